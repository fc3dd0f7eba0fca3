"""cuDNN's flash attention. This is the only file that uses a private module of JAX.

`jax.nn.dot_product_attention` supports no packed segments and does not expose its forward and backward passes separately,
which a common gradient rule for all implementations needs. The primitives that it calls do both. They are the same in JAX
0.10 to 0.12, except for one option of 0.12.
"""

import inspect

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from pallas_kernels import _pallas, _sharding
from pallas_kernels.segments import Segments, clear_in_place, clear_outside

# Earlier releases look up the start of a segment as if there were as many key heads as query heads.
SUPPORTS_GROUPED_SEGMENTS = jax.__version_info__ >= (0, 11, 2)


def unsupported_reason(
    q: jax.Array, k: jax.Array, causal: bool, segmented: bool, kv_segmented: bool, max_segments: int | None
) -> str | None:
    """Returns why cuDNN does not support a call of `attention`, or None if it does."""
    capability = _pallas.compute_capability()
    hopper = capability is None or capability >= 9.0
    ampere = capability is None or capability >= 8.0
    max_dim = 256 if hopper else 128
    reasons = {
        f"q has dtype {q.dtype}; expected bfloat16 or float16": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"D is {q.shape[-1]}; expected a multiple of 8 up to {max_dim}": q.shape[-1] % 8 or q.shape[-1] > max_dim,
        f"causal with {q.shape[1]} queries and {k.shape[1]} keys; expected equal numbers": causal
        and q.shape[1] != k.shape[1],
        "segment_ids without max_segments; expected both": segmented and max_segments is None,
        "kv_segment_ids is given; expected None": kv_segmented,
        "inside split_rows_over; expected outside, since JAX's operation asks the partitioner": _sharding.rows_over.get(),
        f"the GPU has compute capability {capability}; expected at least 8.0": not ampere,
        f"segments on a GPU of compute capability {capability}; expected at least 9.0": segmented and not hopper,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns out [B, T, N, D], and the log-sum-exp of the scores [B, M, N, T] (M = 1 without segments)."""
    k, v = (_with_query_heads(q, x, segments) for x in (k, v))
    out, statistics = fused._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *_optional_operands(q, segments), **_options(segments, scale, causal), is_training=True
    )
    out = out if segments is None else clear_in_place(out, segments)
    return out, statistics.reshape(q.shape[0], -1, *statistics.shape[1:])


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    statistics: jax.Array,
    grad: jax.Array,
    segments: Segments | None,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk, dv."""
    key_heads = k.shape[2]
    k, v = (_with_query_heads(q, x, segments) for x in (k, v))
    statistics = statistics.reshape(-1, *statistics.shape[2:])
    dq, dk, dv = fused._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *_optional_operands(q, segments), statistics, out, grad, **_options(segments, scale, causal)
    )
    dk, dv = (_sum_to_key_heads(x, key_heads) for x in (dk, dv))
    if segments is None:
        return dq, dk, dv
    return clear_outside(dq, segments), clear_outside(dk, segments), clear_outside(dv, segments)


def _optional_operands(q: jax.Array, segments: Segments | None) -> tuple[jax.Array, ...]:
    """Returns bias, lengths and offsets of the query and key segments, and two page tables; unused ones are empty."""
    empty = jnp.zeros(0, q.dtype)
    if segments is None:
        return (empty,) * 7
    offsets = jnp.pad(segments.starts, ((0, 0), (0, 1)), constant_values=-1)
    return empty, segments.lengths, segments.lengths, offsets, offsets, empty, empty


def _options(segments: Segments | None, scale: float, causal: bool) -> dict:
    mask = fused.MaskType
    if segments is None:
        mask_type = mask.CAUSAL if causal else mask.NO_MASK
    else:
        mask_type = mask.PADDING_CAUSAL if causal else mask.PADDING
    options = {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of a bias
        "mask_type": mask_type,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    if "score_mod" in inspect.signature(fused.dot_product_attention).parameters:
        options["score_mod"] = None
    return options


def _with_query_heads(q: jax.Array, x: jax.Array, segments: Segments | None) -> jax.Array:
    """Returns k or v, with its heads repeated for each query head where JAX lacks grouped heads with segments."""
    if segments is None or SUPPORTS_GROUPED_SEGMENTS:
        return x
    return jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)


def _sum_to_key_heads(grad: jax.Array, key_heads: int) -> jax.Array:
    """Returns the gradient of k or v before `_with_query_heads`."""
    if grad.shape[2] == key_heads:
        return grad
    batch, tokens, _, dim = grad.shape
    return jnp.sum(grad.reshape(batch, tokens, key_heads, -1, dim), axis=3, dtype=jnp.float32).astype(grad.dtype)
