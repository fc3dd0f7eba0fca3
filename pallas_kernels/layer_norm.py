"""Layer normalization."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _rows, _sharding, _validate
from pallas_kernels._operation import DifferentiableOp, Pass
from pallas_kernels._pallas import choose_implementation
from pallas_kernels._rows import RowPartition
from pallas_kernels._tuning import Blocks


def layer_norm(
    x: jax.Array, weight: jax.Array, bias: jax.Array, *, eps: float = 1e-6, implementation: str | None = None
) -> jax.Array:
    """Normalizes each row to mean 0 and variance 1: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last axis.

    Args:
        x: [..., D], float.
        weight: [D], float.
        bias: [D], float.
        eps: added to the (biased) variance.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        [..., D] in x's dtype. The arithmetic is float32. The backward pass saves x, weight and two float32 per row. It
        always sums the gradients of weight and bias in the same order.

    Raises:
        ValueError: weight or bias is not [D], a dtype is not floating, implementation is unknown, or a kernel is requested
            by name at D > 65536.

    Source: Ba et al. 2016, Layer Normalization, https://arxiv.org/abs/1607.06450

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import layer_norm
        >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.zeros(2)).round(3).tolist()
        [-1.0, 1.0]
    """
    _validate.floating("layer_norm", x=x, weight=weight, bias=bias)
    static = StaticArgs(float(eps), _validate.rows("layer_norm", implementation, x, weight=weight, bias=bias))
    (out,) = _OPERATION(static, x[None], weight[None], bias[None])
    return out[0]


class StaticArgs(NamedTuple):
    """Options of the operation that are fixed when it is traced."""

    eps: float
    implementation: str | None


# ---- XLA implementation: x [G, ..., D], weight and bias [G, D] -------------------------------------------------------


def _forward_xla(static: StaticArgs, x, weight, bias):
    """Returns out [G, ..., D], mean and inverse standard deviation [G, ...] in float32.

    The variance is computed in a second pass, so that a large mean costs no precision.
    """
    wide = _validate.accumulation_dtype(x.dtype)
    centered = x.astype(wide)
    mean = jnp.mean(centered, axis=-1, keepdims=True)
    centered = centered - mean
    inverse_std = jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + static.eps)
    out = centered * inverse_std * _sharding.over_rows(weight, x).astype(wide) + _sharding.over_rows(bias, x).astype(
        wide
    )
    return out.astype(x.dtype), mean[..., 0], inverse_std[..., 0]


def _backward_xla(static: StaticArgs, x, d_out, weight, mean, inverse_std):
    """Returns d_x [G, ..., D], d_weight and d_bias [G, D] in float32.

    With x_hat = (x - mean) inverse_std and g = d_out weight: d_x = inverse_std (g - mean(g) - x_hat mean(g x_hat)).
    """
    wide = _validate.accumulation_dtype(x.dtype)
    inverse_std, d_out = inverse_std[..., None], d_out.astype(wide)
    x_hat = (x.astype(wide) - mean[..., None]) * inverse_std
    g = d_out * _sharding.over_rows(weight, x).astype(wide)
    d_x = inverse_std * (g - jnp.mean(g, axis=-1, keepdims=True) - x_hat * jnp.mean(g * x_hat, axis=-1, keepdims=True))
    rows = tuple(range(1, x.ndim - 1))
    return d_x.astype(x.dtype), jnp.sum(d_out * x_hat, axis=rows), jnp.sum(d_out, axis=rows)


# ---- kernels: each program holds some rows at full width -------------------------------------------------------------


def _layer_norm_forward(
    x_ref, weight_ref, bias_ref, out_ref, mean_ref, inverse_std_ref, *, static: StaticArgs, partition: RowPartition
) -> None:
    wide, width = _validate.accumulation_dtype(x_ref.dtype), partition.width
    weight = partition.load_vector(weight_ref, wide)[None, :]
    bias = partition.load_vector(bias_ref, wide)[None, :]

    def step(block, carry, x):
        mean = jnp.sum(x, axis=1) / width
        centered = jnp.where(block.inside, x - mean[:, None], 0)
        inverse_std = jax.lax.rsqrt(jnp.sum(centered * centered, axis=1) / width + static.eps)
        block.store(out_ref, centered * inverse_std[:, None] * weight + bias)
        block.store(mean_ref, mean)
        block.store(inverse_std_ref, inverse_std)
        return carry

    partition.for_each_row_block(step, None, x_ref)


def _layer_norm_backward(
    x_ref,
    d_out_ref,
    weight_ref,
    mean_ref,
    inverse_std_ref,
    d_x_ref,
    d_weight_ref,
    d_bias_ref,
    *,
    static: StaticArgs,
    partition: RowPartition,
) -> None:
    width = partition.width
    weight = partition.load_vector(weight_ref, _validate.accumulation_dtype(x_ref.dtype))[None, :]

    def step(block, sums, x, d_out, mean, inverse_std):
        d_weight, d_bias = sums
        inverse_std = inverse_std[:, None]
        x_hat = (x - mean[:, None]) * inverse_std
        g = d_out * weight  # zero past the width, and so are its products below
        mean_g = jnp.sum(g, axis=1)[:, None] / width
        mean_gx = jnp.sum(g * x_hat, axis=1)[:, None] / width
        block.store(d_x_ref, inverse_std * (g - mean_g - x_hat * mean_gx))
        return d_weight + d_out * x_hat, d_bias + d_out

    zeros = partition.zeros(weight_ref, weight.dtype)
    refs = x_ref, d_out_ref, mean_ref, inverse_std_ref
    d_weight, d_bias = partition.for_each_row_block(step, (zeros, zeros), *refs)
    partition.store_sum(d_weight_ref, d_weight)
    partition.store_sum(d_bias_ref, d_bias)


def forward_kernel(static: StaticArgs, x, weight, bias, *, interpret: bool, blocks: Blocks | None = None):
    """As _forward_xla."""
    wide = _validate.accumulation_dtype(x.dtype)
    return _rows.launch(
        _layer_norm_forward,
        static,
        [(x, "G ... D"), (weight, "G D"), (bias, "G D")],
        [(x.dtype, "G ... D"), (wide, "G ..."), (wide, "G ...")],
        interpret=interpret,
        blocks=blocks,
    )


def backward_kernel(
    static: StaticArgs, x, d_out, weight, mean, inverse_std, *, interpret: bool, blocks: Blocks | None = None
):
    """As _backward_xla."""
    wide = _validate.accumulation_dtype(x.dtype)
    d_x, d_weight, d_bias = _rows.launch(
        _layer_norm_backward,
        static,
        [(x, "G ... D"), (d_out, "G ... D"), (weight, "G D"), (mean, "G ..."), (inverse_std, "G ...")],
        [(x.dtype, "G ... D"), (wide, "G programs D"), (wide, "G programs D")],
        interpret=interpret,
        blocks=blocks,
    )
    return d_x, jnp.sum(d_weight, axis=1), jnp.sum(d_bias, axis=1)


# ---- the operation ---------------------------------------------------------------------------------------------------

_OPERATION = DifferentiableOp(
    forward=Pass(
        choose_implementation(forward_kernel, _forward_xla),
        operands={"x": "G ... D", "weight": "G D", "bias": "G D"},
        results={"out": "G ... D", "mean": "G ...", "inverse_std": "G ..."},
        parallel=("G", "..."),
    ),
    backward=Pass(
        choose_implementation(backward_kernel, _backward_xla),
        operands={"x": "G ... D", "d_out": "G ... D", "weight": "G D", "mean": "G ...", "inverse_std": "G ..."},
        results={"d_x": "G ... D", "d_weight": "G D", "d_bias": "G D"},
        parallel=("G", "..."),
    ),
    returns=("out",),
)
