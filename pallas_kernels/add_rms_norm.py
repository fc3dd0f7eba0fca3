"""Residual addition followed by root-mean-square normalization."""

import jax
import jax.numpy as jnp

from pallas_kernels import _rows, _validate
from pallas_kernels._operation import DifferentiableOp, Pass
from pallas_kernels._pallas import choose_implementation
from pallas_kernels._rows import RowPartition
from pallas_kernels._tuning import Blocks
from pallas_kernels.rms_norm import CASTING, StaticArgs, rms_norm_backward_rows, rms_norm_forward_rows
from pallas_kernels.rms_norm import backward_xla as rms_norm_backward_xla
from pallas_kernels.rms_norm import forward_xla as rms_norm_forward_xla


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
    """Returns (rms_norm(s, weight), s) with s = x + residual.

    Args:
        x: [..., D], float.
        residual: [..., D], x's dtype.
        weight: [D], float.
        eps: as in `rms_norm`.
        offset: as in `rms_norm`.
        casting: as in `rms_norm`.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        (normed, s), both [..., D] in x's dtype. s is rounded to x's dtype before the norm. The backward pass saves s, weight
        and one float32 per row. It adds the gradient that arrives at s in the same pass.

    Raises:
        ValueError: x and residual differ in shape or dtype, or for a reason listed in `rms_norm`.

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
    static = StaticArgs(float(eps), float(offset), casting, implementation)
    normed, total = _OPERATION(static, x[None], residual[None], weight[None])
    return normed[0], total[0]


# ---- XLA implementation: x, residual, total [G, ..., D], weight [G, D] -----------------------------------------------


def _forward_xla(static: StaticArgs, x, residual, weight):
    """Returns normed [G, ..., D], total [G, ..., D], and the inverse rms [G, ...] in float32."""
    total = x + residual
    normed, inverse_rms = rms_norm_forward_xla(static, total, weight)
    return normed, total, inverse_rms


def _backward_xla(static: StaticArgs, total, d_normed, d_total, weight, inverse_rms):
    """Returns the gradient [G, ..., D] of both x and residual, and d_weight [G, D] in float32."""
    wide = _validate.accumulation_dtype(total.dtype)
    d_x, d_weight = rms_norm_backward_xla(static, total, d_normed, weight, inverse_rms, dtype=wide)
    return (d_x + d_total.astype(wide)).astype(total.dtype), d_weight


# ---- kernels: as in rms_norm, with one more array to read and to write -----------------------------------------------


def _add_rms_norm_forward(
    x_ref,
    residual_ref,
    weight_ref,
    normed_ref,
    total_ref,
    inverse_rms_ref,
    *,
    static: StaticArgs,
    partition: RowPartition,
) -> None:
    dtype, wide = x_ref.dtype, _validate.accumulation_dtype(x_ref.dtype)
    weight = partition.load_vector(weight_ref, wide)

    def step(block, carry, x, residual):
        total = (x + residual).astype(dtype)
        block.store(total_ref, total)
        normed, inverse_rms = rms_norm_forward_rows(static, total.astype(wide), weight, partition.width, dtype)
        block.store(normed_ref, normed)
        block.store(inverse_rms_ref, inverse_rms)
        return carry

    partition.for_each_row_block(step, None, x_ref, residual_ref)


def _add_rms_norm_backward(
    total_ref,
    d_normed_ref,
    d_total_ref,
    weight_ref,
    inverse_rms_ref,
    d_x_ref,
    d_weight_ref,
    *,
    static: StaticArgs,
    partition: RowPartition,
) -> None:
    weight = partition.load_vector(weight_ref, _validate.accumulation_dtype(total_ref.dtype))

    def step(block, d_weight, total, d_normed, d_total, inverse_rms):
        d_x, d_weight_rows = rms_norm_backward_rows(static, total, d_normed, weight, inverse_rms, partition.width)
        block.store(d_x_ref, d_x + d_total)
        return d_weight + d_weight_rows

    d_weight = partition.zeros(weight_ref, weight.dtype)
    d_weight = partition.for_each_row_block(step, d_weight, total_ref, d_normed_ref, d_total_ref, inverse_rms_ref)
    partition.store_sum(d_weight_ref, d_weight)


def forward_kernel(static: StaticArgs, x, residual, weight, *, interpret: bool, blocks: Blocks | None = None):
    """As _forward_xla."""
    return _rows.launch(
        _add_rms_norm_forward,
        static,
        [(x, "G ... D"), (residual, "G ... D"), (weight, "G D")],
        [(x.dtype, "G ... D"), (x.dtype, "G ... D"), (_validate.accumulation_dtype(x.dtype), "G ...")],
        interpret=interpret,
        blocks=blocks,
    )


def backward_kernel(
    static: StaticArgs, total, d_normed, d_total, weight, inverse_rms, *, interpret: bool, blocks: Blocks | None = None
):
    """As _backward_xla."""
    d_x, d_weight = _rows.launch(
        _add_rms_norm_backward,
        static,
        [
            (total, "G ... D"),
            (d_normed, "G ... D"),
            (d_total, "G ... D"),
            (weight, "G D"),
            (inverse_rms, "G ..."),
        ],
        [(total.dtype, "G ... D"), (_validate.accumulation_dtype(total.dtype), "G programs D")],
        interpret=interpret,
        blocks=blocks,
    )
    return d_x, jnp.sum(d_weight, axis=1)


# ---- the operation ---------------------------------------------------------------------------------------------------

_OPERATION = DifferentiableOp(
    forward=Pass(
        choose_implementation(forward_kernel, _forward_xla),
        operands={"x": "G ... D", "residual": "G ... D", "weight": "G D"},
        results={"normed": "G ... D", "total": "G ... D", "inverse_rms": "G ..."},
        parallel=("G", "..."),
    ),
    backward=Pass(
        choose_implementation(backward_kernel, _backward_xla),
        operands={
            "total": "G ... D",
            "d_normed": "G ... D",
            "d_total": "G ... D",
            "weight": "G D",
            "inverse_rms": "G ...",
        },
        results={"d_x": "G ... D", "d_weight": "G D"},
        parallel=("G", "..."),
    ),
    returns=("normed", "total"),
    gradients={"residual": "d_x"},
)
