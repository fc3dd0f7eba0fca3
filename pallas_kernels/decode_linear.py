"""Small-batch linear layers for decoding, with the adjacent norm, gate or residual add fused into the same pass.

With a single row, a matmul takes as long as reading its weight, and a small matmul ends before memory reaches full speed. So
most of the gain comes from saving launches. Weights are [out, in], so that the summed axis is contiguous. These operations
have no gradient.

The norm needs no separate pass. With x_hat = x / rms(x) * norm_weight, the factor 1 / rms(x) can be applied at the end:

    weight @ x_hat = weight @ (x * norm_weight) / rms(x)

So the kernel sums the squares of x while it streams the weight.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _sharding, _tuning, _validate
from pallas_kernels._tuning import Blocks
from pallas_kernels.activations import swiglu
from pallas_kernels.rms_norm import rms_norm

MAX_ROWS = 64  # the most rows that one program of the tensor-core kernel can hold
# Limits within which implementation=None picks the kernels on a GPU.
PREFERRED_MAX_ROWS = 16  # a tensor-core instruction processes this many rows in any case
PREFERRED_MAX_WEIGHT_BYTES = 16 * 2**20  # for several rows; with larger weights, XLA comes close to memory bandwidth
SEVERAL_ROWS = Blocks(rows=32, columns=256, num_warps=4, loads=4)  # rows: outputs; columns: depth per iteration


def norm_linear(
    x: jax.Array,
    norm_weight: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> jax.Array:
    """Computes rms_norm(x, norm_weight) @ weight.T + bias: for one row, in a single pass over the weight.

    Args:
        x: [B, H], float; the Pallas kernels take up to 64 rows.
        norm_weight: [H], x's dtype.
        weight: [O, H], x's dtype.
        bias: [O], x's dtype, or None.
        eps: added to the mean square.
        implementation: None, "triton", "xla" or "interpret". On an NVIDIA GPU, None picks a Pallas kernel for a single row,
            and for up to 16 rows if `weight` has at most 16 MiB, unless the operands may be sharded over a mesh. Otherwise
            it picks XLA, which can be partitioned.

    Returns:
        [B, O] in x's dtype. Sums are float32. The kernel for one row rounds only the result; that for several rows also
        rounds the normalized x, and XLA also the product. There is no gradient.

    Raises:
        ValueError: a shape or dtype does not fit, or a Pallas kernel is requested by name for more than 64 rows,
            or at H > 65536 for several rows.
        NotImplementedError: the operation is differentiated.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import norm_linear
        >>> norm_linear(jnp.array([[3.0, -3.0]]), jnp.ones(2), jnp.eye(2), jnp.ones(2)).round(3).tolist()
        [[2.0, 0.0]]
    """
    vectors = {"norm_weight": norm_weight} | ({} if bias is None else {"bias": bias})
    static = _checked("norm_linear", implementation, eps, "O H", x, weight, **vectors)
    return _norm_linear(static, x, norm_weight, weight, bias)


def norm_swiglu(
    x: jax.Array, norm_weight: jax.Array, weight: jax.Array, *, eps: float = 1e-6, implementation: str | None = None
) -> jax.Array:
    """Computes silu(x_hat @ weight[0].T) * (x_hat @ weight[1].T) with x_hat = rms_norm(x, norm_weight).

    Args:
        x: [B, H], float.
        norm_weight: [H], x's dtype.
        weight: [2, F, H], x's dtype: the gate projection, then the up projection.
        eps: added to the mean square.
        implementation: as in `norm_linear`.

    Returns:
        [B, F] in x's dtype, rounded as in `norm_linear`. There is no gradient.

    Raises:
        ValueError, NotImplementedError: As in `norm_linear`.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import norm_swiglu
        >>> norm_swiglu(jnp.ones((1, 2)), jnp.ones(2), jnp.array([[[50.0, 50.0]], [[0.5, 0.5]]])).round(2).tolist()
        [[100.0]]
    """
    static = _checked("norm_swiglu", implementation, eps, "2 F H", x, weight, norm_weight=norm_weight)
    return _norm_swiglu(static, x, norm_weight, weight)


def linear_add(
    x: jax.Array,
    weight: jax.Array,
    residual: jax.Array,
    *,
    residual_scale: float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """Computes residual_scale * residual + x @ weight.T in one pass over the weight.

    Args:
        x: [B, F], float.
        weight: [O, F], x's dtype.
        residual: [B, O], x's dtype.
        residual_scale: 1 / n where n devices each hold a part of the depth F, and the results are summed over them.
        implementation: as in `norm_linear`.

    Returns:
        [B, O] in x's dtype. Sums are float32. The Pallas kernels round only the result; XLA also rounds the product. There
        is no gradient.

    Raises:
        ValueError, NotImplementedError: As in `norm_linear`.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import linear_add
        >>> linear_add(jnp.array([[1.0, 2.0]]), jnp.eye(2), jnp.ones((1, 2))).tolist()
        [[2.0, 3.0]]
    """
    static = _checked("linear_add", implementation, 0.0, "O F", x, weight, residual=residual)
    return _linear_add(static._replace(residual_scale=float(residual_scale)), x, weight, residual)


def pallas_preferred(rows: int, *operands: jax.Array) -> bool:
    """Returns whether None may pick a decoding kernel on a GPU: only for few rows, and not if it would gather operands."""
    return rows <= PREFERRED_MAX_ROWS and not _sharding.is_spread(*operands)


class StaticArgs(NamedTuple):
    """Options of the operation that are fixed when it is traced."""

    eps: float  # unused where there is no norm
    implementation: str | None  # that of the fused operation
    requested: str | None  # the caller's choice, for the norm and the gate where they run as separate operations
    residual_scale: float = 1.0  # unused where there is no residual


def _checked(
    op: str,
    implementation: str | None,
    eps: float,
    weight_axes: str,
    x: jax.Array,
    weight: jax.Array,
    **vectors: jax.Array,
) -> StaticArgs:
    """Returns the static arguments. Raises ValueError for a shape or dtype that does not fit, or for too many rows."""
    operands = {"x": x, "weight": weight} | vectors
    _validate.known_implementation(op, implementation)
    _validate.floating(op, **operands)
    _validate.same_dtype(op, **operands)
    *leading, _, depth_axis = axes = weight_axes.split()
    if x.ndim != 2 or weight.ndim != len(axes):
        raise ValueError(
            f"{op}: x has shape {x.shape}, weight {weight.shape}; expected [B, {depth_axis}] and [{', '.join(axes)}]"
        )
    (rows, depth), width = x.shape, weight.shape[-2]
    _validate.shape(op, "weight", weight.shape, (*map(int, leading), width, depth))
    expected = {"norm_weight": (depth,), "bias": (width,), "residual": (rows, width)}
    for name, vector in vectors.items():
        _validate.shape(op, name, vector.shape, expected[name])
    if rows > MAX_ROWS and implementation in ("triton", "interpret"):
        raise ValueError(f"{op}: x has {rows} rows; expected at most {MAX_ROWS} for implementation {implementation!r}")

    if rows > 1 and "norm_weight" in vectors:
        implementation = _validate.rows(op, implementation, x)  # the norm is a kernel of its own, over whole rows
    preferred = pallas_preferred(rows, *operands.values()) and (
        rows == 1 or weight.nbytes <= PREFERRED_MAX_WEIGHT_BYTES
    )
    use_xla = implementation is None and not preferred
    return StaticArgs(float(eps), "xla" if use_xla else implementation, implementation)


# ---- XLA implementations: separate norm, matmul, and gate or add --------------------------------------------------------


def norm_linear_xla(static: StaticArgs, x, norm_weight, weight, bias):
    x = rms_norm(x, norm_weight, eps=static.eps, implementation=static.requested)
    return x @ weight.T + (0 if bias is None else bias)


def norm_swiglu_xla(static: StaticArgs, x, norm_weight, weight):
    x = rms_norm(x, norm_weight, eps=static.eps, implementation=static.requested)
    gate, up = jnp.einsum("bh,poh->pbo", x, weight)
    return swiglu(gate, up, implementation=static.requested)


def linear_add_xla(static: StaticArgs, x, weight, residual):
    return x @ weight.T + _scaled(residual, static.residual_scale)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1 else scale * x


# ---- Pallas implementations: one row takes a single kernel; several rows take a norm, a matmul (with its add) and a gate --


def norm_linear_kernel(
    static: StaticArgs, x, norm_weight, weight, bias=None, *, interpret: bool, blocks: Blocks | None = None
):
    if len(x) == 1:
        kernel = functools.partial(_one_row_norm_linear, eps=static.eps)
        return _launch(
            kernel, x, norm_weight, weight, bias, sizes=weight.shape[-2:], interpret=interpret, blocks=blocks
        )
    x = rms_norm(x, norm_weight, eps=static.eps, implementation="interpret" if interpret else "triton")
    return _launch(_several_rows_linear, x, weight, bias, sizes=weight.shape, interpret=interpret, blocks=blocks)


def norm_swiglu_kernel(static: StaticArgs, x, norm_weight, weight, *, interpret: bool, blocks: Blocks | None = None):
    if len(x) == 1:
        kernel = functools.partial(_one_row_norm_swiglu, eps=static.eps)
        return _launch(kernel, x, norm_weight, weight, sizes=weight.shape[-2:], interpret=interpret, blocks=blocks)
    implementation = "interpret" if interpret else "triton"
    weight = weight.reshape(-1, weight.shape[-1])  # gate and up in one matmul
    x = rms_norm(x, norm_weight, eps=static.eps, implementation=implementation)
    gate_up = _launch(_several_rows_linear, x, weight, None, sizes=weight.shape, interpret=interpret, blocks=blocks)
    return swiglu(*jnp.split(gate_up, 2, axis=-1), implementation=implementation)


def linear_add_kernel(static: StaticArgs, x, weight, residual, *, interpret: bool, blocks: Blocks | None = None):
    kernel = functools.partial(
        _one_row_linear_add if len(x) == 1 else _several_rows_linear_add, residual_scale=static.residual_scale
    )
    return _launch(kernel, x, weight, residual, sizes=weight.shape, interpret=interpret, blocks=blocks)


def _launch(
    kernel: Callable,
    x: jax.Array,
    *operands: jax.Array | None,
    sizes: tuple[int, int],
    interpret: bool,
    blocks: Blocks | None,
) -> jax.Array:
    """Runs a kernel with refs (x, *operands, out) over tiles of outputs. `sizes` is (outputs, depth), the weight's sizes."""
    width, depth = sizes
    if blocks is None and len(x) == 1:
        name = getattr(kernel, "func", kernel).__name__.strip("_")
        blocks = _tuning.blocks(name, rows=width, width=depth)  # the depth takes the place of a row's width
    elif blocks is None:
        # Tiles in flight occupy shared memory, so their depth is halved for 4-byte dtypes, and again for more than 16 rows.
        columns = 2 * SEVERAL_ROWS.columns // x.dtype.itemsize // (1 if len(x) <= 16 else 2)
        blocks = dataclasses.replace(SEVERAL_ROWS, columns=columns)
    (out,) = _pallas.launch(
        functools.partial(kernel, width=width, depth=depth, blocks=blocks),
        (x, *operands),
        [((len(x), width), x.dtype)],
        grid=(_pallas.cdiv(width, blocks.rows),),
        num_warps=blocks.num_warps,
        num_stages=blocks.loads,
        interpret=interpret,
    )
    return out


