"""Linear layers for a handful of rows, as one step of generation has them: each weight is read once, at memory's rate.

What stands beside the product is done in the same pass: the norm before it, the bias, the residual or the gate after it.
Forward only: there is no gradient.

The norm costs no pass of its own. With x_hat = x / rms(x) * norm_weight, a factor of the row may wait until the end:

    x_hat @ kernel = (x * norm_weight) @ kernel / rms(x)

so the squares are summed while the weight flows by.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _lowering, _sharding, _tuning, _validate
from pallas_kernels._tuning import Blocks
from pallas_kernels.rms_norm import rms_norm

FEW_ROWS = 16  # None takes the kernels up to here: the rows that one instruction of the tensor cores takes anyway
MOST_ROWS = 64  # that one program can hold
ELEMENTWISE_ROWS = 4  # up to here multiplying and adding keeps up with memory, and wants no padding to 16 rows


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
        implementation: None, "triton", "xla" or "interpret". None is the Pallas kernel for up to 16 rows on an NVIDIA
            GPU, if there is no mesh of several devices; XLA's otherwise, which the partitioner sees into.

    Returns:
        [B, O] in x's dtype. Sums are float32. The Pallas kernel rounds x * norm_weight to x's dtype from five rows on, and
        the result; XLA's rounds the normed x, the product and the result. No gradient.

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


def norm_swiglu(
    x: jax.Array,
    norm_weight: jax.Array,
    gate_up_kernel: jax.Array,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> jax.Array:
    """silu(x_hat @ gate) * (x_hat @ up) with x_hat = rms_norm(x, norm_weight), in one pass over both kernels.

    Args:
        x: [B, H], float; B is the number of rows, at most 64 for the Pallas kernel.
        norm_weight: [H], x's dtype.
        gate_up_kernel: [H, 2 I], x's dtype: the columns of gate, then those of up.
        eps: added to the mean square.
        implementation: as in `norm_linear`.

    Returns:
        [B, I] in x's dtype; rounded as in `norm_linear`. No gradient.

    Raises:
        ValueError: a shape or dtype that does not fit, or the Pallas kernel asked for by name at more than 64 rows.
        NotImplementedError: when it is differentiated.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import norm_swiglu
        >>> round(float(norm_swiglu(jnp.ones((1, 2)), jnp.ones(2), jnp.array([[1.0, 2.0], [0.0, 1.0]]))[0, 0]), 3)
        2.193
    """
    return _checked_and_run(
        "norm_swiglu", float(eps), implementation, x=x, norm_weight=norm_weight, kernel=gate_up_kernel
    )


class Static(NamedTuple):
    """An operation: what it is called, the arrays that it takes, and eps if there is a norm."""

    op: str
    names: tuple[str, ...]
    eps: float | None
    implementation: str | None

    @property
    def parts(self) -> int:
        """How many products share the rows: gate and up, or one."""
        return 2 if self.op == "norm_swiglu" else 1


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
    if width % static.parts:
        raise ValueError(f"{op}: kernel has {width} columns; expected those of gate and as many of up")
    if rows > MOST_ROWS and implementation in ("triton", "interpret"):
        raise ValueError(f"{op}: x has {rows} rows; the {implementation!r} implementation takes {MOST_ROWS}")
    if not x.size or not kernel.size or (implementation is None and not takes_kernels(rows, *arrays.values())):
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
    x, wide = given["x"], _validate.wide(given["x"].dtype)
    if static.eps is not None:
        x = rms_norm(x, given["norm_weight"], eps=static.eps, implementation="xla")
    out = x @ given["kernel"]
    if static.parts == 2:
        gate, up = (part.astype(wide) for part in jnp.split(out, 2, axis=-1))
        return (jax.nn.silu(gate) * up).astype(x.dtype)
    return out + given.get("bias", given.get("residual", 0))


# ---- kernels: one program takes some columns over all of the depth, or over a share of it ------------------------------


class Cut(NamedTuple):
    """How the kernel [depth, width] is cut up: a program takes `steps` turns, each with `loads` blocks [rows, columns]."""

    depth: int
    width: int  # of one part
    tiles: int  # of columns
    shares: int  # of the depth
    steps: int
    loads: int
    rows: int
    columns: int

    @classmethod
    def of(cls, static: Static, depth: int, width: int, blocks: Blocks, loads: int) -> "Cut":
        """A share for each tile of columns, unless the blocks ask for more programs; a norm wants all of the depth."""
        tiles = _lowering.cdiv(width, blocks.columns)
        turns = _lowering.cdiv(depth, blocks.rows * loads)
        shares = max(1, min(blocks.programs // tiles, turns)) if static.eps is None else 1
        steps = _lowering.cdiv(turns, shares)
        return cls(depth, width, tiles, _lowering.cdiv(turns, steps), steps, loads, blocks.rows, blocks.columns)

    def block(self, share, number):
        """-> the index of the rows of a share's block, and which of them exist; None: all, and no mask to compute."""
        first = (share * self.steps * self.loads + number) * self.rows
        some = _lowering.span(first, self.rows)
        even = self.shares * self.steps * self.loads * self.rows == self.depth
        return some, None if even else first + jnp.arange(self.rows) < self.depth

    def part(self, number: int):
        """-> the index of this program's columns in a part, and which of them exist, as in `block`."""
        first = _lowering.program_id(0) * self.columns
        inside = None if self.width % self.columns == 0 else first + jnp.arange(self.columns) < self.width
        return _lowering.span(number * self.width + first, self.columns), inside


