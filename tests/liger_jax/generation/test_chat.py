"""A chat answers as a fresh prompt with the whole conversation does, and reads only what is new."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

import liger_jax.generation.chat
from liger_jax import Chat, Processor, Qwen2VL, generate, prepare
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.model.sharding import param_shardings

OPTIONS = {"max_new_tokens": 12, "repetition_penalty": 1.5}


@functools.cache
def parts():
    processor = make_processor(load_digits()[0])
    processor = Processor(processor.tokenizer, processor.image, processor.image)  # small frames, too
    return Qwen2VL.init(make_config(processor), seed=1, dtype="float32"), processor


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def fresh(conversation, **options):
    """The answer to a whole conversation, everything computed anew; by one program for all."""
    model, processor = parts()
    batch = prepare(model.config, **processor(conversation, add_generation_prompt=True), length=768, patches=64)
    tokens = generate(model, batch, **OPTIONS | options)[0]
    ends = np.flatnonzero(np.isin(tokens, model.config.eos_token_ids))
    return processor.decode(tokens[: ends[0]] if len(ends) else tokens)


@pytest.fixture
def read(monkeypatch):
    """What the chat reads: (columns that are tokens, patches) of each batch."""
    batches = []

    def spy(name):
        run = getattr(liger_jax.generation.chat, name)

        def called(model, *arguments, **options):
            batch = next(argument for argument in arguments if hasattr(argument, "input_ids"))
            patches = 0 if batch.vision is None else int((np.asarray(batch.vision.segment_ids) > 0).sum())
            batches.append((int((np.asarray(batch.segment_ids) > 0).sum()), patches))
            return run(model, *arguments, **options)

        monkeypatch.setattr(liger_jax.generation.chat, name, called)

    spy("prefill")
    spy("extend")
    return batches


TURNS = [
    ("Which digit?", {"images": [picture(56, 28)]}),
    ("And now?", {}),
    (
        "These two, and the film?",
        {"images": [picture(28, 84, 1), picture(56, 56, 2)], "videos": [[picture(28, 28, i) for i in range(6)]]},
    ),
    ("Thank you.", {}),
]


def test_answers_are_those_of_a_fresh_prompt(read):
    """Over turns with pictures and a video, which shift the positions of what follows; each is encoded once."""
    chat, conversation = Chat(*parts(), **OPTIONS), []
    for question, media in TURNS:
        parts_of = [
            {"type": kind[:-1], kind[:-1]: item} for kind in ("images", "videos") for item in media.get(kind, ())
        ]
        conversation.append({"role": "user", "content": [*parts_of, {"type": "text", "text": question}]})
        answer = chat.ask(question, **media)
        assert answer == fresh(conversation)
        conversation.append({"role": "assistant", "content": answer})
    assert [patches for _, patches in read] == [8, 0, 12 + 16 + 3 * 4, 0]
    assert [message["content"] for message in chat.messages[1::2]] == [m["content"] for m in conversation[1::2]]


def test_only_new_tokens_are_read(read):
    """The last token of an answer and what is written behind it. Digits are tokens of their own, whatever stands beside."""
    model, processor = parts()
    digits = processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
    others = [[token] for token in range(model.config.text.vocab_size) if token not in digits]
    options = {"max_new_tokens": 12, "bad_words_ids": others, "do_sample": True, "eos_token_id": ()}
    chat, conversation, length = Chat(model, processor, **options), [], 0
    for question in ("Which digit?", "And now?", "What else?"):
        answer = chat.ask(question)
        conversation += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert len(answer) == 12 and answer.isdigit()
        assert answer == fresh(conversation[:-1], **options, repetition_penalty=1.0)
        assert read[-1] == (len(chat._prompt) - length, 0)
        length = len(chat._prompt) + 11


def test_an_answer_that_is_not_read_to_its_end_ends_there():
    chat, whole = Chat(*parts(), **OPTIONS), Chat(*parts(), **OPTIONS)
    pieces = chat.stream("Which digit?")
    said = next(pieces)
    del pieces
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    assert len(whole.ask("Which digit?")) > len(said)
    conversation = [
        {"role": "user", "content": "Which digit?"},
        chat.messages[-1],
        {"role": "user", "content": "And now?"},
    ]
    assert chat.ask("And now?") == fresh(conversation)
    unread = Chat(*parts(), **OPTIONS)
    unread.stream("Which digit?")
    conversation[1] = {"role": "assistant", "content": ""}
    assert unread.ask("And now?") == fresh(conversation)


def test_a_cache_that_was_lost_is_read_again(monkeypatch):
    """Ctrl-C while a later turn is read, after pictures: the conversation is as before, and they are encoded anew."""
    chat, extend = Chat(*parts(), **OPTIONS), liger_jax.generation.chat.extend

    def interrupted(*arguments):
        extend(*arguments)
        raise KeyboardInterrupt

    said = chat.ask("Which digit?", images=picture(56, 28))  # a single picture needs no list
    monkeypatch.setattr(liger_jax.generation.chat, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("And now?")
    monkeypatch.setattr(liger_jax.generation.chat, "extend", extend)
    content = [{"type": "image", "image": picture(56, 28)}, {"type": "text", "text": "Which digit?"}]
    conversation = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Why?"},
    ]
    assert chat.ask("Why?") == fresh(conversation)


def test_an_answer_ends_where_a_newer_question_begins():
    chat = Chat(*parts(), **OPTIONS)
    first = chat.stream("Which digit?")
    said = next(first)
    second = chat.stream("And now?")
    assert len(list(second)) > 1
    assert list(first) == [] or chat.messages[-3]["content"] == said


def test_the_cache_grows(monkeypatch):
    monkeypatch.setattr(liger_jax.generation.chat, "SLOTS", 64)
    chat, conversation, sizes = Chat(*parts(), **OPTIONS), [], []
    for turn in range(3):
        question = f"Digit {turn}? " * 6
        conversation.append({"role": "user", "content": question})
        answer = chat.ask(question)
        conversation.append({"role": "assistant", "content": answer})
        sizes.append(chat._decoding.cache.valid.shape[1])
    assert answer == fresh(conversation[:-1])
    assert sizes == sorted(sizes) and len(set(sizes)) > 1


def test_turns_of_the_same_size_compile_nothing():
    chat = Chat(*parts(), **OPTIONS)
    for question in ("One?", "Two?"):
        chat.ask(question)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
    for question in ("Three?", "And four?"):
        chat.ask(question)
    assert "/jax/core/compile/backend_compile_duration" not in events


def test_on_a_mesh():
    """Weights and rows in parts, an empty row beside the only one."""
    model, processor = parts()
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    split = jax.device_put(model, param_shardings(model, mesh))
    chats = [Chat(each, processor, **OPTIONS) for each in (model, split)]
    for question in ("Which digit?", "And now?"):
        here, there = (chat.ask(question) for chat in chats)
        assert here == there


def test_reset_and_a_system_message():
    chat = Chat(*parts(), system="Read.", **OPTIONS)
    first = chat.ask("Which digit?")
    chat.ask("And now?")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Read."}]
    assert chat.ask("Which digit?") == first
    asked = [{"role": "system", "content": "Read."}, {"role": "user", "content": "Which digit?"}]
    assert first == fresh(asked)


def test_what_cannot_be_asked_changes_nothing():
    chat = Chat(*parts(), **OPTIONS)
    chat.ask("Which digit?")
    before = list(chat.messages)
    for error, question, images in (
        (FileNotFoundError, "And now?", ["missing.png"]),
        (ValueError, "<|image_pad|>", []),
        (ValueError, "long " * 5000, []),
    ):
        with pytest.raises((error, ValueError)):
            chat.ask(question, images=images)
        assert chat.messages == before
    conversation = [*before, {"role": "user", "content": "And now?"}]
    assert chat.ask("And now?") == fresh(conversation)


def test_options_without_a_use_are_refused():
    with pytest.raises(ValueError, match="num_return_sequences"):
        Chat(*parts(), num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="no id of the vocabulary"):
        Chat(*parts(), eos_token_id=10**6)
