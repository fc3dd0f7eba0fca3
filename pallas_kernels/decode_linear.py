"""Linear layers of a handful of rows, as one step of generation has them: what stands beside the product in the same pass.

At a single row a product is as long as its weight takes to be read, and the small ones end before memory has come up to
speed: a launch saved is most of what there is to gain. Weights are [out, in], so that what is summed lies together. Forward
only: there is no gradient.

The norm costs no pass of its own. With x_hat = x / rms(x) * norm_weight, a factor of the row may wait until the end:

    weight @ x_hat = weight @ (x * norm_weight) / rms(x)

so the squares are summed while the weight flows by.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _sharding, _tuning, _validate
from pallas_kernels._tuning import Blocks
from pallas_kernels.activations import swiglu
from pallas_kernels.rms_norm import rms_norm

FEW_ROWS = 16  # None takes the kernels up to here: the rows that one instruction of the tensor cores takes anyway
MOST_ROWS = 64  # that one program of the tensor cores' kernel can hold
LARGEST_WEIGHT = 16 * 2**20  # bytes, up to which None takes that kernel: XLA comes near memory's rate beyond
SOME_ROWS = Blocks(rows=32, columns=256, num_warps=4, loads=4)  # outputs; depth of a turn, and turns under way


def norm_linear(
    x: jax.Array,
    norm_weight: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> jax.Array:
    """rms_norm(x, norm_weight) @ weight.T + bias, for one row in a single pass over the weight.

    Args:
        x: [B, H], float; B is the number of rows, at most 64 for the Pallas kernels.
        norm_weight: [H], x's dtype.
        weight: [O, H], x's dtype.
        bias: [O], x's dtype, or None.
        eps: added to the mean square.
        implementation: None, "triton", "xla" or "interpret". None is a Pallas kernel on an NVIDIA GPU for a single row, and
            for up to 16 rows and 16 MiB of `weight`, if they are not spread over a mesh; else XLA's product, which the
            partitioner sees into.

    Returns:
        [B, O] in x's dtype. Sums are float32. The kernel for one row rounds nothing but the result, that for several the
        normed x too, XLA's also the product. No gradient.

    Raises:
        ValueError: a shape or dtype that does not fit, or a Pallas kernel asked for by name at more than 64 rows.
        NotImplementedError: when it is differentiated.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import norm_linear
        >>> norm_linear(jnp.array([[3.0, -3.0]]), jnp.ones(2), jnp.eye(2), jnp.ones(2)).round(3).tolist()
        [[2.0, 0.0]]
    """
    arrays = {"x": x, "norm_weight": norm_weight, "weight": weight} | ({} if bias is None else {"bias": bias})
    return _checked_and_run("norm_linear", float(eps), implementation, **arrays)


def norm_swiglu(
    x: jax.Array, norm_weight: jax.Array, weight: jax.Array, *, eps: float = 1e-6, implementation: str | None = None
) -> jax.Array:
    """silu(x_hat @ weight[0].T) * (x_hat @ weight[1].T) with x_hat = rms_norm(x, norm_weight).

    Args:
        x: [B, H], float.
        norm_weight: [H], x's dtype.
        weight: [2, I, H], x's dtype: of the gate, and of what it gates.
        eps, implementation: as in `norm_linear`, which says what is returned and raised, too.

    Returns:
        [B, I] in x's dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import norm_swiglu
        >>> norm_swiglu(jnp.ones((1, 2)), jnp.ones(2), jnp.array([[[50.0, 50.0]], [[0.5, 0.5]]])).round(2).tolist()
        [[100.0]]
    """
    return _checked_and_run("norm_swiglu", float(eps), implementation, x=x, norm_weight=norm_weight, weight=weight)


def linear_add(x: jax.Array, weight: jax.Array, residual: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """residual + x @ weight.T, in one pass over the weight.

    Args:
        x: [B, I], float.
        weight: [O, I], x's dtype.
        residual: [B, O], x's dtype.
        implementation: as in `norm_linear`, which says what is raised, too.

    Returns:
        [B, O] in x's dtype. Sums are float32; the Pallas kernels round the result only, XLA's the product too.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import linear_add
        >>> linear_add(jnp.array([[1.0, 2.0]]), jnp.eye(2), jnp.ones((1, 2))).tolist()
        [[2.0, 3.0]]
    """
    return _checked_and_run("linear_add", None, implementation, x=x, weight=weight, residual=residual)


class Static(NamedTuple):
    """An operation: what it is called, the arrays that it takes, and eps if there is a norm."""

    op: str
    names: tuple[str, ...]
    eps: float | None
    implementation: str | None

    @property
    def parts(self) -> int:
        """Products with the same x: two where one gates the other."""
        return 2 if self.op == "norm_swiglu" else 1


def _checked_and_run(op: str, eps: float | None, implementation: str | None, **arrays: jax.Array) -> jax.Array:
    _validate.known_implementation(op, implementation)
    _validate.floating(op, **arrays)
    _validate.same_dtype(op, **arrays)
    x, weight, static = arrays["x"], arrays["weight"], Static(op, tuple(arrays), eps, implementation)
    leading = () if static.parts == 1 else (static.parts,)
    if x.ndim != 2 or weight.ndim != 2 + len(leading):
        wanted = ", ".join([*map(str, leading), "O", "H"])
        raise ValueError(f"{op}: x has shape {x.shape}, weight {weight.shape}; expected [B, H] and [{wanted}]")
    (rows, depth), width = x.shape, weight.shape[-2]
    expected = {
        "weight": (*leading, width, depth),
        "norm_weight": (depth,),
        "bias": (width,),
        "residual": (rows, width),
    }
    for name in arrays.keys() & expected.keys():
        _validate.shape(op, name, arrays[name].shape, expected[name])
    if rows > MOST_ROWS and implementation in ("triton", "interpret"):
        raise ValueError(f"{op}: x has {rows} rows; the {implementation!r} implementation takes {MOST_ROWS}")
    fits = takes_kernels(rows, *arrays.values()) and (rows == 1 or weight.nbytes <= LARGEST_WEIGHT)
    if not x.size or not weight.size or (implementation is None and not fits):
        local = thin_xla
    else:
        local = _pallas.either(thin_kernel, thin_xla)
    return _pallas.forward_only(op, local)(static, *arrays.values())


def takes_kernels(rows: int, *arrays: jax.Array) -> bool:
    """Whether None is a Pallas kernel on a GPU: few rows, and no mesh whose devices would have to gather them."""
    return rows <= FEW_ROWS and not _sharding.is_spread(*arrays)


# ---- XLA implementation ------------------------------------------------------------------------------------------------


def thin_xla(static: Static, *arrays: jax.Array) -> jax.Array:
    """As a model writes it: norm, product, and what follows."""
    given = dict(zip(static.names, arrays, strict=True))
    x, weight = given["x"], given["weight"]
    if static.eps is not None:
        x = rms_norm(x, given["norm_weight"], eps=static.eps, implementation=static.implementation)
    if static.parts == 2:
        return swiglu(*jnp.einsum("bh,poh->pbo", x, weight), implementation=static.implementation)
    return x @ weight.T + given.get("bias", given.get("residual", 0))


# ---- kernels -----------------------------------------------------------------------------------------------------------


def thin_kernel(static: Static, *arrays: jax.Array, interpret: bool, blocks: Blocks | None = None) -> jax.Array:
    """As thin_xla: for one row all in one kernel, for several the product with the sum behind it."""
    given = dict(zip(static.names, arrays, strict=True))
    if len(given["x"]) == 1:
        return _launch(
            _one_row, blocks or _blocks_of_one_row(static, *given["weight"].shape[-2:]), static, given, interpret
        )
    implementation = "interpret" if interpret else "triton"
    *_, depth = given["weight"].shape
    given["weight"] = given["weight"].reshape(-1, depth)
    if static.eps is not None:
        given["x"] = rms_norm(given["x"], given.pop("norm_weight"), eps=static.eps, implementation=implementation)
    # what is under way lies in the memory of an SM: half of the depth at once for four bytes, or more than 16 rows
    columns = 2 * SOME_ROWS.columns // given["x"].dtype.itemsize // (1 if len(given["x"]) <= FEW_ROWS else 2)
    blocks = blocks or dataclasses.replace(SOME_ROWS, columns=columns)
    out = _launch(_some_rows, blocks, Static("linear_add", tuple(given), None, None), given, interpret)
    return out if static.parts == 1 else swiglu(*jnp.split(out, 2, axis=-1), implementation=implementation)


def _blocks_of_one_row(static: Static, width: int, depth: int) -> Blocks:
    """Of outputs, and of the depth: what is summed takes the place of a row's width."""
    return _tuning.blocks(f"one_row_{static.op}", rows=width, width=depth)


