"""Residual addition followed by root-mean-square normalisation."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _rows, _sharding, _validate
from pallas_kernels._rows import Split
from pallas_kernels._tuning import Blocks
from pallas_kernels.rms_norm import CASTING, Static, backward_xla, forward_xla, normalise, pull_back


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting: str = "llama",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """s = x + residual -> (rms_norm(s, weight), s).

    Args:
        x: [..., D], float.
        residual: as x, same shape and dtype.
        weight: [D], float.
        eps: as in `rms_norm`.
        offset: as in `rms_norm`.
        casting: as in `rms_norm`.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        (normed, s), both [..., D] in x's dtype; s is rounded to it before the norm. Backward keeps s, weight and one float32
        a row, and adds the gradient of s in the same pass.

    Raises:
        ValueError: x and residual differ in shape or dtype, or what `rms_norm` raises.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import add_rms_norm
        >>> normed, total = add_rms_norm(jnp.array([1.0, -1.0]), jnp.array([2.0, -2.0]), jnp.ones(2))
        >>> normed.round(3).tolist(), total.tolist()
        ([1.0, -1.0], [3.0, -3.0])
    """
    op = "add_rms_norm"
    _validate.floating(op, x=x, residual=residual, weight=weight)
    _validate.same_dtype(op, x=x, residual=residual)
    _validate.shape(op, "residual", residual.shape, x.shape)
    _validate.choice(op, "casting", casting, CASTING)
    implementation = _validate.rows(op, implementation, x, weight=weight)
    static = Static(float(eps), float(offset), casting, implementation)
    x, residual, weight = _sharding.agree(_forward_op(static), x[None], residual[None], weight[None])
    normed, total = _add_rms_norm(static, x, residual, weight)
    return normed[0], total[0]


# ---- XLA implementation: x, residual, total [g, ..., D], weight [g, D] -----------------------------------------------


def _forward_xla(static: Static, x, residual, weight):
    """-> normed [g, ..., D], total [g, ..., D], inverse rms [g, ...] in float32."""
    total = x + residual
    normed, inverse_rms = forward_xla(static, total, weight)
    return normed, total, inverse_rms


def _backward_xla(static: Static, total, grad, grad_total, weight, inverse_rms):
    """-> the gradient of x, and of residual, [g, ..., D]; dweight [g, D] in float32."""
    wide = _validate.wide(total.dtype)
    dx, dweight = backward_xla(static, total, grad, weight, inverse_rms, dtype=wide)
    return (dx + grad_total.astype(wide)).astype(total.dtype), dweight


# ---- kernels: those of rms_norm, with one more thing to read and to write --------------------------------------------


def _add_rms_norm_forward(
    x_ref,
    residual_ref,
    weight_ref,
    normed_ref,
    total_ref,
    inverse_rms_ref,
    *,
    static: Static,
    rows: int,
    width: int,
    split: Split,
):
    """Grid (groups, programs)."""
    dtype, wide = x_ref.dtype, _validate.wide(x_ref.dtype)
    columns, in_width = _rows.whole_width(x_ref, width)
    weight = _pallas.load(weight_ref, (_pallas.program_id(0), columns), in_width, wide)

    def step(nothing, block, values):
        x, residual = values
        total = (x + residual).astype(dtype)
        _pallas.store(total_ref, block.index, total, block.inside)
        normed, inverse_rms = normalise(static, total.astype(wide), weight, width, dtype)
        _pallas.store(normed_ref, block.index, normed, block.inside)
        _pallas.store(inverse_rms_ref, block.rows, inverse_rms, block.in_rows)
        return nothing

    _rows.walk(step, (), [x_ref, residual_ref], [], rows=rows, width=width, split=split)


def _add_rms_norm_backward(
    total_ref,
    grad_ref,
    grad_total_ref,
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
    columns, in_width = _rows.whole_width(total_ref, width)
    weight = _pallas.load(weight_ref, (group, columns), in_width, _validate.wide(total_ref.dtype))

    def step(dweight, block, values):
        total, grad, grad_total, inverse_rms = values
        dx, dweights = pull_back(static, total, grad, weight, inverse_rms, width)
        _pallas.store(dx_ref, block.index, dx + grad_total, block.inside)
        return dweight + dweights

    zeros = jnp.zeros((split.rows, weight.size), weight.dtype)
    refs = [total_ref, grad_ref, grad_total_ref]
    dweight = _rows.walk(step, zeros, refs, [inverse_rms_ref], rows=rows, width=width, split=split)
    _pallas.store(dweight_ref, (group, program, columns), jnp.sum(dweight, axis=0), in_width)


def forward_kernel(static: Static, x, residual, weight, *, interpret: bool, blocks: Blocks | None = None):
    """As _forward_xla."""
    results = [(".d", x.dtype), (".d", x.dtype), (".", _validate.wide(x.dtype))]
    return _rows.launch(_add_rms_norm_forward, static, [x, residual], [weight], [], results, interpret, blocks)


def backward_kernel(
    static: Static, total, grad, grad_total, weight, inverse_rms, *, interpret: bool, blocks: Blocks | None = None
):
    """As _backward_xla."""
    results = [(".d", total.dtype), ("pd", _validate.wide(total.dtype))]
    full, vectors, per_row = [total, grad, grad_total], [weight], [inverse_rms]
    dx, dweight = _rows.launch(_add_rms_norm_backward, static, full, vectors, per_row, results, interpret, blocks)
    return dx, jnp.sum(dweight, axis=1)


# ---- gradient and mesh -----------------------------------------------------------------------------------------------


_forward_local = _pallas.either(forward_kernel, _forward_xla)
_backward_local = _pallas.either(backward_kernel, _backward_xla)


def _forward_op(static: Static) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_forward_local, ("g.d", "g.d", "gd"), ("g.d", "g.d", "g."), "g.", static)


def _backward_op(static: Static) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(_backward_local, ("g.d", "g.d", "g.d", "gd", "g."), ("g.d", "gd"), "g.", static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_rms_norm(static: Static, x, residual, weight):
    return _sharding.run(_forward_op(static), x, residual, weight)[:2]


def _add_rms_norm_fwd(static, x, residual, weight):
    normed, total, inverse_rms = _sharding.run(_forward_op(static), x, residual, weight)
    return (normed, total), (total, weight, inverse_rms)


def _add_rms_norm_bwd(static, saved, grads):
    total, weight, inverse_rms = saved
    dx, dweight = _sharding.run(_backward_op(static), total, *grads, weight, inverse_rms)
    return dx, dx, dweight.astype(weight.dtype)


_add_rms_norm.defvjp(_add_rms_norm_fwd, _add_rms_norm_bwd)
