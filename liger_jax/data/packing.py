"""Several conversations in a row: which ones together, and their arrays behind one another."""

import bisect
from collections.abc import Sequence

import numpy as np

from liger_jax.inputs.batch import IGNORE

ROUNDING = 1e-9  # of a share; a token is a larger one


def pack(
    tokens: Sequence[int], patches: Sequence[int], *, length: int, most_patches: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """Puts conversations into few rows of `length` tokens and `most_patches` patches: best fit, the largest first.

    Args:
        tokens, patches: of each conversation.
        length, most_patches: what a row holds.
        seed: decides among conversations of the same size.

    Returns:
        The conversations of each row, by number; each conversation is in one row.

    Raises:
        ValueError: a conversation does not fit into a row.

    Source: Johnson 1974, Fast algorithms for bin packing, https://doi.org/10.1016/S0022-0000(74)80026-7

    Example:
        >>> from liger_jax.data.packing import pack
        >>> sorted(sorted(row) for row in pack([6, 4, 5, 5, 3], [0, 0, 0, 0, 0], length=10, most_patches=0))
        [[0, 1], [2, 3], [4]]
    """
    tokens, patches = np.asarray(tokens, np.int64), np.asarray(patches, np.int64)
    for name, sizes, most in (("tokens", tokens, length), ("patches", patches, most_patches)):
        if sizes.max(initial=0) > most:
            raise ValueError(f"conversation {sizes.argmax()} has {sizes.max()} {name}; a row holds {most}")
    holds = np.array([length, max(most_patches, 1)])
    needs = np.stack([tokens, patches], axis=1) / holds  # shares of a row
    order = np.random.default_rng(seed).permutation(len(tokens))
    order = order[np.argsort(-needs[order].max(axis=1), kind="stable")]
    rows: list[list[int]] = []
    left: list[np.ndarray] = []  # shares of each row that are free

    # what has pictures goes by the scarcer of the two; texts then fill up what is left for tokens
    for kinds, some in ((slice(2), order[patches[order] > 0]), (slice(1), order[patches[order] == 0])):
        free = sorted((left[row][kinds].min(), row) for row in range(len(rows)))
        for i in some:
            at = bisect.bisect_left(free, (needs[i].max() - ROUNDING, -1))
            if at < len(free):
                _, row = free.pop(at)
            else:
                row = len(rows)
                rows.append([])
                left.append(np.ones(2))
            rows[row].append(int(i))
            left[row] = left[row] - needs[i]
            bisect.insort(free, (left[row][kinds].min(), row))
    return [tuple(row) for row in rows]


def join_rows(rows: Sequence[Sequence[dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """What `prepare` takes, made of what the Processor returned for one conversation at a time.

    Args:
        rows: the conversations of each row; a row may have none.

    Returns:
        input_ids, labels, segment_ids: int64 [rows, longest], padded on the right; the pictures' arrays of all.

    Example:
        >>> import numpy as np
        >>> from liger_jax.data.packing import join_rows
        >>> some = [{"input_ids": np.array([ids]), "labels": np.array([ids])} for ids in ([5, 6], [7], [8, 9])]
        >>> join_rows([some[:2], some[2:]])["segment_ids"].tolist()
        [[1, 1, 2], [1, 1, 0]]
    """
    longest = max(1, *(sum(one["input_ids"].size for one in row) for row in rows))
    arrays = {
        name: np.full((len(rows), longest), fill, np.int64)
        for name, fill in (("input_ids", 0), ("labels", IGNORE), ("segment_ids", 0))
    }
    for b, row in enumerate(rows):
        end = 0
        for number, one in enumerate(row, start=1):
            columns = slice(end, end := end + one["input_ids"].size)
            for name, values in (one | {"segment_ids": number}).items():
                if name in arrays:
                    arrays[name][b, columns] = values
    every = [one for row in rows for one in row]
    pictures = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    found = {name: [one[name] for one in every if name in one] for name in pictures}
    return arrays | {name: np.concatenate(parts) for name, parts in found.items() if parts}
