"""cuDNN's flash attention. The only file that reaches into a private module of JAX.

`jax.nn.dot_product_attention` has neither packed segments nor its forward and backward apart, and one gradient rule for all
implementations needs both. The primitives behind it have: the same ones in JAX 0.10 to 0.12, but for an option of 0.12.
"""

import inspect

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

# Before this release key and value heads are taken for as many as the query's when the start of a segment is looked up.
GROUPED_SEGMENTS = jax.__version_info__ >= (0, 11, 2)

Segments = tuple[jax.Array, jax.Array]  # start and length of each segment, int32 [B, M], -1 where there is none; M >= 2


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """-> out [B, T, N, D], statistics [B, M, N, T] (M = 1 without segments). What lies outside of segments is undefined."""
    k, v = (_with_heads_of(q, x, segments) for x in (k, v))
    out, statistics = fused._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *_other_operands(q, segments), **_options(segments, scale, causal), is_training=True
    )
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
    """-> dq, dk, dv. What lies outside of segments is undefined."""
    key_heads = k.shape[2]
    k, v = (_with_heads_of(q, x, segments) for x in (k, v))
    statistics = statistics.reshape(-1, *statistics.shape[2:])
    dq, dk, dv = fused._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *_other_operands(q, segments), statistics, out, grad, **_options(segments, scale, causal)
    )
    return dq, _summed_to_heads(dk, key_heads), _summed_to_heads(dv, key_heads)


def _other_operands(q: jax.Array, segments: Segments | None) -> tuple[jax.Array, ...]:
    """bias, lengths of query and key segments, their offsets, two page tables: an empty array for what is not there."""
    none = jnp.zeros(0, q.dtype)
    if segments is None:
        return (none,) * 7
    starts, lengths = segments
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return none, lengths, lengths, offsets, offsets, none, none


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


def _with_heads_of(q: jax.Array, x: jax.Array, segments: Segments | None) -> jax.Array:
    if segments is None or GROUPED_SEGMENTS:
        return x
    return jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)


def _summed_to_heads(grad: jax.Array, heads: int) -> jax.Array:
    if grad.shape[2] == heads:
        return grad
    batch, tokens, _, dim = grad.shape
    return jnp.sum(grad.reshape(batch, tokens, heads, -1, dim), axis=3, dtype=jnp.float32).astype(grad.dtype)