def _thin_rows(*refs, static: Static, rows: int, cut: Cut):
    """Grid (tiles of columns, shares of the depth). Products are elementwise, a sum for each row.

    A block's sum over its rows waits until the end: until then every thread adds up what it loads itself. The next turn is
    loaded before the present one is worked on, so that memory is never idle; x, which the caches hold, only then.
    """
    ref = dict(zip((*static.names, "out"), refs, strict=True))
    wide, normed = _validate.wide(ref["x"].dtype), static.eps is not None
    parts, share = [cut.part(i) for i in range(static.parts)], _lowering.program_id(1)

    def load(turn):
        blocks = [cut.block(share, turn * cut.loads + i) for i in range(cut.loads)]
        return [
            [_lowering.load(ref["kernel"], (some, index), _outer(inside, mask)) for index, mask in parts]
            for some, inside in blocks
        ]

    def work(turn, state, found):
        sums, squares = state
        for i, weights in enumerate(found):
            some, inside = cut.block(share, turn * cut.loads + i)
            xs = [_lowering.load(ref["x"], (row, some), inside, wide) for row in range(rows)]
            if normed:
                squares = [s + x * x for s, x in zip(squares, xs, strict=True)]
                norm = _lowering.load(ref["norm_weight"], (some,), inside, wide)
                xs = [x * norm for x in xs]
            weights = [w.astype(wide) for w in weights]
            sums = [
                [s + x[:, None] * w for s, w in zip(of, weights, strict=True)] for of, x in zip(sums, xs, strict=True)
            ]
        return sums, squares

    def load_and_work(turn, carry):
        state, found = carry
        following = load(turn + 1)
        return work(turn, state, found), following

    zeros = jnp.zeros((cut.rows, cut.columns), wide)
    state = [[zeros] * static.parts] * rows, [jnp.zeros(cut.rows, wide)] * (rows if normed else 0)
    state, found = jax.lax.fori_loop(0, cut.steps - 1, load_and_work, (state, load(0)))
    sums, squares = work(cut.steps - 1, state, found)
    for row in range(rows):
        products = [jnp.sum(s, axis=0) for s in sums[row]]
        scale = jax.lax.rsqrt(jnp.sum(squares[row]) / cut.depth + static.eps) if normed else None
        index, inside = parts[0]
        _finish(static, cut, ref, products, scale, (row, index), inside, inside)


