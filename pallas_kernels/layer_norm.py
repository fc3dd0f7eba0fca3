"""Layer normalisation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _rows, _sharding, _validate
from pallas_kernels._rows import Split
from pallas_kernels._tuning import Blocks


def layer_norm(
    x: jax.Array, weight: jax.Array, bias: jax.Array, *, eps: float = 1e-6, implementation: str | None = None
) -> jax.Array:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last axis.

    Args:
        x: [..., D], float.
        weight: [D], float.
        bias: [D], float.
        eps: added to the (biased) variance.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        [..., D] in x's dtype; the arithmetic is float32. Backward keeps x, weight and two float32 a row; the gradients of
        weight and bias are summed in the same order every time.

    Raises:
        ValueError: weight or bias is not [D], a dtype that is not floating, or a kernel asked for by name at D > 65536.

    Source: Ba et al. 2016, Layer Normalization, https://arxiv.org/abs/1607.06450

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import layer_norm
        >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.zeros(2)).round(3).tolist()
        [-1.0, 1.0]
    """
    _validate.floating("layer_norm", x=x, weight=weight, bias=bias)
    static = _Static(float(eps), _validate.rows("layer_norm", implementation, x, weight=weight, bias=bias))
    x, weight, bias = _sharding.agree(_forward_op(static), x[None], weight[None], bias[None])
    return _layer_norm(static, x, weight, bias)[0]


class _Static(NamedTuple):
    eps: float
    implementation: str | None


# ---- XLA implementation: x [g, ..., D], weight and bias [g, D] -------------------------------------------------------


def _forward_xla(static: _Static, x, weight, bias):
    """-> out [g, ..., D], mean and inverse deviation [g, ...] in float32. Two passes: a large mean costs no digits."""
    wide = _validate.wide(x.dtype)
    centred = x.astype(wide)
    mean = jnp.mean(centred, axis=-1, keepdims=True)
    centred = centred - mean
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + static.eps)
    out = centred * inverse * _sharding.over_rows(weight, x).astype(wide) + _sharding.over_rows(bias, x).astype(wide)
    return out.astype(x.dtype), mean[..., 0], inverse[..., 0]


def _backward_xla(static: _Static, x, grad, weight, mean, inverse):
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


# ---- kernels: one program holds some rows at full width --------------------------------------------------------------


def _layer_norm_forward(
    x_ref, weight_ref, bias_ref, out_ref, mean_ref, inverse_ref, *, static: _Static, rows: int, width: int, split: Split
):
    """Grid (groups, programs)."""
    group, wide = _pallas.program_id(0), _validate.wide(x_ref.dtype)
    columns, in_width = _rows.whole_width(x_ref, width)
    weight, bias = (_pallas.load(ref, (group, columns), in_width, wide)[None, :] for ref in (weight_ref, bias_ref))

    def step(nothing, block, values):
        (x,) = values
        mean = jnp.sum(x, axis=1) / width
        centred = jnp.where(block.inside, x - mean[:, None], 0)
        inverse = jax.lax.rsqrt(jnp.sum(centred * centred, axis=1) / width + static.eps)
        _pallas.store(out_ref, block.index, centred * inverse[:, None] * weight + bias, block.inside)
        _pallas.store(mean_ref, block.rows, mean, block.in_rows)
        _pallas.store(inverse_ref, block.rows, inverse, block.in_rows)
        return nothing

    _rows.walk(step, (), [x_ref], [], rows=rows, width=width, split=split)


def _layer_norm_backward(
    x_ref,
    grad_ref,
    weight_ref,
    mean_ref,
    inverse_ref,
    dx_ref,
    dweight_ref,
    dbias_ref,
    *,
    static: _Static,
    rows: int,
    width: int,
    split: Split,
):
    """Grid (groups, programs). Each program leaves one partial sum of dweight and of dbias."""
    group, program = _pallas.program_id(0), _pallas.program_id(1)
    columns, in_width = _rows.whole_width(x_ref, width)
    weight = _pallas.load(weight_ref, (group, columns), in_width, _validate.wide(x_ref.dtype))[None, :]

    def step(sums, block, values):
        x, grad, mean, inverse = values
        dweight, dbias = sums
        inverse = inverse[:, None]
        x_hat = (x - mean[:, None]) * inverse
        g = grad * weight  # zero past the width, and so are both products below
        mean_g, mean_gx = (jnp.sum(value, axis=1)[:, None] / width for value in (g, g * x_hat))
        _pallas.store(dx_ref, block.index, inverse * (g - mean_g - x_hat * mean_gx), block.inside)
        return dweight + grad * x_hat, dbias + grad

    zeros = jnp.zeros((split.rows, weight.size), weight.dtype)
    full, per_row = [x_ref, grad_ref], [mean_ref, inverse_ref]
    sums = _rows.walk(step, (zeros, zeros), full, per_row, rows=rows, width=width, split=split)
    for ref, total in zip((dweight_ref, dbias_ref), sums, strict=True):
        _pallas.store(ref, (group, program, columns), jnp.sum(total, axis=0), in_width)


def forward_kernel(static: _Static, x, weight, bias, *, interpret: bool, blocks: Blocks | None = None):
    """As _forward_xla."""
    wide = _validate.wide(x.dtype)
    results = [(".d", x.dtype), (".", wide), (".", wide)]
    return _rows.launch(_layer_norm_forward, static, [x], [weight, bias], [], results, interpret, blocks)


def backward_kernel(static: _Static, x, grad, weight, mean, inverse, *, interpret: bool, blocks: Blocks | None = None):
    """As _backward_xla."""
    wide = _validate.wide(x.dtype)
    results = [(".d", x.dtype), ("pd", wide), ("pd", wide)]
    full, vectors, per_row = [x, grad], [weight], [mean, inverse]
    dx, *sums = _rows.launch(_layer_norm_backward, static, full, vectors, per_row, results, interpret, blocks)
    return dx, *(jnp.sum(partial, axis=1) for partial in sums)


# ---- gradient and mesh -----------------------------------------------------------------------------------------------


_forward_local = _pallas.either(forward_kernel, _forward_xla)
_backward_local = _pallas.either(backward_kernel, _backward_xla)


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
