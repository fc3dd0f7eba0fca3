"""Scaled dot-product attention with grouped heads, a causal mask and segments."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import _cudnn, _flash_attention, _pallas, _sharding, _validate

IMPLEMENTATIONS = (*_validate.IMPLEMENTATIONS, "cudnn")
OF_OURS = ("triton", "interpret")  # the names of the kernels in _flash_attention
FEWEST_SLOTS = 2  # of segments in a row: with one, cuDNN takes the row for a single unpacked sequence
BLOCK_BYTES = 2**28  # of scores that the XLA implementation has in memory at once
NOTHING = -1e30  # the score of a masked key: finite, so that a row without keys is no NaN


class Segments(NamedTuple):
    """Where the segments of each row lie, as `find_segments` found out."""

    ids: jax.Array  # [B, T] int32: 1, 2, ... in the order of the row; 0 is padding
    starts: jax.Array  # [B, M] int32: first token of each segment, -1 where there is none
    lengths: jax.Array  # [B, M] int32: its tokens, -1 where there is none


def find_segments(segment_ids: jax.Array, max_segments: int) -> Segments:
    """Looks up once what many calls of `attention` need to know of the segments, such as the layers of a model.

    Args:
        segment_ids: [B, T], int; 0 is padding. The tokens of a segment lie side by side.
        max_segments: the most segments in any row, padding aside. Of a row with more than that cuDNN gives NaN in the
            tokens of the rest; XLA is right for any number.

    Returns:
        What `attention` takes in place of `segment_ids`.

    Raises:
        ValueError: a shape, dtype or max_segments that does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import find_segments
        >>> find_segments(jnp.array([[7, 7, 7, 0, 5]]), max_segments=2).starts.tolist()
        [[0, 4]]
    """
    op = "find_segments"
    segment_ids = jnp.asarray(segment_ids)
    _validate.integer(op, segment_ids=segment_ids)
    if segment_ids.ndim != 2:
        raise ValueError(f"{op}: segment_ids has shape {segment_ids.shape}; expected [B, T]")
    if max_segments < 1:
        raise ValueError(f"{op}: max_segments is {max_segments}; expected max_segments >= 1")
    slots = max(FEWEST_SLOTS, max_segments)
    inside = segment_ids != 0
    first = inside & (segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1])
    ids = jnp.where(inside, jnp.cumsum(first, axis=1, dtype=jnp.int32), 0)
    of_slot = ids[:, :, None] == jnp.arange(1, slots + 1)
    lengths = jnp.sum(of_slot, axis=1, dtype=jnp.int32)
    tokens = jnp.arange(ids.shape[1], dtype=jnp.int32)
    starts = jnp.sum(jnp.where(of_slot & first[:, :, None], tokens[:, None], 0), axis=1, dtype=jnp.int32)
    return Segments(ids, *(jnp.where(lengths > 0, x, -1) for x in (starts, lengths)))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    segment_ids: jax.Array | Segments | None = None,
    kv_segment_ids: jax.Array | None = None,
    scale: float | None = None,
    max_segments: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale q k^T + mask) v, for each head; the scores are never in memory as a whole.

    Args:
        q: [B, T, N, D], float.
        k: [B, S, K, D], q's dtype; K divides N, and query head n uses key head n // (N / K).
        v: as k.
        causal: query t sees keys up to t + S - T: the last query is aligned with the last key.
        segment_ids: [B, T], int; a query sees the keys of its own segment only. 0 is padding: a query of segment 0 gives
            zeros and a key of segment 0 is seen by nobody, whatever finite numbers they hold; their gradients are zero.
            The tokens of a segment lie side by side. Or what `find_segments` returns, for keys and queries alike.
        kv_segment_ids: [B, S], int; None stands for segment_ids.
        scale: None for 1/sqrt(D).
        max_segments: the most segments in any row, see `find_segments`; cuDNN needs either.
        implementation: None, "cudnn", "triton", "xla" or "interpret". None on NVIDIA GPUs: cuDNN for what `cudnn_unsupported_reason`
            does not name; else "triton", kernels of our own, where `pallas_preferred`; else XLA, as for a single query.
            "triton" takes heads of up to 512 bytes, without kv_segment_ids, with a scale above 0.

    Returns:
        [B, T, N, D] in q's dtype; the softmax is float32, of float64 float64. Backward keeps q, k, v, the output and one
        such number (for cuDNN, one for each segment) a query and head; the last two go by the name "attention" in
        rematerialisation policies.

    Raises:
        ValueError: a shape, dtype or option that does not fit.
        NotImplementedError: an implementation asked for by name for what it cannot do.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Dao et al. 2022, FlashAttention,
        https://arxiv.org/abs/2205.14135

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import attention
        >>> q, v = jnp.ones((1, 2, 1, 4)), jnp.arange(8.0).reshape(1, 2, 1, 4)
        >>> attention(q, q, v, causal=True)[0, :, 0].tolist()
        [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0]]
    """
    op = "attention"
    _validate.known_implementation(op, implementation, IMPLEMENTATIONS)
    found = segment_ids if isinstance(segment_ids, Segments) else None
    ids = segment_ids if found is None else found.ids
    _check(op, q, k, v, ids, kv_segment_ids, max_segments)
    if found is not None and max_segments is not None:
        raise ValueError(f"{op}: max_segments is {max_segments} beside Segments, which say it; expected None")
    slots = max_segments if found is None else found.starts.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    refusals = {
        "cudnn": cudnn_unsupported_reason(q, k, causal, ids, kv_segment_ids, slots),
        **dict.fromkeys(OF_OURS, _flash_attention.refuses(q, kv_segment_ids, scale)),
    }
    if refusal := refusals.get(implementation):
        raise NotImplementedError(f"{op}: implementation {implementation!r} cannot do this: {refusal}")
    ours = implementation in OF_OURS
    if implementation is None:
        ours = bool(refusals["cudnn"]) and pallas_preferred(q) and not refusals["triton"]
        implementation = "xla" if q.shape[1] == 1 or (refusals["cudnn"] and not ours) else None
    if not q.size or not k.size:
        implementation = "xla"
    if ours:
        found = None  # the kernels need no slots
    elif ids is not None and found is None and implementation != "xla":
        found = find_segments(ids, slots)

    static = _Static(scale, causal, ids is not None, found is not None, implementation, ours)
    segments = () if ids is None else (ids, ids if kv_segment_ids is None else kv_segment_ids, *(found or ()))
    return _attention(static, *_sharding.agree(_forward_op(static), q, k, v, *segments))


