"""Computes the M-RoPE positions of tokens and the positions of patches, in numpy on the host.

A grid (t, h, w) is counted in patches, as in `image_grid_thw`. An item is one image or one video.
"""

import dataclasses

import numpy as np

from liger_jax.config import QwenVLConfig
from liger_jax.errors import UserError

VIDEO_RULES = ("max", "hf5")


@dataclasses.dataclass(frozen=True)
class VisionItem:
    """One image or video of a row."""

    is_video: bool
    grid: tuple[int, int, int]
    first_patch: int  # index in the pixel array of its kind
    positions: np.ndarray  # of its tokens, in the row

    @property
    def patches(self) -> int:
        return int(np.prod(self.grid))


def vision_items(
    config: QwenVLConfig,
    input_ids: np.ndarray,
    segment_ids: np.ndarray,
    image_grid_thw: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
) -> list[list[VisionItem]]:
    """Finds the placeholders of each image and video in input_ids and segment_ids [B, T].

    Images and videos are numbered in order of appearance in the flattened batch. The number of placeholders of an item
    follows from its grid, so two images may be adjacent, without a token between them.

    Returns:
        The items of each row, in order.

    Raises:
        UserError: placeholders and grids do not match. The message names the row and the item.
    """
    merge_unit = config.vision.merge_unit
    kinds = {
        config.image_token_id: _Grids("image", image_grid_thw),
        config.video_token_id: _Grids("video", video_grid_thw),
    }
    rows = []
    for b, ids in enumerate(input_ids):
        positions = np.flatnonzero(segment_ids[b])
        tokens, segments = ids[positions], segment_ids[b, positions]
        placeholders = np.flatnonzero((tokens == config.image_token_id) | (tokens == config.video_token_id))
        items, consumed = [], 0
        while consumed < len(placeholders):
            start = placeholders[consumed]
            grids = kinds[tokens[start]]
            name, grid, first_patch = grids.take(b)
            count = int(np.prod(grid)) // merge_unit
            run = slice(start, start + count)
            length = int(np.cumprod((tokens[run] == tokens[start]) & (segments[run] == segments[start])).sum())
            if length < count:
                raise UserError(
                    f"row {b}: {name} has {length} adjacent placeholders (id {tokens[start]}); expected {count} for its "
                    f"grid {grid}"
                )
            items.append(VisionItem(grids.kind == "video", grid, first_patch, positions[run]))
            consumed += count
        rows.append(items)
    for grids in kinds.values():
        grids.check_all_taken()
    return rows


class _Grids:
    """The grids of all images or of all videos, taken one by one."""

    def __init__(self, kind: str, grid_thw: np.ndarray | None):
        self.kind = kind
        self.grids = [] if grid_thw is None else [(int(t), int(h), int(w)) for t, h, w in np.asarray(grid_thw)]
        self.taken = self.first_patch = 0

    def take(self, row: int) -> tuple[str, tuple[int, int, int], int]:
        """Returns the name, grid and first patch of the next item, whose placeholders are in this row."""
        if self.taken == len(self.grids):
            raise UserError(
                f"row {row}: {self.kind}_grid_thw has {len(self.grids)} grids; expected at least {self.taken + 1}, since "
                f"the row has placeholders of {self.kind} {self.taken} (numbered from 0 over the batch)"
            )
        grid, first_patch = self.grids[self.taken], self.first_patch
        self.taken += 1
        self.first_patch += int(np.prod(grid))
        return f"{self.kind} {self.taken - 1}", grid, first_patch

    def check_all_taken(self):
        if self.taken < len(self.grids):
            raise UserError(
                f"{self.kind}_grid_thw has {len(self.grids)} grids; expected {self.taken}, the number of {self.kind}s that "
                "input_ids has placeholders for"
            )


