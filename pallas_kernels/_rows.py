"""Divides rows and tiles among the programs of a kernel; shared by the norms and the activations."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _tuning, _validate
from pallas_kernels._tuning import Blocks


class RowBlock(NamedTuple):
    """Some rows of a group, at full width."""

    rows: Any  # index of the rows
    in_rows: jax.Array  # [block rows], the mask of rows that exist
    columns: slice  # index of all columns, padded to a power of two
    inside: jax.Array  # [block rows, columns], the mask of elements that exist

    def load(self, ref: Any) -> jax.Array:
        """Loads these rows of a ref [rows, width] or [rows], in its dtype."""
        if len(ref.shape) == 1:
            return _pallas.load(ref, (self.rows,), self.in_rows)
        return _pallas.load(ref, (self.rows, self.columns), self.inside)

    def store(self, ref: Any, value: jax.Array) -> None:
        """Stores a value [block rows, columns] or [block rows] at these rows of a ref."""
        if len(ref.shape) == 1:
            _pallas.store(ref, (self.rows,), value, self.in_rows)
        else:
            _pallas.store(ref, (self.rows, self.columns), value, self.inside)


class RowPartition(NamedTuple):
    """Divides the rows of each group among `programs`, which take `steps` blocks of `block_rows` rows each.

    The grid of the kernel is (groups, programs). Its refs are arrays [groups * rows, width], numbers per row [groups *
    rows], vectors [groups, width] and partial sums [groups, programs, width].
    """

    rows: int
    width: int
    block_rows: int
    programs: int
    steps: int

    @classmethod
    def of(cls, groups: int, rows: int, width: int, blocks: Blocks) -> Self:
        """Returns the partition with one block of rows per program, unless `blocks.programs` sets the number of programs."""
        count = _pallas.cdiv(rows, blocks.rows)
        programs = min(_pallas.cdiv(blocks.programs, groups) or count, count)
        return cls(rows, width, blocks.rows, programs, _pallas.cdiv(count, programs))

    def load_vector(self, ref: Any, dtype: Any) -> jax.Array:
        """Loads the group's vector of a ref [groups, width]; zeros past the width."""
        return _pallas.load(ref, (_pallas.program_id(0), slice(None)), self._in_width(ref), dtype)

    def zeros(self, ref: Any, dtype: Any) -> jax.Array:
        """Returns zeros [block rows, columns], for sums over the program's rows."""
        return jnp.zeros((self.block_rows, ref.shape[-1]), dtype)

    def store_sum(self, ref: Any, sums: jax.Array) -> None:
        """Stores the program's sum over its rows in a ref [groups, programs, width]."""
        index = (_pallas.program_id(0), _pallas.program_id(1), slice(None))
        _pallas.store(ref, index, jnp.sum(sums, axis=0), self._in_width(ref))

    def for_each_row_block(self, step: Callable, carry: Any, *refs: Any) -> Any:
        """Runs carry = step(block, carry, *values) for each of the program's blocks; returns the last carry.

        The values are the block's rows of `refs`, in float32. Each step loads the next block before it works on its own, so
        that memory is never idle. The programs interleave: those that run at the same time work on adjacent rows.
        """
        group, program = _pallas.program_id(0), _pallas.program_id(1)
        in_width = self._in_width(refs[0])

        def block(i) -> RowBlock:
            first = (program + i * self.programs) * self.block_rows
            in_rows = first + jnp.arange(self.block_rows) < self.rows
            index = _pallas.span(group * self.rows + first, self.block_rows)
            return RowBlock(index, in_rows, slice(None), in_rows[:, None] & in_width[None, :])

        def load(i):
            row_block = block(i)
            return [row_block.load(ref) for ref in refs]

        def work(i, carry, values):
            return step(block(i), carry, *(x.astype(_validate.accumulation_dtype(x.dtype)) for x in values))

        def load_and_work(i, state):
            carry, values = state
            next_values = load(i + 1)
            return work(i, carry, values), next_values

        carry, values = jax.lax.fori_loop(0, self.steps - 1, load_and_work, (carry, load(0)))
        return work(self.steps - 1, carry, values)

    def _in_width(self, ref: Any) -> jax.Array:
        return jnp.arange(ref.shape[-1]) < self.width


def launch(
    kernel: Callable,
    static: Any,
    operands: Sequence[tuple[jax.Array, str]],
    results: Sequence[tuple[Any, str]],
    *,
    interpret: bool,
    blocks: Blocks | None,
) -> tuple[jax.Array, ...]:
    """Runs kernel(*operand_refs, *result_refs, static=..., partition=RowPartition) over rows.

    Args:
        kernel: the body; its name without leading underscores is its name in the table of block sizes.
        static: options of the operation, for the kernel.
        operands: arrays with their axes: "G ... D", "G D" or "G ...". The first operand has "G ... D".
        results: dtypes with their axes: as for operands, or "G programs D".
        interpret: as in `_pallas.launch`.
        blocks: block sizes; None for those of `_tuning.blocks`.

    Returns:
        The results, with these axes.
    """
    first, _ = operands[0]
    groups, *_, width = first.shape
    rows = first.size // (groups * width)
    blocks = blocks or _tuning.blocks(kernel.__name__.strip("_"), rows=groups * rows, width=width)
    partition = RowPartition.of(groups, rows, width, blocks)
    in_kernel = {
        "G ... D": (groups * rows, width),
        "G ...": (groups * rows,),
        "G D": (groups, width),
        "G programs D": (groups, partition.programs, width),
    }
    outside = in_kernel | {"G ... D": first.shape, "G ...": first.shape[:-1]}
    outputs = _pallas.launch(
        functools.partial(kernel, static=static, partition=partition),
        [x.reshape(in_kernel[axes]) for x, axes in operands],
        [(in_kernel[axes], dtype) for dtype, axes in results],
        grid=(groups, partition.programs),
        num_warps=blocks.num_warps,
        interpret=interpret,
    )
    return tuple(x.reshape(outside[axes]) for x, (_, axes) in zip(outputs, results, strict=True))


def tile(rows: int, width: int, blocks: Blocks) -> tuple[tuple, jax.Array]:
    """Returns the index of a program's tile and the mask of its elements. Grid (blocks of rows, blocks of columns)."""
    first_row, first_column = (_pallas.program_id(i) * n for i, n in enumerate((blocks.rows, blocks.columns)))
    in_rows = first_row + jnp.arange(blocks.rows) < rows
    in_columns = first_column + jnp.arange(blocks.columns) < width
    index = _pallas.span(first_row, blocks.rows), _pallas.span(first_column, blocks.columns)
    return index, in_rows[:, None] & in_columns[None, :]