def cudnn_unsupported_reason(
    q: jax.Array,
    k: jax.Array,
    causal: bool,
    segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    max_segments: int | None,
) -> str | None:
    """Why cuDNN cannot do it, or None. This is the whole rule by which cuDNN is chosen."""
    capability = _pallas.compute_capability()
    hopper = capability is None or capability >= 9.0
    ampere = capability is None or capability >= 8.0
    widest = 256 if hopper else 128
    reasons = {
        f"q is {q.dtype}, it takes bfloat16 and float16": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"D is {q.shape[-1]}, it takes multiples of 8 up to {widest}": q.shape[-1] % 8 or q.shape[-1] > widest,
        "q or k is empty": not q.size or not k.size,
        "causal, and as many queries as keys are needed then": causal and q.shape[1] != k.shape[1],
        "segment_ids without max_segments": segment_ids is not None and max_segments is None,
        "segments of keys that are not those of the queries": kv_segment_ids is not None,
        f"a GPU of compute capability {capability}, 8.0 is needed": not ampere,
        f"segments on a GPU of compute capability {capability}, 9.0 is needed": segment_ids is not None and not hopper,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def pallas_preferred(q: jax.Array) -> bool:
    """Whether None may choose our own kernels: where tensor cores take the dtype; float32 they multiply without."""
    capability = _pallas.compute_capability()
    return q.dtype in (jnp.bfloat16, jnp.float16) and (capability is None or capability >= 8.0)


def _check(op, q, k, v, segment_ids, kv_segment_ids, max_segments):
    _validate.floating(op, q=q, k=k, v=v)
    _validate.same_dtype(op, q=q, k=k, v=v)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q has shape {q.shape}, k {k.shape}; expected [B, T, N, D] and [B, S, K, D]")
    (batch, tokens, heads, dim), (_, sources, key_heads, _) = q.shape, k.shape
    if not dim:
        raise ValueError(f"{op}: q has shape {q.shape}; expected heads of one number at least")
    _validate.shape(op, "k", k.shape, (batch, sources, key_heads, dim))
    _validate.shape(op, "v", v.shape, k.shape)
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{op}: q has {heads} heads, k has {key_heads}; expected a divisor of {heads}")
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError(f"{op}: kv_segment_ids without segment_ids; expected both or segment_ids alone")
    if segment_ids is not None:
        kv_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
        _validate.integer(op, segment_ids=segment_ids, kv_segment_ids=kv_ids)
        _validate.shape(op, "segment_ids", segment_ids.shape, (batch, tokens))
        _validate.shape(op, "kv_segment_ids", kv_ids.shape, (batch, sources))
    if max_segments is not None and max_segments < 1:
        raise ValueError(f"{op}: max_segments is {max_segments}; expected max_segments >= 1 or None")


class _Static(NamedTuple):
    scale: float
    causal: bool
    segmented: bool  # ids of queries and of keys follow q, k, v
    found: bool  # and then the fields of Segments
    implementation: str | None
    ours: bool  # the kernels of _flash_attention rather than cuDNN's


# ---- XLA implementation: all keys at once for a block of queries ------------------------------------------------------
# b batch, t queries, s keys, k key heads, g query heads that share one, d head size


def _forward_xla(static: _Static, q, k, v, *ids):
    """-> out [B, T, N, D], log-sum-exp of the scores [B, 1, N, T] (infinite where a query sees no key)."""
    wide = _validate.wide(q.dtype)
    queries = _grouped(q, k)

    def block(_, rows):
        q, position, *query_ids = rows
        scores, mask = _scores(static, q, k, position, query_ids, ids)
        largest = jnp.max(scores, axis=-1, keepdims=True, initial=NOTHING)
        p = jnp.where(mask, jnp.exp(scores - largest), 0)
        total = jnp.sum(p, axis=-1, keepdims=True)
        seen = total > 0
        out = jnp.einsum("bkgts,bskd->bkgtd", p.astype(v.dtype), v, preferred_element_type=wide)
        out = (out / jnp.where(seen, total, 1)).astype(q.dtype)
        lse = jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1)), jnp.inf)
        return None, (out.transpose(0, 3, 1, 2, 4), lse[..., 0].transpose(0, 3, 1, 2))

    _, (out, lse) = _over_blocks(block, None, q, k, queries, _positions(q, k), *ids[:1])
    lse = lse.reshape(*q.shape[:3]).transpose(0, 2, 1)[:, None]
    slots = ids[-1].shape[1] if static.found else 1  # as many as cuDNN fills in
    return out.reshape(q.shape), jnp.pad(lse, ((0, 0), (0, slots - 1), (0, 0), (0, 0)))


