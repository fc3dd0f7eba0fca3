"""Chooses the next token from logits: applies constraints, penalties and filters to the logits, then draws."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from liger_jax.config import QwenVLConfig
from liger_jax.generation.options import GenerationOptions

Scalar = float | np.number | jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "seeds",
        "stream_ids",
        "end_tokens",
        "pad_token",
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
    """Generation options as arrays, for compiled functions. None disables an option.

    Enabling an option recompiles. Changing its value does not, except for the `meta_fields`. Without `do_sample`, the token
    with the largest logit is taken; temperature, top_k, top_p and min_p do not affect it.
    """

    seeds: Any = None  # [B] uint32
    stream_ids: Any = None  # [B] int32: distinguishes rows with the same seed
    end_tokens: Any = None  # [E] int32: end tokens, then -1
    pad_token: Scalar = 0  # fills a row after its end token
    do_sample: bool = False
    temperature: Scalar = 1.0
    top_k: Scalar | None = None  # a float because it is compared with a sum of floats
    top_p: Scalar | None = None
    min_p: Scalar | None = None
    repetition_penalty: Scalar | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: Scalar | None = None
    bad_words: Any = None  # [W, longest] int32: token sequences, left-padded with -1
    logprobs: int | None = None  # number of most likely tokens to record at each step

    @classmethod
    def from_options(
        cls, options: GenerationOptions, config: QwenVLConfig, prompts: int, rows: int, *, seed: Any = None
    ) -> Self:
        """Returns the options as arrays for `rows` rows, of which the first ones continue `prompts` prompts.

        `seed` replaces that of the options; it may be traced.
        """
        ends = options.resolve_end_tokens(config)
        end_tokens = np.full(_round_up(len(ends)), -1, np.int32)
        end_tokens[: len(ends)] = ends
        seeds, stream_ids = _row_seeds(
            options.seed if seed is None else seed, prompts, options.num_return_sequences, rows
        )
        words = [word for word in map(tuple, options.bad_words_ids) if word not in {(end,) for end in ends}]
        return cls(
            seeds,
            stream_ids,
            end_tokens,
            np.int32(options.resolve_pad_token(config)),
            do_sample=options.do_sample and options.top_k != 1,
            temperature=np.float32(options.temperature),
            top_k=np.float32(options.top_k) if options.top_k else None,
            top_p=None if options.top_p is None else np.float32(options.top_p),
            min_p=None if options.min_p is None else np.float32(options.min_p),
            repetition_penalty=None if options.repetition_penalty == 1 else np.float32(options.repetition_penalty),
            no_repeat_ngram_size=options.no_repeat_ngram_size or None,
            min_new_tokens=np.int32(options.min_new_tokens) if options.min_new_tokens else None,
            bad_words=_word_table(words),
            logprobs=options.logprobs,
        )

    @property
    def needs_history(self) -> bool:
        """Whether the choice depends on the earlier tokens."""
        return not (self.repetition_penalty is self.no_repeat_ngram_size is self.bad_words is None)

    @property
    def needs_all_logits(self) -> bool:
        """Whether the choice depends on more than the largest score, so that devices gather their parts of the logits.

        That takes about as long as one sum over the mesh, and a filter's sums over the vocabulary would be ten of them.
        """
        filters = self.top_k, self.top_p, self.min_p, self.min_new_tokens, self.logprobs
        return self.needs_history or any(option is not None for option in filters)

    def specs(self, rows: P) -> Self:
        """Returns the PartitionSpecs of the arrays, given that of an array [B]."""
        return dataclasses.replace(jax.tree.map(lambda _: P(), self), seeds=rows, stream_ids=rows)


def _row_seeds(seed: Any, prompts: int, samples: int, rows: int) -> tuple[Any, np.ndarray]:
    """Returns each row's seed [rows] uint32 and stream id [rows] int32.

    With one seed, every row has its own stream. With a seed per prompt, streams distinguish the prompt's continuations.
    """
    is_traced = isinstance(seed, jax.core.Tracer)
    xp: Any = jnp if is_traced else np
    seeds = jnp.atleast_1d(seed) if is_traced else np.atleast_1d(seed).astype(np.int64)
    # All 64 bits count; a seed below 2^32 stays the same. Two shifts, since a shift by 32 is undefined for 32 bits.
    mixed = seeds.astype(np.uint32) ^ (seeds >> 31 >> 1).astype(np.uint32) * np.uint32(0x9E3779B1)
    if np.ndim(seed) == 0:
        return xp.repeat(mixed, rows), np.arange(rows, dtype=np.int32)
    row_seeds = xp.pad(xp.repeat(mixed, samples), (0, rows - prompts * samples))
    return row_seeds, np.arange(rows, dtype=np.int32) % samples


def _word_table(words: Sequence[Sequence[int]]) -> np.ndarray | None:
    """Returns [W, longest] int32: the words, left-padded with -1, in a table that is itself padded with -1."""
    if not words:
        return None
    longest = max(map(len, words))
    table = np.full((_round_up(len(words)), 1 if longest == 1 else _round_up(longest)), -1, np.int32)
    for row, word in zip(table, words, strict=False):
        row[-len(word) :] = word
    return table


def _round_up(count: int) -> int:
    """Rounds up to a multiple of 4, so that one more token does not recompile."""
    return -(-max(count, 1) // 4) * 4


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class History:
    """Each row's tokens so far, starting with the prompt, without padding in between."""

    tokens: Any  # [B, S] int32, of which the first `length` are valid
    length: Any  # [B] int32

    @classmethod
    def from_prompts(cls, input_ids: Any, segment_ids: Any, width: int) -> Self:
        """Returns the history of prompts that are padded on any side; on the host for numpy arrays.

        Args:
            input_ids: [B, L] integers.
            segment_ids: [B, L] integers, 0 for padding.
            width: S, the number of tokens that a row has room for, prompt included.
        """
        xp: Any = np if isinstance(input_ids, np.ndarray) else jnp
        valid = segment_ids > 0
        tokens_first = xp.argsort(~valid, axis=1, **({"kind": "stable"} if xp is np else {"stable": True}))
        tokens = xp.take_along_axis(input_ids, tokens_first, axis=1).astype(np.int32)
        tokens = xp.pad(tokens, [(0, 0), (0, width - tokens.shape[1])])
        return cls(tokens, valid.sum(axis=1).astype(np.int32))

    def append(self, token: jax.Array) -> "History":
        """Returns the history with one more token [B]."""
        rows = jnp.arange(len(token))
        return History(self.tokens.at[rows, self.length].set(token, mode="drop"), self.length + 1)

    def last(self, count: int) -> jax.Array:
        """Returns each row's latest tokens [B, count]. Entries before its first token are -2, which equals no token."""
        positions = self.length[:, None] + jnp.arange(-count, 0)
        tokens = jnp.take_along_axis(self.tokens, jnp.maximum(positions, 0), axis=1)
        return jnp.where(positions >= 0, tokens, -2)

    def valid(self) -> jax.Array:
        """Returns [B, S] bool: True for the entries of `tokens` that are tokens of the row."""
        return jnp.arange(self.tokens.shape[1]) < self.length[:, None]


