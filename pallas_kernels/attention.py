"""Scaled dot-product attention with grouped heads, a causal mask and segments."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _cudnn, _fa4, _flash_attention, _pallas, _sharding, _validate
from pallas_kernels._operation import DifferentiableOp, Pass
from pallas_kernels.segments import Segments, find_segments

BACKENDS = {
    "fa4": "fa4",
    "cudnn": "cudnn",
    "triton": "pallas",
    "interpret": "pallas",
    "xla": "xla",
}  # by implementation
BLOCK_BYTES = 2**28  # bytes of scores that the XLA implementation holds in memory at once
MASKED_SCORE = -1e30  # finite, so that a query whose keys are all masked does not become NaN


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
    """Computes softmax(scale q k^T + mask) v for each head, without ever holding all scores in memory.

    Args:
        q: [B, T, N, D], float.
        k: [B, S, K, D], q's dtype. K divides N, and query head n uses key head n // (N / K).
        v: as k.
        causal: whether query t sees only the keys up to t + S - T, which aligns the last query with the last key.
        segment_ids: [B, T], int, or the result of `find_segments`. A query sees only the keys of its own segment. The tokens
            of a segment are contiguous, unless kv_segment_ids is given. 0 is padding: for any finite values, a query in
            segment 0 returns zeros, no query sees a key in segment 0, and the gradients of both are zero.
        kv_segment_ids: [B, S], int; None means segment_ids.
        scale: None means 1/sqrt(D).
        max_segments: an upper bound on the segments of a row; see `find_segments`. cuDNN needs either it or Segments, and
            FlashAttention-4 skips the keys of other segments only with one of them.
        implementation: None, "fa4", "cudnn", "triton", "xla" or "interpret". On an NVIDIA GPU, None picks the first that
            supports the call and was measured to be faster: "fa4" (FlashAttention-4: the package fa4-jax, Hopper or newer,
            bfloat16 or float16, D a multiple of 8 up to 128, at least 128 queries); "cudnn" (bfloat16 or float16, D a
            multiple of 8, no kv_segment_ids; packed segments from Hopper on); "triton", a Pallas kernel (bfloat16 and
            float16, Ampere or newer, heads of up to 512 bytes, positive scales; with kv_segment_ids, at least 128 queries);
            else XLA. XLA is also picked for a single query.

    Returns:
        [B, T, N, D] in q's dtype. The softmax is float32 (float64 for float64). The backward pass saves q, k, v, the output
        and one float32 per query and head (cuDNN: per segment, query and head). In rematerialization policies, the last two
        are named "attention".

    Raises:
        ValueError: a shape, dtype or option does not fit.
        NotImplementedError: an implementation requested by name does not support the call.

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
    _validate.known_implementation(op, implementation, tuple(BACKENDS))
    segments, ids = (segment_ids, segment_ids.ids) if isinstance(segment_ids, Segments) else (None, segment_ids)
    _check(op, q, k, v, ids, kv_segment_ids, max_segments)
    if segments is not None and max_segments is not None:
        raise ValueError(f"{op}: max_segments is {max_segments}; expected None with segment_ids from find_segments")
    slots = max_segments if segments is None else segments.starts.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)

    unsupported = {
        "fa4": _fa4.unsupported_reason(q, k),
        "cudnn": _cudnn.unsupported_reason(q, k, causal, ids is not None, kv_segment_ids is not None, slots),
        "pallas": _flash_attention.unsupported_reason(q, scale),
        "xla": None,
    }
    kv_segmented = kv_segment_ids is not None
    preferred = {"fa4": _fa4.preferred(q, kv_segmented), "pallas": _flash_attention.preferred(q, kv_segmented)}
    backend = _choose_backend(op, implementation, q, k, unsupported, preferred)
    if backend == "pallas" or kv_segment_ids is not None:
        segments = None  # the kernels work on ids
    elif backend in ("fa4", "cudnn") and ids is not None and slots is not None and segments is None:
        segments = find_segments(ids, slots)
    operands = q, k, v, ids, kv_segment_ids, *(segments or (None, None, None))
    (out,) = _OPERATION(StaticArgs(scale, causal, backend, implementation), *operands)
    return out


