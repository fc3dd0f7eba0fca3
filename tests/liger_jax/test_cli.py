"""The command line: help is quick and complete, env and convert work, and mistakes are told in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import liger_jax.cli as cli
from liger_jax import Chat, Processor, Qwen2VL, Qwen2VLConfig
from liger_jax.checkpoint import load_model, save_model
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.generation.options import GenerationOptions

ROOT = Path(__file__).parents[2]
CALL = "import sys; from liger_jax.cli import main; sys.argv[0] = 'liger-jax'; main()"


def command(*arguments):
    """Runs `liger-jax ARGUMENTS` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def call(monkeypatch, *arguments):
    """Runs `liger-jax ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["liger-jax", *map(str, arguments)])
    cli.main()


def test_help_names_every_command():
    result = command("--help")
    assert result.returncode == 0, result.stderr
    for name in ("demo", "finetune", "generate", "chat", "convert", "tune", "bench", "env"):
        assert name in result.stdout


def test_help_takes_less_than_one_and_a_half_seconds():
    """Processor time, which does not depend on what else runs; the better of two, as the first may fill caches."""
    resource = pytest.importorskip("resource")
    times = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.5


def test_commands_import_what_they_need_only_when_they_run():
    """The heavy packages that a mere --help must not load."""
    code = "import liger_jax.cli, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "jax",
        "flax",
        "transformers",
        "orbax.checkpoint",
        "matplotlib",
        "convert",
        "liger_jax.demo.run",
        "safetensors",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[]", result.stderr


def test_env_tells_versions_and_devices(monkeypatch, capsys):
    call(monkeypatch, "env")
    told = capsys.readouterr().out
    for line in ("python ", "jax ", "flax ", "platform ", "device 0 "):
        assert line in told


def test_convert_goes_to_hugging_face_and_back(monkeypatch, capsys, tmp_path):
    config = Qwen2VLConfig.tiny()
    save_model(Qwen2VL.init(config, dtype="float32"), tmp_path / "orbax")
    call(monkeypatch, "convert", tmp_path / "orbax", tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").is_file()
    call(monkeypatch, "convert", tmp_path / "hf", tmp_path / "back", "--dtype", "float32")
    assert load_model(tmp_path / "back").config == config
    assert "->" in capsys.readouterr().out


# ---- generate and chat


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has learnt nothing, with its processor, and a picture beside it."""
    folder = tmp_path_factory.mktemp("model")
    processor = make_processor(load_digits()[0])
    save_model(Qwen2VL.init(make_config(processor), seed=1, dtype="float32"), folder / "orbax")
    processor.save_pretrained(folder / "orbax")
    stored = json.loads((folder / "orbax/generation_config.json").read_text())
    greedy = stored | {"repetition_penalty": 1.5, "do_sample": True, "top_k": 1, "max_new_tokens": 9}
    (folder / "orbax/generation_config.json").write_text(json.dumps(greedy))
    Image.new("RGB", (56, 28), "white").save(folder / "dog.png")
    return folder


def expected(checkpoint, question, images=(), **options):
    model, processor = load_model(checkpoint / "orbax"), Processor.from_pretrained(checkpoint / "orbax")
    options = vars(GenerationOptions.from_hf(checkpoint / "orbax")) | options
    return Chat(model, processor, **options).ask(question, images=images)


def test_generate_answers_a_question(checkpoint, monkeypatch, capsys):
    """With a picture, and the checkpoint's own options; then with others, which switch drawing on."""
    picture = checkpoint / "dog.png"
    call(monkeypatch, "generate", checkpoint / "orbax", "What is this?", "--images", picture, picture)
    greedy = expected(checkpoint, "What is this?", [picture, picture])
    assert capsys.readouterr().out == greedy + "\n"
    flags = ("--temperature", "2", "--seed", "4", "--max-new-tokens", "7", "--stop", "never", "--max-pixels", "784")
    call(monkeypatch, "generate", checkpoint / "orbax", "What is this?", *flags)
    drawn = {"temperature": 2.0, "seed": 4, "max_new_tokens": 7, "top_k": None}
    assert capsys.readouterr().out == expected(checkpoint, "What is this?", **drawn) + "\n"
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
    assert "1 answers in" in capsys.readouterr().out


