"""Computes the M-RoPE positions of tokens and the positions of patches, in numpy on the host.

A grid (t, h, w) is counted in patches, as in `image_grid_thw`. An item is one image or one video, or one frame of a video
whose frames are separate in the prompt (Qwen3-VL). A frame here is a row of the grid, which merges several video frames.
"""

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from liger_jax.config import QwenVLConfig
from liger_jax.errors import UserError

VIDEO_RULES = ("max", "hf5")
LARGEST_TIME = 2**31  # beyond every model's positions


@dataclasses.dataclass(frozen=True)
class VisionItem:
    """One image or video of a row, or one frame of a video."""

    is_video: bool
    index: int  # number of the image or video in the batch, among those of its kind
    grid: tuple[int, int, int]
    first_patch: int  # index in the pixel array of its kind
    positions: np.ndarray  # of its tokens, in the row
    time_step: float = 1.0  # distance between the time positions of frames, before rounding down

    @property
    def patches(self) -> int:
        return int(np.prod(self.grid))


def vision_items(
    config: QwenVLConfig,
    input_ids: np.ndarray,
    segment_ids: np.ndarray,
    image_grid_thw: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    second_per_grid_ts: Sequence[float] | np.ndarray | None = None,
) -> list[list[VisionItem]]:
    """Finds the placeholders of each image and video in input_ids and segment_ids [B, T].

    Images and videos are numbered in order of appearance in the flattened batch. The number of placeholders of an item
    follows from its grid, so two images may be adjacent, without a token between them. If the prompt has the time of a
    video's frames as text, the placeholders of each frame are an item of their own.

    Args:
        second_per_grid_ts: the seconds between the frames of each video, for models with video_time "seconds"; None: 1.

    Returns:
        The items of each row, in order.

    Raises:
        UserError: placeholders and grids do not match. The message names the row and the item.
    """
    grids = {
        config.image_token_id: _Grids("image", image_grid_thw),
        config.video_token_id: _Grids("video", video_grid_thw, split=config.vision.video_time == "text"),
    }
    steps = _video_steps(config, second_per_grid_ts, len(grids[config.video_token_id].grids))
    rows = []
    for b, ids in enumerate(input_ids):
        positions = np.flatnonzero(segment_ids[b])
        tokens, segments = ids[positions], segment_ids[b, positions]
        placeholders = np.flatnonzero((tokens == config.image_token_id) | (tokens == config.video_token_id))
        items, consumed = [], 0
        while consumed < len(placeholders):
            start = placeholders[consumed]
            is_video = tokens[start] == config.video_token_id
            index, grid, first_patch = grids[tokens[start]].take(b, int(segments[start]))
            count = int(np.prod(grid)) // config.vision.merge_unit
            run = (tokens[start:] == tokens[start]) & (segments[start:] == segments[start])
            grids[tokens[start]].check_run(b, int(np.cumprod(run).sum()), count, int(tokens[start]))
            step = steps[index] if is_video else 1.0
            items.append(
                VisionItem(bool(is_video), index, grid, first_patch, positions[start : start + count], float(step))
            )
            consumed += count
        rows.append(items)
    for kind in grids.values():
        kind.check_all_taken()
    return rows


def _video_steps(config: QwenVLConfig, second_per_grid_ts, videos: int) -> np.ndarray:
    """Returns the distance between the time positions of the frames of each video, before rounding down."""
    if second_per_grid_ts is None:
        seconds = np.ones(videos)
    else:
        if config.vision.video_time != "seconds":
            raise UserError("second_per_grid_ts is given; expected none, since this model does not use it")
        try:
            seconds = np.asarray(second_per_grid_ts)
        except ValueError:  # lists of different lengths
            seconds = np.array(None)
        if seconds.size and seconds.dtype.kind not in "iuf":
            raise UserError(
                f"second_per_grid_ts is {second_per_grid_ts!r:.60}; expected a list of numbers, one for each video"
            )
        seconds = seconds.astype(np.float64)
        if seconds.shape != (videos,):
            raise UserError(
                f"second_per_grid_ts has shape {list(seconds.shape)}; expected [{videos}], one number for each video"
            )
        if not (np.isfinite(seconds) & (seconds > 0)).all():
            raise UserError(f"second_per_grid_ts is {seconds.tolist()!s:.60}; expected positive, finite numbers")
    rate = config.vision.tokens_per_second if config.vision.video_time == "seconds" else 1
    return np.minimum(np.minimum(seconds, LARGEST_TIME) * rate, LARGEST_TIME)


