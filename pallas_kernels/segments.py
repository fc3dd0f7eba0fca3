"""Segments: several sequences packed into one row of attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _validate

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
    ids = segments.ids[:, :, None, None]
    outside = jnp.where(ids == 0, 0, jnp.nan).astype(x.dtype)
    return jnp.where((ids > 0) & (ids <= segments.starts.shape[1]), x, outside)
