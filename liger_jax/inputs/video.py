"""Samples the frames of videos, computes their times, and limits the size of whole clips."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from liger_jax.errors import UserError
from liger_jax.inputs.images import LIMIT_KEYS, VisionSettings, check_aspect_ratio

DEFAULT_FPS = 2.0  # frames per second of videos without a rate, the rate at which qwen-vl-utils samples


class VideoTime(NamedTuple):
    """When the frames of a video's grid, each of which merges `temporal_patch_size` frames, were recorded."""

    timestamps: tuple[float, ...]  # in seconds
    second_per_grid: float  # seconds between them


@dataclasses.dataclass(frozen=True)
class ClipSettings(VisionSettings):
    """Settings for videos whose size limits apply to all frames together. The defaults are transformers' for Qwen3-VL."""

    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    patch_size: int = 16
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def resized(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """Returns the (height, width) that each frame is resized to."""
        limits = self.min_pixels, self.max_pixels
        return smart_resize_clip(frames, height, width, self.temporal_patch_size, self.factor, *limits)

    def sample(self, frames: int, fps: float, target_fps: float) -> np.ndarray:
        """Returns the frames to keep: evenly spaced, with the first and the last one.

        Example:
            >>> ClipSettings().sample(53, 30.0, 2.0).tolist()
            [0, 17, 35, 52]
        """
        count = min(max(int(frames / fps * target_fps), self.min_frames), self.max_frames, frames)
        return np.linspace(0, frames - 1, count).round().astype(int)

    def to_hf(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_hf().items() if key not in dict(LIMIT_KEYS)}


def smart_resize_clip(
    frames: int, height: int, width: int, temporal_factor: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Returns the (height, width) that the frames of a clip are resized to.

    Both are multiples of `factor`, and the limits are for the pixels of all frames. The number of frames is rounded (half to
    even) to a multiple of `temporal_factor`; otherwise, this is `smart_resize` with frames * height * width in place of the
    area, after enlarging frames with a side below `factor`. The result equals that of transformers' Qwen3-VL.

    Raises:
        UserError: there are fewer than `temporal_factor` frames, or one side is more than 200 times the other.

    Example:
        >>> smart_resize_clip(8, 480, 640, 2, 32, 4096, 8 * 256 * 256)
        (192, 288)
    """
    if frames < temporal_factor:
        raise UserError(f"video has length {frames}; expected at least {temporal_factor} frames")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    pixels = round(frames / temporal_factor) * temporal_factor * new_height * new_width
    if pixels > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def sample_video(
    frames: np.ndarray | Sequence[Any], settings: VisionSettings, fps: float, target_fps: float | None
) -> tuple[np.ndarray | Sequence[Any], VideoTime]:
    """Returns the frames that are used, and their times.

    Args:
        frames: all frames.
        settings: whose rule samples them.
        fps: the rate of `frames`, in frames per second.
        target_fps: the rate to sample them at; None uses all.
    """
    total = len(frames)
    if target_fps is None:
        kept = np.arange(total)
    else:
        kept = settings.sample(total, fps, target_fps)
        frames = frames[kept] if isinstance(frames, np.ndarray) else [frames[int(i)] for i in kept]
    merge = settings.temporal_patch_size
    return frames, VideoTime(timestamps(kept, fps, merge), merge / (len(kept) / total * fps))


def timestamps(frames: np.ndarray, fps: float, merge: int) -> tuple[float, ...]:
    """Returns the time of each group of `merge` frames: the mean of the first and the last one's, in seconds.

    As in transformers, the times are divided before they are averaged, so that they round in the same way.

    Example:
        >>> timestamps(np.arange(5), 2.0, 2)
        (0.25, 1.25, 2.0)
    """
    seconds = [int(frame) / fps for frame in frames]
    seconds += seconds[-1:] * (-len(seconds) % merge)
    return tuple((first + last) / 2 for first, last in zip(seconds[::merge], seconds[merge - 1 :: merge], strict=True))


def check_fps(name: str, value: Any) -> float:
    """Returns a rate. Raises UserError unless it is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < math.inf:
        raise UserError(f"{name} is {value!r:.60}; expected a positive number of frames per second")
    return float(value)