def test_chat(checkpoint, monkeypatch, capsys):
    """Pictures by path, errors told and the talk goes on, a new beginning, the end by a word or by Ctrl-D."""
    picture = checkpoint / "dog.png"
    for last in ("/quit", None):
        typed = iter([f"/image {picture}", "What is this?", "/image missing.png", "/help", "", "/reset", "Hello", last])

        def type_next(prompt):
            line = next(typed)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", type_next)
        call(monkeypatch, "chat", checkpoint / "orbax")
        told = capsys.readouterr().out
        assert told.startswith(expected(checkpoint, "What is this?", [picture]) + "\n! ")
        assert "missing.png" in told and "expected a question, /image PATH, /reset or /quit" in told
        assert told.rstrip("\n").endswith("\n" + expected(checkpoint, "Hello"))


def test_ctrl_c_ends_an_answer_and_not_the_chat(checkpoint, monkeypatch, capsys):
    typed = iter(["What is this?", "/reset", "Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    told = cli.print_pieces

    def interrupted(pieces):
        print(next(iter(pieces)), end="")
        monkeypatch.setattr(cli, "print_pieces", told)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "print_pieces", interrupted)
    call(monkeypatch, "chat", checkpoint / "orbax")
    assert capsys.readouterr().out.endswith("\n" + expected(checkpoint, "Hello") + "\n")


def test_compiled_programs_are_kept(checkpoint, tmp_path):
    """In the user's cache folder, where a second process finds them; in another, or nowhere, if the user says so."""
    code = "import jax; from liger_jax import runtime; runtime.enable_compilation_cache(); print(jax.config.{})"

    def told(setting, **more):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"PYTHONPATH": str(ROOT)}
        environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | more
        run = subprocess.run(
            [sys.executable, "-c", code.format(setting)], capture_output=True, text=True, env=environment
        )
        return run.stdout.strip() or run.stderr

    assert told("jax_compilation_cache_dir") == str(tmp_path / "liger-jax")
    assert told("jax_compilation_cache_dir", JAX_COMPILATION_CACHE_DIR="mine") == "mine"
    assert told("jax_compilation_cache_dir", JAX_ENABLE_COMPILATION_CACHE="false") == "None"


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("generate", "m"), "expected a question, or --data and --output"),
        (("generate", "m", "What?", "--data", "x", "--output", "y"), "expected a question, or --data and --output"),
        (("generate", "m", "--data", "x"), "expected a question, or --data and --output"),
        (("generate", "m", "--data", "x", "--output", "y"), "x: no such file of questions"),
        (("generate", "m", "--data", "x", "--output", "y", "--images", "z"), "--images is not for a file of questions"),
        (("generate", "m", "What?", "--batch-size", "0"), "--batch-size is not for a single question"),
        (("generate", "m", "What?", "--skip-broken"), "--skip-broken is not for a single question"),
        (("generate", "m", "What?", "--images", "dog.jpg"), "dog.jpg: no such picture"),
        (("generate", "missing/folder/x", "What?"), "missing/folder/x"),
        (("chat", "missing/folder/x"), "missing/folder/x"),
        (("convert", "missing/folder/x", "out"), "missing/folder/x"),
        (("demo", "--steps", "0", "--output", "out"), "steps must be at least 1, got 0"),
        (("demo", "--learning-rate", "-1", "--output", "out"), "learning_rate must be above 0"),
    ],
)
def test_mistakes_are_one_line_without_a_traceback(monkeypatch, tmp_path, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, *arguments)
    message = str(error.value)
    assert message.startswith("liger-jax: ") and told in message
    assert list(tmp_path.iterdir()) == []