def _backward_xla(static: _Static, q, k, v, out, lse, grad, *ids):
    """With p = exp(scores - lse) and dp = grad v^T: ds = p (dp - sum(grad out)). -> dq, dk, dv."""
    wide = _validate.wide(q.dtype)
    delta = jnp.sum(grad.astype(wide) * out.astype(wide), axis=-1)
    lse = lse[:, 0].transpose(0, 2, 1)
    queries = [_grouped(array, k) for array in (q, grad, lse, delta)]

    def block(sums, rows):
        q, grad, lse, delta, position, *query_ids = rows
        scores, mask = _scores(static, q, k, position, query_ids, ids)
        lse, delta = (x.transpose(0, 2, 3, 1)[..., None] for x in (lse, delta))
        p = jnp.where(mask, jnp.exp(scores - lse), 0)
        dp = jnp.einsum("btkgd,bskd->bkgts", grad, v, preferred_element_type=wide)
        ds = (jnp.where(mask, p * (dp - delta), 0) * static.scale).astype(q.dtype)
        dk, dv = sums
        dk = dk + jnp.einsum("bkgts,btkgd->bskd", ds, q, preferred_element_type=wide)
        dv = dv + jnp.einsum("bkgts,btkgd->bskd", p.astype(grad.dtype), grad, preferred_element_type=wide)
        return (dk, dv), jnp.einsum("bkgts,bskd->btkgd", ds, k, preferred_element_type=wide).astype(q.dtype)

    zeros = (jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
    (dk, dv), dq = _over_blocks(block, zeros, q, k, *queries, _positions(q, k), *ids[:1])
    return dq.reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


def _scores(static: _Static, q, k, position, query_ids, ids):
    """-> scores [b, k, g, t, s] in float32, and which of them count."""
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=_validate.wide(q.dtype)) * static.scale
    mask = jnp.ones((1, 1, 1), bool)
    if static.causal:
        mask = mask & (jnp.arange(k.shape[1]) <= position[..., None])
    if static.segmented:
        mask = mask & (query_ids[0][:, :, None] == ids[1][:, None, :]) & (query_ids[0] != 0)[:, :, None]
    mask = jnp.broadcast_to(mask[:, None, None], scores.shape)
    return jnp.where(mask, scores, NOTHING), mask


