"""Packing: chooses which conversations share a sequence, and joins their arrays."""

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from liger_jax.errors import UserError
from liger_jax.inputs.batch import IGNORE

ROUNDING = 1e-9  # tolerance for fractions of a sequence; a single token is a larger fraction
TRIED = 10  # sequences to try for a conversation before it goes to one that surely has room; bounds the time


def pack(
    tokens: ArrayLike, patches: ArrayLike, *, length: int, max_patches: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """Packs conversations into few sequences: best fit, largest conversation first.

    Args:
        tokens, patches: sizes of each conversation.
        length, max_patches: capacity of a sequence, in tokens and patches.
        seed: determines the order among conversations of the same size.

    Returns:
        The conversations of each sequence, by index. Each conversation occurs once.

    Raises:
        UserError: a conversation does not fit into a sequence, or there is no room in one.

    Source: Johnson 1974, Fast algorithms for bin packing, https://doi.org/10.1016/S0022-0000(74)80026-7

    Example:
        >>> from liger_jax.data.packing import pack
        >>> sorted(sorted(row) for row in pack([6, 4, 5, 5, 3], [0, 0, 0, 0, 0], length=10, max_patches=0))
        [[0, 1], [2, 3], [4]]
    """
    if length < 1 or max_patches < 0:
        raise UserError(f"length is {length} and max_patches is {max_patches}; expected at least 1 and 0")
    token_counts, patch_counts = np.asarray(tokens, np.int64), np.asarray(patches, np.int64)
    for name, sizes, limit in (("tokens", token_counts, length), ("patches", patch_counts, max_patches)):
        if sizes.max(initial=0) > limit:
            raise UserError(
                f"conversation {sizes.argmax()} has {sizes.max()} {name}; expected at most the {limit} of a sequence"
            )
    capacity = np.array([length, max(max_patches, 1)])
    needs = np.stack([token_counts, patch_counts], axis=1) / capacity  # as fractions of a sequence
    order = np.random.default_rng(seed).permutation(len(token_counts))
    order = order[np.argsort(-needs[order].max(axis=1), kind="stable")]
    sequences: list[list[int]] = []
    room: list[np.ndarray] = []  # free fractions of each sequence

    # Sequences are ordered by the scarcer of their free tokens and patches. Those with less of it than a conversation's
    # smaller need are too full; from there on, the first that has room for both is the fullest. Texts come last, to fill the
    # remaining tokens.
    with_images, texts = order[patch_counts[order] > 0], order[patch_counts[order] == 0]
    for resources, conversations in ((slice(2), with_images), (slice(1), texts)):
        free = sorted((room[i][resources].min(), i) for i in range(len(sequences)))
        for conversation in conversations:
            need = needs[conversation][resources] - ROUNDING
            first = bisect.bisect_left(free, (need.min(), -1))
            certain = bisect.bisect_left(free, (need.max(), -1), lo=first)  # from here on, every sequence has room
            tried = range(first, min(certain, first + TRIED))
            place = next((at for at in tried if (room[free[at][1]][resources] >= need).all()), certain)
            if place < len(free):
                _, i = free.pop(place)
            else:
                i = len(sequences)
                sequences.append([])
                room.append(np.ones(2))
            sequences[i].append(int(conversation))
            room[i] = room[i] - needs[conversation]
            bisect.insort(free, (room[i][resources].min(), i))
    return [tuple(sequence) for sequence in sequences]


def join_conversations(sequences: Sequence[Sequence[dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Joins the arrays that the Processor returns for single conversations into the arguments of `prepare`.

    Args:
        sequences: the conversations of each sequence; a sequence may be empty.

    Returns:
        input_ids, labels, segment_ids: int64 [sequences, longest], padded on the right; and the image and video arrays of
        all conversations, concatenated.

    Example:
        >>> import numpy as np
        >>> from liger_jax.data.packing import join_conversations
        >>> arrays = [{"input_ids": np.array([ids]), "labels": np.array([ids])} for ids in ([5, 6], [7], [8, 9])]
        >>> join_conversations([arrays[:2], arrays[2:]])["segment_ids"].tolist()
        [[1, 1, 2], [1, 1, 0]]
    """
    longest = max(1, *(sum(arrays["input_ids"].size for arrays in sequence) for sequence in sequences))
    shape = (len(sequences), longest)
    joined = {
        "input_ids": np.zeros(shape, np.int64),
        "labels": np.full(shape, IGNORE, np.int64),
        "segment_ids": np.zeros(shape, np.int64),
    }
    for i, sequence in enumerate(sequences):
        end = 0
        for segment, arrays in enumerate(sequence, start=1):
            positions = slice(end, end := end + arrays["input_ids"].size)
            joined["input_ids"][i, positions] = arrays["input_ids"]
            joined["labels"][i, positions] = arrays["labels"]
            joined["segment_ids"][i, positions] = segment
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        if parts := [arrays[name] for sequence in sequences for arrays in sequence if name in arrays]:
            joined[name] = np.concatenate(parts)
    return joined