def constrain_logits(logits: jax.Array, sampling: Sampling, history: History | None, step: jax.Array) -> jax.Array:
    """Returns the logits after the options that constrain greedy decoding too, applied in transformers' order.

    The logits of forbidden tokens become -inf.

    Args:
        logits: [B, V] float32.
        sampling: uses repetition_penalty, no_repeat_ngram_size, bad_words, end_tokens and min_new_tokens.
        history: None unless `sampling.needs_history`.
        step: scalar, the number of new tokens so far.
    """
    if sampling.needs_history:
        assert history is not None
        if sampling.repetition_penalty is not None:
            logits = penalize_repetition(logits, history, sampling.repetition_penalty)
        if sampling.no_repeat_ngram_size is not None:
            logits = _forbid(logits, *repeated_ngrams(history, sampling.no_repeat_ngram_size))
        if sampling.bad_words is not None:
            logits = _forbid(logits, *completed_words(history, jnp.asarray(sampling.bad_words)))
    if sampling.min_new_tokens is not None:
        ends = jnp.broadcast_to(sampling.end_tokens, (len(logits), len(sampling.end_tokens)))
        logits = _forbid(logits, ends, (ends >= 0) & (step < sampling.min_new_tokens))
    return logits


def _forbid(logits: jax.Array, tokens: jax.Array, forbidden: jax.Array) -> jax.Array:
    """Returns the logits, with -inf for each of `tokens` [B, N] where `forbidden` [B, N] is True."""
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, jnp.where(forbidden, tokens, logits.shape[1])].set(-jnp.inf, mode="drop")


def penalize_repetition(logits: jax.Array, history: History, penalty: Scalar) -> jax.Array:
    """Makes tokens that have occurred less likely: divides positive logits by the penalty, multiplies negative ones.

    The prompt's tokens count, image placeholders included, as in transformers; padding does not.
    """
    rows = jnp.arange(len(logits))[:, None]
    penalized = jnp.take_along_axis(logits, history.tokens, axis=1)
    penalized = jnp.where(penalized < 0, penalized * penalty, penalized / penalty)
    return logits.at[rows, jnp.where(history.valid(), history.tokens, logits.shape[1])].set(penalized, mode="drop")


