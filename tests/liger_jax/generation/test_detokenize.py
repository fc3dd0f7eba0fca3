"""Text while it comes: whole characters, strings that end an answer, and the tokens that `generate` returns."""

import functools
import json

import numpy as np
import pytest

from liger_jax import Qwen2VL, generate, prepare
from liger_jax.generation import loop as decoding
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.generation.detokenize import StopStrings, TextPieces
from liger_jax.generation.generate import stream
from liger_jax.generation.loop import start_decoding
from liger_jax.generation.options import GenerationOptions
from tests._support import parity

STORED = json.loads((parity.REFERENCES / "generation.json").read_text(encoding="utf-8"))
tokenizer_of = functools.cache(lambda learnt: train_tokenizer(learnt))


@functools.cache
def parts():
    processor = make_processor(load_digits()[0])
    return Qwen2VL.init(make_config(processor), seed=1, dtype="float32"), processor


def batch_of(*questions):
    model, processor = parts()
    prompts = [[{"role": "user", "content": question}] for question in questions]
    return prepare(model.config, **processor(prompts, add_generation_prompt=True), length=64)


# ---- pieces


@pytest.mark.parametrize("text", ["plain", "ünï😀cödé 漢字 👩‍👩‍👧", "\ufffd", "a\ufffdb", "e\u0301<|im_end|>\n"])
def test_pieces_are_whole_characters_and_together_the_text(text):
    """A token a byte, the hardest case: a piece is never a part of a character."""
    tokenizer = tokenizer_of(())
    tokens = tokenizer(text)["input_ids"]
    pieces = TextPieces(tokenizer)
    found = [piece for piece in map(pieces.push, tokens) if piece] + [pieces.flush()]
    assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert all(len(piece) == 1 for piece in found[:-1]) and found[-1] == ""


def test_tokens_that_are_no_text():
    """Random bytes: what they decode to as a whole, and a character cut off at the end."""
    tokenizer = tokenizer_of(())
    for seed in range(20):
        tokens = np.random.default_rng(seed).integers(0, 256, 40).tolist() + tokenizer("é")["input_ids"][:1]
        pieces = TextPieces(tokenizer)
        assert "".join([*map(pieces.push, tokens), pieces.flush()]) == tokenizer.decode(tokens)


# ---- stop strings


@pytest.mark.parametrize("case", STORED["stop_strings"], ids=lambda case: f"{len(case['tokens'])} {case['strings']}")
def test_stop_strings(case):
    """The first token at which transformers' StopStringCriteria says stop, wherever the string begins and ends."""
    stop = StopStrings(case["strings"], tokenizer_of(tuple(case["learnt"])))
    found = [number for number, token in enumerate(case["tokens"], start=1) if stop.push(token)]
    assert (found[0] if found else None) == case["stop"]


def test_a_string_of_characters_of_several_tokens():
    tokenizer = tokenizer_of(())
    stop, tokens = StopStrings(["é😀"], tokenizer), tokenizer("aé😀b")["input_ids"]
    assert [stop.push(token) for token in tokens].index(True) == 6


def test_rows_end_at_their_stop_string():
    """Each row where its own text has it; what follows is padding, and what comes before is as without."""
    model, processor = parts()
    batch = batch_of("Which?", "And now?", "What is it then?")
    options = {"max_new_tokens": 20, "eos_token_id": (), "repetition_penalty": 1.5, "pad_token_id": 3, "logprobs": 0}
    plain = generate(model, batch, **options).tokens
    text = processor.decode(plain[1, 5:7], skip_special_tokens=False)
    found = generate(model, batch, **options, stop_strings=text, tokenizer=processor)
    for row, wanted, chances in zip(found.tokens, plain, found.logprobs, strict=True):
        texts = [processor.decode(wanted[: n + 1], skip_special_tokens=False) for n in range(20)]
        end = next((n + 1 for n in range(20) if text in texts[n]), 20)
        np.testing.assert_array_equal(row, [*wanted[:end], *[3] * (20 - end)])
        assert chances[:end].all() and not chances[end:].any()
    assert (found.tokens[1] == 3).sum() >= 13


def test_stop_strings_and_end_tokens_together():
    model, processor = parts()
    plain = generate(model, batch_of("Which?"), max_new_tokens=20, eos_token_id=(), repetition_penalty=1.5)[0]
    options = {"repetition_penalty": 1.5, "stop_strings": processor.decode(plain[9:11]), "tokenizer": processor}
    found = generate(model, batch_of("Which?"), max_new_tokens=20, eos_token_id=int(plain[4]), **options)
    assert found[0].tolist() == [*plain[:5].tolist(), *[model.config.pad_token_id] * 15]


# ---- streams


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 7, "temperature": 2.0}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("length", [1, 5, 21])
def test_a_stream_is_the_text_of_generate(options, length):
    model, processor = parts()
    options = {"max_new_tokens": length, "repetition_penalty": 1.5, "eos_token_id": ()} | options
    pieces = list(stream(model, batch_of("Which?"), processor, **options))
    assert "".join(pieces) == processor.decode(generate(model, batch_of("Which?"), **options))[0]
    assert length < 20 or len(pieces) > 5


def test_a_stream_ends_at_an_end_token_or_a_string():
    model, processor = parts()
    options = {"max_new_tokens": 40, "repetition_penalty": 1.5}
    plain = generate(model, batch_of("Which?"), eos_token_id=(), **options)[0]
    for more in ({"eos_token_id": int(plain[6])}, {"stop_strings": processor.decode(plain[10:12]), "eos_token_id": ()}):
        wanted = generate(model, batch_of("Which?"), **options, **more, tokenizer=processor)[0]
        assert "".join(stream(model, batch_of("Which?"), processor, **options, **more)) == processor.decode(
            wanted[: np.flatnonzero(wanted != model.config.pad_token_id)[-1] + 1]
        )


def test_what_cannot_be_streamed_is_refused_at_once():
    model, processor = parts()
    with pytest.raises(ValueError, match="2 rows"):
        stream(model, batch_of("Which?", "What?"), processor)
    with pytest.raises(ValueError, match="num_return_sequences"):
        stream(model, batch_of("Which?"), processor, num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="temperature is 0"):
        stream(model, batch_of("Which?"), processor, temperature=0)


def test_the_first_token_does_not_wait_for_the_loop(monkeypatch):
    """Whose compilation takes seconds; it runs when the second is asked for."""
    model, _ = parts()
    tokens = iter(start_decoding(model, batch_of("Which digit?"), GenerationOptions(max_new_tokens=3, eos_token_id=())))
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", None)
        assert next(tokens).shape == (1, 1)
    assert [found.shape for found in tokens] == [(1, 3)]
