"""From Hugging Face's arrays to what the model is compiled for: one pytree whose shapes come from few buckets.

Everything that depends on an image's size happens here, on the host, in numpy. Under `jax.jit` a batch is a handful of
arrays of fixed shape, and pictures of any size fit the same compiled program.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import numpy as np

from liger_jax.config import Qwen2VLConfig
from liger_jax.inputs.positions import VisionItem, positions_of, vision_items, vision_position_ids, vision_segment_ids

IGNORE = -100  # label of a token that is not trained


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pixel_values", "position_ids", "segment_ids", "token_columns"],
    meta_fields=["max_segments"],
)
@dataclasses.dataclass(frozen=True)
class Vision:
    """The patches of B rows, P of them each: a row's images and videos one after the other, then padding.

    They stand with the row of text they belong to, so a mesh that splits the rows never moves them.
    """

    pixel_values: Any  # [B, P, patch_values] float32
    position_ids: Any  # [B, P, 2] int32: (h, w) in the frame
    segment_ids: Any  # [B, P] int32: the frame, from 1 in each row; 0 is padding
    token_columns: (
        Any  # [B, P / merge_unit] int32: the column of input_ids that a merged token goes to; >= L is nowhere
    )
    max_segments: int  # frames in a row, at most


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_ids", "labels", "position_ids", "segment_ids", "vision"],
    meta_fields=["max_segments"],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of L tokens, ready for the model. The caller's rows and columns come first; what is beyond is padding."""

    input_ids: Any  # [B, L] int32
    labels: Any  # [B, L] int32, -100 where nothing is trained; or None
    position_ids: Any  # [B, 3, L] int32: (t, h, w)
    segment_ids: Any  # [B, L] int32: the packed sequence, from 1 in each row; 0 is padding
    vision: Vision | None
    max_segments: int  # sequences packed in a row, at most

    @property
    def shape(self) -> tuple[int, int]:
        return self.input_ids.shape

    def pad_rows(self, multiple: int) -> Self:
        """The batch with empty rows added, so that a mesh or an accumulation loop can split it evenly."""
        missing = -len(self.input_ids) % multiple
        if not missing:
            return self

        def pad(array, value=0):
            return np.pad(np.asarray(array), [(0, missing)] + [(0, 0)] * (array.ndim - 1), constant_values=value)

        vision = self.vision
        if vision is not None:
            nowhere = _nowhere(missing, self.input_ids.shape[1], vision.token_columns.shape[1])
            columns = np.concatenate([vision.token_columns, nowhere])
            vision = dataclasses.replace(jax.tree.map(pad, vision), token_columns=columns)
        labels = None if self.labels is None else pad(self.labels, IGNORE)
        rest = {name: pad(getattr(self, name)) for name in ("input_ids", "position_ids", "segment_ids")}
        return dataclasses.replace(self, labels=labels, vision=vision, **rest)


def _nowhere(rows: int, length: int, tokens: int) -> np.ndarray:
    """Columns behind the row, each another one: what is scattered there is dropped."""
    return np.tile(length + np.arange(tokens, dtype=np.int32), (rows, 1))


