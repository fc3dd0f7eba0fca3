"""The compiled programs that turn prompts into new tokens: a prefill, then one loop that generates the tokens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from liger_jax import runtime
from liger_jax.generation.sampling import (
    History,
    Sampling,
    constrain_logits,
    next_token,
    next_token_over_shards,
    token_logprobs,
)
from liger_jax.inputs.batch import Batch
from liger_jax.model import QwenVL
from liger_jax.model.decode_layout import SINGLE_DEVICE, DecodeLayout
from liger_jax.model.fused_decode import PackedModel, decode_step
from liger_jax.model.kv_cache import KVCache
from liger_jax.model.qwen_vl import causal_attention
from liger_jax.model.text import DecoderLayer, Deepstack, rotary_tables

NON_FINITE = -1  # recorded in place of a token that was chosen by a logit that is NaN or infinite
NEW_TOKENS = 64  # smallest bucket of room for new tokens, see `bucket`


class Generated(NamedTuple):
    """New tokens and their log-probabilities, which are 0 after a row's end."""

    tokens: Any  # [B, T] int32
    logprobs: Any  # [B, T] float32: log-probability of each token
    top_tokens: Any  # [B, T, n] int32: the n most likely tokens at each position, most likely first
    top_logprobs: Any  # [B, T, n] float32: their log-probabilities


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
def prefill(model: QwenVL, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
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

    x, deepstack = model.embed(batch)
    return model.language_model(x, batch.position_ids, attend, deepstack=deepstack)


@jax.jit
def first_token_logits(
    model: QwenVL, hidden: jax.Array, position_ids: jax.Array, segment_ids: jax.Array, slot: jax.Array
) -> FirstStep:
    """Returns the first step after prompts with hidden states [B, T, H] that occupy the cache from `slot` on."""
    valid = segment_ids > 0
    last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
    logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    position = jnp.take_along_axis(position_ids, last[:, None, None], axis=2)[..., 0] + 1
    empty = ~valid.any(axis=1)
    return FirstStep(logits.astype(jnp.float32), position, slot + last.max() + 1, empty)


@functools.partial(jax.jit, static_argnames=("room", "layout"))
def init_cache(
    keys: jax.Array, values: jax.Array, segment_ids: jax.Array, *, room: int, layout: DecodeLayout
) -> KVCache:
    """Returns the KV cache of a prefill, with room for new tokens, in the layout for decoding."""
    return KVCache.from_prompt(keys, values, segment_ids, room, layout)


@functools.partial(jax.jit, donate_argnames="cache")
def extend(model: QwenVL, cache: KVCache, batch: Batch, slot: jax.Array) -> tuple[jax.Array, KVCache]:
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

    x, deepstack = model.embed(batch)
    hidden, keys, values = _run_layers(model, unstack_layers(model), x, batch.position_ids, attend, deepstack)
    cache = dataclasses.replace(cache, keys=keys, values=values).mark_valid(slot, segments)
    return hidden, cache.constrain()


@functools.partial(jax.jit, static_argnums=1)
def repeat_rows(tree: tuple[KVCache, FirstStep], count: int) -> tuple[KVCache, FirstStep]:
    """Returns the tree with each row repeated `count` times; the copies are adjacent."""
    cache, first_step = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0) if x.ndim else x, tree)
    return cache.constrain(), first_step


@functools.partial(jax.jit, static_argnames="room")
def grow(cache: KVCache, *, room: int) -> KVCache:
    """Returns the cache with `room` more slots."""
    return cache.grow(room)


@functools.partial(jax.jit, static_argnames=("room", "layout"))
def init_decode_state(
    first_step: FirstStep, sampling: Sampling, history: History | None, *, room: int, layout: DecodeLayout
) -> tuple[DecodeState, tuple]:
    """Chooses each row's first token. Returns the state and a snapshot of it (generated, step, done)."""
    rows, generated = len(first_step.logits), Generated(None, None, None, None)
    if sampling.logprobs is not None:
        top = (rows, room, sampling.logprobs)
        generated = Generated(None, jnp.zeros((rows, room)), jnp.zeros(top, jnp.int32), jnp.zeros(top))
    generated = generated._replace(tokens=jnp.full((rows, room), sampling.pad_token, jnp.int32))
    token = jnp.zeros(rows, jnp.int32)
    state = DecodeState(jnp.int32(0), token, first_step.position, first_step.slot, first_step.empty, history, generated)
    state = _choose_tokens(first_step.logits, state, sampling)
    return layout.constrain(state, layout.row_specs(state)), _snapshot(state, layout)


def decode_weights(model: QwenVL, layout: DecodeLayout) -> PackedModel:
    """Returns the weights that `decode_loop` reads, laid out for it on the current mesh."""
    return PackedModel.from_model(model.language_model, model.head, layout)


