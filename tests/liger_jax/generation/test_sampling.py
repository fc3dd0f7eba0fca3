"""Logits processors: values against transformers' own, draws against the distribution they come from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liger_jax.generation.sampling import History, Sampling, constrain, next_token, penalise_repetition, process_logits
from tests._support import parity

STORED = {key.removeprefix("processors/"): value for key, value in parity.stored("generation").items()}
BAD_WORDS = np.array([[-1, -1, 7], [-1, 3, 4], [5, 6, 7], [-1, -1, -1]], np.int32)
ENDS = np.array([8, 9, -1, -1], np.int32)


def options_of(name):
    pairs = (part.split("=") for part in name.split(","))
    return {key: int(value) if key == "top_k" else float(value) for key, value in pairs}


def assert_same(found, wanted):
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def history(ids):
    """As of a prompt with padding before it and within its rows."""
    ids = np.asarray(ids)
    padded = np.concatenate([np.full((len(ids), 3), 5), ids[:, :4], np.full((len(ids), 2), 6), ids[:, 4:]], axis=1)
    segments = np.ones_like(padded)
    segments[:, :3] = segments[:, 7:9] = 0
    return History.of_prompts(padded, segments, padded.shape[1] + 8)


# ---- filters of a draw


@pytest.mark.parametrize("name", [key for key in parity.stored("sampling") if "=" in key and "penalty" not in key])
def test_filters(name):
    """Temperature, top-k, top-p, min-p alone and all together: the logits of transformers' processors, -inf included."""
    logits = jnp.asarray(parity.stored("sampling")["logits"])
    found = process_logits(logits, Sampling(do_sample=True, **options_of(name)))
    assert_same(found, parity.stored("sampling")[name])


@pytest.mark.parametrize("top_k", [1, 2, 7, 159, 160, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.999, 1.0])
def test_filters_against_a_sort(top_k, top_p):
    """Logits of all sizes, -inf, zeros of both signs and ties among them; what ties with the last that stays, stays."""
    rng = np.random.default_rng(top_k)
    logits = rng.normal(size=(3, 160)).astype(np.float32) * np.array([[1], [30], [1e-30]], np.float32)
    logits[:, ::7], logits[:, 1::9] = -np.inf, np.round(logits[:, 1::9])
    logits[:, 5:7] = [[0.0, -0.0]]
    found = np.asarray(process_logits(jnp.asarray(logits), Sampling(do_sample=True, top_k=top_k, top_p=top_p)))
    for row, got in zip(logits, found, strict=True):
        kept = row >= np.sort(row)[-min(top_k, 160)]
        likely = np.where(kept, np.exp(row.astype(np.float64) - row.max()), 0)
        likely /= likely.sum()
        more_likely = np.array([likely[kept & (row > value)].sum() for value in row])
        wanted = kept & (more_likely < top_p - 1e-6) if top_p < 1 else kept
        wanted |= row == row.max()
        np.testing.assert_array_equal(~np.isneginf(got), wanted & ~np.isneginf(row))


def test_filters_under_jit_take_other_values_without_compiling():
    compiled = jax.jit(process_logits)
    logits = jnp.asarray(parity.stored("sampling")["logits"])
    for top_k, top_p in ((5.0, 0.9), (50.0, 0.3), (160.0, 1.0)):
        compiled(logits, Sampling(do_sample=True, temperature=0.5 + top_p, top_k=top_k, top_p=top_p))
    assert compiled._cache_size() == 1


# ---- what holds for greedy decoding too


def test_penalty():
    arrays = parity.stored("sampling")
    found = penalise_repetition(jnp.asarray(arrays["logits"]), history(arrays["seen"]), 1.3)
    np.testing.assert_allclose(found, arrays["repetition_penalty=1.3"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((f"no_repeat_ngram_size={n}", {"no_repeat_ngram_size": n}) for n in (1, 2, 3, 4)),
        ("bad_words_ids", {"bad_words": BAD_WORDS}),
        ("min_new_tokens=4,step=3", {"min_new_tokens": 4}),
        (
            "all",
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words": BAD_WORDS, "min_new_tokens": 4},
        ),
    ],
)
def test_constraints(name, options):
    """No repeated n-grams, bad words, a least number of tokens: transformers' processors; padding is no part of a row."""
    sampling = Sampling(ends=ENDS, **options)
    found = constrain(jnp.asarray(STORED["logits"]), sampling, history(STORED["history"]), 3)
    assert_same(found, STORED[name])


def test_the_least_number_of_tokens_ends():
    found = constrain(jnp.asarray(STORED["logits"]), Sampling(ends=ENDS, min_new_tokens=4), None, 4)
    np.testing.assert_array_equal(found, STORED["min_new_tokens=4,step=4"])


def test_a_row_shorter_than_an_ngram_or_a_bad_word_is_left_alone():
    short = History.of_prompts(np.array([[5, 6]]), np.array([[1, 0]]), 8)
    logits = jnp.ones((1, 40))
    for options in ({"no_repeat_ngram_size": 3}, {"bad_words": BAD_WORDS[2:]}):
        np.testing.assert_array_equal(constrain(logits, Sampling(**options), short, 0), logits)


def test_history_grows():
    grown = functools.reduce(History.append, ([7, 1], [8, 2]), History(jnp.zeros((2, 6), int), jnp.array([3, 0])))
    assert grown.tokens.tolist() == [[0, 0, 0, 7, 8, 0], [1, 2, 0, 0, 0, 0]]
    assert grown.last(3).tolist() == [[0, 7, 8], [-2, 1, 2]]


# ---- draws


def test_draws_follow_the_distribution():
    """4000 draws of 6 tokens, two of them filtered out: frequencies within 5 standard deviations."""
    logits = jnp.tile(jnp.array([2.0, 1.0, 0.0, 0.5, -1.0, -2.0]), (4000, 1))
    one, many = np.zeros(4000, np.int32), np.arange(4000, dtype=np.int32)
    for seeds, streams in ((one.astype(np.uint32), many), (many.astype(np.uint32), one)):
        sampling = Sampling(seeds, streams, do_sample=True, temperature=2.0, top_k=4)
        drawn = np.bincount(next_token(logits, sampling, jnp.int32(3)), minlength=6) / 4000
        likely = np.exp(np.array([1.0, 0.5, 0.0, 0.25, -np.inf, -np.inf]))
        likely /= likely.sum()
        assert (np.abs(drawn - likely) <= 5 * np.sqrt(likely * (1 - likely) / 4000)).all()
