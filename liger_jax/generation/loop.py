"""Turns prompts into new tokens on the device: one compiled prefill, then one compiled loop that generates the tokens."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from liger_jax import runtime
from liger_jax.config import Qwen2VLConfig
from liger_jax.errors import UserError
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.sampling import History, Sampling, constrain_logits, next_token, token_logprobs
from liger_jax.inputs.batch import Batch, bucket
from liger_jax.model import Qwen2VL
from liger_jax.model.fused_decode import PackedModel, decode_step
from liger_jax.model.kv_cache import KVCache
from liger_jax.model.lora import lora_config
from liger_jax.model.qwen2_vl import causal_attention
from liger_jax.model.sharding import (
    find_abstract_mesh,
    get_mesh,
    mesh_context,
    run_on_auto_axes,
    shard_batch,
    with_auto_axes,
)
from liger_jax.model.text import DecoderLayer

NON_FINITE = -1  # recorded in place of a token that was chosen by a logit that is NaN or infinite
NEW_TOKENS = 64  # smallest bucket of room for new tokens, see `bucket`
CHUNK = 8  # tokens that the device generates while the host reads the previous chunk


class Generated(NamedTuple):
    """New tokens and their log-probabilities, which are 0 after a row's end."""

    tokens: Any  # [B, T] int32
    logprobs: Any  # [B, T] float32: log-probability of each token
    top_tokens: Any  # [B, T, n] int32: the n most likely tokens at each position, most likely first
    top_logprobs: Any  # [B, T, n] float32: their log-probabilities


class NonFiniteLogitsError(UserError):
    """Raised when logits are NaN or infinite. The other rows' tokens are in `generated`.

    Attributes:
        new_tokens: for each row with such logits, the number of the new token that they were for, counted from 1.
        generated: all new tokens; these rows end before that token.
    """

    def __init__(self, new_tokens: dict[int, int], generated: Generated):
        self.new_tokens, self.generated = new_tokens, generated
        row, number = next(iter(new_tokens.items()))
        super().__init__(f"Row {row}: {self.describe(number)}")

    @staticmethod
    def describe(number: int) -> str:
        return (
            f"The logits of new token {number} are NaN or infinite; expected finite logits: the weights are damaged, or "
            "values exceed the range of their dtype (float16 ends at 65504; bfloat16 has the range of float32)"
        )


def check_prompts(config: Qwen2VLConfig, batch: Batch, max_new_tokens: int) -> None:
    """Raises UserError unless each row holds one prompt, and prompt and answer fit the model's positions.

    Traced arrays have no values to check.
    """
    if not isinstance(batch, Batch):
        raise UserError(f"batch is a {type(batch).__name__}; expected a Batch, as prepare(model.config, ...) returns")
    if is_traced((batch.segment_ids, batch.position_ids)):
        return  # the caller's responsibility, see `generate`
    segments = np.asarray(batch.segment_ids)
    if segments.max() > 1:
        row = int(np.argmax(segments.max(axis=1)))
        raise UserError(f"Row {row} holds {segments.max()} packed sequences; expected one prompt per row")
    if not segments.any(axis=1).all():
        raise UserError(f"Row {int(np.argmin(segments.any(axis=1)))} has no tokens; expected a prompt in every row")
    last, limit = int(np.asarray(batch.position_ids).max()) + max_new_tokens, config.text.max_position_embeddings
    if last >= limit:
        raise UserError(
            f"The prompts and {max_new_tokens} new tokens reach position {last}; expected at most {limit - 1}, since the "
            f"model's max_position_embeddings is {limit}"
        )


