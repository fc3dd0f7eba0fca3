"""Root-mean-square normalisation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _rows, _sharding, _validate
from pallas_kernels._rows import Split
from pallas_kernels._tuning import Blocks

CASTING = ("llama", "gemma", "none")


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting: str = "llama",
    implementation: str | None = None,
) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), over the last axis.

    Args:
        x: [..., D], float.
        weight: [D], float.
        eps: added to the mean square.
        offset: added to the weight; 1.0 for models that store weight - 1.
        casting: where values are rounded to x's dtype. "llama": before the product with the weight, and the result;
            "gemma": the result only; "none": after every step. Sums are float32 in all three.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        [..., D] in x's dtype. Backward keeps x, weight and one float32 a row; the gradient is that of the formula, in
        float32, and the gradient of weight is summed in the same order every time.

    Raises:
        ValueError: weight is not [D], a dtype that is not floating, an unknown casting or implementation, or a kernel
            asked for by name at D > 65536.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import rms_norm
        >>> rms_norm(jnp.array([3.0, -3.0]), jnp.array([1.0, 2.0])).round(3).tolist()
        [1.0, -2.0]
    """
    _validate.floating("rms_norm", x=x, weight=weight)
    _validate.choice("rms_norm", "casting", casting, CASTING)
    implementation = _validate.rows("rms_norm", implementation, x, weight=weight)
    static = Static(float(eps), float(offset), casting, implementation)
    x, weight = _sharding.agree(_forward_op(static), x[None], weight[None])
    return _rms_norm(static, x, weight)[0]


class Static(NamedTuple):
    eps: float
    offset: float
    casting: str
    implementation: str | None


# ---- XLA implementation: x [g, ..., D], weight [g, D] ------------------------------------------------------------------


