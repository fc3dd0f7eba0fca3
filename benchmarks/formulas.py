"""The operations' formulas in plain JAX, written as in a training script without fused operations.

Jitted, they are the "jnp" implementation of `python -m benchmarks ops`; in float32, they are the reference for its errors.
An operation without a formula here uses that of pallas_kernels/registry.py.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.registry import OPERATIONS

EPS = 1e-6


def rms_norm(x, weight):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)).astype(x.dtype) * weight


def add_rms_norm(x, residual, weight):
    total = x + residual
    return rms_norm(total, weight), total


def layer_norm(x, weight, bias):
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + EPS)
    return (normed * weight + bias).astype(x.dtype)


def rope(q, k, cos, sin):
    def rotate(x):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        c, s = cos[:, :, None], sin[:, :, None]
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)

    return rotate(q), rotate(k)


def mrope(q, k, cos, sin, sections):
    ends = np.cumsum(sections)[:-1]

    def merge(tables):
        return jnp.concatenate([part[i] for i, part in enumerate(jnp.split(tables, ends, axis=-1))], axis=-1)

    return rope(q, k, merge(cos), merge(sin))


def qk_norm_rope(q, k, q_weight, k_weight, cos, sin):
    return rope(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin)


def swiglu(gate, up):
    return jax.nn.silu(gate) * up


def geglu(gate, up):
    return jax.nn.gelu(gate, approximate=True) * up


def quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def cross_entropy(logits, labels):
    logits, counted = logits.astype(jnp.float32), labels >= 0
    label_logits = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[:, None], axis=-1)[:, 0]
    losses = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - label_logits, 0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counted), 1)


def linear_cross_entropy(x, weight, labels):
    return cross_entropy(jnp.einsum("nh,vh->nv", x, weight, preferred_element_type=jnp.float32), labels)


def linear_cross_entropy_in_chunks(x, weight, labels, rows=4096):
    """Computes the same loss in chunks that the backward pass recomputes, so that float32 fits in memory at every size."""

    def chunk_sum(chunk):
        x, labels = chunk
        return linear_cross_entropy(x, weight, labels) * jnp.sum(labels >= 0)

    chunks = [a.reshape(-1, min(rows, len(a)), *a.shape[1:]) for a in (x, labels)]
    return jnp.sum(jax.lax.map(jax.checkpoint(chunk_sum), chunks)) / jnp.maximum(jnp.sum(labels >= 0), 1)


def attention(q, k, v, *, causal=False, segment_ids=None, **_):
    """Computes one batch entry and key head at a time, so that only their scores are held in memory."""
    (batch, tokens, _, dim), kv_heads = q.shape, k.shape[2]
    ids = jnp.ones((batch, tokens), jnp.int32) if segment_ids is None else segment_ids
    positions = jnp.arange(tokens)

    def one_head(operands):
        q, k, v, ids = operands  # [G, T, D], [T, D], [T, D], [T]
        visible = (ids[:, None] == ids) & (~jnp.bool(causal) | (positions[:, None] >= positions))
        scores = jnp.einsum("gtd,sd->gts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("gts,sd->gtd", weights.astype(v.dtype), v)

    queries = (
        q.reshape(batch, tokens, kv_heads, -1, dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(-1, q.shape[2] // kv_heads, tokens, dim)
    )
    keys, values = (a.transpose(0, 2, 1, 3).reshape(-1, tokens, dim) for a in (k, v))
    out = jax.lax.map(jax.checkpoint(one_head), (queries, keys, values, jnp.repeat(ids, kv_heads, axis=0)))
    return out.reshape(batch, -1, tokens, dim).transpose(0, 2, 1, 3)


def norm_linear(x, norm_weight, weight, bias):
    return rms_norm(x, norm_weight) @ weight.T + bias


def norm_swiglu(x, norm_weight, weight):
    x = rms_norm(x, norm_weight)
    return swiglu(x @ weight[0].T, x @ weight[1].T)


def linear_add(x, weight, residual):
    return residual + x @ weight.T


_TRAINING_SCRIPT = (
    *(rms_norm, add_rms_norm, layer_norm, rope, mrope, qk_norm_rope, swiglu, geglu, quick_gelu, gelu_tanh),
    *(cross_entropy, linear_cross_entropy, attention),
    *(norm_linear, norm_swiglu, linear_add),
)
FORMULAS = {operation.name: operation.formula for operation in OPERATIONS.values()}
FORMULAS |= {formula.__name__: formula for formula in _TRAINING_SCRIPT}
# The float32 reference of each operation: its formula, or a form of it that needs less memory.
REFERENCES = FORMULAS | {"linear_cross_entropy": linear_cross_entropy_in_chunks}