def is_traced(tree: Any) -> bool:
    """Returns whether a tree holds traced arrays, as the arguments of a function under `jax.jit` or `jax.vmap` do."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def is_inside_trace(*arguments: Any) -> bool:
    """Returns whether JAX traces the caller: an argument is traced, or an array that is made here (under `jax.jit`)."""
    return is_traced((arguments, jnp.asarray(0)))


class DecodeSession:
    """The generation of one batch on the device: its KV cache, and the new tokens so far.

    Iterate over `chunks` to read tokens as they are generated, or call `run` to generate all of them. Then `result` returns
    all tokens.

    Compiled programs run in this order: `prefill`, `first_token_logits`, `init_cache`, `init_decode_state`, `decode_loop`.

    Attributes:
        rows: number of rows, `num_return_sequences` for each prompt.
        cache: the KV cache, which a chat extends with its next turn.
        sampling: the options as arrays.
    """

    def __init__(
        self,
        model: Qwen2VL,
        cache: KVCache,
        first_step: "FirstStep",
        options: GenerationOptions,
        input_ids: np.ndarray,
        segment_ids: np.ndarray,
    ):
        """Chooses each row's first token.

        Args:
            model: the model.
            cache: filled with the prompts, each `num_return_sequences` times, with room for the new tokens.
            first_step: logits and positions of the first new tokens, with the rows of the cache.
            options: generation options.
            input_ids: [prompts, L], the whole prompts, padded on any side.
            segment_ids: [prompts, L], 0 for padding.
        """
        prompts, samples, padded_rows = len(input_ids), options.num_return_sequences, len(first_step.empty)
        self.model, self.cache, self.rows = model, cache, prompts * samples
        self.sampling = Sampling.from_options(options, model.config, prompts, padded_rows)
        self._limit = options.max_new_tokens
        self._stopped = np.zeros(self.rows, bool)
        self._length = np.full(self.rows, self._limit)
        history = None
        if self.sampling.needs_history:
            padding = [(0, padded_rows // samples - prompts), (0, 0)]
            ids, segments = (np.pad(array, padding).repeat(samples, axis=0) for array in (input_ids, segment_ids))
            history = History.from_prompts(ids, segments, cache.valid.shape[1])
        self._mesh, self._weights, self._requested = get_mesh((model, cache)), None, 1
        with mesh_context(self._mesh):
            room = bucket(self._limit, NEW_TOKENS)
            self._state, self._snapshot = init_decode_state(first_step, self.sampling, history, room=room)
            if self._limit > 1:  # copied while the device runs the prefill
                self._weights = decode_weights(model)

    @classmethod
    def start(cls, model: Qwen2VL, batch: Batch, options: GenerationOptions) -> Self:
        """Runs the prefill of a batch of prompts and chooses each row's first token."""
        check_prompts(model.config, batch, options.max_new_tokens)
        model, prompts = with_auto_axes(model), (np.asarray(batch.input_ids), np.asarray(batch.segment_ids))
        options.check_against(model.config, len(prompts[0]))
        batch = shard_batch(dataclasses.replace(batch, labels=None), get_mesh(model))
        with mesh_context(get_mesh((model, batch))):
            hidden, keys_values = prefill(model, batch)
            first_step = first_token_logits(model, hidden, batch.position_ids, batch.segment_ids, np.int32(0))
            cache = init_cache(*keys_values, batch.segment_ids, room=bucket(options.max_new_tokens, NEW_TOKENS))
            if options.num_return_sequences > 1:
                cache, first_step = repeat_rows((cache, first_step), options.num_return_sequences)
        return cls(model, cache, first_step, options, *prompts)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yields the new tokens [rows, 1 or more] as they are generated, until all rows have ended.

        The first chunk is a single token. The device is one chunk ahead of the reader. A row whose logits are not finite
        ends with the token NON_FINITE.
        """
        read, finished = 0, False
        try:
            while not finished:
                snapshot, requested = self._snapshot, self._requested
                if requested > 1:  # the first token does not wait for the compilation of the loop
                    self._advance(CHUNK)
                tokens, step, done = jax.device_get(snapshot)
                yield tokens[: self.rows, read:step]
                read = step
                finished = requested == self._limit or (done[: self.rows] | self._stopped).all()
                if requested == 1 and not finished:
                    self._advance(CHUNK)
        finally:
            self._weights = None  # they are a copy of most weights, and a chat keeps the session for its cache

    def stop(self, row: int, length: int) -> None:
        """Ends a row after its first `length` tokens."""
        self._stopped[row], self._length[row] = True, length

    def run(self) -> None:
        """Generates all tokens, without waiting for the device."""
        self._advance(self._limit)

    def result(self) -> Generated:
        """Waits for the device and returns all tokens, with None for log-probabilities that were not requested.

        Raises:
            NonFiniteLogitsError: the logits of a row were NaN or infinite.
        """
        generated = jax.device_get(self._state.generated)
        after_end = np.arange(self._limit) >= self._length[:, None]

        def cut(array, fill):  # on the host: slicing on the device would compile for each length
            array = np.array(array[: self.rows, : self._limit])
            array[after_end] = fill
            return array

        fills = (self.sampling.pad_token, 0, 0, 0)
        generated = Generated(
            *(array if array is None else cut(array, fill) for array, fill in zip(generated, fills, strict=True))
        )
        failed = generated.tokens == NON_FINITE
        if failed.any():
            generated.tokens[failed] = self.sampling.pad_token
            raise NonFiniteLogitsError({int(row): int(step) + 1 for row, step in np.argwhere(failed)}, generated)
        return generated

    def _advance(self, tokens: int) -> None:
        """Dispatches up to `tokens` more tokens per row, without waiting for the device."""
        if self._requested == self._limit:
            return
        self._requested = min(self._requested + tokens, self._limit)
        stopped = np.ones(len(self.sampling.seeds), bool)
        stopped[: self.rows] = self._stopped
        with mesh_context(self._mesh):
            self._weights = self._weights or decode_weights(self.model)
            self.cache, self._state, self._snapshot = decode_loop(
                self.model,
                self._weights,
                self.cache,
                self._state,
                self.sampling,
                stopped=stopped,
                until=np.int32(self._requested),
            )


# ---- compiled functions ----------------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "position", "slot", "empty"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class FirstStep:
    """The inputs of the first decoding step, apart from the cache."""

    logits: jax.Array  # [B, V] float32, for the first new token
    position: jax.Array  # [B, 3]: (t, h, w) of the first new token
    slot: jax.Array  # scalar: the cache slot of the first new token
    empty: jax.Array  # [B] bool: rows that only pad the batch to the size of the mesh


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "token", "position", "slot", "done", "history", "generated"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of the decode loop, apart from the cache."""

    step: jax.Array  # scalar: new tokens per row so far
    token: jax.Array  # [B] int32: the last new token, not in the cache yet
    position: jax.Array  # [B, 3]: (t, h, w) of that token
    slot: jax.Array  # scalar: the cache slot of that token
    done: jax.Array  # [B] bool
    history: History | None  # None unless sampling depends on it
    generated: Generated  # all new tokens, with room for more; None for log-probabilities that were not requested


