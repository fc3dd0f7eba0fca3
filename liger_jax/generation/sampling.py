"""From logits to the next token: what is ruled out, what is made less likely, and the draw."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "seeds",
        "streams",
        "ends",
        "pad",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "min_new_tokens",
        "bad_words",
    ],
    meta_fields=["do_sample", "no_repeat_ngram_size", "logprobs"],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Another value compiles nothing but for `meta_fields`; switching one on or off does.

    Greedy decoding takes the largest logit, which temperature, top_k, top_p and min_p never change.
    """

    seeds: np.ndarray | None = None  # [B] uint32
    streams: np.ndarray | None = None  # [B] int32: tells apart rows of the same seed
    ends: np.ndarray | None = None  # [E] int32: end tokens, then -1
    pad: int = 0  # what follows an end token
    do_sample: bool = False
    temperature: float = 1.0
    top_k: np.float32 | None = None  # compared with a sum of floats
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    bad_words: np.ndarray | None = None  # [W, longest] int32: token sequences, -1 before those that are shorter
    logprobs: int | None = None  # how many of the most likely tokens to tell at each step

    @property
    def looks_back(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return not (self.repetition_penalty is self.no_repeat_ngram_size is self.bad_words is None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class History:
    """Each row's tokens so far, the prompt's first; no padding among them."""

    tokens: jax.Array  # [B, S] int32, as many as `length` says
    length: jax.Array  # [B] int32

    @classmethod
    def of_prompts(cls, input_ids: np.ndarray, segment_ids: np.ndarray, width: int) -> Self:
        """input_ids, segment_ids [B, L], padded anywhere -> room for `width` tokens a row. On the host."""
        front = np.argsort(segment_ids == 0, axis=1, kind="stable")
        tokens = np.zeros((len(input_ids), width), np.int32)
        tokens[:, : input_ids.shape[1]] = np.take_along_axis(input_ids, front, axis=1)
        return cls(tokens, (segment_ids > 0).sum(axis=1).astype(np.int32))

    def append(self, token: jax.Array) -> Self:
        rows = jnp.arange(len(token))
        return History(self.tokens.at[rows, self.length].set(token, mode="drop"), self.length + 1)

    def last(self, count: int) -> jax.Array:
        """-> [B, count]: the latest tokens; -2, which equals nothing, before a row's beginning."""
        places = self.length[:, None] + jnp.arange(-count, 0)
        found = jnp.take_along_axis(self.tokens, jnp.maximum(places, 0), axis=1)
        return jnp.where(places >= 0, found, -2)

    def known(self) -> jax.Array:
        """-> [B, S] bool: which of `tokens` are a row's."""
        return jnp.arange(self.tokens.shape[1]) < self.length[:, None]


def constrain(logits: jax.Array, sampling: Sampling, history: History | None, step: jax.Array) -> jax.Array:
    """What holds for greedy decoding too, in transformers' order; what is ruled out becomes -inf. [B, V] float32."""
    if sampling.repetition_penalty is not None:
        logits = penalise_repetition(logits, history, sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size is not None:
        logits = _forbid(logits, *repeated_ngrams(history, sampling.no_repeat_ngram_size))
    if sampling.bad_words is not None:
        *before, last = jnp.asarray(sampling.bad_words).T
        begun = jnp.ones((len(logits), len(last)), bool)
        for word, said in zip(before, history.last(len(before)).T, strict=True):
            begun &= (word < 0) | (word == said[:, None])
        logits = _forbid(logits, jnp.broadcast_to(last, begun.shape), begun & (last >= 0))
    if sampling.min_new_tokens is not None:
        ends = jnp.broadcast_to(sampling.ends, (len(logits), len(sampling.ends)))
        logits = _forbid(logits, ends, (ends >= 0) & (step < sampling.min_new_tokens))
    return logits


def _forbid(logits: jax.Array, tokens: jax.Array, chosen: jax.Array) -> jax.Array:
    """-inf for those of `tokens` [B, N] that are `chosen` [B, N]."""
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, jnp.where(chosen, tokens, logits.shape[1])].set(-jnp.inf, mode="drop")


def penalise_repetition(logits: jax.Array, history: History, penalty: jax.Array | float) -> jax.Array:
    """Makes tokens that occurred less likely: a positive logit is divided by the penalty, a negative one multiplied.

    Tokens of the prompt count, placeholders of pictures included, as in transformers; padding does not.
    """
    rows = jnp.arange(len(logits))[:, None]
    found = jnp.take_along_axis(logits, history.tokens, axis=1)
    found = jnp.where(found < 0, found * penalty, found / penalty)
    return logits.at[rows, jnp.where(history.known(), history.tokens, logits.shape[1])].set(found, mode="drop")


def repeated_ngrams(history: History, size: int) -> tuple[jax.Array, jax.Array]:
    """-> tokens [B, S], and whether each would complete a run of `size` tokens that the row has already."""
    places = jnp.arange(history.tokens.shape[1])
    completes = history.known() & (places >= size - 1)
    for back, said in enumerate(history.last(size - 1).T[::-1], start=1):
        completes &= jnp.roll(history.tokens, back, axis=1) == said[:, None]
    return history.tokens, completes


def next_token(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """logits [B, V] -> [B] int32. A row's draws depend on its seed, its stream and the step, not on the rows around it."""
    if not sampling.do_sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(seed, stream, logits):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)
        return jax.random.categorical(key, logits)

    return jax.vmap(draw)(sampling.seeds, sampling.streams, process_logits(logits, sampling)).astype(jnp.int32)


def process_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature, then top-k, top-p and min-p, in transformers' order; what is ruled out becomes -inf. [B, V] float32.

    Nothing is sorted. Tokens as likely as the least likely one that stays, stay: in transformers this holds for top-k and
    min-p, while its top-p keeps of such tokens those that a sort happens to put first.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = _largest(logits, jnp.ones_like(logits), sampling.top_k)
    if sampling.top_p is not None:
        # a token stays if those more likely than it have less than top_p together; at 1 all do, whatever the sum rounds to
        enough = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)
        logits = _largest(logits, jax.nn.softmax(logits, axis=-1), enough)
    if sampling.min_p is not None:
        # a token stays if it is at least min_p times as likely as the most likely one
        probabilities = jax.nn.softmax(logits, axis=-1)
        stays = probabilities >= sampling.min_p * probabilities.max(axis=-1, keepdims=True)
        logits = jnp.where(stays, logits, -jnp.inf)
    return logits


def _largest(logits: jax.Array, weights: jax.Array, enough: jax.Array) -> jax.Array:
    """Each row's largest logits, as few as weigh `enough` together, and their equals; -inf for the rest.

    Finds the smallest that stays by its 32 bits, four at a time: eight passes over the logits instead of a sort.
    """
    order = _ordered(logits)
    least = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    for shift in range(28, -1, -4):
        candidates = least + (jnp.arange(1, 16, dtype=jnp.uint32) << shift)  # [B, 15], rising
        reached = order[..., None, :] >= candidates[..., None]
        weight = jnp.sum(jnp.where(reached, weights[..., None, :], 0), axis=-1)  # falling
        digit = jnp.sum(weight >= enough, axis=-1, keepdims=True, dtype=jnp.uint32)
        least += digit << shift
    return jnp.where(order >= least, logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 of the same order; +0 and -0 are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def log_probabilities(logits: jax.Array, token: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits [B, V], token [B] -> its log-probability [B]; the `count` most likely tokens, and theirs [B, count]."""
    logits = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    values, tokens = jax.lax.top_k(logits, count)
    return chosen, tokens.astype(jnp.int32), values