class _Grids:
    """The grids of all images or of all videos, taken one by one; with `split`, one frame of a video at a time."""

    def __init__(self, kind: str, grid_thw: np.ndarray | None, *, split: bool = False):
        self.kind, self.split = kind, split
        self.grids = [] if grid_thw is None else [(int(t), int(h), int(w)) for t, h, w in np.asarray(grid_thw)]
        self.taken = self.first_patch = 0
        self.frame = 0  # of the video that is being taken
        self.place = 0, 0  # row and segment of its first frame

    def take(self, row: int, segment: int) -> tuple[int, tuple[int, int, int], int]:
        """Returns the number, grid and first patch of the next item, whose placeholders are in this row and segment."""
        if self.taken == len(self.grids):
            total = f" ({sum(t for t, _, _ in self.grids)} frames)" if self.split and self.grids else ""
            raise UserError(
                f"row {row}: {self.kind}_grid_thw has {len(self.grids)} grids{total}; expected at least "
                f"{self.taken + 1}, since the row has placeholders of {self.kind} {self.taken} (numbered from 0 over the "
                "batch)"
            )
        if self.frame and self.place != (row, segment):
            self._raise_missing_frames()
        self.place = row, segment
        index, (t, h, w), first_patch = self.taken, self.grids[self.taken], self.first_patch
        frames = 1 if self.split else t
        self.frame += frames
        self.first_patch += frames * h * w
        if self.frame == t:
            self.taken, self.frame = self.taken + 1, 0
        return index, (frames, h, w), first_patch

    def check_run(self, row: int, length: int, count: int, token: int) -> None:
        """Raises UserError unless the item last taken has `count` adjacent placeholders, given the length of their run."""
        index = self.taken - (self.frame == 0)
        name, (t, h, w) = f"{self.kind} {index}", self.grids[index]
        if length < count:
            raise UserError(
                f"row {row}: {name} has {length} adjacent placeholders (id {token}); expected {count} for "
                f"{'a frame of ' if self.split else ''}its grid {(t, h, w)}"
            )
        if self.split and length > count:
            raise UserError(
                f"row {row}: {name} has {length} adjacent placeholders (id {token}); expected {t} separate runs of {count}, "
                f"one for each frame of its grid {(t, h, w)}"
            )

    def check_all_taken(self) -> None:
        """Raises UserError if a grid, or a frame of the last video taken, has no placeholders."""
        if self.frame:
            self._raise_missing_frames()
        if self.taken < len(self.grids):
            raise UserError(
                f"{self.kind}_grid_thw has {len(self.grids)} grids; expected {self.taken}, the number of {self.kind}s that "
                "input_ids has placeholders for"
            )

    def _raise_missing_frames(self) -> NoReturn:
        raise UserError(
            f"row {self.place[0]}: {self.kind} {self.taken} has {self.frame} runs of placeholders in one sequence; expected "
            f"{self.grids[self.taken][0]}, one for each frame of its grid {self.grids[self.taken]}"
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
    second_per_grid_ts: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Returns the M-RoPE positions (t, h, w) of every token: [3, B, T] int32, 0 for padding.

    The position of text tokens increases by 1 on all three axes. A token of an image or video that starts at s has the
    position s + (time, row, column) on the merged grid. The time of a video is, depending on the model's video_time:

    - "frames" (Qwen2-VL): the number of the frame.
    - "seconds" (Qwen2.5-VL): frame * tokens_per_second * second_per_grid, rounded down.
    - "text" (Qwen3-VL): 0. Each frame is an image of its own, after its time as text in the prompt.

    `video_positions` selects the position of the text that follows:

    - "max": 1 + the largest position of the image or video on any axis. This is the rule of the Qwen2-VL paper,
      transformers 4.x and vLLM, and the one that the published weights were trained with.
    - "hf5": s + max(h, w) / 2. This is the rule of transformers 5.x, which ignores the time. Both rules are equal for
      images and for Qwen3-VL, and for videos whose times are below the rows or columns of their merged grid.

    Args:
        input_ids: [B, T], padded on any side.
        attention_mask: [B, T], 0 for padding; not needed with `segment_ids`.
        image_grid_thw, video_grid_thw: [items, 3] in patches.
        video_positions: "max" or "hf5".
        segment_ids: [B, T] for packed rows, 0 for padding. Positions restart in each segment.
        second_per_grid_ts: seconds between the frames of each video, for "seconds"; None: 1.

    Raises:
        UserError: an unknown rule, or placeholders that do not match the grids.

    Source: https://arxiv.org/abs/2409.12191 (Qwen2-VL), https://arxiv.org/abs/2502.13923 (Qwen2.5-VL)

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
    items = vision_items(config, input_ids, segment_ids, image_grid_thw, video_grid_thw, second_per_grid_ts)
    return rope_positions(config, segment_ids, items, video_positions).astype(np.int32)


def rope_positions(
    config: QwenVLConfig, segment_ids: np.ndarray, items: list[list[VisionItem]], video_positions: str
) -> np.ndarray:
    """Returns the positions of `rope_index` in int64, given the items from `vision_items`."""
    if not isinstance(video_positions, str) or video_positions not in VIDEO_RULES:
        raise UserError(f"video_positions is {video_positions!r:.60}; expected one of {VIDEO_RULES}")
    merge = config.vision.spatial_merge_size
    rope = np.zeros((3, *segment_ids.shape), np.int64)
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
                time = np.arange(t, dtype=np.float32) * np.float32(item.time_step)  # float32, as in transformers
                time = np.minimum(time, LARGEST_TIME).astype(np.int64)
                frame, row, column = np.indices((t, h, w)).reshape(3, -1)
                rope[:, b, item.positions] = next_index + np.stack([time[frame], row, column])
                next_index += max(int(time[-1]) + 1, h, w) if video_positions == "max" else max(h, w)
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


def position_table_lookup(grid: tuple[int, int, int], side: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the entries of a table of side x side positions that surround each patch, and their bilinear weights.

    The table is stretched over the image: its corners lie on the centers of the image's corner patches. The patch in row r
    of h and column c of w is at y = r (side - 1) / (h - 1), x = c (side - 1) / (w - 1), computed in float32.

    Returns:
        indices: [patches, 4] int32, y * side + x of the entries (top left, top right, bottom left, bottom right).
        weights: [patches, 4] float32. Both are in the order of `vision_position_ids`.

    Example:
        >>> indices, weights = position_table_lookup((1, 4, 6), 48, 2)
        >>> indices[1].tolist(), weights[1].round(2).tolist()
        ([9, 10, 57, 58], [0.6000000238418579, 0.4000000059604645, 0.0, 0.0])
    """
    axes = []
    for index, size in zip(vision_position_ids(np.array([grid]), merge).T, grid[1:], strict=True):
        place = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        corners = np.floor(place).astype(np.int32)[:, None] + np.arange(2, dtype=np.int32)
        weights = 1 - np.abs(place[:, None] - corners.astype(np.float32))
        axes.append((np.minimum(corners, side - 1), weights))
    (y, y_weights), (x, x_weights) = axes
    indices = y[:, :, None] * side + x[:, None, :]
    weights = y_weights[:, :, None] * x_weights[:, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4)