def _launch(kernel, blocks: Blocks, static: Static, given: dict[str, jax.Array], interpret: bool) -> jax.Array:
    x, (width, depth) = given["x"], given["weight"].shape[-2:]
    (out,) = _pallas.launch(
        functools.partial(kernel, static=static, rows=len(x), depth=depth, width=width, blocks=blocks),
        list(given.values()),
        [((len(x), width), x.dtype)],
        grid=(_pallas.cdiv(width, blocks.rows),),
        num_warps=blocks.num_warps,
        num_stages=blocks.loads,
        interpret=interpret,
    )
    return out


def _one_row(*refs, static: Static, rows: int, depth: int, width: int, blocks: Blocks):
    """Grid (tiles of outputs,). One program sums some outputs over all of the depth, number by number."""
    ref = dict(zip((*static.names, "out"), refs, strict=True))
    wide, normed = _validate.wide(ref["x"].dtype), static.eps is not None
    first = _pallas.program_id(0) * blocks.rows
    outputs, in_outputs = _pallas.span(first, blocks.rows), first + jnp.arange(blocks.rows) < width
    parts = [()] if static.parts == 1 else [(i,) for i in range(static.parts)]

    def load(turn):
        first = turn * blocks.columns
        some, inside = _pallas.span(first, blocks.columns), first + jnp.arange(blocks.columns) < depth
        mask = in_outputs[:, None] & inside[None, :]
        return some, inside, [_pallas.load(ref["weight"], (*part, outputs, some), mask) for part in parts]

    def step(turn, state):
        sums, squares = state
        for some, inside, weights in [load(turn * blocks.loads + i) for i in range(blocks.loads)]:
            x = _pallas.load(ref["x"], (0, some), inside, wide)
            if normed:
                squares = squares + x * x
                x = x * _pallas.load(ref["norm_weight"], (some,), inside, wide)
            sums = [total + weight.astype(wide) * x[None, :] for total, weight in zip(sums, weights, strict=True)]
        return sums, squares

    zeros = [jnp.zeros((blocks.rows, blocks.columns), wide) for _ in parts], jnp.zeros(blocks.columns, wide)
    turns = _pallas.cdiv(depth, blocks.columns * blocks.loads)
    sums, squares = jax.lax.fori_loop(0, turns, step, zeros)
    out = [jnp.sum(total, axis=1) for total in sums]
    if normed:
        factor = jax.lax.rsqrt(jnp.sum(squares) / depth + static.eps)
        out = [value * factor for value in out]
    out = out[0] if static.parts == 1 else out[0] * jax.nn.sigmoid(out[0]) * out[1]
    if "bias" in ref:
        out = out + _pallas.load(ref["bias"], (outputs,), in_outputs, wide)
    if "residual" in ref:
        out = out + _pallas.load(ref["residual"], (0, outputs), in_outputs, wide)
    _pallas.store(ref["out"], (0, outputs), out, in_outputs)


