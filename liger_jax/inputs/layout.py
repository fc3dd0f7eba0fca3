"""Places the patches of images and videos in the slots of a row, so that window attention needs no gather on the device.

A vision tower with windows attends, in most layers, only within windows of `window_patches` patches (8 x 8). A row of slots
is cut into blocks of that many slots, and no window straddles a block border. The device can then compute window attention
as a dense batch of blocks. Patches move in groups of `merge_unit`, which become one token; sizes here count such tokens.

A frame has at most four different sizes of windows: whole ones, and those at its right edge, its bottom edge and its corner.
"""

import bisect
import functools

import numpy as np

from liger_jax.config import VisionConfig

Layout = tuple[np.ndarray, np.ndarray]


def item_layout(config: VisionConfig, grid: tuple[int, int, int], start: int) -> Layout | None:
    """Returns the tokens and windows of an image or video, in the order of its slots, or None without windows.

    Args:
        config: the vision tower's configuration.
        grid: (t, h, w) in patches.
        start: the number of slots before it in the row, in tokens.

    Returns:
        tokens: int [slots], the index of each token in the processor's order; -1 is padding.
        windows: int [slots], the number of each token's window, from 1 in the item; 0 is padding.

    Example:
        >>> from liger_jax import QwenVLConfig
        >>> config = QwenVLConfig.tiny(family="qwen2_5_vl").vision
        >>> tokens, windows = item_layout(config, (1, 2, 10), start=13)  # a window of 4 tokens, and one of 1 token
        >>> tokens.tolist(), windows.tolist()
        ([4, -1, -1, 0, 1, 2, 3], [1, 0, 0, 2, 2, 2, 2])
    """
    if not config.window_size:
        return None
    t, height, width = grid[0], grid[1] // config.spatial_merge_size, grid[2] // config.spatial_merge_size
    side = config.window_size // (config.patch_size * config.spatial_merge_size)
    tokens, windows = [], []
    end = start
    for frame in range(t):
        frame_tokens, frame_windows = _frame_layout(height, width, side, end % side**2)
        tokens.append(np.where(frame_tokens < 0, -1, frame_tokens + frame * height * width))
        windows.append(np.where(frame_windows > 0, frame_windows + frame * frame_windows.max(), 0))
        end += len(frame_tokens)
    return np.concatenate(tokens), np.concatenate(windows)


def count_slots(config: VisionConfig, grids: list[tuple[int, int, int]]) -> int:
    """Returns the number of slots, in patches, that images and videos need in a row of their own, in this order.

    With windows, the number is a multiple of `window_patches`. Conversations whose numbers add up to the slots of a row
    always fit in it together: a frame never needs more slots after other frames than at the start of a block.
    """
    if not config.window_size:
        return sum(t * h * w for t, h, w in grids)
    side = config.window_size // (config.patch_size * config.spatial_merge_size)
    end = 0
    for t, h, w in grids:
        for _ in range(t):
            end += _frame_slots(h // config.spatial_merge_size, w // config.spatial_merge_size, side, end % side**2)
    return -(-end // side**2) * config.window_patches


def arrange(values: np.ndarray, tokens: np.ndarray, merge_unit: int) -> np.ndarray:
    """Returns values [patches, ...] in the order of slots, with zeros in padding."""
    groups = values.reshape(-1, merge_unit, *values.shape[1:])[tokens]
    groups[tokens < 0] = 0
    return groups.reshape(-1, *values.shape[1:])


def split_at_frames(frames: np.ndarray, parts: int, size: int, step: int) -> list[slice] | None:
    """Returns consecutive slices of a row, one for each part, that divide no frame; None if there are none.

    The longest slice is as short as possible.

    Args:
        frames: int [slots], the number of each slot's frame, in increasing order; 0 is padding.
        parts: number of slices, which may be empty.
        size: the largest size of a slice.
        step: slices begin at multiples of it.

    Example:
        >>> frames = np.array([1, 1, 2, 2, 2, 3, 3, 0])
        >>> split_at_frames(frames, parts=2, size=8, step=1)
        [slice(0, 5, None), slice(5, 7, None)]
        >>> split_at_frames(frames, parts=2, size=4, step=1) is None
        True
    """
    end = int(np.flatnonzero(frames)[-1]) + 1 if frames.any() else 0
    used = frames[:end]
    largest_before = np.maximum.accumulate(used)
    smallest_after = np.minimum.accumulate(np.where(used > 0, used, frames.max(initial=0))[::-1])[::-1]
    starts = np.arange(step, end, step)
    starts = starts[largest_before[starts - 1] < smallest_after[starts]]

    def slices_up_to(limit: int) -> list[slice] | None:
        slices, start = [], 0
        for _ in range(parts):
            possible = starts[np.searchsorted(starts, start, "right") : np.searchsorted(starts, start + limit, "right")]
            stop = end if end - start <= limit else int(possible[-1]) if possible.size else start
            slices.append(slice(start, stop))
            start = stop
        return slices if start == end else None

    limits = range(-(-end // parts), size + 1)
    shortest = limits.start + bisect.bisect_left(limits, True, key=lambda limit: slices_up_to(limit) is not None)
    return slices_up_to(shortest) if shortest <= size else None


def window_order(height: int, width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a frame sorted by window, and the size of each window; transformers' `window_index`.

    Example:
        >>> tokens, sizes = window_order(2, 5, 4)
        >>> tokens.tolist(), sizes.tolist()
        ([0, 1, 2, 3, 5, 6, 7, 8, 4, 9], [8, 2])
    """
    row, column = np.indices((height, width))
    window = (row // side * -(-width // side) + column // side).ravel()
    return np.argsort(window, kind="stable"), np.bincount(window)


@functools.lru_cache(maxsize=64)
def _frame_layout(height: int, width: int, side: int, start: int) -> Layout:
    """Returns the tokens and windows of a frame, see `item_layout`, after `start` used slots of a block."""
    order, sizes = window_order(height, width, side)
    first_token = np.cumsum(sizes) - sizes
    tokens, windows = [], []
    for number, (window, gap) in enumerate(_place_windows(sizes, side**2, start), 1):
        tokens += [np.full(gap, -1), order[first_token[window] : first_token[window] + sizes[window]]]
        windows += [np.zeros(gap, int), np.full(sizes[window], number)]
    layout = np.concatenate(tokens), np.concatenate(windows)
    for array in layout:
        array.setflags(write=False)  # cached
    return layout


@functools.lru_cache(maxsize=2**16)
def _frame_slots(height: int, width: int, side: int, start: int) -> int:
    """Returns the number of slots of a frame after `start` used slots of a block."""
    _, sizes = window_order(height, width, side)
    return height * width + sum(gap for _, gap in _place_windows(sizes, side**2, start))


def _place_windows(sizes: np.ndarray, block: int, start: int) -> list[tuple[int, int]]:
    """Returns the windows in the order in which they are placed, each with the number of empty slots before it.

    Each time, places the first of the largest windows that fit in the rest of the block. Starts a new block if none fits.
    """
    waiting = {
        int(size): list(np.flatnonzero(sizes == size)[::-1]) for size in sorted(set(sizes.tolist()), reverse=True)
    }
    placed, room = [], block - start
    while waiting:
        size = next((size for size in waiting if size <= room), None)
        gap = room if size is None else 0
        if size is None:
            size, room = next(iter(waiting)), block
        placed.append((waiting[size].pop(), gap))
        room = room - size or block
        if not waiting[size]:
            del waiting[size]
    return placed
