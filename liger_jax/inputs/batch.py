"""`prepare` turns Hugging Face's arrays into a `Batch`: one pytree, whose shapes are rounded up to a few buckets.

Everything that depends on the size of an image happens here, on the host, in numpy. Under `jax.jit`, a batch is a few
arrays of fixed shape. Batches in the same bucket share one compiled program, even if the sizes of their images differ.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from liger_jax.config import QwenVLConfig, VisionConfig
from liger_jax.errors import UserError
from liger_jax.inputs.layout import Layout, arrange, item_layout, split_at_frames
from liger_jax.inputs.positions import (
    VisionItem,
    position_table_lookup,
    rope_positions,
    vision_items,
    vision_position_ids,
    vision_segment_ids,
)

IGNORE = -100  # label of tokens that the loss ignores
LARGEST_ROW = 2**24  # tokens or patches in a row, far more than any device holds


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "pixel_values",
        "position_ids",
        "segment_ids",
        "token_positions",
        "window_ids",
        "table_indices",
        "table_weights",
    ],
    meta_fields=["max_segments", "block", "parts"],
)
@dataclasses.dataclass(frozen=True)
class Vision:
    """The patches of a batch: in each of the B rows, the patches of its images and videos in order, padded to P.

    Patches are stored with the row of text that they belong to, so splitting the batch over a mesh never moves them. For a
    tower with windows, they are in the order of `liger_jax.inputs.layout`, which has padding between some windows.
    """

    pixel_values: Any  # [B, P, patch_values] float32
    position_ids: Any  # [B, P, 2] int32: (h, w) in the frame
    segment_ids: Any  # [B, P] int32: number of the frame, from 1 in each row; 0 is padding
    token_positions: Any  # [B, P / merge_unit] int32: each merged token's position in the sequence; dropped if >= T
    max_segments: int  # upper bound of the number of frames in a row
    window_ids: Any = None  # [B, P] int32: number of the window, from 1 in each row; 0 is padding; None without windows
    table_indices: Any = None  # [B, P, 4] int32: entries of the position table around the patch; None without a table
    table_weights: Any = None  # [B, P, 4] float32: their weights
    block: int = 64  # every window, and every merged token, lies within a block of this many slots
    parts: int = 1  # cutting each row into this many equal parts divides no frame


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_ids", "labels", "position_ids", "segment_ids", "vision"],
    meta_fields=["max_segments"],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """B sequences (or rows of packed sequences) of T tokens, ready for the model.

    On each axis, the values that `prepare` received come first, followed by padding to the bucket.
    """

    input_ids: Any
    """[B, T] int32."""
    labels: Any
    """[B, T] int32, -100 for tokens that the loss ignores; or None."""
    position_ids: Any
    """[B, 3, T] int32: M-RoPE positions (t, h, w)."""
    segment_ids: Any
    """[B, T] int32: number of the packed sequence, from 1 in each row; 0 is padding."""
    vision: Vision | None
    """The patches of images and videos, or None without any."""
    max_segments: int
    """Upper bound of the number of sequences packed in a row."""

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.input_ids.shape

    def pad_rows(self, multiple: int) -> Self:
        """Appends empty rows up to a multiple, so that a mesh or gradient accumulation can split the batch evenly."""
        missing = -len(self.input_ids) % multiple
        if not missing:
            return self

        def pad(array, value=0):
            return np.pad(np.asarray(array), [(0, missing)] + [(0, 0)] * (array.ndim - 1), constant_values=value)

        vision = self.vision
        if vision is not None:
            dropped = _dropped_positions(missing, self.input_ids.shape[1], vision.token_positions.shape[1])
            token_positions = np.concatenate([vision.token_positions, dropped])
            vision = dataclasses.replace(jax.tree.map(pad, vision), token_positions=token_positions)
        labels = None if self.labels is None else pad(self.labels, IGNORE)
        padded = {name: pad(getattr(self, name)) for name in ("input_ids", "position_ids", "segment_ids")}
        return dataclasses.replace(self, labels=labels, vision=vision, **padded)

    def split_positions(self, parts: int, *, whole_frames: bool = True) -> Self:
        """Returns the batch with padding in each row and in its patches, so that `parts` devices can split both evenly.

        The part of a device ends neither within a merged token nor within a block of windows. If frames fit, it does not end
        within a frame either; their attention then needs no communication.

        Args:
            parts: number of devices that split each row.
            whole_frames: False moves no patch, so that the result's static fields depend on the bucket alone.
        """
        if parts == 1:
            return self
        missing = -self.shape[1] % parts

        def pad(array, value=0):
            return np.pad(np.asarray(array), [(0, 0)] * (array.ndim - 1) + [(0, missing)], constant_values=value)

        vision = self.vision and _split_patches(self.vision, self.shape[1], missing, parts, whole_frames)
        labels = None if self.labels is None else pad(self.labels, IGNORE)
        padded = {name: pad(getattr(self, name)) for name in ("input_ids", "position_ids", "segment_ids")}
        return dataclasses.replace(self, labels=labels, vision=vision, **padded)


def _split_patches(vision: Vision, length: int, missing: int, parts: int, whole_frames: bool) -> Vision:
    """Returns patches that `parts` devices can split evenly, in rows of `length` tokens that become longer by `missing`."""
    rows, patches = vision.segment_ids.shape
    unit = patches // vision.token_positions.shape[1]
    size = -(-patches // (vision.block * parts)) * vision.block
    step = unit if vision.window_ids is None else vision.block
    by_row = [split_at_frames(row, parts, size, step) if whole_frames else None for row in vision.segment_ids]
    whole_frames = None not in by_row
    pieces = [row if row and whole_frames else [slice(0, patches)] for row in by_row]
    unmoved = all(piece.start in (piece.stop, number * size) for row in pieces for number, piece in enumerate(row))

    def move(array, target):
        slots = patches // array.shape[1]  # patches per entry
        for row, row_pieces in enumerate(pieces):
            for number, piece in enumerate(row_pieces):
                values = array[row, piece.start // slots : piece.stop // slots]
                start = number * size // slots
                target[row, start : start + len(values)] = values
        return target

    def place(array):
        array = np.asarray(array)
        if unmoved and parts * size == patches:
            return array
        return move(array, np.zeros((rows, parts * size, *array.shape[2:]), array.dtype))

    dropped = _dropped_positions(rows, length + missing, parts * size // unit)
    positions = move(np.asarray(vision.token_positions), dropped.copy())
    positions = np.where(positions < length, positions, dropped)
    arrays = jax.tree.map(place, dataclasses.replace(vision, token_positions=None))
    return dataclasses.replace(arrays, token_positions=positions, parts=parts if whole_frames else 1)


def _dropped_positions(rows: int, length: int, tokens: int) -> np.ndarray:
    """Returns distinct positions past the end of each sequence, [rows, tokens]. Tokens scattered to them are dropped."""
    return np.tile(length + np.arange(tokens, dtype=np.int32), (rows, 1))


def bucket(count: int, smallest: int) -> int:
    """Returns the first of smallest * (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...) that is at least `count`.

    There are four sizes per octave. From 4 * smallest on, padding adds at most 25 %.

    Example:
        >>> [bucket(n, 64) for n in (1, 65, 500, 513, 2048)]
        [64, 128, 512, 640, 2048]
    """
    units = -(-max(int(count), 1) // smallest)
    step = 1 << max(units.bit_length() - 3, 0)
    step = step if -(-units // step) <= 8 else 2 * step
    return -(-units // step) * step * smallest


def patch_bucket(config: VisionConfig, count: int) -> int:
    """Returns the bucket of a number of patches per row; it satisfies `check_patches`."""
    return bucket(count, patch_block(config))


def patch_block(config: VisionConfig) -> int:
    """Returns the size of blocks of patches, within which every window and every merged token lies."""
    return math.lcm(config.window_patches or 1, 16 * config.merge_unit)


def check_patches(config: VisionConfig, patches: int) -> None:
    """Raises UserError for a number of patches per row that ends within a merged token, or within a block of windows."""
    block, name = (config.window_patches, "window") if config.window_size else (config.merge_unit, "merged token")
    if patches % block:
        raise UserError(f"patches is {patches}; expected a multiple of {block}, the number of patches per {name}")


def power_of_two(count: int, *, at_least: int) -> int:
    """Returns a number of segments rounded up to a power of two that is at least `at_least`.

    The number is static. Rounding lets more batches share a program, and the cost of attention hardly depends on it.
    """
    return 1 << (max(int(count), at_least) - 1).bit_length()


def prepare(
    config: QwenVLConfig,
    *,
    input_ids,
    attention_mask=None,
    labels=None,
    pixel_values=None,
    image_grid_thw=None,
    pixel_values_videos=None,
    video_grid_thw=None,
    video_positions: str = "max",
    second_per_grid_ts=None,
    segment_ids=None,
    position_ids=None,
    mm_token_type_ids=None,
    length: int | None = None,
    patches: int | None = None,
) -> Batch:
    """Returns a batch in Hugging Face's layout as a `Batch`, after checking it and padding it to its bucket.

    Args:
        input_ids: [B, T] integers, padded on any side.
        attention_mask: [B, T], 1 for tokens and 0 for padding; None: no padding.
        labels: [B, T], the token id where the loss counts it and -100 elsewhere. The loss shifts them.
        pixel_values: [patches, patch_values] floats of all images, in order of appearance in the flattened batch.
        image_grid_thw: [images, 3], (t, h, w) in patches.
        pixel_values_videos: as pixel_values, for videos.
        video_grid_thw: [videos, 3], likewise. If the prompt has the time of each frame as text (Qwen3-VL), a video has one
            grid (t, h, w), and a run of placeholders for each of its t frames.
        video_positions: "max" or "hf5", see `liger_jax.inputs.positions.rope_index`.
        second_per_grid_ts: [videos], the seconds between the frames of each video's grid (Qwen2.5-VL); None: 1.
        segment_ids: [B, T] for packed rows: 1, 2, ... for the sequences of a row, each contiguous, 0 for padding.
        position_ids: [3, B, T], used instead of the computed ones.
        mm_token_type_ids: [B, T], from Hugging Face's processor. They are only checked, since the ids imply them. Videos may
            be marked as text, as in transformers 4.
        length: tokens per row, for batches that must have the same shape; None: the next bucket.
        patches: patches per row, likewise. For a tower with windows, slots (see `liger_jax.inputs.layout.count_slots`).

    Returns:
        A `Batch` of numpy arrays, whose shapes and static fields depend on its bucket alone.

    Raises:
        UserError: arguments contradict each other or the configuration. The message names the argument, its value, and
            the expected value.

    Example:
        >>> import numpy as np
        >>> from liger_jax import QwenVLConfig, prepare
        >>> prepare(QwenVLConfig.tiny(), input_ids=np.array([[5, 6, 7]])).shape
        (1, 64)
    """
    input_ids = _integers("input_ids", input_ids, 2)
    if not input_ids.size:
        raise UserError(f"input_ids has shape {list(input_ids.shape)}; expected at least one sequence and one token")
    _check_ids("input_ids", input_ids, config.text.vocab_size)
    segment_ids = _segments(input_ids, attention_mask, segment_ids)
    if labels is not None:
        labels = _integers("labels", labels, 2, input_ids.shape)
        _check_ids("labels", labels, config.text.vocab_size, ignored=IGNORE)
    image_grid_thw = _grid("image_grid_thw", image_grid_thw, config)
    video_grid_thw = _grid("video_grid_thw", video_grid_thw, config)
    pixels = (
        _pixels("pixel_values", pixel_values, "image_grid_thw", image_grid_thw, config),
        _pixels("pixel_values_videos", pixel_values_videos, "video_grid_thw", video_grid_thw, config),
    )
    items = vision_items(config, input_ids, segment_ids, image_grid_thw, video_grid_thw, second_per_grid_ts)
    if mm_token_type_ids is not None:
        types = _integers("mm_token_type_ids", mm_token_type_ids, 2, input_ids.shape)
        _check_token_types(config, input_ids, segment_ids, types)
    if position_ids is None:
        position_ids = rope_positions(config, segment_ids, items, video_positions)
    else:
        position_ids = _integers("position_ids", position_ids, 3, (3, *input_ids.shape))
    _check_positions(position_ids, config.text.max_position_embeddings)
    length = _bucket_size("length", length, input_ids.shape[1], bucket(input_ids.shape[1], 64))

    def pad(array, value=0):
        missing = length - array.shape[-1]
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)], constant_values=value).astype(np.int32)

    return Batch(
        input_ids=pad(input_ids),
        labels=None if labels is None else pad(labels, IGNORE),
        position_ids=pad(position_ids.swapaxes(0, 1)),
        segment_ids=pad(segment_ids),
        vision=_vision(config, items, pixels, length, patches),
        max_segments=power_of_two(segment_ids.max(), at_least=1),
    )


def _vision(
    config: QwenVLConfig, items: list[list[VisionItem]], pixels, length: int, patches: int | None
) -> Vision | None:
    """Returns the patches of each row, in order of appearance, or None for a batch without images and videos."""
    vision, unit = config.vision, config.vision.merge_unit
    rows = [_place_items(config, row) for row in items]
    needed = max(row[-1].slots.stop if row else 0 for row in rows)
    if not needed and patches is None:
        return None
    size = _bucket_size("patches", patches, needed, patch_bucket(vision, needed))
    check_patches(vision, size)

    def zeros(*shape, dtype=np.int32):
        return np.zeros((len(items), size, *shape), dtype)

    arrays = {"pixel_values": zeros(vision.patch_values, dtype=np.float32)}
    arrays |= {"position_ids": zeros(2), "segment_ids": zeros()}
    if vision.window_size:
        arrays["window_ids"] = zeros()
    if vision.position_table_side:
        arrays |= {"table_indices": zeros(4), "table_weights": zeros(4, dtype=np.float32)}
    token_positions = _dropped_positions(len(items), length, size // unit)
    for b, row in enumerate(rows):
        last_ids = {"segment_ids": 0, "window_ids": 0}
        for item, slots, layout in row:
            values = {"pixel_values": pixels[item.is_video][item.first_patch : item.first_patch + item.patches]}
            values |= _patch_arrays(config, item)
            merged = slice(slots.start // unit, slots.stop // unit)
            positions = item.positions
            if layout is not None:
                tokens, windows = layout
                values = {name: arrange(array, tokens, unit) for name, array in values.items()}
                values["window_ids"] = np.repeat(windows, unit)
                positions = np.where(tokens < 0, token_positions[b, merged], positions[tokens])
            for name in last_ids.keys() & values.keys():  # frames and windows are numbered over the row
                values[name] = np.where(values[name] > 0, values[name] + last_ids[name], 0)
                last_ids[name] = int(values[name].max())
            for name, array in values.items():
                arrays[name][b, slots] = array
            token_positions[b, merged] = positions
    max_segments = power_of_two(arrays["segment_ids"].max(), at_least=4)
    return Vision(token_positions=token_positions, max_segments=max_segments, block=patch_block(vision), **arrays)


class _PlacedItem(NamedTuple):
    item: VisionItem
    slots: slice  # of the row, in patches
    layout: Layout | None


def _place_items(config: QwenVLConfig, row: list[VisionItem]) -> list[_PlacedItem]:
    """Returns the items of a row with their slots, one after the other."""
    placed, end = [], 0
    for item in row:
        layout = item_layout(config.vision, item.grid, end // config.vision.merge_unit)
        start, end = end, end + (item.patches if layout is None else len(layout[0]) * config.vision.merge_unit)
        placed.append(_PlacedItem(item, slice(start, end), layout))
    return placed


def _patch_arrays(config: QwenVLConfig, item: VisionItem) -> dict[str, np.ndarray]:
    """Returns the arrays of `Vision` that have a value per patch, except the pixels, in the processor's order."""
    vision, grid = config.vision, np.array([item.grid])
    arrays = {
        "position_ids": vision_position_ids(grid, vision.spatial_merge_size),
        "segment_ids": vision_segment_ids(grid),
    }
    if vision.position_table_side:
        lookup = position_table_lookup(item.grid, vision.position_table_side, vision.spatial_merge_size)
        arrays |= dict(zip(("table_indices", "table_weights"), lookup, strict=True))
    return arrays


