"""Logits processing equals that of transformers, and samples follow their distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from liger_jax.generation.sampling import (
    History,
    Sampling,
    constrain_logits,
    filter_logits,
    next_token,
    next_token_over_shards,
    penalize_repetition,
)
from tests._support import parity

STORED = {key.removeprefix("processors/"): value for key, value in parity.stored("generation").items()}
BAD_WORDS = np.array([[-1, -1, 7], [-1, 3, 4], [5, 6, 7], [-1, -1, -1]], np.int32)
END_TOKENS = np.array([8, 9, -1, -1], np.int32)


def parse_options(name):
    pairs = (part.split("=") for part in name.split(","))
    return {key: int(value) if key == "top_k" else float(value) for key, value in pairs}


def assert_same(logits, expected):
    np.testing.assert_array_equal(np.isneginf(logits), np.isneginf(expected))
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


def make_history(ids):
    """Returns the history of prompts that have padding before and between their tokens."""
    ids = np.asarray(ids)
    padded = np.concatenate([np.full((len(ids), 3), 5), ids[:, :4], np.full((len(ids), 2), 6), ids[:, 4:]], axis=1)
    segments = np.ones_like(padded)
    segments[:, :3] = segments[:, 7:9] = 0
    return History.from_prompts(padded, segments, padded.shape[1] + 8)


# ---- sampling filters


@pytest.mark.parametrize("name", [key for key in parity.stored("sampling") if "=" in key and "penalty" not in key])
def test_filters(name):
    """Temperature, top-k, top-p and min-p, alone and together, give the logits of transformers, including -inf."""
    logits = jnp.asarray(parity.stored("sampling")["logits"])
    filtered = filter_logits(logits, Sampling(do_sample=True, **parse_options(name)))
    assert_same(filtered, parity.stored("sampling")[name])


@pytest.mark.parametrize("top_k", [1, 2, 7, 159, 160, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.999, 1.0])
def test_filters_against_a_sort(top_k, top_p):
    """Logits of all magnitudes, with -inf, zeros of both signs and ties; a tie with the last kept logit is kept."""
    rng = np.random.default_rng(top_k)
    logits = rng.normal(size=(3, 160)).astype(np.float32) * np.array([[1], [30], [1e-30]], np.float32)
    logits[:, ::7], logits[:, 1::9] = -np.inf, np.round(logits[:, 1::9])
    logits[:, 5:7] = [[0.0, -0.0]]
    filtered = np.asarray(filter_logits(jnp.asarray(logits), Sampling(do_sample=True, top_k=top_k, top_p=top_p)))
    for row, filtered_row in zip(logits, filtered, strict=True):
        kept = row >= np.sort(row)[-min(top_k, 160)]
        probabilities = np.where(kept, np.exp(row.astype(np.float64) - row.max()), 0)
        probabilities /= probabilities.sum()
        more_likely = np.array([probabilities[kept & (row > value)].sum() for value in row])
        expected = kept & (more_likely < top_p - 1e-6) if top_p < 1 else kept
        expected |= row == row.max()
        np.testing.assert_array_equal(~np.isneginf(filtered_row), expected & ~np.isneginf(row))


def test_changing_filter_values_does_not_recompile():
    compiled = jax.jit(filter_logits)
    logits = jnp.asarray(parity.stored("sampling")["logits"])
    for top_k, top_p in ((5.0, 0.9), (50.0, 0.3), (160.0, 1.0)):
        compiled(logits, Sampling(do_sample=True, temperature=0.5 + top_p, top_k=top_k, top_p=top_p))
    assert compiled._cache_size() == 1


# ---- constraints, which apply to greedy decoding too


def test_repetition_penalty():
    arrays = parity.stored("sampling")
    penalized = penalize_repetition(jnp.asarray(arrays["logits"]), make_history(arrays["seen"]), 1.3)
    np.testing.assert_allclose(penalized, arrays["repetition_penalty=1.3"], rtol=1e-6)


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
    """No repeated n-grams, bad words and min_new_tokens give the logits of transformers; padding does not count."""
    sampling = Sampling(end_tokens=END_TOKENS, **options)
    constrained = constrain_logits(jnp.asarray(STORED["logits"]), sampling, make_history(STORED["history"]), 3)
    assert_same(constrained, STORED[name])


def test_end_tokens_are_allowed_after_min_new_tokens():
    sampling = Sampling(end_tokens=END_TOKENS, min_new_tokens=4)
    constrained = constrain_logits(jnp.asarray(STORED["logits"]), sampling, None, 4)
    np.testing.assert_array_equal(constrained, STORED["min_new_tokens=4,step=4"])


def test_rows_shorter_than_an_ngram_or_bad_word_are_unchanged():
    short = History.from_prompts(np.array([[5, 6]]), np.array([[1, 0]]), 8)
    logits = jnp.ones((1, 40))
    for options in ({"no_repeat_ngram_size": 3}, {"bad_words": BAD_WORDS[2:]}):
        np.testing.assert_array_equal(constrain_logits(logits, Sampling(**options), short, 0), logits)


def test_history_grows():
    grown = functools.reduce(History.append, ([7, 1], [8, 2]), History(jnp.zeros((2, 6), int), jnp.array([3, 0])))
    assert grown.tokens.tolist() == [[0, 0, 0, 7, 8, 0], [1, 2, 0, 0, 0, 0]]
    assert grown.last(3).tolist() == [[0, 7, 8], [-2, 1, 2]]


# ---- sampling


def test_samples_follow_the_distribution():
    """4000 samples of 6 tokens, two of them filtered out: frequencies are within 5 standard deviations."""
    logits = jnp.tile(jnp.array([2.0, 1.0, 0.0, 0.5, -1.0, -2.0]), (4000, 1))
    zeros, distinct = np.zeros(4000, np.int32), np.arange(4000, dtype=np.int32)
    for seeds, stream_ids in ((zeros.astype(np.uint32), distinct), (distinct.astype(np.uint32), zeros)):
        sampling = Sampling(seeds, stream_ids, do_sample=True, temperature=2.0, top_k=4)
        frequencies = np.bincount(next_token(logits, sampling, jnp.int32(3)), minlength=6) / 4000
        expected = np.exp(np.array([1.0, 0.5, 0.0, 0.25, -np.inf, -np.inf]))
        expected /= expected.sum()
        assert (np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all()


def test_sample_is_a_draw_of_jax():
    logits, sampling = jnp.linspace(0, 3, 20).reshape(2, 10), rows_sampling(2)
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(7), row), 3) for row in range(2)]
    expected = [int(jax.random.categorical(key, row / 1.5)) for key, row in zip(keys, logits, strict=True)]
    assert next_token(logits, sampling, jnp.int32(3)).tolist() == expected


def rows_sampling(rows, **options):
    seeds, streams = np.full(rows, 7, np.uint32), np.arange(rows, dtype=np.int32)
    return Sampling(seeds, streams, **{"do_sample": True, "temperature": np.float32(1.5)} | options)


@pytest.mark.parametrize("do_sample", [False, True])
def test_devices_that_split_the_vocabulary_choose_the_same_token(do_sample):
    """Also among equal logits, and with NaN and infinity, on two axes of a mesh."""
    rows = 6
    logits = np.random.default_rng(0).integers(0, 3, (rows, 40)).astype(np.float32)
    logits[1, [5, 25]], logits[2, [33, 34]], logits[3], logits[4, 12] = np.nan, np.inf, -np.inf, -np.inf
    sampling, axes = rows_sampling(rows, do_sample=do_sample), ("fsdp", "tensor")
    choose = jax.shard_map(
        lambda logits: next_token_over_shards(logits, sampling, jnp.int32(3), axes),
        mesh=jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2),
        in_specs=P(None, axes),
        out_specs=P(),
        check_vma=False,
    )
    token, chosen = jax.jit(choose)(logits)
    expected = next_token(logits, sampling, jnp.int32(3))
    np.testing.assert_array_equal(token, expected)
    np.testing.assert_array_equal(chosen, logits[np.arange(rows), expected])
