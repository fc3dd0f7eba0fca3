"""Streamed text: whole characters, stop strings, and the same tokens as `generate`."""

import functools
import json

import numpy as np
import pytest

from liger_jax import generate, prepare
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.generation import session
from liger_jax.generation.detokenize import StopStrings, TextPieces
from liger_jax.generation.generate import stream
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.session import DecodeSession
from tests._support import parity
from tests._support.demo_model import model_and_processor

STORED = json.loads((parity.REFERENCES / "generation.json").read_text(encoding="utf-8"))
cached_tokenizer = functools.cache(train_tokenizer)


def make_batch(*questions):
    model, processor = model_and_processor()
    prompts = [[{"role": "user", "content": question}] for question in questions]
    return prepare(model.config, **processor(prompts, add_generation_prompt=True), length=64)


# ---- pieces


@pytest.mark.parametrize("text", ["plain", "ünï😀cödé 漢字 👩‍👩‍👧", "\ufffd", "a\ufffdb", "e\u0301<|im_end|>\n"])
def test_pieces_are_whole_characters_and_add_up_to_the_text(text):
    """With a token per byte, the hardest case, no piece ends within a character."""
    tokenizer = cached_tokenizer(())
    tokens = tokenizer(text)["input_ids"]
    pieces = TextPieces(tokenizer)
    streamed = [piece for piece in map(pieces.push, tokens) if piece] + [pieces.flush()]
    assert "".join(streamed) == tokenizer.decode(tokens, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert all(len(piece) == 1 for piece in streamed[:-1]) and streamed[-1] == ""


def test_bytes_that_are_not_utf8():
    """Random bytes, with an incomplete character at the end, decode to the same text as all at once."""
    tokenizer = cached_tokenizer(())
    for seed in range(20):
        tokens = np.random.default_rng(seed).integers(0, 256, 40).tolist() + tokenizer("é")["input_ids"][:1]
        pieces = TextPieces(tokenizer)
        assert "".join([*map(pieces.push, tokens), pieces.flush()]) == tokenizer.decode(tokens)


# ---- stop strings


@pytest.mark.parametrize("case", STORED["stop_strings"], ids=lambda case: f"{len(case['tokens'])} {case['strings']}")
def test_stop_strings(case):
    """Stops at the same token as transformers' StopStringCriteria, wherever the string begins and ends."""
    stop = StopStrings(case["strings"], cached_tokenizer(tuple(case["learnt"])))
    stops = [number for number, token in enumerate(case["tokens"], start=1) if stop.push(token)]
    assert (stops[0] if stops else None) == case["stop"]


def test_stop_string_of_multi_token_characters():
    tokenizer = cached_tokenizer(())
    stop, tokens = StopStrings(["é😀"], tokenizer), tokenizer("aé😀b")["input_ids"]
    assert [stop.push(token) for token in tokens].index(True) == 6


def test_rows_end_at_their_stop_string():
    """Each row ends where its own text completes the string. The tokens before are unchanged, padding follows."""
    model, processor = model_and_processor()
    batch = make_batch("Which?", "And now?", "What is it then?")
    options = {"max_new_tokens": 20, "eos_token_id": (), "repetition_penalty": 1.5, "pad_token_id": 3, "logprobs": 0}
    plain = generate(model, batch, **options).tokens
    text = processor.decode(plain[1, 5:7], skip_special_tokens=False)
    stopped = generate(model, batch, **options, stop_strings=text, tokenizer=processor)
    for row, plain_row, logprobs in zip(stopped.tokens, plain, stopped.logprobs, strict=True):
        texts = [processor.decode(plain_row[: n + 1], skip_special_tokens=False) for n in range(20)]
        end = next((n + 1 for n in range(20) if text in texts[n]), 20)
        np.testing.assert_array_equal(row, [*plain_row[:end], *[3] * (20 - end)])
        assert logprobs[:end].all() and not logprobs[end:].any()
    assert (stopped.tokens[1] == 3).sum() >= 13


def test_stop_strings_and_end_tokens_together():
    model, processor = model_and_processor()
    plain = generate(model, make_batch("Which?"), max_new_tokens=20, eos_token_id=(), repetition_penalty=1.5)[0]
    options = {"repetition_penalty": 1.5, "stop_strings": processor.decode(plain[9:11]), "tokenizer": processor}
    tokens = generate(model, make_batch("Which?"), max_new_tokens=20, eos_token_id=int(plain[4]), **options)
    assert tokens[0].tolist() == [*plain[:5].tolist(), *[model.config.pad_token_id] * 15]


# ---- streams


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 7, "temperature": 2.0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 5, 21])
def test_stream_matches_generate(options, length):
    model, processor = model_and_processor()
    options = {"max_new_tokens": length, "repetition_penalty": 1.5, "eos_token_id": ()} | options
    pieces = list(stream(model, make_batch("Which?"), processor, **options))
    assert "".join(pieces) == processor.decode(generate(model, make_batch("Which?"), **options))[0]
    assert length < 20 or len(pieces) > 5


def test_stream_ends_at_end_token_or_stop_string():
    model, processor = model_and_processor()
    options = {"max_new_tokens": 40, "repetition_penalty": 1.5}
    plain = generate(model, make_batch("Which?"), eos_token_id=(), **options)[0]
    for end in ({"eos_token_id": int(plain[6])}, {"stop_strings": processor.decode(plain[10:12]), "eos_token_id": ()}):
        tokens = generate(model, make_batch("Which?"), **options, **end, tokenizer=processor)[0]
        length = np.flatnonzero(tokens != model.config.pad_token_id)[-1] + 1
        text = "".join(stream(model, make_batch("Which?"), processor, **options, **end))
        assert text == processor.decode(tokens[:length])


def test_stream_rejects_invalid_arguments_when_called():
    model, processor = model_and_processor()
    with pytest.raises(ValueError, match="2 rows"):
        stream(model, make_batch("Which?", "What?"), processor)
    with pytest.raises(ValueError, match="num_return_sequences"):
        stream(model, make_batch("Which?"), processor, num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="temperature is 0"):
        stream(model, make_batch("Which?"), processor, temperature=0)


def test_first_token_does_not_wait_for_the_loop(monkeypatch):
    """The loop, whose compilation takes seconds, runs when the second token is requested."""
    model, _ = model_and_processor()
    options = GenerationOptions(max_new_tokens=3, eos_token_id=())
    chunks = DecodeSession.start(model, make_batch("Which digit?"), options).chunks()
    with monkeypatch.context() as patch:
        patch.setattr(session, "decode_loop", None)
        assert next(chunks).shape == (1, 1)
    assert [chunk.shape for chunk in chunks] == [(1, 2)]
