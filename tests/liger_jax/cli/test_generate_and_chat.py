"""`liger-jax generate` and `liger-jax chat` print the answers of the library."""

import json

from liger_jax import Chat, Processor
from liger_jax.checkpoint import load_model
from liger_jax.cli import chat
from liger_jax.generation.options import GenerationOptions
from tests._support.command_line import call
from tests._support.quiet import assert_quiet


def expected(checkpoint, question, images=(), **options):
    model, processor = load_model(checkpoint / "orbax"), Processor.from_pretrained(checkpoint / "orbax")
    options = vars(GenerationOptions.from_hf(checkpoint / "orbax")) | options
    return Chat(model, processor, **options).ask(question, images=images)


def test_generate_answers_a_question(checkpoint, monkeypatch, capsys):
    """A question about images with the checkpoint's generation options; then with flags, which enable sampling."""
    image = checkpoint / "dog.png"
    call(monkeypatch, "generate", checkpoint / "orbax", "What is this?", "--images", image, image)
    greedy = expected(checkpoint, "What is this?", [image, image])
    printed = capsys.readouterr()
    assert printed.out == greedy + "\n"
    assert_quiet(printed.err)
    flags = ("--temperature", "2", "--seed", "4", "--max-new-tokens", "7", "--stop", "never", "--max-pixels", "784")
    call(monkeypatch, "generate", checkpoint / "orbax", "What is this?", *flags)
    sampled = {"temperature": 2.0, "seed": 4, "max_new_tokens": 7, "top_k": None}
    assert capsys.readouterr().out == expected(checkpoint, "What is this?", **sampled) + "\n"
    call(monkeypatch, "generate", checkpoint / "orbax", "What is this?", "--temperature", "0", "--top-p", "0.5")
    assert capsys.readouterr().out == expected(checkpoint, "What is this?", do_sample=False) + "\n"


def test_generate_answers_a_file(checkpoint, monkeypatch, capsys, tmp_path):
    question = {"messages": [{"role": "user", "content": "<image>What is this?"}], "images": ["dog.png"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(question))
    paths = ("--data", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--media", checkpoint)
    call(monkeypatch, "generate", checkpoint / "orbax", *paths, "--batch-size", "1")
    answer = expected(checkpoint, "What is this?", [checkpoint / "dog.png"])
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line == {"record": 1, "content": line["content"], "answer": answer}
    printed = capsys.readouterr()
    assert "answers in" in printed.out and printed.out.endswith(": 1\n") and "100% 1/1 [" in printed.err
    assert_quiet(printed.err)


def test_chat(checkpoint, monkeypatch, capsys):
    """Images are given by path, errors do not end the chat, /reset starts again, and /quit or Ctrl-D end it."""
    image = checkpoint / "dog.png"
    for last in ("/quit", None):
        typed = iter([f"/image {image}", "What is this?", "/image missing.png", "/help", "", "/reset", "Hello", last])

        def type_next(prompt):
            line = next(typed)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", type_next)
        call(monkeypatch, "chat", checkpoint / "orbax")
        output, errors = capsys.readouterr()
        assert_quiet(errors)
        assert output.startswith(expected(checkpoint, "What is this?", [image]) + "\n! ")
        assert "missing.png" in output and "expected a question, /image PATH, /reset or /quit" in output
        assert output.rstrip("\n").endswith("\n" + expected(checkpoint, "Hello"))


def test_ctrl_c_stops_an_answer_but_not_the_chat(checkpoint, monkeypatch, capsys):
    typed = iter(["What is this?", "/reset", "Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    print_stream = chat.print_stream

    def interrupted(pieces):
        print(next(iter(pieces)), end="")
        monkeypatch.setattr(chat, "print_stream", print_stream)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "print_stream", interrupted)
    call(monkeypatch, "chat", checkpoint / "orbax")
    assert capsys.readouterr().out.endswith("\n" + expected(checkpoint, "Hello") + "\n")


def test_images_of_a_stopped_answer_were_sent_again_with_the_next_question(checkpoint, monkeypatch):
    typed = iter([f"/image {checkpoint / 'dog.png'}", "What is this?", "And now?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    sent, stream = [], Chat.stream

    def record(self, question, *, images):
        sent.append((question, len(images)))
        return stream(self, question, images=images)

    def interrupted(pieces):
        next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "stream", record)
    monkeypatch.setattr(chat, "print_stream", interrupted)
    call(monkeypatch, "chat", checkpoint / "orbax")
    assert sent == [("What is this?", 1), ("And now?", 0)]
