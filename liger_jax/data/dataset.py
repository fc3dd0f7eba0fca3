"""Conversations as the batches of a run: measured, planned, and read when their step comes."""

import dataclasses
import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from liger_jax.config import Qwen2VLConfig
from liger_jax.data.packing import join_rows, pack
from liger_jax.data.schedule import Plan
from liger_jax.inputs.batch import Batch, bucket, power_of_two, prepare
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor

logger = logging.getLogger(__name__)
OnError = Literal["raise", "skip"]
BROKEN = (ValueError, FileNotFoundError)  # what the processor raises for a conversation that cannot be read
SLACK = 1.1  # patches a packed row has room for, to those that its share would be


class Shape(NamedTuple):
    """What all batches have in common; None: each batch its own bucket. See `Batch`."""

    length: int | None = None
    patches: int | None = None
    segments: int | None = None  # conversations in a row, at most
    frames: int | None = None  # pictures in a row, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Called with a step, it makes its batch: the same one whoever calls. Made by `make_dataset`.

    Attributes:
        processor, config: of the model.
        conversations: as `read_conversations` returns them.
        plan: which of them each batch has.
        shape: of the batches.
        on_error: "skip" leaves a conversation that cannot be read out of its row, with a warning; the rest of the batch
            is as it would be.
    """

    processor: Processor
    config: Qwen2VLConfig
    conversations: Sequence[Conversation]
    plan: Plan
    shape: Shape
    on_error: OnError = "raise"

    def __call__(self, step: int) -> Batch:
        rows = [[one for i in row if (one := self.read(i))] for row in self.plan.batch(step)]
        length, patches, segments, frames = self.shape
        batch = prepare(self.config, **join_rows(rows), length=length, patches=patches)
        if batch.vision is not None and frames:
            batch = dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, max_segments=frames))
        batch = dataclasses.replace(batch, max_segments=segments or batch.max_segments)
        return batch.pad_rows(self.plan.batch_size)

    def read(self, number: int) -> dict[str, np.ndarray] | None:
        """The arrays of one conversation; None if it is left out."""
        try:
            found = self.processor([self.conversations[number]], labels=True)
            if (tokens := found["input_ids"].size) > (most := self.config.text.max_position_embeddings):
                raise ValueError(f"it has {tokens} tokens, and the model {most} positions (max_position_embeddings)")
        except BROKEN as error:
            _leave_out([_told(number, self.conversations[number], error)], self.on_error)
            return None
        return {name: values[0] if name in ("input_ids", "labels") else values for name, values in found.items()}


def make_dataset(
    processor: Processor,
    config: Qwen2VLConfig,
    conversations: Sequence[Conversation],
    *,
    batch_size: int,
    seed: int | None = 0,
    length: int | None = None,
    patches: int | None = None,
    pack_length: int | None = None,
    group_by_length: bool = False,
    on_error: OnError = "raise",
    progress: bool = False,
) -> Dataset:
    """Plans the batches of a run.

    Packing, grouping and a given shape need the sizes of all conversations: each is tokenized once, and the head of each
    picture's file read. What is too large or cannot be read is found then. Damaged pixels are found when they are needed.

    Args:
        processor, config: of the model.
        conversations: as `read_conversations` returns them.
        batch_size: rows in a batch.
        seed: of the order; None: as they stand.
        length, patches: tokens and patches of a row; None: each batch its own bucket.
        pack_length: put several conversations into rows of so many tokens. Rows then have `patches` patches, by default
            a little more than their share, and all batches one shape.
        group_by_length: put conversations of similar sizes into a batch, so that there is little padding.
        on_error: what a conversation does that cannot be read, or does not fit: "raise", or "skip" with a warning.
        progress: show a bar while measuring.

    Raises:
        ValueError: options that exclude one another, a conversation that cannot be read or does not fit (unless they are
            skipped), or none that can be used.

    Example:
        >>> from liger_jax.data.dataset import make_dataset
        >>> data = make_dataset(processor, config, conversations, batch_size=8, pack_length=2048)  # doctest: +SKIP
        >>> data(0).shape  # doctest: +SKIP
        (8, 2048)
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
    for name, size in {"length": length, "patches": patches, "pack_length": pack_length}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")
    if pack_length and (length or group_by_length):
        raise ValueError("packed rows have one length: give either pack_length, or length and group_by_length")
    numbers = np.arange(len(conversations))
    make = {"batch_size": batch_size, "seed": seed}
    if not (pack_length or group_by_length or length or patches):
        plan, shape = Plan([(int(i),) for i in numbers], **make), Shape()
    else:
        longest = min(pack_length or length or np.inf, config.text.max_position_embeddings)
        sizes, left_out = measure(processor, conversations, length=longest, patches=patches, bar=progress)
        _leave_out(left_out, on_error)
        numbers = np.flatnonzero(sizes[:, 0])
        if not len(numbers):
            raise ValueError(f"None of {len(conversations)} conversations can be used: {'; '.join(left_out[:3])}")
        sizes = sizes[numbers]
        plan, shape = (
            _packed(sizes, pack_length, patches, config.vision.merge_unit, make)
            if pack_length
            else _one_a_row(sizes, length, patches, group_by_length, make)
        )
        plan = dataclasses.replace(plan, rows=[tuple(int(numbers[i]) for i in row) for row in plan.rows])
    return Dataset(processor, config, list(conversations), plan, shape, on_error)