def repeated_ngrams(history: History, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns tokens [B, S], and for each, [B, S] bool, whether it would repeat an n-gram of `size` tokens in its row."""
    positions = jnp.arange(history.tokens.shape[1])
    completes = history.valid() & (positions >= size - 1)
    for distance, token in enumerate(history.last(size - 1).T[::-1], start=1):
        completes &= jnp.roll(history.tokens, distance, axis=1) == token[:, None]
    return history.tokens, completes


def completed_words(history: History, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the last token of each word, [B, W], and whether it would complete the word, [B, W] bool.

    Args:
        history: each row's tokens so far.
        words: [W, longest], left-padded with -1.
    """
    *prefix, last = words.T
    matches = jnp.ones((len(history.tokens), len(last)), bool)
    for word_token, row_token in zip(prefix, history.last(len(prefix)).T, strict=True):
        matches &= (word_token < 0) | (word_token == row_token[:, None])
    return jnp.broadcast_to(last, matches.shape), matches & (last >= 0)


def next_token(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """Returns the next token of each row, [B] int32, from logits [B, V].

    A row's draw depends on its seed, its stream id and the step, not on the other rows. NaN and infinity are chosen before
    any finite logit, with any constraints and filters, so that the caller need only check the chosen token's logit.
    """
    if sampling.do_sample:  # the largest sum of logit and Gumbel noise is a draw from the softmax
        logits = filter_logits(logits, sampling) + _gumbel_noise(sampling, step, logits.shape[1], logits.dtype)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def next_token_over_shards(
    logits: jax.Array, sampling: Sampling, step: jax.Array, mesh_axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns the token that `next_token` would choose, [B] int32, and its logit, where devices split the vocabulary.

    It is called inside a `shard_map`.

    Args:
        logits: [B, V / devices] float32, in the order of the devices along `mesh_axes`.
        sampling: without options that need all logits.
        step: scalar, the number of new tokens so far.
        mesh_axes: axes of the mesh, which split the vocabulary.
    """
    size = logits.shape[1]
    start = size * jax.lax.axis_index(mesh_axes)
    scores = logits
    if sampling.do_sample:
        noise = _gumbel_noise(sampling, step, size * jax.lax.axis_size(mesh_axes), logits.dtype)
        scores = filter_logits(logits, sampling) + jax.lax.dynamic_slice_in_dim(noise, start, size, axis=1)
    best = jnp.argmax(scores, axis=-1)
    of_best = (jnp.take_along_axis(x, best[:, None], axis=1)[:, 0] for x in (scores, logits))
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in of_best]
    bits = jax.lax.all_gather(jnp.stack([*bits, (start + best).astype(jnp.int32)]), mesh_axes)  # [devices, 3, B]
    score, logit = (jax.lax.bitcast_convert_type(bits[:, i], jnp.float32) for i in range(2))
    winner = jnp.argmax(score, axis=0)  # of equal scores the first, as on a single device
    token, logit = (jnp.take_along_axis(x, winner[None], axis=0)[0] for x in (bits[:, 2], logit))
    return token, logit


def _gumbel_noise(sampling: Sampling, step: jax.Array, size: int, dtype) -> jax.Array:
    """Returns Gumbel noise [B, size] for each row's seed, stream id and step."""

    def draw(seed, stream_id):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream_id), step)
        return jax.random.gumbel(key, (size,), dtype)

    return jax.vmap(draw)(sampling.seeds, sampling.stream_ids)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Applies temperature, then top-k, top-p and min-p, in transformers' order, to logits [B, V] float32.

    The logits of tokens that are filtered out become -inf. No filter sorts. Ties with the least likely kept token are kept
    too, as in transformers' top-k and min-p; its top-p keeps only those that its sort puts first.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = _keep_largest(logits, jnp.ones_like(logits), sampling.top_k)
    if sampling.top_p is not None:
        # Keeps a token if all more likely tokens together have less than top_p. At 1 it keeps all, however the sum rounds.
        threshold = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)
        logits = _keep_largest(logits, jax.nn.softmax(logits, axis=-1), threshold)
    if sampling.min_p is not None:
        # Keeps a token if it is at least min_p times as likely as the most likely one.
        probabilities = jax.nn.softmax(logits, axis=-1)
        removed = probabilities < sampling.min_p * probabilities.max(axis=-1, keepdims=True)
        logits = jnp.where(removed, -jnp.inf, logits)  # keeps NaN, which `next_token` then chooses
    return logits


def _keep_largest(logits: jax.Array, weights: jax.Array, threshold: Scalar) -> jax.Array:
    """Keeps each row's largest logits, as few as reach a total weight of `threshold`, and ties. The others become -inf.

    Finds the smallest logit to keep by its 32 bits, four at a time: eight passes over the logits instead of a sort.
    """
    bits = _sortable_bits(logits)
    smallest = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    for shift in range(28, -1, -4):
        candidates = smallest + (jnp.arange(1, 16, dtype=jnp.uint32) << shift)  # [B, 15], increasing
        reached = bits[..., None, :] >= candidates[..., None]
        weight = jnp.sum(jnp.where(reached, weights[..., None, :], 0), axis=-1)  # decreasing
        digit = jnp.sum(weight >= threshold, axis=-1, keepdims=True, dtype=jnp.uint32)
        smallest += digit << shift
    return jnp.where(bits >= smallest, logits, -jnp.inf)


def _sortable_bits(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 of the same order; +0 and -0 are equal. NaN of either sign is the largest."""
    x = jnp.where(x == 0, 0.0, jnp.where(x == x, x, jnp.nan))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def token_logprobs(logits: jax.Array, token: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the log-probabilities of the chosen token [B] and of the most likely tokens, given logits [B, V].

    Returns:
        The log-probability of the chosen token [B]; the `count` most likely tokens [B, count] int32; their
        log-probabilities [B, count].
    """
    logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, count)
    return chosen, top_tokens.astype(jnp.int32), top_logprobs
