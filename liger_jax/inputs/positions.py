"""Where each token and each patch stands: M-RoPE indices and vision positions, in numpy on the host.

Names: t, h, w are a grid in patches, as in `image_grid_thw`; an item is one image or one video.
"""

import dataclasses

import numpy as np

from liger_jax.config import Qwen2VLConfig

VIDEO_RULES = ("max", "hf5")


@dataclasses.dataclass(frozen=True)
class VisionItem:
    """One image or video of a row: its grid, its first row in the pixel array of its kind, the columns of its tokens."""

    is_video: bool
    grid: tuple[int, int, int]
    first_patch: int
    columns: np.ndarray

    @property
    def patches(self) -> int:
        return int(np.prod(self.grid))


def vision_items(
    config: Qwen2VLConfig,
    input_ids: np.ndarray,
    segment_ids: np.ndarray,
    image_grid_thw: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
) -> list[list[VisionItem]]:
    """Finds the placeholders of each image and video; input_ids, segment_ids [B, L] -> the items of each row, in order.

    Images and videos are taken in order of appearance over the flattened batch. The grid says how many placeholders an
    item has, so that two images may stand back to back.

    Raises:
        ValueError: placeholders and grids do not match; names the row and the item.
    """
    merge_unit = config.vision.merge_unit
    kinds = {
        config.image_token_id: _Grids("image", image_grid_thw),
        config.video_token_id: _Grids("video", video_grid_thw),
    }
    rows = []
    for b, ids in enumerate(input_ids):
        columns = np.flatnonzero(segment_ids[b])
        tokens, segments = ids[columns], segment_ids[b, columns]
        placeholders = np.flatnonzero((tokens == config.image_token_id) | (tokens == config.video_token_id))
        items, done = [], 0
        while done < len(placeholders):
            start = placeholders[done]
            grids = kinds[tokens[start]]
            name, grid, first_patch = grids.take(b)
            count = int(np.prod(grid)) // merge_unit
            run = slice(start, start + count)
            found = int(np.cumprod((tokens[run] == tokens[start]) & (segments[run] == segments[start])).sum())
            if found < count:
                raise ValueError(
                    f"Row {b}: {name} has grid {grid}, which makes {count} tokens, but its placeholders (id "
                    f"{tokens[start]}) end after {found}"
                )
            items.append(VisionItem(grids.kind == "video", grid, first_patch, columns[run]))
            done += count
        rows.append(items)
    for grids in kinds.values():
        grids.check_all_taken()
    return rows


class _Grids:
    """Hands out the grids of one kind one after the other."""

    def __init__(self, kind: str, grid_thw: np.ndarray | None):
        self.kind = kind
        self.grids = [] if grid_thw is None else [tuple(map(int, grid)) for grid in np.asarray(grid_thw)]
        self.taken = self.first_patch = 0

    def take(self, row: int) -> tuple[str, tuple[int, int, int], int]:
        if self.taken == len(self.grids):
            raise ValueError(
                f"Row {row} has placeholders for {self.kind} {self.taken}, but {self.kind}_grid_thw describes only "
                f"{len(self.grids)} (counted over the batch, from 0)"
            )
        grid, first_patch = self.grids[self.taken], self.first_patch
        self.taken += 1
        self.first_patch += int(np.prod(grid))
        return f"{self.kind} {self.taken - 1}", grid, first_patch

    def check_all_taken(self):
        if self.taken < len(self.grids):
            raise ValueError(
                f"{self.kind}_grid_thw describes {len(self.grids)} {self.kind}s, but input_ids has placeholders for "
                f"{self.taken}"
            )


def rope_index(
    config: Qwen2VLConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    *,
    video_positions: str = "max",
    segment_ids: np.ndarray | None = None,
) -> np.ndarray:
    """M-RoPE positions (t, h, w) of every token: [3, B, L] int32, padding 0.

    Text counts up on all three axes together. The tokens of an image or video that starts at s stand at s + (its frame,
    row, column) on the merged grid. The text behind it goes on at

    - "max": the largest index of the block on any axis + 1. The Qwen2-VL paper, transformers 4.x, vLLM: what the
      published weights were trained with.
    - "hf5": s + max(h, w) / 2, as transformers 5.x has it, which ignores the number of frames. Both are equal for images
      and for videos with no more frames than the grid is wide or high.

    Args:
        input_ids: [B, L], padded on any side.
        attention_mask: [B, L], 0 at padding; not needed beside `segment_ids`.
        image_grid_thw, video_grid_thw: [items, 3] in patches.
        segment_ids: [B, L] for packed rows: 0 at padding; positions start anew in each segment.

    Raises:
        ValueError: an unknown rule, or placeholders that do not match the grids.

    Example:
        >>> import numpy as np
        >>> from liger_jax import Qwen2VLConfig
        >>> from liger_jax.inputs.positions import rope_index
        >>> config = Qwen2VLConfig.tiny()
        >>> ids = np.array([[5, *[config.image_token_id] * 2, 6]])
        >>> rope_index(config, ids, image_grid_thw=np.array([[1, 2, 4]]))[:, 0].tolist()
        [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    if segment_ids is None:
        segment_ids = np.ones_like(input_ids) if attention_mask is None else attention_mask
    items = vision_items(config, input_ids, segment_ids, image_grid_thw, video_grid_thw)
    return positions_of(config, segment_ids, items, video_positions)


def positions_of(
    config: Qwen2VLConfig, segment_ids: np.ndarray, items: list[list[VisionItem]], video_positions: str
) -> np.ndarray:
    """`rope_index` for items already found."""
    if video_positions not in VIDEO_RULES:
        raise ValueError(f"video_positions is {video_positions!r}; expected one of {VIDEO_RULES}")
    merge = config.vision.spatial_merge_size
    positions = np.zeros((3, *segment_ids.shape), np.int32)
    for b, segments in enumerate(segment_ids):
        for segment in np.unique(segments[segments > 0]):
            columns = np.flatnonzero(segments == segment)
            next_position, done = 0, 0
            for item in items[b]:
                if segments[item.columns[0]] != segment:
                    continue
                before = np.searchsorted(columns, item.columns[0]) - done
                positions[:, b, columns[done : done + before]] = next_position + np.arange(before)
                next_position += before
                t, h, w = item.grid[0], item.grid[1] // merge, item.grid[2] // merge
                block = np.indices((t, h, w)).reshape(3, -1)
                positions[:, b, item.columns] = next_position + block
                next_position += max(t, h, w) if video_positions == "max" else max(h, w)
                done += before + len(item.columns)
            rest = len(columns) - done
            positions[:, b, columns[done:]] = next_position + np.arange(rest)
    return positions


def vision_position_ids(grid_thw: np.ndarray, merge: int) -> np.ndarray:
    """(h, w) of each patch, [patches, 2] int32, in the processor's order: block by block of merge x merge patches.

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
    """Which frame each patch belongs to, counted from 1 over all items: [patches] int32. Attention stays in a frame.

    >>> vision_segment_ids(np.array([[1, 2, 2], [2, 2, 2]])).tolist()
    [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    """
    frames = np.repeat(np.prod(np.asarray(grid_thw)[:, 1:], axis=1), np.asarray(grid_thw)[:, 0])
    return np.repeat(np.arange(1, len(frames) + 1), frames).astype(np.int32)