def bucket(count: int, smallest: int) -> int:
    """The next of smallest * (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...): four sizes an octave, <= 25 % is padding.

    >>> [bucket(n, 64) for n in (1, 65, 500, 513, 2048)]
    [64, 128, 512, 640, 2048]
    """
    units = -(-max(int(count), 1) // smallest)
    step = 1 << max(units.bit_length() - 3, 0)
    step = step if -(-units // step) <= 8 else 2 * step
    return -(-units // step) * step * smallest


def prepare(
    config: Qwen2VLConfig,
    *,
    input_ids,
    attention_mask=None,
    labels=None,
    pixel_values=None,
    image_grid_thw=None,
    pixel_values_videos=None,
    video_grid_thw=None,
    video_positions: str = "max",
    segment_ids=None,
    position_ids=None,
    mm_token_type_ids=None,
    length: int | None = None,
    patches: int | None = None,
) -> Batch:
    """Checks a batch in Hugging Face's layout and puts it into the nearest bucket.

    Args:
        input_ids: [B, L] integers, padded on any side.
        attention_mask: [B, L], 1 for tokens and 0 for padding; without it every column is a token.
        labels: [B, L], the token itself where it is trained and -100 elsewhere; shifted later, by the loss.
        pixel_values: [patches, patch_values] floats of all images, in order of appearance over the flattened batch.
        image_grid_thw: [images, 3], (t, h, w) in patches.
        pixel_values_videos, video_grid_thw: the same for videos.
        video_positions: "max" or "hf5", see `liger_jax.inputs.positions.rope_index`.
        segment_ids: [B, L] for packed rows: 1, 2, ... for the sequences of a row, each contiguous, 0 for padding.
        position_ids: [3, B, L], used instead of the computed ones.
        mm_token_type_ids: what Hugging Face's processor adds; the ids say the same, so it is only checked.
        length, patches: columns and patches a row, where all batches shall have the same; by default the next bucket.

    Returns:
        A `Batch` of numpy arrays.

    Raises:
        ValueError: anything that does not fit together. Names the argument, what was found and what was expected.

    Example:
        >>> import numpy as np
        >>> from liger_jax import Qwen2VLConfig, prepare
        >>> prepare(Qwen2VLConfig.tiny(), input_ids=np.array([[5, 6, 7]])).shape
        (1, 64)
    """
    input_ids = _integers("input_ids", input_ids, 2)
    if not input_ids.size:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; expected at least one row and one column")
    _within("input_ids", input_ids, config.text.vocab_size)
    segment_ids = _segments(input_ids, attention_mask, segment_ids)
    if labels is not None:
        labels = _integers("labels", labels, 2, input_ids.shape)
        _within("labels", labels, config.text.vocab_size, or_else=IGNORE)
    image_grid_thw = _grid("image_grid_thw", image_grid_thw, config)
    video_grid_thw = _grid("video_grid_thw", video_grid_thw, config)
    pixels = (
        _pixels("pixel_values", pixel_values, "image_grid_thw", image_grid_thw, config),
        _pixels("pixel_values_videos", pixel_values_videos, "video_grid_thw", video_grid_thw, config),
    )
    items = vision_items(config, input_ids, segment_ids, image_grid_thw, video_grid_thw)
    if mm_token_type_ids is not None:
        _check_token_types(
            config, input_ids, segment_ids, _integers("mm_token_type_ids", mm_token_type_ids, 2, input_ids.shape)
        )
    if position_ids is None:
        position_ids = positions_of(config, segment_ids, items, video_positions)
    else:
        position_ids = _integers("position_ids", position_ids, 3, (3, *input_ids.shape))
    for found in (position_ids.min(), position_ids.max()):
        if not 0 <= found < config.text.max_position_embeddings:
            raise ValueError(
                f"The batch has a token at position {found}; expected position_ids in "
                f"[0, {config.text.max_position_embeddings}), the model's max_position_embeddings"
            )

    columns = _size("length", length, input_ids.shape[1], bucket(input_ids.shape[1], 64))

    def pad(array, value=0):
        extra = columns - array.shape[-1]
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, extra)], constant_values=value).astype(np.int32)

    return Batch(
        input_ids=pad(input_ids),
        labels=None if labels is None else pad(labels, IGNORE),
        position_ids=pad(position_ids.swapaxes(0, 1)),
        segment_ids=pad(segment_ids),
        vision=_vision(config, items, pixels, columns, patches),
        max_segments=power_of_two(segment_ids.max(), at_least=1),
    )