def _choose_backend(
    op: str,
    implementation: str | None,
    q: jax.Array,
    k: jax.Array,
    unsupported: dict[str, str | None],
    preferred: dict[str, bool],
) -> str:
    """Returns the backend for a call.

    `unsupported` has the reason why a backend does not support the call, or None; `preferred` says whether
    implementation=None may pick it. For None, this is the choice on NVIDIA GPUs; other platforms always use XLA.
    """
    if not q.size or not k.size:
        return "xla"
    requested = None if implementation is None else BACKENDS[implementation]
    if requested and (reason := unsupported[requested]):
        raise NotImplementedError(f"{op}: implementation {implementation!r} does not support this call: {reason}")
    if requested:
        return requested
    if q.shape[1] == 1:
        return "xla"  # decoding: a few small matmuls
    if preferred["fa4"] and not unsupported["fa4"]:
        return "fa4"
    if not unsupported["cudnn"]:
        return "cudnn"
    return "pallas" if preferred["pallas"] and not unsupported["pallas"] else "xla"


def _check(op, q, k, v, segment_ids, kv_segment_ids, max_segments):
    """Raises ValueError for a shape, dtype or option that does not fit."""
    _validate.floating(op, q=q, k=k, v=v)
    _validate.same_dtype(op, q=q, k=k, v=v)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q has shape {q.shape}, k {k.shape}; expected [B, T, N, D] and [B, S, K, D]")
    (batch, tokens, heads, dim), (_, sources, key_heads, _) = q.shape, k.shape
    if not dim:
        raise ValueError(f"{op}: q has shape {q.shape}; expected D >= 1")
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


class StaticArgs(NamedTuple):
    """Options of the operation that are fixed when it is traced."""

    scale: float
    causal: bool
    backend: str  # "fa4", "cudnn", "pallas" or "xla"
    implementation: str | None


# The passes take query_ids [B, T] (None without segments), key_ids [B, S] (None: those of the queries) and the fields of
# Segments (None without Segments).

# ---- XLA implementation: computes the scores of a block of queries with all keys ----------------------------------------
# In einsums: b batch, t queries, s keys, k key heads, g query heads that share a key head, d head size.


def _forward_xla(static: StaticArgs, q, k, v, query_ids, key_ids, *segments):
    """Returns out [B, T, N, D], and the log-sum-exp of the scores [B, M, N, T], infinite where a query sees no key.

    Only the first of the M slots is used; M matches the number of slots that cuDNN fills.
    """
    dtype = _validate.accumulation_dtype(q.dtype)
    key_ids = query_ids if key_ids is None else key_ids

    def block(_, rows):
        q, *positions_and_ids = rows
        scores, mask = _scores(static, q, k, *positions_and_ids, key_ids)
        largest = jnp.max(scores, axis=-1, keepdims=True, initial=MASKED_SCORE)
        p = jnp.where(mask, jnp.exp(scores - largest), 0)
        total = jnp.sum(p, axis=-1, keepdims=True)
        sees_keys = total > 0
        out = jnp.einsum("bkgts,bskd->bkgtd", p.astype(v.dtype), v, preferred_element_type=dtype)
        out = (out / jnp.where(sees_keys, total, 1)).astype(q.dtype)
        lse = jnp.where(sees_keys, largest + jnp.log(jnp.where(sees_keys, total, 1)), jnp.inf)
        return None, (out.transpose(0, 3, 1, 2, 4), lse[..., 0].transpose(0, 3, 1, 2))

    _, (out, lse) = _over_query_blocks(block, None, q, k, _grouped(q, k), _last_visible_keys(q, k), query_ids)
    lse = lse.reshape(*q.shape[:3]).transpose(0, 2, 1)[:, None]
    _, starts, _ = segments
    slots = starts.shape[1] if static.backend == "cudnn" and starts is not None else 1
    return out.reshape(q.shape), jnp.pad(lse, ((0, 0), (0, slots - 1), (0, 0), (0, 0)))