@functools.partial(jax.jit, compiler_options=runtime.COMPILER_OPTIONS)
def prefill(model: Qwen2VL, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Runs the vision tower and the language model on the prompts.

    `first_token_logits` and `init_cache` are separate programs: this one takes the longest to compile and does not depend
    on the number of new tokens. When it also computed the first logits, XLA took 15 to 24 s instead of 2 s to compile it for
    one row of 2048 tokens on a GPU.

    Returns:
        Hidden states [B, T, H], and (keys, values), each [L, B, T, K, D].
    """
    segments = pk.find_segments(batch.segment_ids, batch.max_segments)

    def attend(q, k, v):
        return causal_attention(segments, q, k, v)[0], (k, v)

    return model.language_model(model.embed(batch), batch.position_ids, attend)


@jax.jit
def first_token_logits(
    model: Qwen2VL, hidden: jax.Array, position_ids: jax.Array, segment_ids: jax.Array, slot: jax.Array
) -> FirstStep:
    """Returns the first step after prompts with hidden states [B, T, H] that occupy the cache from `slot` on."""
    valid = segment_ids > 0
    last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
    logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    position = jnp.take_along_axis(position_ids, last[:, None, None], axis=2)[..., 0] + 1
    empty = ~valid.any(axis=1)
    return FirstStep(logits.astype(jnp.float32), position, slot + last.max() + 1, empty)


@functools.partial(jax.jit, static_argnames="room")
def init_cache(keys: jax.Array, values: jax.Array, segment_ids: jax.Array, *, room: int) -> KVCache:
    """Returns the KV cache of a prefill, with room for new tokens."""
    return KVCache.from_prompt(keys, values, segment_ids, room)


@functools.partial(jax.jit, donate_argnames="cache")
def extend(model: Qwen2VL, cache: KVCache, batch: Batch, slot: jax.Array) -> tuple[jax.Array, KVCache]:
    """Prefills the next tokens of prompts whose first `slot` slots are cached; later slots of the cache are discarded.

    Args:
        model: the model.
        cache: the KV cache; donated.
        batch: the new tokens and images, with positions in the whole prompts.
        slot: scalar, the first slot to write to.

    Returns:
        Hidden states [B, T, H] for the new tokens, and the cache.
    """
    cache, segments = cache.truncate(slot), (batch.segment_ids > 0).astype(jnp.int32)

    def attend(i, q, k, v):
        return cache.attend_chunk(i, slot, segments, q, k, v)

    hidden, keys, values = _run_layers(model, unstack_layers(model), model.embed(batch), batch.position_ids, attend)
    return hidden, dataclasses.replace(cache, keys=keys, values=values).mark_valid(slot, segments)


@functools.partial(jax.jit, static_argnums=1)
def repeat_rows(tree: tuple[KVCache, FirstStep], count: int) -> tuple[KVCache, FirstStep]:
    """Returns the tree with each row repeated `count` times; the copies are adjacent."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0) if x.ndim else x, tree)


@functools.partial(jax.jit, static_argnames="room")
def grow(cache: KVCache, *, room: int) -> KVCache:
    """Returns the cache with `room` more slots."""
    return cache.grow(room)


@functools.partial(jax.jit, static_argnames="room")
def init_decode_state(
    first_step: FirstStep, sampling: Sampling, history: History | None, *, room: int
) -> tuple[DecodeState, tuple]:
    """Chooses each row's first token. Returns the state and a snapshot of it (tokens, step, done)."""
    rows, generated = len(first_step.logits), Generated(None, None, None, None)
    if sampling.logprobs is not None:
        top = (rows, room, sampling.logprobs)
        generated = Generated(None, jnp.zeros((rows, room)), jnp.zeros(top, jnp.int32), jnp.zeros(top))
    generated = generated._replace(tokens=jnp.full((rows, room), sampling.pad_token, jnp.int32))
    token = jnp.zeros(rows, jnp.int32)
    state = DecodeState(jnp.int32(0), token, first_step.position, first_step.slot, first_step.empty, history, generated)
    state = _choose_tokens(first_step.logits, state, sampling)
    return state, (state.generated.tokens, state.step, state.done)


@jax.jit
def unstack_layers(model: Qwen2VL) -> list[DecoderLayer]:
    """Returns separate arrays for each layer's weights: a loop over the stack would copy a slice of it in every step."""
    layers = model.language_model.layers
    return [jax.tree.map(lambda w, i=i: w[i], layers) for i in range(model.config.text.num_hidden_layers)]


def decode_weights(model: Qwen2VL) -> PackedModel | list[DecoderLayer]:
    """Returns the weights that `decode_loop` reads: packed, or, with a mesh or LoRA, separate layers with their sharding."""
    if find_abstract_mesh(model) is None and lora_config(model) is None:
        return PackedModel.from_model(model.language_model, model.head)
    return unstack_layers(model)


@functools.partial(jax.jit, donate_argnames=("cache", "state"))
def decode_loop(
    model: Qwen2VL,
    weights: PackedModel | list[DecoderLayer],
    cache: KVCache,
    state: DecodeState,
    sampling: Sampling,
    *,
    stopped: jax.Array,
    until: jax.Array,
) -> tuple[KVCache, DecodeState, tuple]:
    """Generates tokens until each row has `until` of them or all rows have ended.

    Args:
        model: the model.
        weights: its weights, as `decode_weights` returns them.
        cache: the KV cache; donated.
        state: the state of the loop; donated.
        sampling: how tokens are chosen.
        stopped: [B] bool, rows that the host has ended.
        until: scalar, number of new tokens per row.

    Returns:
        The cache, the state, and a snapshot of the state (tokens, step, done).
    """

    def unfinished(carry):
        _, state = carry
        return (state.step < until) & ~state.done.all()

    def one_token(carry):
        cache, state = carry
        x = model.language_model.embed_tokens.weight[state.token]
        if isinstance(weights, PackedModel):
            cos, sin = (table[:, 0] for table in model.language_model.rotary(state.position[..., None]))
            logits, cache = decode_step(weights, x, cos, sin, cache, state.slot)
        else:
            cache = cache.mark_valid(state.slot, jnp.ones((len(x), 1), jnp.int32))

            def attend(i, q, k, v):
                return cache.attend(i, state.slot, q, k, v)

            hidden, keys, values = _run_layers(model, weights, x[:, None], state.position[..., None], attend)
            logits, cache = model.logits(hidden[:, 0]), dataclasses.replace(cache, keys=keys, values=values)
        state = dataclasses.replace(state, position=state.position + 1, slot=state.slot + 1)
        return cache, _choose_tokens(logits.astype(jnp.float32), state, sampling)

    state = dataclasses.replace(state, done=state.done | stopped)
    cache, state = jax.lax.while_loop(unfinished, one_token, (cache, state))
    return cache, state, (state.generated.tokens, state.step, state.done)


def _run_layers(model: Qwen2VL, layers: list[DecoderLayer], x: jax.Array, position_ids: jax.Array, attend) -> tuple:
    """Runs x [B, T, H] through all layers; layer i calls attend(i, q, k, v), which returns output and (keys, values).

    Returns:
        Hidden states [B, T, H] after the final norm, and the keys and the values of all layers.
    """
    cos, sin = model.language_model.rotary(position_ids)
    keys_values = []
    for i, layer in enumerate(layers):
        x, layer_keys_values = layer(x, cos, sin, functools.partial(attend, i))
        keys_values.append(layer_keys_values)
    return model.language_model.norm(x), *zip(*keys_values, strict=True)


def _choose_tokens(logits: jax.Array, state: DecodeState, sampling: Sampling) -> DecodeState:
    """Returns the state with the next token of each row, from logits [B, V]; rows that have ended get the padding token.

    A row ends where its logits are not finite, and NON_FINITE is recorded as its token.
    """
    step, generated, history = state.step, state.generated, state.history
    token = next_token(constrain_logits(logits, sampling, history, step), sampling, step)
    chosen = logits[jnp.arange(len(token)), token]  # not finite if any logit of the row is NaN or +inf, or all are -inf
    failed = ~jnp.isfinite(chosen) & ~state.done
    done = state.done | failed
    token = jnp.where(done, sampling.pad_token, token)
    new = [jnp.where(failed, NON_FINITE, token), None, None, None]
    if sampling.logprobs is not None:
        new[1:] = (
            jnp.where(done.reshape(-1, *[1] * (x.ndim - 1)), 0, x)
            for x in token_logprobs(logits, token, sampling.logprobs)
        )
    generated = Generated(
        *(array if array is None else array.at[:, step].set(x) for array, x in zip(generated, new, strict=True))
    )
    return dataclasses.replace(
        state,
        step=step + 1,
        token=token,
        done=done | jnp.isin(token, sampling.end_tokens),
        history=history and history.append(token),
        generated=generated,
    )


# ---- inside a caller's program -----------------------------------------------------------------------------------------


def generate_traced(model: Qwen2VL, batch: Batch, options: GenerationOptions, seed: Any = None) -> Generated:
    """Generates as a `DecodeSession` does, as part of a program that the caller traces, such as a function under `jax.jit`.

    A row whose logits are not finite ends with padding, since a program cannot raise an error.

    Args:
        model: the model; its arrays may be traced, as may those of the batch.
        batch: prompts, as `prepare` returns them.
        options: generation options.
        seed: a traced integer, or one per prompt, which replaces that of the options.

    Returns:
        The new tokens, with None for log-probabilities that were not requested.
    """
    prompts, samples = batch.shape[0], options.num_return_sequences
    check_prompts(model.config, batch, options.max_new_tokens)
    options.check_against(model.config, prompts)
    sampling = Sampling.from_options(options, model.config, prompts, prompts * samples, seed=seed)
    batch = dataclasses.replace(batch, labels=None)
    return _traced_program(model, batch, sampling, samples=samples, limit=options.max_new_tokens)


@functools.partial(jax.jit, static_argnames=("samples", "limit"))
def _traced_program(model: Qwen2VL, batch: Batch, sampling: Sampling, *, samples: int, limit: int) -> Generated:
    run = functools.partial(_prefill_and_decode, samples=samples, limit=limit)
    return run_on_auto_axes(run, model, batch, sampling, rows_of=batch.input_ids)


def _prefill_and_decode(model: Qwen2VL, batch: Batch, sampling: Sampling, *, samples: int, limit: int) -> Generated:
    """Returns `limit` new tokens for each of `samples` rows per prompt. Runs the compiled functions in their order."""
    rows, room = batch.shape[0] * samples, bucket(limit, NEW_TOKENS)
    has_context = not jax.sharding.get_abstract_mesh().empty
    with mesh_context(None if has_context else find_abstract_mesh((model, batch))):
        # unwrapped: JAX allows compiler options only for whole programs, and `run_on_auto_axes` needs a new trace
        hidden, keys_values = inspect.unwrap(prefill)(model, batch)
        first_step = first_token_logits(model, hidden, batch.position_ids, batch.segment_ids, np.int32(0))
        cache, history = init_cache(*keys_values, batch.segment_ids, room=room), None
        if samples > 1:
            cache, first_step = repeat_rows((cache, first_step), samples)
        if sampling.needs_history:
            ids, segments = (jnp.repeat(x, samples, axis=0) for x in (batch.input_ids, batch.segment_ids))
            history = History.from_prompts(ids, segments, cache.valid.shape[1])
        state, _ = init_decode_state(first_step, sampling, history, room=room)
        if limit > 1:
            arguments = model, decode_weights(model), cache, state, sampling
            _, state, _ = inspect.unwrap(decode_loop)(*arguments, stopped=np.zeros(rows, bool), until=np.int32(limit))
    generated = Generated(*(array if array is None else array[:, :limit] for array in state.generated))
    tokens = jnp.where(generated.tokens == NON_FINITE, sampling.pad_token, generated.tokens)
    return generated._replace(tokens=tokens)
