"""Layer normalisation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _sharding, _validate


def layer_norm(
    x: jax.Array, weight: jax.Array, bias: jax.Array, *, eps: float = 1e-6, implementation: str | None = None
) -> jax.Array:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last axis.

    Args:
        x: [..., D], float.
        weight: [D], float.
        bias: [D], float.
        eps: added to the (biased) variance.
        implementation: None or "xla".

    Returns:
        [..., D] in x's dtype; the arithmetic is float32. Backward keeps x, weight and two numbers a row.

    Raises:
        ValueError: weight or bias is not [D], a dtype that is not floating.
        NotImplementedError: an implementation that does not exist yet.

    Source: Ba et al. 2016, Layer Normalization, https://arxiv.org/abs/1607.06450

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import layer_norm
        >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.zeros(2)).round(3).tolist()
        [-1.0, 1.0]
    """
    _validate.implementation_exists("layer_norm", implementation)
    _validate.floating("layer_norm", x=x, weight=weight, bias=bias)
    if x.ndim < 1:
        raise ValueError("layer_norm: x has shape (); expected [..., D]")
    _validate.shape("layer_norm", "weight", weight.shape, x.shape[-1:])
    _validate.shape("layer_norm", "bias", bias.shape, x.shape[-1:])
    static = _Static(float(eps))
    x, weight, bias = _sharding.agree(_forward_op(static), x[None], weight[None], bias[None])
    return _layer_norm(static, x, weight, bias)[0]


class _Static(NamedTuple):
    eps: float


# ---- XLA implementation: x [g, ..., D], weight and bias [g, D] --------------------------------------------------------


def _forward_local(static: _Static, x, weight, bias):
    """-> out [g, ..., D], mean and inverse deviation [g, ...] in float32. Two passes: a large mean costs no digits."""
    wide = _validate.wide(x.dtype)
    centred = x.astype(wide)
    mean = jnp.mean(centred, axis=-1, keepdims=True)
    centred = centred - mean
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + static.eps)
    out = centred * inverse * _sharding.over_rows(weight, x).astype(wide) + _sharding.over_rows(bias, x).astype(wide)
    return out.astype(x.dtype), mean[..., 0], inverse[..., 0]


def _backward_local(static: _Static, x, grad, weight, mean, inverse):
    """With x_hat = (x - mean) inverse and g = grad weight: dx = inverse (g - mean(g) - x_hat mean(g x_hat)).

    -> dx [g, ..., D], dweight and dbias [g, D] in float32.
    """
    wide = _validate.wide(x.dtype)
    inverse, grad = inverse[..., None], grad.astype(wide)
    x_hat = (x.astype(wide) - mean[..., None]) * inverse
    g = grad * _sharding.over_rows(weight, x).astype(wide)
    dx = inverse * (g - jnp.mean(g, axis=-1, keepdims=True) - x_hat * jnp.mean(g * x_hat, axis=-1, keepdims=True))
    rows = tuple(range(1, x.ndim - 1))
    return dx.astype(x.dtype), jnp.sum(grad * x_hat, axis=rows), jnp.sum(grad, axis=rows)


# ---- gradient and mesh -------------------------------------------------------------------------------------------------


def _forward_op(static: _Static) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_forward_local, ("g.d", "gd", "gd"), ("g.d", "g.", "g."), "g.", static)


def _backward_op(static: _Static) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_backward_local, ("g.d", "g.d", "gd", "g.", "g."), ("g.d", "gd", "gd"), "g.", static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(static: _Static, x, weight, bias):
    return _sharding.run(_forward_op(static), x, weight, bias)[0]


def _layer_norm_fwd(static, x, weight, bias):
    out, mean, inverse = _sharding.run(_forward_op(static), x, weight, bias)
    return out, (x, weight, bias, mean, inverse)


def _layer_norm_bwd(static, saved, grad):
    x, weight, bias, mean, inverse = saved
    dx, dweight, dbias = _sharding.run(_backward_op(static), x, grad, weight, mean, inverse)
    return dx, dweight.astype(weight.dtype), dbias.astype(bias.dtype)


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)