def _vision(
    config: Qwen2VLConfig, items: list[list[VisionItem]], pixels, columns: int, patches: int | None
) -> Vision | None:
    """Gathers the patches of each row behind one another."""
    needed = max(sum(item.patches for item in row) for row in items)
    if not needed and patches is None:
        return None
    unit = config.vision.merge_unit
    width = _size("patches", patches, needed, bucket(needed, 16 * unit))
    if width % unit:
        raise ValueError(f"patches is {width}; expected a multiple of {unit}, the patches of one merged token")
    rows = len(items)
    pixel_values = np.zeros((rows, width, config.vision.patch_values), np.float32)
    position_ids = np.zeros((rows, width, 2), np.int32)
    segment_ids = np.zeros((rows, width), np.int32)
    token_columns = _nowhere(rows, columns, width // unit)
    for b, row in enumerate(items):
        if not row:
            continue
        grids = np.array([item.grid for item in row])
        used = int(grids.prod(axis=1).sum())
        np.concatenate(
            [pixels[item.is_video][item.first_patch : item.first_patch + item.patches] for item in row],
            out=pixel_values[b, :used],
        )
        position_ids[b, :used] = vision_position_ids(grids, config.vision.spatial_merge_size)
        segment_ids[b, :used] = vision_segment_ids(grids)
        token_columns[b, : used // unit] = np.concatenate([item.columns for item in row])
    return Vision(pixel_values, position_ids, segment_ids, token_columns, power_of_two(segment_ids.max(), at_least=4))


def power_of_two(count: int, *, at_least: int) -> int:
    """Rounds a number of segments up: it is part of the bucket, and attention's cost hardly depends on it."""
    return 1 << (max(int(count), at_least) - 1).bit_length()


def _size(name: str, asked: int | None, needed: int, default: int) -> int:
    if asked is None:
        return default
    if asked < needed:
        raise ValueError(f"{name} is {asked}, but the batch has {needed} in a row")
    return asked


def _integers(name: str, values, ndim: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
    values = np.asarray(values)
    if not (np.issubdtype(values.dtype, np.integer) or values.dtype == bool):
        raise ValueError(f"{name} has dtype {values.dtype}; expected integers")
    if values.ndim != ndim or (shape is not None and values.shape != shape):
        expected = f"{ndim} axes" if shape is None else f"shape {list(shape)}, from input_ids"
        raise ValueError(f"{name} has shape {list(values.shape)}; expected {expected}")
    return values.astype(np.int64)


def _within(name: str, ids: np.ndarray, vocab_size: int, or_else: int | None = None) -> None:
    outside = (ids < 0) | (ids >= vocab_size)
    if or_else is not None:
        outside &= ids != or_else
    if outside.any():
        row, column = np.argwhere(outside)[0]
        also = "" if or_else is None else f" or {or_else}"
        raise ValueError(f"{name}[{row}, {column}] is {ids[row, column]}; expected an id in [0, {vocab_size}){also}")


def _segments(input_ids: np.ndarray, attention_mask, segment_ids) -> np.ndarray:
    mask = None
    if attention_mask is not None:
        mask = _integers("attention_mask", attention_mask, 2, input_ids.shape)
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(f"attention_mask holds {np.unique(mask)[:5].tolist()}; expected 0 and 1")
    if segment_ids is None:
        return np.ones_like(input_ids) if mask is None else _without_holes(mask)
    segment_ids = _integers("segment_ids", segment_ids, 2, input_ids.shape)
    if segment_ids.min() < 0:
        raise ValueError(f"segment_ids holds {segment_ids.min()}; expected 0 for padding and 1, 2, ... for sequences")
    if mask is not None and ((segment_ids > 0) != (mask > 0)).any():
        raise ValueError("segment_ids and attention_mask disagree about what is padding")
    renumbered = np.zeros_like(segment_ids)
    for b, row in enumerate(segment_ids):
        starts = np.flatnonzero((row != np.concatenate([[0], row[:-1]])) & (row > 0))
        if len(np.unique(row[starts])) < len(starts):
            raise ValueError(f"segment_ids of row {b} return to an earlier sequence; expected each to be contiguous")
        for number, start in enumerate(starts, 1):
            renumbered[b, row == row[start]] = number
    return renumbered


def _without_holes(mask: np.ndarray) -> np.ndarray:
    """The mask, as segment ids of one sequence a row."""
    for b, row in enumerate(mask):
        tokens = np.flatnonzero(row)
        if len(tokens) and tokens[-1] - tokens[0] >= len(tokens):
            hole = tokens[0] + np.argmin(row[tokens[0] :])
            raise ValueError(
                f"attention_mask of row {b} has padding between tokens, at column {hole}; expected it outside"
            )
    return mask


def _grid(name: str, grid, config: Qwen2VLConfig) -> np.ndarray | None:
    if grid is None:
        return None
    grid = np.asarray(grid)
    if grid.size == 0:
        return None
    if not np.issubdtype(grid.dtype, np.integer) or grid.ndim != 2 or grid.shape[1] != 3:
        raise ValueError(f"{name} has shape {list(grid.shape)} and dtype {grid.dtype}; expected integers [items, 3]")
    merge = config.vision.spatial_merge_size
    for i, (t, h, w) in enumerate(grid):
        if t < 1 or h < 1 or w < 1 or h % merge or w % merge:
            raise ValueError(
                f"{name}[{i}] is {(int(t), int(h), int(w))}; expected at least one frame, and a height and width in "
                f"patches that are multiples of {merge}"
            )
    return grid.astype(np.int64)


def _pixels(name: str, pixels, grid_name: str, grid: np.ndarray | None, config: Qwen2VLConfig) -> np.ndarray | None:
    if pixels is None or np.size(pixels) == 0:
        if grid is not None:
            raise ValueError(f"{grid_name} is given without {name}")
        return None
    if grid is None:
        raise ValueError(f"{name} is given without {grid_name}")
    pixels = np.asarray(pixels)
    if not (np.issubdtype(pixels.dtype, np.floating) or pixels.dtype.name == "bfloat16"):
        raise ValueError(f"{name} has dtype {pixels.dtype}; expected normalised floats, as the processor makes them")
    expected = (int(grid.prod(axis=1).sum()), config.vision.patch_values)
    if pixels.shape != expected:
        raise ValueError(
            f"{name} has shape {list(pixels.shape)}; expected {list(expected)}: one row for each patch of {grid_name}"
        )
    return pixels.astype(np.float32, copy=False)


def _check_token_types(config: Qwen2VLConfig, input_ids, segment_ids, types) -> None:
    expected = np.where(input_ids == config.image_token_id, 1, np.where(input_ids == config.video_token_id, 2, 0))
    wrong = (types != expected) & (segment_ids > 0)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"mm_token_type_ids[{row}, {column}] is {types[row, column]}, but input_ids has {input_ids[row, column]} "
            f"there, which is {expected[row, column]} (0 text, 1 image, 2 video)"
        )