def _backward_xla(static: StaticArgs, q, k, v, out, lse, grad, query_ids, key_ids, *segments):
    """Returns dq, dk, dv, from ds = p (dp - sum(grad out)) with p = exp(scores - lse) and dp = grad v^T."""
    dtype = _validate.accumulation_dtype(q.dtype)
    delta = jnp.sum(grad.astype(dtype) * out.astype(dtype), axis=-1)
    lse = lse[:, 0].transpose(0, 2, 1)
    key_ids = query_ids if key_ids is None else key_ids

    def block(sums, rows):
        q, grad, lse, delta, *positions_and_ids = rows
        scores, mask = _scores(static, q, k, *positions_and_ids, key_ids)
        lse, delta = (x.transpose(0, 2, 3, 1)[..., None] for x in (lse, delta))
        p = jnp.where(mask, jnp.exp(scores - lse), 0)
        dp = jnp.einsum("btkgd,bskd->bkgts", grad, v, preferred_element_type=dtype)
        ds = (jnp.where(mask, p * (dp - delta), 0) * static.scale).astype(q.dtype)
        dk, dv = sums
        dk = dk + jnp.einsum("bkgts,btkgd->bskd", ds, q, preferred_element_type=dtype)
        dv = dv + jnp.einsum("bkgts,btkgd->bskd", p.astype(grad.dtype), grad, preferred_element_type=dtype)
        return (dk, dv), jnp.einsum("bkgts,bskd->btkgd", ds, k, preferred_element_type=dtype).astype(q.dtype)

    rows = *(_grouped(x, k) for x in (q, grad, lse, delta)), _last_visible_keys(q, k), query_ids
    zeros = (jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype))
    (dk, dv), dq = _over_query_blocks(block, zeros, q, k, *rows)
    return dq.reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


def _scores(static: StaticArgs, q, k, last_visible_key, query_ids, key_ids):
    """Returns the scores [b, k, g, t, s] in the accumulation dtype, and the mask of visible keys."""
    dtype = _validate.accumulation_dtype(q.dtype)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=dtype) * static.scale
    mask = jnp.ones((1, 1, 1), bool)
    if static.causal:
        mask = mask & (jnp.arange(k.shape[1]) <= last_visible_key[..., None])
    if query_ids is not None:
        mask = mask & (query_ids[:, :, None] == key_ids[:, None, :]) & (query_ids != 0)[:, :, None]
    mask = jnp.broadcast_to(mask[:, None, None], scores.shape)
    return jnp.where(mask, scores, MASKED_SCORE), mask


