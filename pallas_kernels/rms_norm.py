"""Root-mean-square normalization."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _rows, _sharding, _validate
from pallas_kernels._operation import DifferentiableOp, Pass
from pallas_kernels._pallas import choose_implementation
from pallas_kernels._rows import RowPartition
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
    """Normalizes each row by its root mean square: x / sqrt(mean(x^2) + eps) * (offset + weight), over the last axis.

    Args:
        x: [..., D], float.
        weight: [D], float.
        eps: added to the mean square.
        offset: added to the weight; 1.0 for models that store weight - 1.
        casting: where values are rounded to x's dtype. "llama": before the product with the weight and in the result;
            "gemma": only in the result; "none": after every step. Sums are float32 in all three.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        [..., D] in x's dtype. The backward pass saves x, weight and one float32 per row. It computes the gradient of the
        formula without rounding, in float32, and always sums the gradient of weight in the same order.

    Raises:
        ValueError: weight is not [D], a dtype is not floating, casting or implementation is unknown, or a kernel is
            requested by name at D > 65536.

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
    static = StaticArgs(float(eps), float(offset), casting, implementation)
    (out,) = _OPERATION(static, x[None], weight[None])
    return out[0]


class StaticArgs(NamedTuple):
    """Options of the operation that are fixed when it is traced."""

    eps: float
    offset: float
    casting: str
    implementation: str | None


# ---- XLA implementation: x [G, ..., D], weight [G, D] ------------------------------------------------------------------