# ---- kernels, grid (tiles of outputs,): a program computes `blocks.rows` outputs over the whole depth -------------------


def _one_row_norm_linear(
    x_ref, norm_weight_ref, weight_ref, bias_ref, out_ref, *, eps: float, width: int, depth: int, blocks: Blocks
):
    """Writes out = weight @ (x * norm_weight) / rms(x) + bias; bias_ref may be None."""
    outputs, in_outputs = _tile(_pallas.program_id(0), blocks.rows, width)
    (product,), sum_of_squares = _one_row_products(
        x_ref, weight_ref, [()], outputs, in_outputs, depth, blocks, norm_weight_ref
    )
    out = product * jax.lax.rsqrt(sum_of_squares / depth + eps)
    if bias_ref is not None:
        out = out + _pallas.load(bias_ref, (outputs,), in_outputs, out.dtype)
    _pallas.store(out_ref, (0, outputs), out, in_outputs)


def _one_row_norm_swiglu(
    x_ref, norm_weight_ref, weight_ref, out_ref, *, eps: float, width: int, depth: int, blocks: Blocks
):
    """Writes out = silu(gate) * up, with gate and up = weight @ (x * norm_weight) / rms(x)."""
    outputs, in_outputs = _tile(_pallas.program_id(0), blocks.rows, width)
    products, sum_of_squares = _one_row_products(
        x_ref, weight_ref, [(0,), (1,)], outputs, in_outputs, depth, blocks, norm_weight_ref
    )
    inverse_rms = jax.lax.rsqrt(sum_of_squares / depth + eps)
    gate, up = (product * inverse_rms for product in products)
    _pallas.store(out_ref, (0, outputs), gate * jax.nn.sigmoid(gate) * up, in_outputs)


