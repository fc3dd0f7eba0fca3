"""Segments: several sequences packed into one row of attention."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _sharding, _validate

CLEARED_ROWS = 32  # rows per program of `clear_rows`
CLEARED_COLUMNS = 256  # columns that it writes at once
MIN_SLOTS = 2  # with a single slot, cuDNN treats the row as one unpacked sequence


class Segments(NamedTuple):
    """The start and length of each segment in each row, as returned by `find_segments`. M is the number of slots."""

    ids: jax.Array  # [B, T] int32: 1, 2, ... from left to right; 0 is padding
    starts: jax.Array  # [B, M] int32: the first token of each segment; -1 in unused slots
    lengths: jax.Array  # [B, M] int32: its number of tokens; -1 in unused slots


def find_segments(segment_ids: jax.Array, max_segments: int) -> Segments:
    """Computes the start and length of each segment, once for many calls of `attention`, such as those of a model's layers.

    Args:
        segment_ids: [B, T], int; 0 is padding. The tokens of a segment are contiguous.
        max_segments: an upper bound on the segments of a row, not counting padding. If a row has more, "fa4" and "cudnn"
            give NaN for the tokens of the excess segments; the other implementations remain correct.

    Returns:
        Segments, which `attention` accepts in place of `segment_ids`.

    Raises:
        ValueError: a shape, a dtype or max_segments does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import find_segments
        >>> find_segments(jnp.array([[7, 7, 7, 0, 5]]), max_segments=2).starts.tolist()
        [[0, 4]]
    """
    op = "find_segments"
    segment_ids = jnp.asarray(segment_ids)
    _validate.integer(op, segment_ids=segment_ids)
    if segment_ids.ndim != 2:
        raise ValueError(f"{op}: segment_ids has shape {segment_ids.shape}; expected [B, T]")
    if max_segments < 1:
        raise ValueError(f"{op}: max_segments is {max_segments}; expected max_segments >= 1")
    slots = max(MIN_SLOTS, max_segments)
    inside = segment_ids != 0
    is_start = inside & (segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1])
    ids = jnp.where(inside, jnp.cumsum(is_start, axis=1, dtype=jnp.int32), 0)
    in_slot = ids[:, :, None] == jnp.arange(1, slots + 1)
    lengths = jnp.sum(in_slot, axis=1, dtype=jnp.int32)
    tokens = jnp.arange(ids.shape[1], dtype=jnp.int32)
    starts = jnp.sum(jnp.where(in_slot & is_start[:, :, None], tokens[:, None], 0), axis=1, dtype=jnp.int32)
    return Segments(ids, *(jnp.where(lengths > 0, x, -1) for x in (starts, lengths)))


def clear_outside(x: jax.Array, segments: Segments) -> jax.Array:
    """Returns x [B, T, N, D] with zeros in padding, which kernels may leave uninitialized.

    Tokens of segments without a slot become NaN.
    """
    has_slot, value = _replacement(segments.ids[:, :, None, None], segments.starts.shape[1])
    return jnp.where(has_slot, x, value.astype(x.dtype))


def clear_in_place(x: jax.Array, segments: Segments) -> jax.Array:
    """As `clear_outside`, for an array that a matmul reads next, so that XLA could not fuse the selection.

    On a GPU, a kernel writes only to the tokens to clear. XLA's selection moves 336 MB in each layer of Qwen2-VL's vision
    tower, for 16 rows of 4096 patches.
    """

    def kernel(x, segments, *, interpret: bool):
        rows = x.reshape(segments.ids.size, -1)
        return clear_rows(rows, segments.ids.ravel(), segments.starts.shape[1], interpret=interpret).reshape(x.shape)

    # in a shard_map, the results of other packages' kernels do not declare the mesh axes that they vary over
    x = _sharding.varying_as(segments.ids, x)
    return _pallas.call_implementation(None, kernel, clear_outside, x, segments)


def clear_rows(x: jax.Array, ids: jax.Array, slots: int, *, interpret: bool) -> jax.Array:
    """As `clear_outside`, in place, for x [rows, width] and ids [rows]."""
    rows, width = x.shape
    (out,) = _pallas.launch(
        functools.partial(_clear_rows, slots=slots, rows=rows, width=width),
        [x, ids],
        [(x.shape, x.dtype)],
        grid=(_pallas.cdiv(rows, CLEARED_ROWS),),
        num_warps=4,
        interpret=interpret,
        in_place={0: 0},
    )
    return out


def _clear_rows(_, ids_ref, out_ref, *, slots: int, rows: int, width: int) -> None:
    """Grid (blocks of rows). Most programs find nothing to clear."""
    first = _pallas.program_id(0) * CLEARED_ROWS
    index, in_rows = _pallas.span(first, CLEARED_ROWS), first + jnp.arange(CLEARED_ROWS) < rows
    has_slot, value = _replacement(_pallas.load(ids_ref, (index,), in_rows, other=1), slots)
    to_clear = ~has_slot & in_rows

    @_pallas.when(jnp.max(to_clear.astype(jnp.int32)) > 0)
    def clear():
        def clear_columns(i, _):
            column = i * CLEARED_COLUMNS
            mask = to_clear[:, None] & (column + jnp.arange(CLEARED_COLUMNS) < width)[None, :]
            tile = jnp.broadcast_to(value[:, None], mask.shape)
            _pallas.store(out_ref, (index, _pallas.span(column, CLEARED_COLUMNS)), tile, mask)

        jax.lax.fori_loop(0, _pallas.cdiv(width, CLEARED_COLUMNS), clear_columns, None)


def _replacement(ids: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Returns which ids have a slot, and what replaces the values of those that have none."""
    return (ids > 0) & (ids <= slots), jnp.where(ids == 0, 0, jnp.nan)