def forward_xla(static: StaticArgs, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns out [G, ..., D], and the inverse rms [G, ...] in float32."""
    wide = _validate.accumulation_dtype(x.dtype)
    finfo = jnp.finfo(x.dtype)

    def round_if(to_dtype_of_x: bool, value: jax.Array) -> jax.Array:
        # reduce_precision instead of a pair of casts, which XLA would remove
        return jax.lax.reduce_precision(value, finfo.nexp, finfo.nmant) if to_dtype_of_x else value

    every_step, before_weight = static.casting == "none", static.casting != "gemma"
    x32 = x.astype(wide)
    mean_square = round_if(every_step, jnp.mean(round_if(every_step, x32 * x32), axis=-1, keepdims=True))
    inverse_rms = round_if(every_step, jax.lax.rsqrt(mean_square + static.eps))
    scale = round_if(every_step, static.offset + _sharding.over_rows(weight, x).astype(wide))
    return (round_if(before_weight, x32 * inverse_rms) * scale).astype(x.dtype), inverse_rms[..., 0]


def backward_xla(static: StaticArgs, x, d_out, weight, inverse_rms, *, dtype=None) -> tuple[jax.Array, jax.Array]:
    """Returns d_x [G, ..., D] in `dtype` (None: that of x), and d_weight [G, D] in float32.

    With x_hat = x inverse_rms and g = d_out (offset + weight): d_x = inverse_rms (g - x_hat mean(g x_hat)).
    """
    wide = _validate.accumulation_dtype(x.dtype)
    inverse_rms, d_out = inverse_rms[..., None], d_out.astype(wide)
    x_hat = x.astype(wide) * inverse_rms
    g = d_out * (static.offset + _sharding.over_rows(weight, x).astype(wide))
    d_x = inverse_rms * (g - x_hat * jnp.mean(g * x_hat, axis=-1, keepdims=True))
    return d_x.astype(dtype or x.dtype), jnp.sum(d_out * x_hat, axis=tuple(range(1, x.ndim - 1)))


# ---- kernels: each program holds some rows at full width ---------------------------------------------------------------


def rms_norm_forward_rows(static: StaticArgs, x, weight, width: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Inside a kernel: returns out [rows, columns] and the inverse rms [rows] of x [rows, columns], which is zero past D."""

    def round_if(to_dtype_of_x: bool, value: jax.Array) -> jax.Array:
        return value.astype(dtype).astype(value.dtype) if to_dtype_of_x else value

    every_step, before_weight = static.casting == "none", static.casting != "gemma"
    mean_square = round_if(every_step, jnp.sum(round_if(every_step, x * x), axis=1) / width)
    inverse_rms = round_if(every_step, jax.lax.rsqrt(mean_square + static.eps))
    scale = round_if(every_step, static.offset + weight)
    return round_if(before_weight, x * inverse_rms[:, None]) * scale[None, :], inverse_rms


def rms_norm_backward_rows(
    static: StaticArgs, x, d_out, weight, inverse_rms, width: int
) -> tuple[jax.Array, jax.Array]:
    """Inside a kernel: returns d_x [rows, columns], and each row's contribution to d_weight [rows, columns]."""
    x_hat = x * inverse_rms[:, None]
    g = d_out * (static.offset + weight)[None, :]
    mean = jnp.sum(g * x_hat, axis=1)[:, None] / width
    return inverse_rms[:, None] * (g - x_hat * mean), d_out * x_hat


def _rms_norm_forward(
    x_ref, weight_ref, out_ref, inverse_rms_ref, *, static: StaticArgs, partition: RowPartition
) -> None:
    dtype = x_ref.dtype
    weight = partition.load_vector(weight_ref, _validate.accumulation_dtype(dtype))

    def step(block, carry, x):
        out, inverse_rms = rms_norm_forward_rows(static, x, weight, partition.width, dtype)
        block.store(out_ref, out)
        block.store(inverse_rms_ref, inverse_rms)
        return carry

    partition.for_each_row_block(step, None, x_ref)


def _rms_norm_backward(
    x_ref,
    d_out_ref,
    weight_ref,
    inverse_rms_ref,
    d_x_ref,
    d_weight_ref,
    *,
    static: StaticArgs,
    partition: RowPartition,
) -> None:
    weight = partition.load_vector(weight_ref, _validate.accumulation_dtype(x_ref.dtype))

    def step(block, d_weight, x, d_out, inverse_rms):
        d_x, d_weight_rows = rms_norm_backward_rows(static, x, d_out, weight, inverse_rms, partition.width)
        block.store(d_x_ref, d_x)
        return d_weight + d_weight_rows

    d_weight = partition.zeros(weight_ref, weight.dtype)
    d_weight = partition.for_each_row_block(step, d_weight, x_ref, d_out_ref, inverse_rms_ref)
    partition.store_sum(d_weight_ref, d_weight)


def forward_kernel(static: StaticArgs, x, weight, *, interpret: bool, blocks: Blocks | None = None):
    """As forward_xla."""
    return _rows.launch(
        _rms_norm_forward,
        static,
        [(x, "G ... D"), (weight, "G D")],
        [(x.dtype, "G ... D"), (_validate.accumulation_dtype(x.dtype), "G ...")],
        interpret=interpret,
        blocks=blocks,
    )


def backward_kernel(
    static: StaticArgs, x, d_out, weight, inverse_rms, *, interpret: bool, blocks: Blocks | None = None
):
    """As backward_xla."""
    d_x, d_weight = _rows.launch(
        _rms_norm_backward,
        static,
        [(x, "G ... D"), (d_out, "G ... D"), (weight, "G D"), (inverse_rms, "G ...")],
        [(x.dtype, "G ... D"), (_validate.accumulation_dtype(x.dtype), "G programs D")],
        interpret=interpret,
        blocks=blocks,
    )
    return d_x, jnp.sum(d_weight, axis=1)


# ---- the operation -----------------------------------------------------------------------------------------------------

_OPERATION = DifferentiableOp(
    forward=Pass(
        choose_implementation(forward_kernel, forward_xla),
        operands={"x": "G ... D", "weight": "G D"},
        results={"out": "G ... D", "inverse_rms": "G ..."},
        parallel=("G", "..."),
    ),
    backward=Pass(
        choose_implementation(backward_kernel, backward_xla),
        operands={"x": "G ... D", "d_out": "G ... D", "weight": "G D", "inverse_rms": "G ..."},
        results={"d_x": "G ... D", "d_weight": "G D"},
        parallel=("G", "..."),
    ),
    returns=("out",),
)