def _one_row_linear_add(
    x_ref, weight_ref, residual_ref, out_ref, *, residual_scale: float, width: int, depth: int, blocks: Blocks
):
    """Writes out = weight @ x + residual_scale * residual."""
    outputs, in_outputs = _tile(_pallas.program_id(0), blocks.rows, width)
    (product,), _ = _one_row_products(x_ref, weight_ref, [()], outputs, in_outputs, depth, blocks)
    out = product + _scaled(_pallas.load(residual_ref, (0, outputs), in_outputs, product.dtype), residual_scale)
    _pallas.store(out_ref, (0, outputs), out, in_outputs)


def _one_row_products(
    x_ref, weight_ref, parts: list[tuple], outputs, in_outputs, depth: int, blocks: Blocks, norm_weight_ref=None
) -> tuple[list[jax.Array], jax.Array]:
    """Returns weight[part] @ (x * norm_weight) for each part, and the sum of x^2 (0 without norm_weight)."""
    dtype = _validate.accumulation_dtype(x_ref.dtype)

    def load_weights(i):
        columns, in_columns = _tile(i, blocks.columns, depth)
        mask = in_outputs[:, None] & in_columns[None, :]
        return columns, in_columns, [_pallas.load(weight_ref, (*part, outputs, columns), mask) for part in parts]

    def step(i, state):
        sums, squares = state
        for columns, in_columns, weights in [load_weights(i * blocks.loads + j) for j in range(blocks.loads)]:
            x = _pallas.load(x_ref, (0, columns), in_columns, dtype)
            if norm_weight_ref is not None:
                squares = squares + x * x
                x = x * _pallas.load(norm_weight_ref, (columns,), in_columns, dtype)
            sums = [total + weight.astype(dtype) * x[None, :] for total, weight in zip(sums, weights, strict=True)]
        return sums, squares

    zeros = [jnp.zeros((blocks.rows, blocks.columns), dtype) for _ in parts], jnp.zeros(blocks.columns, dtype)
    sums, squares = jax.lax.fori_loop(0, _pallas.cdiv(depth, blocks.columns * blocks.loads), step, zeros)
    return [jnp.sum(total, axis=1) for total in sums], jnp.sum(squares)


