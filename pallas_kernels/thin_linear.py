"""Linear layers of a handful of rows with a small weight, as one step of generation has them between its large ones.

What stands beside the product is done in the same pass: the norm before it, the bias or the residual after it. A product so
small ends before memory has come up to speed, so a launch saved is most of what there is to gain. Forward only: there is no
gradient.

The norm costs no pass of its own. With x_hat = x / rms(x) * norm_weight, a factor of the row may wait until the end:

    x_hat @ kernel = (x * norm_weight) @ kernel / rms(x)

so the squares are summed while the weight flows by.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _lowering, _sharding, _validate
from pallas_kernels._tuning import Blocks
from pallas_kernels.rms_norm import rms_norm

FEW_ROWS = 16  # None takes the kernels up to here: the rows that one instruction of the tensor cores takes anyway
MOST_ROWS = 64  # that one program can hold
# Bytes of a weight up to which they do. On an H200 1536 x 1536 took 6.8 us, against 9.9 by XLA; 8960 x 1536 took 12 to 14,
# and 9.7 by XLA, which comes near memory's rate there. (XLA's times are from another run than the kernels'.)
LARGEST_WEIGHT = 16 * 2**20
BLOCKS = Blocks(rows=128, columns=32, num_warps=4, loads=6)  # of the weight: a turn's, and turns under way


def norm_linear(
    x: jax.Array,
    norm_weight: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> jax.Array:
    """rms_norm(x, norm_weight) @ kernel + bias, in one pass over the kernel.

    Args:
        x: [B, H], float; B is the number of rows, at most 64 for the Pallas kernel.
        norm_weight: [H], x's dtype.
        kernel: [H, O], x's dtype.
        bias: [O], x's dtype, or None.
        eps: added to the mean square.
        implementation: None, "triton", "xla" or "interpret". None is the Pallas kernel for up to 16 rows and 16 MiB of
            `kernel` on an NVIDIA GPU, if there is no mesh of several devices; else XLA's, which the partitioner sees into.

    Returns:
        [B, O] in x's dtype. Sums are float32. The Pallas kernel rounds x * norm_weight to x's dtype, and the result; XLA's
        rounds the normed x, the product and the result. No gradient.

    Raises:
        ValueError: a shape or dtype that does not fit, or the Pallas kernel asked for by name at more than 64 rows.
        NotImplementedError: when it is differentiated.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import norm_linear
        >>> norm_linear(jnp.array([[3.0, -3.0]]), jnp.ones(2), jnp.eye(2), jnp.ones(2)).round(3).tolist()
        [[2.0, 0.0]]
    """
    arrays = {"x": x, "norm_weight": norm_weight, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    return _checked_and_run("norm_linear", float(eps), implementation, **arrays)


def linear_add(x: jax.Array, kernel: jax.Array, residual: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """residual + x @ kernel, in one pass over the kernel.

    Args:
        x: [B, I], float; B is the number of rows, at most 64 for the Pallas kernel.
        kernel: [I, O], x's dtype.
        residual: [B, O], x's dtype.
        implementation: as in `norm_linear`.

    Returns:
        [B, O] in x's dtype. Sums are float32; the Pallas kernel rounds the result only, XLA's the product too. No gradient.

    Raises:
        ValueError: a shape or dtype that does not fit, or the Pallas kernel asked for by name at more than 64 rows.
        NotImplementedError: when it is differentiated.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import linear_add
        >>> linear_add(jnp.array([[1.0, 2.0]]), jnp.eye(2), jnp.ones((1, 2))).tolist()
        [[2.0, 3.0]]
    """
    return _checked_and_run("linear_add", None, implementation, x=x, kernel=kernel, residual=residual)


class Static(NamedTuple):
    """An operation: what it is called, the arrays that it takes, and eps if there is a norm."""

    op: str
    names: tuple[str, ...]
    eps: float | None
    implementation: str | None


def _checked_and_run(op: str, eps: float | None, implementation: str | None, **arrays: jax.Array) -> jax.Array:
    _validate.known_implementation(op, implementation)
    _validate.floating(op, **arrays)
    _validate.same_dtype(op, **arrays)
    x, kernel = arrays["x"], arrays["kernel"]
    if x.ndim != 2 or kernel.ndim != 2:
        raise ValueError(f"{op}: x has shape {x.shape}, kernel {kernel.shape}; expected [B, H] and [H, O]")
    (rows, depth), width = x.shape, kernel.shape[1]
    expected = {"kernel": (depth, width), "norm_weight": (depth,), "bias": (width,), "residual": (rows, width)}
    for name in arrays.keys() & expected.keys():
        _validate.shape(op, name, arrays[name].shape, expected[name])
    static = Static(op, tuple(arrays), eps, implementation)
    if rows > MOST_ROWS and implementation in ("triton", "interpret"):
        raise ValueError(f"{op}: x has {rows} rows; the {implementation!r} implementation takes {MOST_ROWS}")
    small = kernel.nbytes <= LARGEST_WEIGHT and takes_kernels(rows, *arrays.values())
    if not x.size or not kernel.size or (implementation is None and not small):
        static = static._replace(implementation="xla")
    local = _lowering.either(thin_kernel, thin_xla)
    return _lowering.forward_only(op, local)(static, *arrays.values())


def takes_kernels(rows: int, *arrays: jax.Array) -> bool:
    """Whether None is the Pallas kernel on a GPU: few rows, and no mesh of several devices, which would gather them."""
    return rows <= FEW_ROWS and _sharding.devices_of(*arrays) <= 1


# ---- XLA implementation ------------------------------------------------------------------------------------------------


def thin_xla(static: Static, *arrays: jax.Array) -> jax.Array:
    """As a model writes it: norm, product, and what follows."""
    given = dict(zip(static.names, arrays, strict=True))
    x = given["x"]
    if static.eps is not None:
        x = rms_norm(x, given["norm_weight"], eps=static.eps, implementation="xla")
    return x @ given["kernel"] + given.get("bias", given.get("residual", 0))


# ---- kernel: one program takes some columns over all of the depth ------------------------------------------------------


def _thin(*refs, static: Static, rows: int, depth: int, width: int, blocks: Blocks):
    """Grid (tiles of columns,). Products by the tensor cores, for 16 rows or a larger power of two."""
    ref = dict(zip((*static.names, "out"), refs, strict=True))
    dtype, wide, normed = ref["x"].dtype, _validate.wide(ref["x"].dtype), static.eps is not None
    height = max(16, _lowering.next_power_of_2(rows))
    some_rows, in_rows = _lowering.overhanging(0, height), jnp.arange(height) < rows
    first = _lowering.program_id(0) * blocks.columns
    columns, in_columns = _lowering.span(first, blocks.columns), first + jnp.arange(blocks.columns) < width
    # x * norm_weight may be larger than any float16: those go as float32, of which the tensor cores take ten bits
    tf32 = normed and dtype == jnp.float16

    def step(turn, state):
        product, squares = state
        first = turn * blocks.rows
        some, inside = _lowering.span(first, blocks.rows), first + jnp.arange(blocks.rows) < depth
        x = _lowering.load(ref["x"], (some_rows, some), in_rows[:, None] & inside[None, :])
        if normed:
            x = x.astype(wide)
            squares = squares + x * x
            x = x * _lowering.load(ref["norm_weight"], (some,), inside, wide)[None, :]
            x = x if tf32 else x.astype(dtype)
        mask = inside[:, None] & in_columns[None, :]
        weight = _lowering.load(ref["kernel"], (some, columns), mask, wide if tf32 else None)
        return product + _lowering.dot(x, weight, tf32=tf32), squares

    zeros = jnp.zeros((height, blocks.columns), wide), jnp.zeros((height, blocks.rows) if normed else (), wide)
    out, squares = jax.lax.fori_loop(0, _lowering.cdiv(depth, blocks.rows), step, zeros)
    if normed:
        out = out * jax.lax.rsqrt(jnp.sum(squares, axis=1) / depth + static.eps)[:, None]
    if "bias" in ref:
        out = out + _lowering.load(ref["bias"], (columns,), in_columns, wide)[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    if "residual" in ref:
        out = out + _lowering.load(ref["residual"], (some_rows, columns), inside, wide)
    _lowering.store(ref["out"], (some_rows, columns), out, inside)


def thin_kernel(static: Static, *arrays: jax.Array, interpret: bool) -> jax.Array:
    """As thin_xla."""
    given = dict(zip(static.names, arrays, strict=True))
    x, (depth, width) = given["x"], given["kernel"].shape
    (out,) = _lowering.launch(
        functools.partial(_thin, static=static, rows=len(x), depth=depth, width=width, blocks=BLOCKS),
        arrays,
        [((len(x), width), x.dtype)],
        grid=(_lowering.cdiv(width, BLOCKS.columns),),
        num_warps=BLOCKS.num_warps,
        num_stages=BLOCKS.loads,
        interpret=interpret,
    )
    return out