def measure(
    processor: Processor,
    conversations: Sequence[Conversation],
    *,
    length: int | None = None,
    patches: int | None = None,
    bar: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Sizes of conversations without decoding their pictures.

    Returns:
        int64 [conversations, 3]: tokens, patches, frames; all 0 for what cannot be read, or has more than `length` tokens
        or `patches` patches; and a message for each of those.
    """
    sizes, broken = np.zeros((len(conversations), 3), np.int64), []
    for i, conversation in enumerate(tqdm(conversations, "measuring", disable=not bar)):
        try:
            found = processor.measure(conversation)
            for name, has, most in (("tokens", found[0], length), ("patches", found[1], patches)):
                if most and has > most:
                    raise ValueError(f"it has {has} {name}, and a row holds {most}")
            sizes[i] = found
        except BROKEN as error:
            broken.append(_told(i, conversation, error))
    return sizes, broken


def _packed(sizes: np.ndarray, length: int, patches: int | None, unit: int, make: dict[str, Any]) -> tuple[Plan, Shape]:
    tokens, needed, frames = sizes.T
    if patches is None:
        share = SLACK * length * needed.sum() / tokens.sum()
        patches = bucket(max(needed.max(), math.ceil(share)), 16 * unit) if needed.any() else 0
    rows = pack(tokens, needed, length=length, most_patches=patches, seed=make["seed"] or 0)
    most = [max(sum(int(of[i]) for i in row) for row in rows) for of in (np.ones_like(tokens), frames)]
    used = [f"{of.sum() / (len(rows) * size):.1%}" for of, size in ((tokens, length), (needed, patches)) if size]
    logger.info(
        "packed %d conversations into %d rows of %d tokens and %d patches, of which %s are used",
        *(len(sizes), len(rows), length, patches, " and ".join(used)),
    )
    segments, pictures = (power_of_two(count, at_least=least) for count, least in zip(most, (1, 4), strict=True))
    return Plan(rows, **make), Shape(length, patches or None, segments, pictures)


def _one_a_row(
    sizes: np.ndarray, length: int | None, patches: int | None, group: bool, make: dict[str, Any]
) -> tuple[Plan, Shape]:
    # by buckets of tokens, then by patches: few shapes, and in each of them little padding
    alike = np.stack([[bucket(int(n), 64) for n in sizes[:, 0]], sizes[:, 1]], axis=1)
    plan = Plan([(i,) for i in range(len(sizes))], **make, sizes=alike if group else None)
    return plan, Shape(length, patches, 1, power_of_two(sizes[:, 2].max(), at_least=4))


def _told(number: int, conversation: Conversation, error: Exception) -> str:
    """What is wrong with a conversation, which its number alone does not tell once others were left out."""
    try:
        first = next(message["content"] for message in conversation if message["role"] == "user")
        text = first if isinstance(first, str) else next(part["text"] for part in first if "text" in part)
    except (TypeError, KeyError, StopIteration):  # it is no conversation, or asks with pictures alone
        return f"conversation {number}: {error}"
    return f"conversation {number}: {error} (it asks {text[:60]!r})"


def _leave_out(messages: list[str], on_error: OnError) -> None:
    """Stops at the first, or warns of all."""
    if messages and on_error == "raise":
        raise ValueError(messages[0])
    if messages:
        shown = "; ".join(messages[:10]) + ("; ..." if len(messages) > 10 else "")
        warnings.warn(f"left out {len(messages)} conversations: {shown}", stacklevel=2)