def _several_rows_linear(x_ref, weight_ref, bias_ref, out_ref, *, width: int, depth: int, blocks: Blocks):
    """Writes out = x @ weight.T + bias; bias_ref may be None."""
    rows, in_rows = _all_rows(x_ref)
    outputs, in_outputs = _tile(_pallas.program_id(0), blocks.rows, width)
    out = _several_rows_product(x_ref, weight_ref, (rows, in_rows), (outputs, in_outputs), depth, blocks)
    if bias_ref is not None:
        out = out + _pallas.load(bias_ref, (outputs,), in_outputs, out.dtype)[None, :]
    _pallas.store(out_ref, (rows, outputs), out, in_rows[:, None] & in_outputs[None, :])


def _several_rows_linear_add(
    x_ref, weight_ref, residual_ref, out_ref, *, residual_scale: float, width: int, depth: int, blocks: Blocks
):
    """Writes out = x @ weight.T + residual_scale * residual."""
    rows, in_rows = _all_rows(x_ref)
    outputs, in_outputs = _tile(_pallas.program_id(0), blocks.rows, width)
    product = _several_rows_product(x_ref, weight_ref, (rows, in_rows), (outputs, in_outputs), depth, blocks)
    mask = in_rows[:, None] & in_outputs[None, :]
    out = product + _scaled(_pallas.load(residual_ref, (rows, outputs), mask, product.dtype), residual_scale)
    _pallas.store(out_ref, (rows, outputs), out, mask)


def _several_rows_product(x_ref, weight_ref, row_tile: tuple, output_tile: tuple, depth: int, blocks: Blocks):
    """Returns x @ weight.T for all rows and a tile of outputs, from the tensor cores."""
    (rows, in_rows), (outputs, in_outputs) = row_tile, output_tile

    def step(i, product):
        columns, in_columns = _tile(i, blocks.columns, depth)
        x = _pallas.load(x_ref, (rows, columns), in_rows[:, None] & in_columns[None, :])
        weight = _pallas.load(weight_ref, (outputs, columns), in_outputs[:, None] & in_columns[None, :])
        return product + _pallas.dot(x, weight, transposed=True)

    zeros = jnp.zeros((in_rows.size, in_outputs.size), _validate.accumulation_dtype(x_ref.dtype))
    return jax.lax.fori_loop(0, _pallas.cdiv(depth, blocks.columns), step, zeros)


def _all_rows(x_ref):
    """Returns the index of all rows, padded to a power of two of at least 16 for the tensor cores, and their mask."""
    height = max(16, _pallas.next_power_of_2(x_ref.shape[0]))
    return _pallas.overhanging(0, height), jnp.arange(height) < x_ref.shape[0]


def _tile(i, size: int, end: int):
    """Returns the index of the i-th tile of `size` elements, and the mask of those before `end`."""
    start = i * size
    return _pallas.span(start, size), start + jnp.arange(size) < end


_norm_linear = _pallas.forward_only("norm_linear", _pallas.choose_implementation(norm_linear_kernel, norm_linear_xla))
_norm_swiglu = _pallas.forward_only("norm_swiglu", _pallas.choose_implementation(norm_swiglu_kernel, norm_swiglu_xla))
_linear_add = _pallas.forward_only("linear_add", _pallas.choose_implementation(linear_add_kernel, linear_add_xla))