def _bucket_size(name: str, requested: Any, needed: int, default: int) -> int:
    if requested is None:
        return default
    if isinstance(requested, bool) or not isinstance(requested, int | np.integer) or requested > LARGEST_ROW:
        raise UserError(f"{name} is {requested!r:.60}; expected an integer up to {LARGEST_ROW}")
    if requested < needed:
        raise UserError(f"{name} is {requested}; expected at least {needed}, the size of the longest row in the batch")
    return int(requested)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _array(name: str, values) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise UserError(f"{name} is not rectangular ({error}); expected rows of equal length") from error


def _integers(name: str, values, ndim: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
    values = _array(name, values)
    if not (np.issubdtype(values.dtype, np.integer) or values.dtype == bool):
        raise UserError(f"{name} has dtype {values.dtype}; expected integers")
    if values.ndim != ndim or (shape is not None and values.shape != shape):
        expected = f"{ndim} axes" if shape is None else f"shape {list(shape)}, from input_ids"
        raise UserError(f"{name} has shape {list(values.shape)}; expected {expected}")
    return values.astype(np.int64)


def _check_ids(name: str, ids: np.ndarray, vocab_size: int, ignored: int | None = None) -> None:
    outside = (ids < 0) | (ids >= vocab_size)
    if ignored is not None:
        outside &= ids != ignored
    if outside.any():
        b, t = np.argwhere(outside)[0]
        alternative = "" if ignored is None else f" or {ignored}"
        raise UserError(f"{name}[{b}, {t}] is {ids[b, t]}; expected an id in [0, {vocab_size}){alternative}")


def _check_positions(position_ids: np.ndarray, limit: int) -> None:
    for position in (position_ids.min(), position_ids.max()):
        if not 0 <= position < limit:
            raise UserError(
                f"a token has position {position}; expected position_ids in [0, {limit}), where {limit} is the model's "
                "max_position_embeddings"
            )


def _segments(input_ids: np.ndarray, attention_mask, segment_ids) -> np.ndarray:
    """Returns segment ids [B, T], renumbered 1, 2, ... from the start of each row."""
    mask = None
    if attention_mask is not None:
        mask = _integers("attention_mask", attention_mask, 2, input_ids.shape)
        if not np.isin(mask, (0, 1)).all():
            raise UserError(f"attention_mask holds {np.unique(mask)[:5].tolist()}; expected 0 and 1")
    if segment_ids is None:
        return np.ones_like(input_ids) if mask is None else _single_segments(mask)
    segment_ids = _integers("segment_ids", segment_ids, 2, input_ids.shape)
    if segment_ids.min() < 0:
        raise UserError(f"segment_ids holds {segment_ids.min()}; expected 0 for padding and 1, 2, ... for sequences")
    if mask is not None and ((segment_ids > 0) != (mask > 0)).any():
        raise UserError(
            "segment_ids and attention_mask differ in their padding; expected 0 in both for the same tokens"
        )
    renumbered = np.zeros_like(segment_ids)
    for b, row in enumerate(segment_ids):
        starts = np.flatnonzero((row != np.concatenate([[0], row[:-1]])) & (row > 0))
        if len(np.unique(row[starts])) < len(starts):
            raise UserError(f"segment_ids of row {b} return to an earlier sequence; expected contiguous sequences")
        for number, start in enumerate(starts, 1):
            renumbered[b, row == row[start]] = number
    return renumbered


def _single_segments(mask: np.ndarray) -> np.ndarray:
    """Returns the mask, which is also the segment ids of one sequence per row. Raises UserError if it has holes."""
    for b, row in enumerate(mask):
        tokens = np.flatnonzero(row)
        if len(tokens) and tokens[-1] - tokens[0] >= len(tokens):
            hole = tokens[0] + np.argmin(row[tokens[0] :])
            raise UserError(
                f"attention_mask of row {b} has padding between tokens, at position {hole}; expected padding only before "
                "or after them"
            )
    return mask


def _grid(name: str, grid, config: QwenVLConfig) -> np.ndarray | None:
    if grid is None:
        return None
    grid = _array(name, grid)
    if grid.size == 0:
        return None
    if not np.issubdtype(grid.dtype, np.integer) or grid.ndim != 2 or grid.shape[1] != 3:
        raise UserError(f"{name} has shape {list(grid.shape)} and dtype {grid.dtype}; expected integers [items, 3]")
    merge = config.vision.spatial_merge_size
    for i, (t, h, w) in enumerate(grid):
        if t < 1 or h < 1 or w < 1 or h % merge or w % merge:
            raise UserError(
                f"{name}[{i}] is {(int(t), int(h), int(w))}; expected at least one frame, and a height and width in "
                f"patches that are multiples of {merge}"
            )
    return grid.astype(np.int64)


def _pixels(name: str, pixels, grid_name: str, grid: np.ndarray | None, config: QwenVLConfig) -> np.ndarray | None:
    pixels = None if pixels is None else _array(name, pixels)
    if pixels is None or pixels.size == 0:
        if grid is not None:
            raise UserError(f"{grid_name} is given without {name}; expected both or neither")
        return None
    if grid is None:
        raise UserError(f"{name} is given without {grid_name}; expected both or neither")
    if not (np.issubdtype(pixels.dtype, np.floating) or pixels.dtype.name == "bfloat16"):
        raise UserError(f"{name} has dtype {pixels.dtype}; expected normalized floats, as the processor makes them")
    expected = (int(grid.prod(axis=1).sum()), config.vision.patch_values)
    if pixels.shape != expected:
        raise UserError(
            f"{name} has shape {list(pixels.shape)}; expected {list(expected)}, with all patches of {grid_name} on axis 0"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        pixels = pixels.astype(np.float32, copy=False)
        suspicious = not np.isfinite(pixels.sum())  # the sum alone is quick, but can overflow
    if suspicious and not np.isfinite(pixels).all():
        patch, value = np.argwhere(~np.isfinite(pixels))[0]
        raise UserError(f"{name}[{patch}, {value}] is {pixels[patch, value]}; expected finite numbers")
    return pixels


def _check_token_types(config: QwenVLConfig, input_ids, segment_ids, types) -> None:
    expected = np.where(input_ids == config.image_token_id, 1, np.where(input_ids == config.video_token_id, 2, 0))
    wrong = (types != expected) & (segment_ids > 0)
    videos = expected == 2
    if not types[videos].any():  # transformers 4 marks images only
        wrong &= ~videos
    if wrong.any():
        b, t = np.argwhere(wrong)[0]
        raise UserError(
            f"mm_token_type_ids[{b}, {t}] is {types[b, t]}; expected {expected[b, t]} for the id {input_ids[b, t]} in "
            "input_ids (0 text, 1 image, 2 video)"
        )