def _grouped(x, k):
    """[B, T, N, ...] -> [B, T, K, N / K, ...]"""
    return x.reshape(*x.shape[:2], k.shape[2], x.shape[2] // k.shape[2], *x.shape[3:])


def _positions(q, k):
    """[1, T]: the last key that each query sees under a causal mask."""
    return jnp.arange(q.shape[1])[None] + k.shape[1] - q.shape[1]


def _over_blocks(block, sums, q, k, *rows):
    """Runs block(sums, rows of some queries) over all queries; rows and what is found for them have queries on axis 1."""
    batch, tokens, heads, _ = q.shape
    limit = max(16, BLOCK_BYTES // max(1, 4 * batch * heads * k.shape[1]))
    if tokens <= limit:
        return block(sums, rows)
    blocks = -(-tokens // limit)
    size = -(-tokens // blocks)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, blocks * size - tokens), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], blocks * size, *x.shape[3:])[:, :tokens]

    sums = jax.tree.map(lambda zeros: _sharding.varying_as(q, zeros), sums)
    sums, found = jax.lax.scan(block, sums, [split(x) for x in rows])
    return sums, jax.tree.map(join, found)


# ---- cuDNN -------------------------------------------------------------------------------------------------------------


def _forward_cudnn(static: _Static, q, k, v, *ids, interpret: bool):
    segments = Segments(*ids[2:]) if static.found else None
    out, statistics = _cudnn.forward(q, k, v, segments and segments[1:], static.scale, static.causal)
    return _cleared(out, segments), statistics


def _backward_cudnn(static: _Static, q, k, v, out, statistics, grad, *ids, interpret: bool):
    segments = Segments(*ids[2:]) if static.found else None
    grads = _cudnn.backward(q, k, v, out, statistics, grad, segments and segments[1:], static.scale, static.causal)
    return tuple(_cleared(x, segments) for x in grads)


def _cleared(x, segments: Segments | None):
    """What cuDNN leaves unwritten becomes zero, what it had no slot for NaN."""
    if segments is None:
        return x
    ids = segments.ids[:, :, None, None]
    outside = jnp.where(ids == 0, 0, jnp.nan).astype(x.dtype)
    return jnp.where((ids > 0) & (ids <= segments.starts.shape[1]), x, outside)


# ---- the kernel --------------------------------------------------------------------------------------------------------


def _forward_kernel(static: _Static, q, k, v, *ids, interpret: bool):
    of_queries, _ = _flash_attention.intervals(ids[0] if static.segmented else None, q, k, static.causal)
    out, lse = _flash_attention.forward(q, k, v, of_queries, static.scale, interpret=interpret)
    return out, lse[:, None]


def _backward_kernel(static: _Static, q, k, v, out, lse, grad, *ids, interpret: bool):
    both = _flash_attention.intervals(ids[0] if static.segmented else None, q, k, static.causal)
    return _flash_attention.backward(q, k, v, out, lse[:, 0], grad, *both, static.scale, interpret=interpret)


# ---- gradient and mesh -------------------------------------------------------------------------------------------------


def _local(cudnn, kernel, xla):
    def local(static: _Static, *operands):
        return _pallas.either(kernel if static.ours else cudnn, xla)(static, *operands)

    return local


_forward_local = _local(_forward_cudnn, _forward_kernel, _forward_xla)
_backward_local = _local(_backward_cudnn, _backward_kernel, _backward_xla)

_QKV = ("btnd", "bsnd", "bsnd")  # n: query heads in q, key heads in k and v, sharded alike


def _ids_signature(static: _Static):
    return ("bt", "bs") * static.segmented + ("bt", "bm", "bm") * static.found


def _forward_op(static: _Static) -> _sharding.ParallelOp:
    operands = (*_QKV, *_ids_signature(static))
    return _sharding.ParallelOp(_forward_local, operands, ("btnd", "bmnt"), "bn", static)


def _backward_op(static: _Static) -> _sharding.ParallelOp:
    operands = (*_QKV, "btnd", "bmnt", "btnd", *_ids_signature(static))
    return _sharding.ParallelOp(_backward_local, operands, _QKV, "bn", static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, *ids):
    return _sharding.run(_forward_op(static), q, k, v, *ids)[0]


def _attention_fwd(static, q, k, v, *ids):
    out, statistics = (checkpoint_name(x, "attention") for x in _sharding.run(_forward_op(static), q, k, v, *ids))
    return out, (q, k, v, out, statistics, ids)


def _attention_bwd(static, saved, grad):
    q, k, v, out, statistics, ids = saved
    grads = _sharding.run(_backward_op(static), q, k, v, out, statistics, grad, *ids)
    return *grads, *(None for _ in ids)


_attention.defvjp(_attention_fwd, _attention_bwd)