@functools.partial(jax.jit, donate_argnames=("cache", "state"), compiler_options=runtime.DECODE_COMPILER_OPTIONS)
def decode_loop(
    weights: PackedModel,
    cache: KVCache,
    state: DecodeState,
    sampling: Sampling,
    *,
    stopped: jax.Array,
    until: jax.Array,
) -> tuple[KVCache, DecodeState, tuple]:
    """Generates tokens until each row has `until` of them or all rows have ended.

    Args:
        weights: the model's weights, as `decode_weights` returns them.
        cache: the KV cache; donated.
        state: the state of the loop; donated.
        sampling: how tokens are chosen.
        stopped: [B] bool, rows that the host has ended.
        until: scalar, number of new tokens per row.

    Returns:
        The cache, the state, and a snapshot of the state (generated, step, done), whole on each device.
    """
    layout = weights.layout
    state = dataclasses.replace(state, done=state.done | stopped)
    carry_specs = cache.specs(), layout.row_specs(state)
    in_specs = weights.specs(), *carry_specs, sampling.specs(layout.spec("B")), P()
    run = layout.on_each_device(_decode_until, in_specs, carry_specs)
    cache, state = run(weights, cache, state, sampling, until)
    return cache, state, _snapshot(state, layout)


def _decode_until(
    weights: PackedModel, cache: KVCache, state: DecodeState, sampling: Sampling, until: jax.Array
) -> tuple[KVCache, DecodeState]:
    """Runs the loop on the rows, heads and columns of one device. Devices with other rows may end earlier or later."""
    layout = weights.layout

    def unfinished(carry):
        _, state = carry
        return (state.step < until) & ~state.done.all()

    def one_token(carry):
        cache, state = carry
        cos, sin = (table[:, 0] for table in rotary_tables(weights.config, state.position[..., None]))
        logits, cache = decode_step(weights, weights.embedding[state.token], cos, sin, cache, state.slot)
        state = dataclasses.replace(state, position=state.position + 1, slot=state.slot + 1)
        return cache, _choose_tokens(logits, state, sampling, layout)

    cache, state = jax.lax.while_loop(unfinished, one_token, (cache, state))
    if layout.row_axes:  # scalars must be equal on all devices
        step, slot = jax.lax.pmax((state.step, state.slot), layout.row_axes)
        state = dataclasses.replace(state, step=step, slot=slot)
    return cache, state


def unstack_layers(model: QwenVL) -> list[DecoderLayer]:
    """Returns separate arrays for each layer's weights: a loop over the stack would copy a slice of it in every step."""
    layers = model.language_model.layers
    return [jax.tree.map(lambda w, i=i: w[i], layers) for i in range(model.config.text.num_hidden_layers)]


def _snapshot(state: DecodeState, layout: DecodeLayout) -> tuple[Generated, jax.Array, jax.Array]:
    """Returns what the host reads: all tokens, their number per row, and the rows that have ended."""
    return layout.constrain((state.generated, state.step, state.done), P())


def _run_layers(
    model: QwenVL,
    layers: list[DecoderLayer],
    x: jax.Array,
    position_ids: jax.Array,
    attend: Callable[..., tuple[jax.Array, Any]],
    deepstack: Deepstack | None = None,
) -> tuple:
    """Runs x [B, T, H] through all layers; layer i calls attend(i, q, k, v), which returns output and (keys, values).

    Returns:
        Hidden states [B, T, H] after the final norm, and the keys and the values of all layers.
    """
    cos, sin = model.language_model.rotary(position_ids)
    keys_values = []
    for i, layer in enumerate(layers):
        x, layer_keys_values = layer(x, cos, sin, functools.partial(attend, i))
        if deepstack is not None and i < len(deepstack.features):
            x = deepstack.add(x, deepstack.features[i])
        keys_values.append(layer_keys_values)
    return model.language_model.norm(x), *zip(*keys_values, strict=True)


def _choose_tokens(
    logits: jax.Array, state: DecodeState, sampling: Sampling, layout: DecodeLayout = SINGLE_DEVICE
) -> DecodeState:
    """Returns the state with the next token of each row; rows that have ended get the padding token.

    A row ends where its logits are not finite, and NON_FINITE is recorded as its token.

    Args:
        logits: [B, V], or the part of it that `layout` gives to a device.
        state: the state.
        sampling: how tokens are chosen.
        layout: that of the logits.
    """
    step, generated, history, is_split = state.step, state.generated, state.history, "V" in layout.split
    if is_split and sampling.needs_all_logits:
        logits, is_split = jax.lax.all_gather(logits, layout.column_axes, axis=1, tiled=True), False
    logits = logits.astype(jnp.float32)
    if is_split:
        token, chosen = next_token_over_shards(logits, sampling, step, layout.column_axes)
    else:
        token = next_token(constrain_logits(logits, sampling, history, step), sampling, step)
        chosen = logits[jnp.arange(len(token)), token]
    # the chosen logit is not finite if any logit of the row is NaN or +inf, or all are -inf
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
