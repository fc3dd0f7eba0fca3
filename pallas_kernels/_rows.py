"""How kernels over rows of numbers are cut up: what the norms and the gates have in common."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _tuning, _validate
from pallas_kernels._tuning import Blocks


def whole_width(ref: Any, width: int) -> tuple[slice, jax.Array]:
    """-> an index of all columns and more, up to a power of two; which of them exist."""
    return slice(None), jnp.arange(ref.shape[-1]) < width


def tile(rows: int, width: int, blocks: Blocks) -> tuple[tuple, jax.Array]:
    """For grid (blocks of rows, blocks of columns): -> the index of a program's tile; which of its numbers exist."""
    first_row, first_column = (_pallas.program_id(i) * n for i, n in enumerate((blocks.rows, blocks.columns)))
    in_rows = first_row + jnp.arange(blocks.rows) < rows
    in_columns = first_column + jnp.arange(blocks.columns) < width
    index = _pallas.span(first_row, blocks.rows), _pallas.span(first_column, blocks.columns)
    return index, in_rows[:, None] & in_columns[None, :]


class Block(NamedTuple):
    """Some rows of an array, as indices into [rows] and [rows, width], and which of them exist."""

    rows: tuple
    in_rows: jax.Array
    index: tuple
    inside: jax.Array


class Split(NamedTuple):
    """How the rows of a group are shared out: `programs` that take `steps` blocks of `rows` each."""

    rows: int
    programs: int
    steps: int

    @classmethod
    def of(cls, rows: int, groups: int, blocks: Blocks) -> Self:
        """One block for each program, unless the blocks say how many programs there are."""
        count = _pallas.cdiv(rows, blocks.rows)
        programs = min(_pallas.cdiv(blocks.programs, groups) or count, count)
        return cls(blocks.rows, programs, _pallas.cdiv(count, programs))


def walk(
    step: Callable, sums: Any, refs: Sequence[Any], per_row: Sequence[Any], *, rows: int, width: int, split: Split
) -> Any:
    """For grid (groups, programs): a program's blocks of rows, one after the other. -> the last sums.

    step(sums, Block, values) -> sums, with float32 values loaded from `refs` [rows, width and more] and `per_row` [rows].
    The next block is loaded before a step works on its own, so that the memory is never idle. Programs take turns: those
    that run at the same time work on rows that lie side by side.
    """
    group, program = _pallas.program_id(0), _pallas.program_id(1)
    columns, in_width = whole_width(refs[0], width)

    def block(i) -> Block:
        first = (program + i * split.programs) * split.rows
        some, in_rows = _pallas.span(group * rows + first, split.rows), first + jnp.arange(split.rows) < rows
        return Block((some,), in_rows, (some, columns), in_rows[:, None] & in_width[None, :])

    def load(i):
        here = block(i)
        full = [_pallas.load(ref, here.index, here.inside) for ref in refs]
        return full + [_pallas.load(ref, here.rows, here.in_rows) for ref in per_row]

    def work(i, sums, values):
        return step(sums, block(i), [x.astype(_validate.wide(x.dtype)) for x in values])

    def load_and_work(i, state):
        sums, values = state
        following = load(i + 1)
        return work(i, sums, values), following

    sums, values = jax.lax.fori_loop(0, split.steps - 1, load_and_work, (sums, load(0)))
    return work(split.steps - 1, sums, values)


def launch(
    kernel: Callable,
    static: Any,
    full: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    per_row: Sequence[jax.Array],
    results: Sequence[tuple[str, Any]],
    interpret: bool,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, ...]:
    """Runs a kernel over rows: full [g, ..., D], vectors [g, D], per_row [g, ...].

    Results are written as (axes, dtype): ".d" is [g, ..., D], "." is [g, ...], "pd" is [g, programs, D].
    """
    first = full[0]
    (groups, width), rows = vectors[0].shape, first.size // vectors[0].size
    op = kernel.__name__.strip("_")
    blocks = blocks or _tuning.blocks(op, rows=groups * rows, width=width)
    split = Split.of(rows, groups, blocks)
    flat = {".d": (groups * rows, width), ".": (groups * rows,), "pd": (groups, split.programs, width)}
    shaped = {".d": first.shape, ".": first.shape[:-1], "pd": flat["pd"]}
    found = _pallas.launch(
        functools.partial(kernel, static=static, rows=rows, width=width, split=split),
        [*(x.reshape(flat[".d"]) for x in full), *vectors, *(x.reshape(flat["."]) for x in per_row)],
        [(flat[axes], dtype) for axes, dtype in results],
        grid=(groups, split.programs),
        num_warps=blocks.num_warps,
        interpret=interpret,
    )
    return tuple(x.reshape(shaped[axes]) for x, (axes, _) in zip(found, results, strict=True))