def rope_index(
    config: QwenVLConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    *,
    video_positions: str = "max",
    segment_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the M-RoPE positions (t, h, w) of every token: [3, B, T] int32, 0 for padding.

    The position of text tokens increases by 1 on all three axes. A token of an image or video that starts at s has the
    position s + (frame, row, column) on the merged grid. `video_positions` selects the position of the text that follows:

    - "max": 1 + the largest position of the image or video on any axis. This is the rule of the Qwen2-VL paper,
      transformers 4.x and vLLM, and the one that the published weights were trained with.
    - "hf5": s + max(h, w) / 2. This is the rule of transformers 5.x, which ignores the number of frames. Both rules are
      equal for images, and for videos that have at most as many frames as their merged grid has rows or columns.

    Args:
        input_ids: [B, T], padded on any side.
        attention_mask: [B, T], 0 for padding; not needed with `segment_ids`.
        image_grid_thw, video_grid_thw: [items, 3] in patches.
        video_positions: "max" or "hf5".
        segment_ids: [B, T] for packed rows, 0 for padding. Positions restart in each segment.

    Raises:
        UserError: an unknown rule, or placeholders that do not match the grids.

    Example:
        >>> import numpy as np
        >>> from liger_jax import QwenVLConfig
        >>> from liger_jax.inputs.positions import rope_index
        >>> config = QwenVLConfig.tiny()
        >>> ids = np.array([[5, *[config.image_token_id] * 2, 6]])
        >>> rope_index(config, ids, image_grid_thw=np.array([[1, 2, 4]]))[:, 0].tolist()
        [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    if segment_ids is None:
        segment_ids = np.ones_like(input_ids) if attention_mask is None else attention_mask
    items = vision_items(config, input_ids, segment_ids, image_grid_thw, video_grid_thw)
    return rope_positions(config, segment_ids, items, video_positions)


def rope_positions(
    config: QwenVLConfig, segment_ids: np.ndarray, items: list[list[VisionItem]], video_positions: str
) -> np.ndarray:
    """Returns the positions of `rope_index`, given the items from `vision_items`."""
    if video_positions not in VIDEO_RULES:
        raise UserError(f"video_positions is {video_positions!r}; expected one of {VIDEO_RULES}")
    merge = config.vision.spatial_merge_size
    rope = np.zeros((3, *segment_ids.shape), np.int32)
    for b, segments in enumerate(segment_ids):
        for segment in np.unique(segments[segments > 0]):
            positions = np.flatnonzero(segments == segment)
            next_index, consumed = 0, 0
            for item in items[b]:
                if segments[item.positions[0]] != segment:
                    continue
                text = np.searchsorted(positions, item.positions[0]) - consumed  # tokens before the item
                rope[:, b, positions[consumed : consumed + text]] = next_index + np.arange(text)
                next_index += text
                t, h, w = item.grid[0], item.grid[1] // merge, item.grid[2] // merge
                rope[:, b, item.positions] = next_index + np.indices((t, h, w)).reshape(3, -1)
                next_index += max(t, h, w) if video_positions == "max" else max(h, w)
                consumed += text + len(item.positions)
            rope[:, b, positions[consumed:]] = next_index + np.arange(len(positions) - consumed)
    return rope


def vision_position_ids(grid_thw: np.ndarray, merge: int) -> np.ndarray:
    """Returns the (h, w) of each patch, [patches, 2] int32, in the processor's order: by blocks of merge x merge patches.

    Example:
        >>> vision_position_ids(np.array([[1, 2, 4]]), 2).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    """
    positions = [np.zeros((0, 2), np.int32)]
    for t, h, w in np.asarray(grid_thw):
        hw = np.indices((h, w)).reshape(2, h // merge, merge, w // merge, merge)
        frame = hw.transpose(1, 3, 2, 4, 0).reshape(h * w, 2)
        positions.append(np.tile(frame, (t, 1)))
    return np.concatenate(positions).astype(np.int32)


def vision_segment_ids(grid_thw: np.ndarray) -> np.ndarray:
    """Returns the frame of each patch, numbered from 1 over all items: [patches] int32. Attention does not cross frames.

    Example:
        >>> vision_segment_ids(np.array([[1, 2, 2], [2, 2, 2]])).tolist()
        [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    """
    frame_patches = np.repeat(np.prod(np.asarray(grid_thw)[:, 1:], axis=1), np.asarray(grid_thw)[:, 0])
    return np.repeat(np.arange(1, len(frame_patches) + 1), frame_patches).astype(np.int32)