def _some_rows(*refs, static: Static, rows: int, depth: int, width: int, blocks: Blocks):
    """Grid (tiles of outputs,). Products by the tensor cores, for 16 rows or a larger power of two."""
    ref = dict(zip((*static.names, "out"), refs, strict=True))
    wide, height = _validate.wide(ref["x"].dtype), max(16, _pallas.next_power_of_2(rows))
    every, in_rows = _pallas.overhanging(0, height), jnp.arange(height) < rows
    first = _pallas.program_id(0) * blocks.rows
    outputs, in_outputs = _pallas.span(first, blocks.rows), first + jnp.arange(blocks.rows) < width

    def step(turn, product):
        first = turn * blocks.columns
        some, inside = _pallas.span(first, blocks.columns), first + jnp.arange(blocks.columns) < depth
        x = _pallas.load(ref["x"], (every, some), in_rows[:, None] & inside[None, :])
        weight = _pallas.load(ref["weight"], (outputs, some), in_outputs[:, None] & inside[None, :])
        return product + _pallas.dot(x, weight, transposed=True)

    zeros = jnp.zeros((height, blocks.rows), wide)
    out = jax.lax.fori_loop(0, _pallas.cdiv(depth, blocks.columns), step, zeros)
    if "bias" in ref:
        out = out + _pallas.load(ref["bias"], (outputs,), in_outputs, wide)[None, :]
    inside = in_rows[:, None] & in_outputs[None, :]
    if "residual" in ref:
        out = out + _pallas.load(ref["residual"], (every, outputs), inside, wide)
    _pallas.store(ref["out"], (every, outputs), out, inside)