def _thin_dot(*refs, static: Static, rows: int, cut: Cut):
    """Grid (tiles of columns, shares of the depth). Products by the tensor cores, for 16 rows or a larger power of two."""
    ref = dict(zip((*static.names, "out"), refs, strict=True))
    dtype, wide, normed = ref["x"].dtype, _validate.wide(ref["x"].dtype), static.eps is not None
    height = block_rows(rows)
    some_rows = _lowering.overhanging(0, height)
    in_rows = jnp.arange(height) < rows
    parts, share = [cut.part(i) for i in range(static.parts)], _lowering.program_id(1)
    # x * norm_weight may be larger than any float16: those go as float32, of which the tensor cores take ten bits
    tf32 = normed and dtype == jnp.float16

    def step(turn, state):
        sums, squares = state
        some, inside = cut.block(share, turn)
        every = jnp.broadcast_to(_outer(in_rows, inside), (height, cut.rows))
        x = _lowering.load(ref["x"], (some_rows, some), every)
        if normed:
            x = x.astype(wide)
            squares = squares + x * x
            x = x * _lowering.load(ref["norm_weight"], (some,), inside, wide)[None, :]
            x = x if tf32 else x.astype(dtype)
        weights = [
            _lowering.load(ref["kernel"], (some, index), _outer(inside, mask), wide if tf32 else None)
            for index, mask in parts
        ]
        return [s + _lowering.dot(x, w, tf32=tf32) for s, w in zip(sums, weights, strict=True)], squares

    state = [jnp.zeros((height, cut.columns), wide)] * static.parts, jnp.zeros((height, cut.rows), wide)
    if not normed:
        state = state[0], jnp.zeros((), wide)
    products, squares = jax.lax.fori_loop(0, cut.steps, step, state)
    scale = jax.lax.rsqrt(jnp.sum(squares, axis=1) / cut.depth + static.eps)[:, None] if normed else None
    index, mask = parts[0]
    inside = jnp.broadcast_to(_outer(in_rows, mask), products[0].shape)
    _finish(static, cut, ref, products, scale, (some_rows, index), inside, mask)


def _finish(static: Static, cut: Cut, ref, products, scale, index, inside, in_columns):
    """What follows the products; a share of the depth leaves its own as it is."""
    if scale is not None:
        products = [product * scale for product in products]
    if static.parts == 2:
        gate, up = products
        out = gate * jax.nn.sigmoid(gate) * up
    else:
        (out,) = products
    if "bias" in ref:
        out = out + _lowering.load(ref["bias"], index[1:], in_columns, out.dtype)
    if cut.shares > 1:
        index = (_lowering.program_id(1), *index)
    elif "residual" in ref:
        out = out + _lowering.load(ref["residual"], index, inside, out.dtype)
    _lowering.store(ref["out"], index, out, inside)


def _outer(rows, columns):
    """The mask of a tile, from those of its rows and its columns; None is all of them."""
    if rows is None or columns is None:
        return rows[:, None] if rows is not None else None if columns is None else columns[None, :]
    return rows[:, None] & columns[None, :]


def block_rows(rows: int) -> int:
    """Rows of a tile for the tensor cores."""
    return max(16, _lowering.next_power_of_2(rows))


def thin_kernel(
    static: Static, *arrays: jax.Array, interpret: bool, blocks: Blocks | None = None, elementwise: bool | None = None
) -> jax.Array:
    """As thin_xla. `blocks` and `elementwise` (None: by the rows) are for tuning."""
    given = dict(zip(static.names, arrays, strict=True))
    x, kernel = given["x"], given["kernel"]
    (rows, depth), width = x.shape, kernel.shape[1] // static.parts
    elementwise = rows <= ELEMENTWISE_ROWS if elementwise is None else elementwise
    op = f"thin_{static.op}{'' if elementwise else '_dot'}"
    blocks = blocks or _tuning.blocks(op, rows=rows, width=depth)
    cut = Cut.of(static, depth, width, blocks, blocks.loads if elementwise else 1)
    shape, wide = (rows, width), _validate.wide(x.dtype)
    (out,) = _lowering.launch(
        functools.partial(_thin_rows if elementwise else _thin_dot, static=static, rows=rows, cut=cut),
        arrays,
        [(shape, x.dtype) if cut.shares == 1 else ((cut.shares, *shape), wide)],
        grid=(cut.tiles, cut.shares),
        num_warps=blocks.num_warps,
        num_stages=1 if elementwise else blocks.loads,
        interpret=interpret,
    )
    if cut.shares == 1:
        return out
    return (given["residual"].astype(wide) + jnp.sum(out, axis=0)).astype(x.dtype)
