"""From prompts to tokens on the device: one compiled pass over the prompts, then one compiled loop over the new tokens."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from liger_jax import runtime
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.sampling import History, Sampling, constrain, log_probabilities, next_token
from liger_jax.inputs.batch import Batch, bucket
from liger_jax.model import Qwen2VL
from liger_jax.model.fused_decode import PackedModel, decode_step
from liger_jax.model.kv_cache import Cache
from liger_jax.model.lora import lora_config
from liger_jax.model.qwen2_vl import attend_row
from liger_jax.model.sharding import get_mesh, mesh_context, shard_batch
from liger_jax.model.text import DecoderLayer

NEW_TOKENS = 64  # room for new tokens comes in multiples of this
CHUNK = 8  # tokens that the device makes while the host looks at those before


class Generated(NamedTuple):
    """Tokens with what the model thought of them; 0 behind a row's end."""

    tokens: np.ndarray  # [B, T] int32
    logprobs: np.ndarray  # [B, T] float32: log-probability of each
    top_tokens: np.ndarray  # [B, T, n] int32: the n most likely in its place, most likely first
    top_logprobs: np.ndarray  # [B, T, n] float32


def start_decoding(model: Qwen2VL, batch: Batch, options: GenerationOptions) -> "Decoding":
    """Reads the prompts and chooses each row's first token."""
    check_prompts(batch, options.max_new_tokens, model.config.text.max_position_embeddings)
    mesh, prompts = get_mesh(model), (np.asarray(batch.input_ids), np.asarray(batch.segment_ids))
    options.check_tokens(model.config, len(prompts[0]))
    batch = shard_batch(dataclasses.replace(batch, labels=None), mesh)
    with mesh_context(mesh):
        hidden, written = prefill(model, batch)
        start = first_token_logits(model, hidden, batch.position_ids, batch.segment_ids, np.int32(0))
        cache = init_cache(*written, batch.segment_ids, room=bucket(options.max_new_tokens, NEW_TOKENS))
        if options.num_return_sequences > 1:
            cache, start = repeat_rows((cache, start), options.num_return_sequences)
    return Decoding(model, cache, start, options, *prompts)


def check_prompts(batch: Batch, max_new_tokens: int, max_positions: int) -> None:
    if not isinstance(batch, Batch):
        raise ValueError(
            f"The prompts are a {type(batch).__name__}; expected a Batch, as prepare(model.config, ...) returns"
        )
    segments = np.asarray(batch.segment_ids)
    if segments.max() > 1:
        row = int(np.argmax(segments.max(axis=1)))
        raise ValueError(f"Row {row} holds {segments.max()} packed sequences; expected one prompt a row")
    if not segments.any(axis=1).all():
        raise ValueError(f"Row {int(np.argmin(segments.any(axis=1)))} has no tokens; expected a prompt in every row")
    last = int(np.asarray(batch.position_ids).max()) + max_new_tokens
    if last >= max_positions:
        raise ValueError(
            f"The prompts and {max_new_tokens} new tokens reach position {last}; the model has {max_positions} "
            "(max_position_embeddings)"
        )