def _grouped(x, k):
    """Reshapes [B, T, N, ...] to [B, T, K, N / K, ...]."""
    return x.reshape(*x.shape[:2], k.shape[2], x.shape[2] // k.shape[2], *x.shape[3:])


def _last_visible_keys(q, k):
    """Returns the last key that each query sees under a causal mask, [1, T]."""
    return jnp.arange(q.shape[1])[None] + k.shape[1] - q.shape[1]


def _over_query_blocks(block, sums, q, k, *rows):
    """Runs sums, results = block(sums, rows) over blocks of queries, which are axis 1 of `rows` and of the results."""
    batch, tokens, heads, _ = q.shape
    max_size = max(16, BLOCK_BYTES // max(1, 4 * batch * heads * k.shape[1]))
    if tokens <= max_size:
        return block(sums, rows)
    blocks = -(-tokens // max_size)
    size = -(-tokens // blocks)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, blocks * size - tokens), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], blocks * size, *x.shape[3:])[:, :tokens]

    sums = jax.tree.map(lambda zeros: _sharding.varying_as(q, zeros), sums)
    sums, results = jax.lax.scan(block, sums, jax.tree.map(split, rows))
    return sums, jax.tree.map(join, results)


# ---- FlashAttention-4 --------------------------------------------------------------------------------------------------


def _forward_fa4(static: StaticArgs, q, k, v, query_ids, key_ids, *segments, interpret: bool):
    masks = _pair_ids(query_ids, key_ids), _as_segments(segments)
    out, lse = _fa4.forward(q, k, v, *masks, static.scale, static.causal)
    return out, lse[:, None]


def _backward_fa4(static: StaticArgs, q, k, v, out, lse, grad, query_ids, key_ids, *segments, interpret: bool):
    masks = _pair_ids(query_ids, key_ids), _as_segments(segments)
    return _fa4.backward(q, k, v, out, lse[:, 0], grad, *masks, static.scale, static.causal)


def _pair_ids(query_ids, key_ids) -> tuple[jax.Array, jax.Array] | None:
    return None if query_ids is None else (query_ids, query_ids if key_ids is None else key_ids)


def _as_segments(fields: tuple) -> Segments | None:
    return None if fields[0] is None else Segments(*fields)


# ---- cuDNN -------------------------------------------------------------------------------------------------------------


def _forward_cudnn(static: StaticArgs, q, k, v, query_ids, key_ids, *segments, interpret: bool):
    return _cudnn.forward(q, k, v, _as_segments(segments), static.scale, static.causal)


def _backward_cudnn(static: StaticArgs, q, k, v, out, statistics, grad, query_ids, key_ids, *segments, interpret: bool):
    return _cudnn.backward(q, k, v, out, statistics, grad, _as_segments(segments), static.scale, static.causal)


# ---- Pallas kernels ----------------------------------------------------------------------------------------------------


def _forward_pallas(static: StaticArgs, q, k, v, query_ids, key_ids, *segments, interpret: bool):
    mask = _flash_attention.make_mask(query_ids, key_ids, q, k, static.causal)
    out, lse = _flash_attention.forward(q, k, v, mask, static.scale, interpret=interpret)
    return out, lse[:, None]


def _backward_pallas(static: StaticArgs, q, k, v, out, lse, grad, query_ids, key_ids, *segments, interpret: bool):
    mask = _flash_attention.make_mask(query_ids, key_ids, q, k, static.causal)
    return _flash_attention.backward(q, k, v, out, lse[:, 0], grad, mask, static.scale, interpret=interpret)


# ---- gradient and mesh -------------------------------------------------------------------------------------------------


def _local(fa4: Callable, cudnn: Callable, pallas: Callable, xla: Callable) -> Callable[..., tuple]:
    """Returns local(static, *operands), which runs static.backend on an NVIDIA GPU."""
    backends = {
        "fa4": _pallas.choose_implementation(fa4, xla),
        "cudnn": _pallas.choose_implementation(cudnn, xla),
        "pallas": _pallas.choose_implementation(pallas, xla),
        "xla": xla,
    }
    return lambda static, *operands: backends[static.backend](static, *operands)


# N is the query heads of q and the key heads of k and v, which are sharded alike.
_QKV = {"q": "B T N D", "k": "B S N D", "v": "B S N D"}
_SEGMENTS = {
    "query_ids": "B T",
    "key_ids": "B S",
    "ids": "B T",
    "starts": "B slots",
    "lengths": "B slots",
}
_RESULTS = {"out": "B T N D", "statistics": "B slots N T"}

_OPERATION = DifferentiableOp(
    forward=Pass(
        _local(_forward_fa4, _forward_cudnn, _forward_pallas, _forward_xla),
        operands=_QKV | _SEGMENTS,
        results=_RESULTS,
        parallel=("B", "N"),
    ),
    backward=Pass(
        _local(_backward_fa4, _backward_cudnn, _backward_pallas, _backward_xla),
        operands=_QKV | _RESULTS | {"d_out": "B T N D"} | _SEGMENTS,
        results={f"d_{name}": axes for name, axes in _QKV.items()},
        parallel=("B", "N"),
    ),
    returns=("out",),
    saved_as="attention",
)
