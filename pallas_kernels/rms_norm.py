"""Root-mean-square normalisation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _lowering, _sharding, _tuning, _validate
from pallas_kernels._tuning import Blocks

CASTING = ("llama", "gemma", "none")
WIDEST = 65_536  # columns that one program can hold in registers


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
    op = "rms_norm"
    _validate.implementation_exists(op, implementation, _validate.WITH_KERNEL)
    _validate.floating(op, x=x, weight=weight)
    _validate.choice(op, "casting", casting, CASTING)
    if x.ndim < 1:
        raise ValueError(f"{op}: x has shape (); expected [..., D]")
    _validate.shape(op, "weight", weight.shape, x.shape[-1:])
    if x.shape[-1] > WIDEST and implementation in ("triton", "interpret"):
        raise ValueError(f"{op}: x has {x.shape[-1]} columns; the {implementation!r} implementation takes {WIDEST}")
    if x.size == 0 or x.shape[-1] > WIDEST:
        implementation = "xla"
    static = _Static(float(eps), float(offset), casting, implementation)
    x, weight = _sharding.agree(_forward_op(static), x[None], weight[None])
    return _rms_norm(static, x, weight)[0]


class _Static(NamedTuple):
    eps: float
    offset: float
    casting: str
    implementation: str | None


# ---- XLA implementation: x [g, ..., D], weight [g, D] ------------------------------------------------------------------


def _forward_xla(static: _Static, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
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


def _backward_xla(static: _Static, x, grad, weight, inverse_rms) -> tuple[jax.Array, jax.Array]:
    """With x_hat = x inverse_rms and g = grad (offset + weight): dx = inverse_rms (g - x_hat mean(g x_hat)).

    -> dx [g, ..., D], dweight [g, D] in float32.
    """
    wide = _validate.wide(x.dtype)
    inverse_rms, grad = inverse_rms[..., None], grad.astype(wide)
    x_hat = x.astype(wide) * inverse_rms
    g = grad * (static.offset + _sharding.over_rows(weight, x).astype(wide))
    dx = inverse_rms * (g - x_hat * jnp.mean(g * x_hat, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(grad * x_hat, axis=tuple(range(1, x.ndim - 1)))


# ---- kernels: one program holds some rows at full width ----------------------------------------------------------------


def _rms_norm_forward(
    x_ref, weight_ref, out_ref, inverse_rms_ref, *, static: _Static, rows: int, width: int, blocks: Blocks
):
    """Grid (groups, blocks of rows)."""
    group, block = _lowering.program_id(0), _lowering.program_id(1)
    columns, in_width, wide = _columns(x_ref, width)
    dtype = x_ref.dtype
    every_step, before_weight = static.casting == "none", static.casting != "gemma"

    def rounded(value: jax.Array, to_dtype_of_x: bool) -> jax.Array:
        return value.astype(dtype).astype(wide) if to_dtype_of_x else value

    some, in_rows = _rows(group, block, rows, blocks.rows)
    inside = in_rows[:, None] & in_width[None, :]
    x = _lowering.load(x_ref, (some, columns), inside, wide)
    weight = _lowering.load(weight_ref, (group, columns), in_width, wide)
    mean_square = rounded(jnp.sum(rounded(x * x, every_step), axis=1) / width, every_step)
    inverse_rms = rounded(jax.lax.rsqrt(mean_square + static.eps), every_step)
    scale = rounded(static.offset + weight, every_step)
    out = rounded(x * inverse_rms[:, None], before_weight) * scale[None, :]
    _lowering.store(out_ref, (some, columns), out, inside)
    _lowering.store(inverse_rms_ref, (some,), inverse_rms, in_rows)


def _rms_norm_backward(
    x_ref,
    grad_ref,
    weight_ref,
    inverse_rms_ref,
    dx_ref,
    dweight_ref,
    *,
    static: _Static,
    rows: int,
    width: int,
    blocks: Blocks,
):
    """Grid (groups, programs). Each program walks over its blocks of rows and leaves one partial sum of dweight."""
    group, program = _lowering.program_id(0), _lowering.program_id(1)
    columns, in_width, wide = _columns(x_ref, width)
    programs = dweight_ref.shape[1]
    steps = _lowering.cdiv(_lowering.cdiv(rows, blocks.rows), programs)
    scale = static.offset + _lowering.load(weight_ref, (group, columns), in_width, wide)[None, :]

    def step(i, dweight):
        some, in_rows = _rows(group, program * steps + i, rows, blocks.rows)
        inside = in_rows[:, None] & in_width[None, :]
        x = _lowering.load(x_ref, (some, columns), inside, wide)
        grad = _lowering.load(grad_ref, (some, columns), inside, wide)
        inverse_rms = _lowering.load(inverse_rms_ref, (some,), in_rows, wide)[:, None]
        x_hat = x * inverse_rms
        g = grad * scale
        mean = jnp.sum(g * x_hat, axis=1)[:, None] / width
        _lowering.store(dx_ref, (some, columns), inverse_rms * (g - x_hat * mean), inside)
        return dweight + grad * x_hat

    dweight = jax.lax.fori_loop(0, steps, step, jnp.zeros((blocks.rows, in_width.shape[0]), wide))
    _lowering.store(dweight_ref, (group, program, columns), jnp.sum(dweight, axis=0), in_width)


def _columns(x_ref, width: int):
    """-> an index of all columns and more, up to a power of two; which of them exist; the dtype of the arithmetic."""
    return slice(None), jnp.arange(x_ref.shape[1]) < width, _validate.wide(x_ref.dtype)


def _rows(group, block, rows: int, block_rows: int):
    """-> an index of the rows of a block, counted through all groups; which of them belong to the group."""
    first = block * block_rows
    return _lowering.span(group * rows + first, block_rows), first + jnp.arange(block_rows) < rows


def forward_kernel(static: _Static, x, weight, *, interpret: bool, blocks: Blocks | None = None):
    """As _forward_xla."""
    (groups, width), rows = weight.shape, x.size // weight.size
    blocks = blocks or _tuning.blocks("rms_norm_forward", rows=groups * rows, width=width)
    out, inverse_rms = _lowering.launch(
        functools.partial(_rms_norm_forward, static=static, rows=rows, width=width, blocks=blocks),
        (x.reshape(groups * rows, width), weight),
        [((groups * rows, width), x.dtype), ((groups * rows,), _validate.wide(x.dtype))],
        grid=(groups, _lowering.cdiv(rows, blocks.rows)),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        interpret=interpret,
    )
    return out.reshape(x.shape), inverse_rms.reshape(x.shape[:-1])


def backward_kernel(static: _Static, x, grad, weight, inverse_rms, *, interpret: bool, blocks: Blocks | None = None):
    """As _backward_xla."""
    (groups, width), rows = weight.shape, x.size // weight.size
    blocks = blocks or _tuning.blocks("rms_norm_backward", rows=groups * rows, width=width)
    programs = min(_lowering.cdiv(blocks.programs, groups), _lowering.cdiv(rows, blocks.rows))
    wide = _validate.wide(x.dtype)
    dx, dweight = _lowering.launch(
        functools.partial(_rms_norm_backward, static=static, rows=rows, width=width, blocks=blocks),
        (x.reshape(-1, width), grad.reshape(-1, width), weight, inverse_rms.reshape(-1)),
        [((groups * rows, width), x.dtype), ((groups, programs, width), wide)],
        grid=(groups, programs),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        interpret=interpret,
    )
    return dx.reshape(x.shape), jnp.sum(dweight, axis=1)


# ---- gradient and mesh -------------------------------------------------------------------------------------------------


def _forward_local(static: _Static, x, weight):
    kernel, xla = (functools.partial(f, static) for f in (forward_kernel, _forward_xla))
    return _lowering.pick(static.implementation, kernel, xla, x, weight)


def _backward_local(static: _Static, x, grad, weight, inverse_rms):
    kernel, xla = (functools.partial(f, static) for f in (backward_kernel, _backward_xla))
    return _lowering.pick(static.implementation, kernel, xla, x, grad, weight, inverse_rms)


def _forward_op(static: _Static) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_forward_local, ("g.d", "gd"), ("g.d", "g."), "g.", static)


def _backward_op(static: _Static) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_backward_local, ("g.d", "g.d", "gd", "g."), ("g.d", "gd"), "g.", static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(static: _Static, x, weight):
    return _sharding.run(_forward_op(static), x, weight)[0]


def _rms_norm_fwd(static, x, weight):
    out, inverse_rms = _sharding.run(_forward_op(static), x, weight)
    return out, (x, weight, inverse_rms)


def _rms_norm_bwd(static, saved, grad):
    x, weight, inverse_rms = saved
    dx, dweight = _sharding.run(_backward_op(static), x, grad, weight, inverse_rms)
    return dx, dweight.astype(weight.dtype)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)