def forward_xla(static: Static, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-> out [g, ..., D], inverse rms [g, ...] in float32."""
    wide = _validate.wide(x.dtype)
    finfo = jnp.finfo(x.dtype)

    def rounded(value: jax.Array, to_dtype_of_x: bool) -> jax.Array:
        # not a pair of casts: XLA takes those away
        return jax.lax.reduce_precision(value, finfo.nexp, finfo.nmant) if to_dtype_of_x else value

    every_step, before_weight = static.casting == "none", static.casting != "gemma"
    x32 = x.astype(wide)
    mean_square = rounded(jnp.mean(rounded(x32 * x32, every_step), axis=-1, keepdims=True), every_step)
    inverse_rms = rounded(jax.lax.rsqrt(mean_square + static.eps), every_step)
    scale = rounded(static.offset + _sharding.over_rows(weight, x).astype(wide), every_step)
    return (rounded(x32 * inverse_rms, before_weight) * scale).astype(x.dtype), inverse_rms[..., 0]


def backward_xla(static: Static, x, grad, weight, inverse_rms, *, dtype=None) -> tuple[jax.Array, jax.Array]:
    """With x_hat = x inverse_rms and g = grad (offset + weight): dx = inverse_rms (g - x_hat mean(g x_hat)).

    -> dx [g, ..., D] in `dtype` or that of x, dweight [g, D] in float32.
    """
    wide = _validate.wide(x.dtype)
    inverse_rms, grad = inverse_rms[..., None], grad.astype(wide)
    x_hat = x.astype(wide) * inverse_rms
    g = grad * (static.offset + _sharding.over_rows(weight, x).astype(wide))
    dx = inverse_rms * (g - x_hat * jnp.mean(g * x_hat, axis=-1, keepdims=True))
    return dx.astype(dtype or x.dtype), jnp.sum(grad * x_hat, axis=tuple(range(1, x.ndim - 1)))


# ---- kernels: one program holds some rows at full width ----------------------------------------------------------------


def normalise(static: Static, x, weight, width: int, dtype):
    """Inside a kernel: x [rows, D and zeros], weight [D and zeros], both wide -> out, inverse rms [rows]."""
    every_step, before_weight = static.casting == "none", static.casting != "gemma"

    def rounded(value: jax.Array, to_dtype_of_x: bool) -> jax.Array:
        return value.astype(dtype).astype(value.dtype) if to_dtype_of_x else value

    mean_square = rounded(jnp.sum(rounded(x * x, every_step), axis=1) / width, every_step)
    inverse_rms = rounded(jax.lax.rsqrt(mean_square + static.eps), every_step)
    scale = rounded(static.offset + weight, every_step)
    return rounded(x * inverse_rms[:, None], before_weight) * scale[None, :], inverse_rms


def pull_back(static: Static, x, grad, weight, inverse_rms, width: int):
    """Inside a kernel: -> dx [rows, D and more], and what each row adds to dweight."""
    x_hat = x * inverse_rms[:, None]
    g = grad * (static.offset + weight)[None, :]
    mean = jnp.sum(g * x_hat, axis=1)[:, None] / width
    return inverse_rms[:, None] * (g - x_hat * mean), grad * x_hat


def _rms_norm_forward(
    x_ref, weight_ref, out_ref, inverse_rms_ref, *, static: Static, rows: int, width: int, split: Split
):
    """Grid (groups, programs)."""
    columns, in_width = _rows.whole_width(x_ref, width)
    weight = _pallas.load(weight_ref, (_pallas.program_id(0), columns), in_width, _validate.wide(x_ref.dtype))

    def step(nothing, block, values):
        out, inverse_rms = normalise(static, *values, weight, width, x_ref.dtype)
        _pallas.store(out_ref, block.index, out, block.inside)
        _pallas.store(inverse_rms_ref, block.rows, inverse_rms, block.in_rows)
        return nothing

    _rows.walk(step, (), [x_ref], [], rows=rows, width=width, split=split)


def _rms_norm_backward(
    x_ref,
    grad_ref,
    weight_ref,
    inverse_rms_ref,
    dx_ref,
    dweight_ref,
    *,
    static: Static,
    rows: int,
    width: int,
    split: Split,
):
    """Grid (groups, programs). Each program leaves one partial sum of dweight."""
    group, program = _pallas.program_id(0), _pallas.program_id(1)
    columns, in_width = _rows.whole_width(x_ref, width)
    weight = _pallas.load(weight_ref, (group, columns), in_width, _validate.wide(x_ref.dtype))

    def step(dweight, block, values):
        x, grad, inverse_rms = values
        dx, dweights = pull_back(static, x, grad, weight, inverse_rms, width)
        _pallas.store(dx_ref, block.index, dx, block.inside)
        return dweight + dweights

    zeros = jnp.zeros((split.rows, weight.size), weight.dtype)
    dweight = _rows.walk(step, zeros, [x_ref, grad_ref], [inverse_rms_ref], rows=rows, width=width, split=split)
    _pallas.store(dweight_ref, (group, program, columns), jnp.sum(dweight, axis=0), in_width)


def forward_kernel(static: Static, x, weight, *, interpret: bool, blocks: Blocks | None = None):
    """As forward_xla."""
    results = [(".d", x.dtype), (".", _validate.wide(x.dtype))]
    return _rows.launch(_rms_norm_forward, static, [x], [weight], [], results, interpret, blocks)


def backward_kernel(static: Static, x, grad, weight, inverse_rms, *, interpret: bool, blocks: Blocks | None = None):
    """As backward_xla."""
    results = [(".d", x.dtype), ("pd", _validate.wide(x.dtype))]
    full, vectors, per_row = [x, grad], [weight], [inverse_rms]
    dx, dweight = _rows.launch(_rms_norm_backward, static, full, vectors, per_row, results, interpret, blocks)
    return dx, jnp.sum(dweight, axis=1)


# ---- gradient and mesh -------------------------------------------------------------------------------------------------


_forward_local = _pallas.either(forward_kernel, forward_xla)
_backward_local = _pallas.either(backward_kernel, backward_xla)


def _forward_op(static: Static) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_forward_local, ("g.d", "gd"), ("g.d", "g."), "g.", static)


def _backward_op(static: Static) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_backward_local, ("g.d", "g.d", "gd", "g."), ("g.d", "gd"), "g.", static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(static: Static, x, weight):
    return _sharding.run(_forward_op(static), x, weight)[0]


def _rms_norm_fwd(static, x, weight):
    out, inverse_rms = _sharding.run(_forward_op(static), x, weight)
    return out, (x, weight, inverse_rms)


def _rms_norm_bwd(static, saved, grad):
    x, weight, inverse_rms = saved
    dx, dweight = _sharding.run(_backward_op(static), x, grad, weight, inverse_rms)
    return dx, dweight.astype(weight.dtype)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)
