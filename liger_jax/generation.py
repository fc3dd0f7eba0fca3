"""Generation: one compiled pass over the prompt, then one compiled loop over the new tokens."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from liger_jax.batch import Batch, bucket
from liger_jax.mesh import mesh_context, mesh_of, put_batch
from liger_jax.model import Qwen2VL
from liger_jax.model.cache import Cache
from liger_jax.model.qwen2_vl import attend_row
from liger_jax.sampling import Sampling, next_token, penalise_repetition

NEW_TOKENS = 64  # room for new tokens comes in multiples of this


def generate(
    model: Qwen2VL,
    batch: Batch,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Continues every row of a batch; -> the new tokens, [B, max_new_tokens] int32, in host memory.

    A row ends at its first end token; what follows in it is `pad_token_id`. The loop stops when all rows have ended.
    Compiles once for each bucket of prompt shapes and of `max_new_tokens`.

    Args:
        batch: prompts, as `prepare` returns them; padded on any side, one sequence a row.
        eos_token_id: one or several end tokens; None: the checkpoint's, () for none.
        pad_token_id: None: the checkpoint's, or else the first end token.
        do_sample: draw from the distribution; otherwise the most likely token is taken.
        temperature, top_k, top_p, min_p: applied in this order, as in transformers; None leaves a filter out.
        repetition_penalty: above 1 makes tokens that occurred less likely; the prompt's count too.
        seed: equal seeds give equal tokens, whatever rows stand beside.

    Raises:
        ValueError: an option out of range, packed rows, a row without tokens, or more positions than the model has.

    Example:
        >>> import numpy as np
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, generate, prepare
        >>> model = Qwen2VL.init(Qwen2VLConfig.tiny())
        >>> generate(model, prepare(model.config, input_ids=np.array([[5, 6, 7]])), max_new_tokens=4).shape
        (1, 4)
    """
    config, rows = model.config, batch.shape[0]
    penalty = None if repetition_penalty == 1 else repetition_penalty
    sampling = Sampling(do_sample, temperature, top_k or None, top_p, min_p, penalty, seed)
    sampling.check()
    _check_prompts(batch, max_new_tokens, config.text.max_position_embeddings)
    eos = config.eos_token_ids if eos_token_id is None else tuple(np.atleast_1d(np.asarray(eos_token_id, np.int64)))
    if pad_token_id is None:
        pad_token_id = config.pad_token_id if config.pad_token_id is not None else eos[0] if eos else 0
    for token in (*eos, pad_token_id):
        if not 0 <= token < config.text.vocab_size:
            raise ValueError(f"Token {token} is no id of the vocabulary, which has {config.text.vocab_size}")

    mesh = mesh_of(model)
    batch = dataclasses.replace(batch, labels=None)
    room = bucket(max_new_tokens, NEW_TOKENS)
    ends = np.full(-(-max(len(eos), 1) // 4) * 4, -1, np.int32)  # padded, so that one end token more compiles nothing
    ends[: len(eos)] = eos
    with mesh_context(mesh):
        cache, start = prefill(model, put_batch(batch, mesh), room=room, track_seen=penalty is not None)
        limit, pad = np.int32(max_new_tokens), np.int32(pad_token_id)
        tokens, _ = decode(model, cache, start, sampling, ends=ends, pad=pad, limit=limit, room=room)
    return np.asarray(tokens)[:rows, :max_new_tokens]  # cut on the host: a cut on the device compiles for each length


def _check_prompts(batch: Batch, max_new_tokens: int, max_positions: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "position", "seen", "empty"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Start:
    """What decoding starts from, beside the cache."""

    logits: jax.Array  # [B, V] float32, for the first new token
    position: jax.Array  # [B, 3]: (t, h, w) of the first new token
    seen: jax.Array | None  # [B, V] bool: tokens that occurred, if a penalty asks for them
    empty: jax.Array  # [B] bool: rows that only fill up a mesh


@functools.partial(jax.jit, static_argnames=("room", "track_seen"))
def prefill(model: Qwen2VL, batch: Batch, *, room: int, track_seen: bool) -> tuple[Cache, Start]:
    """Reads the prompts once: vision tower, all layers, and the logits of each row's last token."""
    text = model.language_model
    segments = pk.find_segments(batch.segment_ids, batch.max_segments)

    def attend(q, k, v):
        return attend_row(segments, q, k, v)[0], (k, v)

    hidden, (keys, values) = text(model.embed(batch), batch.position_ids, attend)
    valid = batch.segment_ids > 0
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    position = jnp.take_along_axis(batch.position_ids, last[:, None, None], axis=2)[..., 0] + 1
    seen = None
    if track_seen:
        ids = jnp.where(valid, batch.input_ids, model.config.text.vocab_size)
        none = jnp.zeros((len(ids), model.config.text.vocab_size), bool)
        seen = jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(none, ids)
    cache = Cache.of_prompt(keys, values, batch.segment_ids, room)
    return cache, Start(logits.astype(jnp.float32), position, seen, ~valid.any(axis=1))


@functools.partial(jax.jit, static_argnames="room", donate_argnames="cache")
def decode(
    model: Qwen2VL,
    cache: Cache,
    start: Start,
    sampling: Sampling,
    *,
    ends: jax.Array,
    pad: jax.Array,
    limit: jax.Array,
    room: int,
) -> tuple[jax.Array, Cache]:
    """Chooses up to `limit` tokens a row; -> [B, room] int32 with `pad` behind a row's end, and the cache, in place."""
    text = model.language_model
    # each layer's weights as arrays of their own: a loop that slices the stack copies the slice in each step
    layers = [jax.tree.map(lambda w, i=i: w[i], text.layers) for i in range(model.config.text.num_hidden_layers)]
    rows = jnp.arange(len(start.logits))

    def choose(logits, seen, done, step):
        if seen is not None:
            logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
        token = jnp.where(done, pad, next_token(logits, sampling, step))
        seen = None if seen is None else seen.at[rows, token].set(True)
        return token, seen, done | jnp.isin(token, ends)

    def unfinished(carry):
        step, _, _, _, _, done = carry
        return (step < limit) & ~done.all()

    def one_token(carry):
        step, tokens, cache, token, seen, done = carry
        cache = cache.open_slot(step - 1)
        x = text.embed_tokens.weight[token][:, None]
        cos, sin = text.rotary(start.position[..., None] + (step - 1))
        written = []
        for i, layer in enumerate(layers):
            x, keys_values = layer(x, cos, sin, functools.partial(cache.attend, i, step - 1))
            written.append(keys_values)
        keys, values = zip(*written, strict=True)
        cache = dataclasses.replace(cache, keys=keys, values=values)
        logits = model.logits(text.norm(x)[:, 0]).astype(jnp.float32)
        token, seen, done = choose(logits, seen, done, step)
        return step + 1, tokens.at[:, step].set(token), cache, token, seen, done

    token, seen, done = choose(start.logits, start.seen, start.empty, 0)
    tokens = jnp.full((len(token), room), pad, jnp.int32).at[:, 0].set(token)
    _, tokens, cache, *_ = jax.lax.while_loop(unfinished, one_token, (jnp.int32(1), tokens, cache, token, seen, done))
    return tokens, cache
