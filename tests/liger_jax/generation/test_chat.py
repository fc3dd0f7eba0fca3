"""A chat gives the same answers as prompts with the whole conversation, and prefills only new tokens."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

import liger_jax.generation.chat
from liger_jax import Chat, Processor, generate, prepare
from liger_jax.errors import NotFoundError, UserError
from liger_jax.model.sharding import param_shardings
from tests._support import demo_model

OPTIONS = {"max_new_tokens": 12, "repetition_penalty": 1.5}


@functools.cache
def model_and_processor():
    model, processor = demo_model.model_and_processor()
    return model, Processor(processor.tokenizer, processor.image, processor.image)  # small video frames too


def make_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def fresh(conversation, **options):
    """Answers a whole conversation from a fresh prompt. One program serves all conversations."""
    model, processor = model_and_processor()
    batch = prepare(model.config, **processor(conversation, add_generation_prompt=True), length=768, patches=64)
    tokens = generate(model, batch, **OPTIONS | options)[0]
    ends = np.flatnonzero(np.isin(tokens, model.config.eos_token_ids))
    return processor.decode(tokens[: ends[0]] if len(ends) else tokens)


@pytest.fixture
def prefilled(monkeypatch):
    """Returns a list that receives the numbers of (tokens, patches) in each batch that the chat prefills."""
    batches = []

    def spy(name):
        original = getattr(liger_jax.generation.chat, name)

        def recorded(model, *arguments, **options):
            batch = next(argument for argument in arguments if hasattr(argument, "input_ids"))
            patches = 0 if batch.vision is None else int((np.asarray(batch.vision.segment_ids) > 0).sum())
            batches.append((int((np.asarray(batch.segment_ids) > 0).sum()), patches))
            return original(model, *arguments, **options)

        monkeypatch.setattr(liger_jax.generation.chat, name, recorded)

    spy("prefill")
    spy("extend")
    return batches


TURNS = [
    ("Which digit?", {"images": [make_image(56, 28)]}),
    ("And now?", {}),
    (
        "These two, and the film?",
        {
            "images": [make_image(28, 84, 1), make_image(56, 56, 2)],
            "videos": [[make_image(28, 28, i) for i in range(6)]],
        },
    ),
    ("Thank you.", {}),
]


def test_answers_match_a_fresh_prompt(prefilled):
    """Over turns with images and a video, which shift later positions. Each image is encoded once."""
    chat, conversation = Chat(*model_and_processor(), **OPTIONS), []
    for question, media in TURNS:
        parts = [{"type": kind[:-1], kind[:-1]: item} for kind in ("images", "videos") for item in media.get(kind, ())]
        conversation.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        answer = chat.ask(question, **media)
        assert answer == fresh(conversation)
        conversation.append({"role": "assistant", "content": answer})
    assert [patches for _, patches in prefilled] == [8, 0, 12 + 16 + 3 * 4, 0]
    assert [message["content"] for message in chat.messages[1::2]] == [m["content"] for m in conversation[1::2]]


def test_only_new_tokens_are_prefilled(prefilled):
    """Each turn prefills the last token of the previous answer and all after it. Every digit is always one token."""
    model, processor = model_and_processor()
    digits = processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
    non_digits = [[token] for token in range(model.config.text.vocab_size) if token not in digits]
    options = {"max_new_tokens": 12, "bad_words_ids": non_digits, "do_sample": True, "eos_token_id": ()}
    chat, conversation, length = Chat(model, processor, **options), [], 0
    for question in ("Which digit?", "And now?", "What else?"):
        answer = chat.ask(question)
        conversation += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert len(answer) == 12 and answer.isdigit()
        assert answer == fresh(conversation[:-1], **options, repetition_penalty=1.0)
        assert prefilled[-1] == (len(chat._prompt) - length, 0)
        length = len(chat._prompt) + 11


def test_answer_ends_where_the_reader_stops():
    chat, complete = Chat(*model_and_processor(), **OPTIONS), Chat(*model_and_processor(), **OPTIONS)
    pieces = chat.stream("Which digit?")
    first_piece = next(pieces)
    del pieces
    assert chat.messages[-1] == {"role": "assistant", "content": first_piece}
    assert len(complete.ask("Which digit?")) > len(first_piece)
    conversation = [
        {"role": "user", "content": "Which digit?"},
        chat.messages[-1],
        {"role": "user", "content": "And now?"},
    ]
    assert chat.ask("And now?") == fresh(conversation)
    unread = Chat(*model_and_processor(), **OPTIONS)
    unread.stream("Which digit?")
    conversation[1] = {"role": "assistant", "content": ""}
    assert unread.ask("And now?") == fresh(conversation)


def test_lost_cache_is_rebuilt(monkeypatch):
    """Ctrl-C during a prefill, after an image: the conversation is unchanged, and the image is encoded again."""
    chat, extend = Chat(*model_and_processor(), **OPTIONS), liger_jax.generation.chat.extend

    def interrupted(*arguments):
        extend(*arguments)
        raise KeyboardInterrupt

    answer = chat.ask("Which digit?", images=make_image(56, 28))  # a single image needs no list
    monkeypatch.setattr(liger_jax.generation.chat, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("And now?")
    monkeypatch.setattr(liger_jax.generation.chat, "extend", extend)
    content = [{"type": "image", "image": make_image(56, 28)}, {"type": "text", "text": "Which digit?"}]
    conversation = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Why?"},
    ]
    assert chat.ask("Why?") == fresh(conversation)


def test_newer_question_ends_an_answer():
    chat = Chat(*model_and_processor(), **OPTIONS)
    first = chat.stream("Which digit?")
    first_piece = next(first)
    second = chat.stream("And now?")
    assert len(list(second)) > 1
    assert list(first) == [] or chat.messages[-3]["content"] == first_piece


def test_cache_grows(monkeypatch):
    monkeypatch.setattr(liger_jax.generation.chat, "SLOTS", 64)
    chat, conversation, sizes = Chat(*model_and_processor(), **OPTIONS), [], []
    for turn in range(3):
        question = f"Digit {turn}? " * 6
        conversation.append({"role": "user", "content": question})
        answer = chat.ask(question)
        conversation.append({"role": "assistant", "content": answer})
        sizes.append(chat._session.cache.valid.shape[1])
    assert answer == fresh(conversation[:-1])
    assert sizes == sorted(sizes) and len(set(sizes)) > 1


def test_turns_of_equal_size_do_not_recompile():
    chat = Chat(*model_and_processor(), **OPTIONS)
    for question in ("One?", "Two?"):
        chat.ask(question)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
    for question in ("Three?", "And four?"):
        chat.ask(question)
    assert "/jax/core/compile/backend_compile_duration" not in events


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"tensor": 4}])
def test_on_a_mesh(axes):
    """Weights and rows are sharded; an empty row pads the batch.

    Regression: with more devices than key heads, the second turn failed. The partitioner split RoPE's keys as their copies.
    """
    model, processor = model_and_processor()
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    split = jax.device_put(model, param_shardings(model, mesh))
    chats = [Chat(chat_model, processor, **OPTIONS) for chat_model in (model, split)]
    for question in ("Which digit?", "And now?"):
        single_device, sharded = (chat.ask(question) for chat in chats)
        assert single_device == sharded


def test_padding_of_a_mesh_has_slots(monkeypatch):
    """Regression: three devices pad 64 new positions to 66. A cache with room for 64 was filled from an earlier slot on, and
    the last tokens of the previous turn were overwritten.
    """
    monkeypatch.setattr(liger_jax.generation.chat, "SLOTS", 64)
    model, processor = model_and_processor()
    mesh = jax.make_mesh((3,), ("sequence",), devices=jax.devices()[:3])
    chat = Chat(jax.device_put(model, param_shardings(model, mesh)), processor, **OPTIONS)
    ids = 5 + np.arange(164) % 50
    whole = prepare(model.config, input_ids=ids[None])
    first = prepare(model.config, input_ids=ids[None, :128])
    second = prepare(
        model.config, input_ids=ids[None, 128:], position_ids=whole.position_ids[:, :, 128:164].swapaxes(0, 1)
    )
    chat._session = chat._prefill_turn(ids[:128], first, 0)
    before = np.asarray(chat._session.cache.keys[0])[:, :128]
    session = chat._prefill_turn(ids, second, 128)
    np.testing.assert_array_equal(np.asarray(session.cache.keys[0])[:, :128], before)
    session.run()
    np.testing.assert_array_equal(session.result().tokens, generate(model, whole, **OPTIONS))


def test_reset_keeps_the_system_message():
    chat = Chat(*model_and_processor(), system="Read.", **OPTIONS)
    first = chat.ask("Which digit?")
    chat.ask("And now?")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Read."}]
    assert chat.ask("Which digit?") == first
    conversation = [{"role": "system", "content": "Read."}, {"role": "user", "content": "Which digit?"}]
    assert first == fresh(conversation)


def test_rejected_question_changes_nothing():
    chat = Chat(*model_and_processor(), **OPTIONS)
    chat.ask("Which digit?")
    before = list(chat.messages)
    for error, question, images in (
        (NotFoundError, "And now?", ["missing.png"]),
        (UserError, "<|image_pad|>", []),
        (UserError, "long " * 5000, []),
    ):
        with pytest.raises(error):
            chat.ask(question, images=images)
        assert chat.messages == before
    conversation = [*before, {"role": "user", "content": "And now?"}]
    assert chat.ask("And now?") == fresh(conversation)


def test_invalid_options():
    with pytest.raises(UserError, match="num_return_sequences"):
        Chat(*model_and_processor(), num_return_sequences=2, do_sample=True)
    with pytest.raises(UserError, match="outside the vocabulary"):
        Chat(*model_and_processor(), eos_token_id=10**6)