class Decoding:
    """Prompts that are being continued, some tokens at a time.

    Iterating gives the tokens so far, [rows, longer and longer], until all rows have ended or have `limit` tokens; the
    device meanwhile makes the next ones. Who reads may end a row: `stopped[row] = True`, and say after how many tokens in
    `length[row]`.
    """

    def __init__(
        self,
        model: Qwen2VL,
        cache: Cache,
        start: "Start",
        options: GenerationOptions,
        input_ids: np.ndarray,
        segment_ids: np.ndarray,
    ):
        """input_ids, segment_ids [B, L] are all of the prompts, each row of which `start` has as often as options say."""
        prompts, samples, rows = len(input_ids), options.num_return_sequences, len(start.empty)
        self.model, self.cache, self.limit = model, cache, options.max_new_tokens
        self.stopped = np.zeros(prompts * samples, bool)
        self.length = np.full(prompts * samples, self.limit)
        self.sampling = options.sampling(model.config, prompts, rows)
        history = None
        if self.sampling.looks_back:
            fill = [(0, rows // samples - prompts), (0, 0)]
            ids, segments = (np.pad(array, fill).repeat(samples, axis=0) for array in (input_ids, segment_ids))
            history = History.of_prompts(ids, segments, cache.valid.shape[1])
        self._mesh, self._layers, self._until = get_mesh(model), None, 1
        with mesh_context(self._mesh):
            room = bucket(self.limit, NEW_TOKENS)
            self._progress, self._last = begin(start, self.sampling, history, room=room)
            if self.limit > 1:  # while the device reads the prompts
                self._layers = decode_weights(model)

    def advance(self, tokens: int) -> None:
        """Lets the device make up to so many more tokens a row; does not wait for it."""
        if self._until == self.limit:
            return
        self._until = min(self._until + tokens, self.limit)
        stopped = np.ones(len(self.sampling.seeds), bool)
        stopped[: len(self.stopped)] = self.stopped
        with mesh_context(self._mesh):
            self._layers = self._layers or decode_weights(self.model)
            self.cache, self._progress, self._last = decode(
                self.model,
                self._layers,
                self.cache,
                self._progress,
                self.sampling,
                stopped=stopped,
                until=np.int32(self._until),
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        rows, finished = len(self.stopped), False
        try:
            while not finished:
                last, until = self._last, self._until
                if until > 1:  # the first token does not wait for the loop to be compiled
                    self.advance(CHUNK)
                tokens, step, done = jax.device_get(last)
                yield tokens[:rows, :step]
                finished = until == self.limit or (done[:rows] | self.stopped).all()
                if until == 1 and not finished:
                    self.advance(CHUNK)
        finally:
            self._layers = None  # a copy of most weights; a chat keeps the cache alone

    def result(self) -> Generated:
        """All tokens; waits for the device."""
        found = jax.device_get(self._progress.told)
        rows, behind = len(self.stopped), np.arange(self.limit) >= self.length[:, None]

        def cut(array, fill):  # on the host: a cut on the device compiles for each length
            array = np.array(array[:rows, : self.limit])
            array[behind] = fill
            return array

        return Generated(
            *(array if array is None else cut(array, i == 0 and self.sampling.pad) for i, array in enumerate(found))
        )


# ---- what is compiled ------------------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "position", "slot", "empty"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Start:
    """What decoding starts from, beside the cache."""

    logits: jax.Array  # [B, V] float32, for the first new token
    position: jax.Array  # [B, 3]: (t, h, w) of the first new token
    slot: jax.Array  # of the cache, that it goes to
    empty: jax.Array  # [B] bool: rows that only fill up a mesh


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "token", "position", "slot", "done", "history", "told"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Progress:
    """How far decoding has come, beside the cache."""

    step: jax.Array  # tokens chosen in a row
    token: jax.Array  # [B] int32: the last of them, which the cache has not got yet
    position: jax.Array  # [B, 3]: (t, h, w) of that token
    slot: jax.Array  # of the cache, that it goes to
    done: jax.Array  # [B] bool
    history: History | None  # if the choice depends on it
    told: Generated  # all tokens, with room for those to come; logprobs and the others None if not asked for


@functools.partial(jax.jit, compiler_options=runtime.COMPILER_OPTIONS)
def prefill(model: Qwen2VL, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Reads the prompts once, vision tower and all layers; -> hidden [B, T, H], keys and values [layers, B, T, K, D].

    `first_token_logits` and `init_cache` make of them what decoding takes. They are programs of their own: this one takes the longest
    to compile, and how many tokens are to come is none of its business; and with the first logits in it XLA took 15 to
    24 s in place of 2 for one row of 2048 tokens on a GPU.
    """
    segments = pk.find_segments(batch.segment_ids, batch.max_segments)

    def attend(q, k, v):
        return attend_row(segments, q, k, v)[0], (k, v)

    return model.language_model(model.embed(batch), batch.position_ids, attend)


@jax.jit
def first_token_logits(
    model: Qwen2VL, hidden: jax.Array, position_ids: jax.Array, segment_ids: jax.Array, slot: jax.Array
) -> Start:
    """What follows prompts, hidden [B, T, H], whose columns go to the cache's slots from `slot` on."""
    valid = segment_ids > 0
    last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
    logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    position = jnp.take_along_axis(position_ids, last[:, None, None], axis=2)[..., 0] + 1
    empty = ~valid.any(axis=1)
    return Start(logits.astype(jnp.float32), position, slot + last.max() + 1, empty)


@functools.partial(jax.jit, static_argnames="room")
def init_cache(keys: jax.Array, values: jax.Array, segment_ids: jax.Array, *, room: int) -> Cache:
    """What `prefill` wrote, with room for new tokens."""
    return Cache.of_prompt(keys, values, segment_ids, room)


@functools.partial(jax.jit, donate_argnames="cache")
def extend(model: Qwen2VL, cache: Cache, batch: Batch, slot: jax.Array) -> tuple[jax.Array, Cache]:
    """Reads more of prompts whose beginning is in the first `slot` slots of the cache; forgets what is behind them.

    -> hidden [B, T, H] of what is new, and the cache. The batch holds the new tokens and pictures, with the positions that
    they have in the whole.
    """
    cache, segments = cache.keep(slot), (batch.segment_ids > 0).astype(jnp.int32)

    def attend(i, q, k, v):
        return cache.attend_many(i, slot, segments, q, k, v)

    hidden, keys, values = _through(model, split_layers(model), model.embed(batch), batch.position_ids, attend)
    return hidden, dataclasses.replace(cache, keys=keys, values=values).open_slots(slot, segments)


@functools.partial(jax.jit, static_argnums=1)
def repeat_rows(tree: tuple[Cache, Start], count: int) -> tuple[Cache, Start]:
    """Each row `count` times."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0) if x.ndim else x, tree)


@functools.partial(jax.jit, static_argnames="room")
def grow(cache: Cache, *, room: int) -> Cache:
    """The cache with `room` more slots."""
    return cache.grow(room)


@functools.partial(jax.jit, static_argnames="room")
def begin(start: Start, sampling: Sampling, history: History | None, *, room: int) -> tuple[Progress, tuple]:
    """Chooses the first token; -> progress, and tokens, step, done to look at."""
    rows, told = len(start.logits), Generated(None, None, None, None)
    if sampling.logprobs is not None:
        top = (rows, room, sampling.logprobs)
        told = Generated(None, jnp.zeros((rows, room)), jnp.zeros(top, jnp.int32), jnp.zeros(top))
    told = told._replace(tokens=jnp.full((rows, room), sampling.pad, jnp.int32))
    nothing = jnp.zeros(rows, jnp.int32)
    progress = Progress(jnp.int32(0), nothing, start.position, start.slot, start.empty, history, told)
    progress = _choose(start.logits, progress, sampling)
    return progress, (progress.told.tokens, progress.step, progress.done)


@jax.jit
def split_layers(model: Qwen2VL) -> list[DecoderLayer]:
    """Each layer's weights as arrays of their own: a loop that slices the stack copies the slice in each step."""
    layers = model.language_model.layers
    return [jax.tree.map(lambda w, i=i: w[i], layers) for i in range(model.config.text.num_hidden_layers)]


def decode_weights(model: Qwen2VL) -> PackedModel | list[DecoderLayer]:
    """What `decode` reads at each step: packed, but for a mesh, where layers keep their sharding, and for LoRA."""
    if get_mesh(model) is None and lora_config(model) is None:
        return PackedModel.of(model.language_model, model.head)
    return split_layers(model)


@functools.partial(jax.jit, donate_argnames=("cache", "progress"))
def decode(
    model: Qwen2VL,
    weights: PackedModel | list[DecoderLayer],
    cache: Cache,
    progress: Progress,
    sampling: Sampling,
    *,
    stopped: jax.Array,
    until: jax.Array,
) -> tuple[Cache, Progress, tuple]:
    """Goes on to `until` tokens a row, or to where all rows have ended; -> cache, progress, tokens, step, done.

    `weights` are the model's, see `decode_weights`; `stopped` [B] bool: rows that the host has ended.
    """

    def unfinished(carry):
        _, progress = carry
        return (progress.step < until) & ~progress.done.all()

    def one_token(carry):
        cache, progress = carry
        x = model.language_model.embed_tokens.weight[progress.token]
        if isinstance(weights, PackedModel):
            cos, sin = (table[:, 0] for table in model.language_model.rotary(progress.position[..., None]))
            logits, cache = decode_step(weights, x, cos, sin, cache, progress.slot)
        else:
            cache = cache.open_slots(progress.slot, jnp.ones((len(x), 1), jnp.int32))

            def attend(i, q, k, v):
                return cache.attend(i, progress.slot, q, k, v)

            hidden, keys, values = _through(model, weights, x[:, None], progress.position[..., None], attend)
            logits, cache = model.logits(hidden[:, 0]), dataclasses.replace(cache, keys=keys, values=values)
        progress = dataclasses.replace(progress, position=progress.position + 1, slot=progress.slot + 1)
        return cache, _choose(logits.astype(jnp.float32), progress, sampling)

    progress = dataclasses.replace(progress, done=progress.done | stopped)
    cache, progress = jax.lax.while_loop(unfinished, one_token, (cache, progress))
    return cache, progress, (progress.told.tokens, progress.step, progress.done)


def _through(model: Qwen2VL, layers: list[DecoderLayer], x: jax.Array, position_ids: jax.Array, attend) -> tuple:
    """x [B, T, H] through all layers, layer i with attend(i, q, k, v) -> out, its cache; -> hidden, all keys, all values."""
    cos, sin = model.language_model.rotary(position_ids)
    written = []
    for i, layer in enumerate(layers):
        x, keys_values = layer(x, cos, sin, functools.partial(attend, i))
        written.append(keys_values)
    return model.language_model.norm(x), *zip(*written, strict=True)


def _choose(logits: jax.Array, progress: Progress, sampling: Sampling) -> Progress:
    """The next token of each row by its logits [B, V]; rows that have ended get `pad`."""
    done, step, told, history = progress.done, progress.step, progress.told, progress.history
    token = next_token(constrain(logits, sampling, history, step), sampling, step)
    token = jnp.where(done, sampling.pad, token)
    new = [token, None, None, None]
    if sampling.logprobs is not None:
        new[1:] = (
            jnp.where(done.reshape(-1, *[1] * (x.ndim - 1)), 0, x)
            for x in log_probabilities(logits, token, sampling.logprobs)
        )
    told = Generated(
        *(old if old is None else old.at[:, step].set(value) for old, value in zip(told, new, strict=True))
    )
    return dataclasses.replace(
        progress,
        step=step + 1,
        token=token,
        done=done | jnp.isin(token, sampling.ends),
        history=history and history.append(token),
        told=told,
    )
