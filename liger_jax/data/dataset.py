"""Turns conversations into batches: measures and schedules them, and reads them when a training step needs them."""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from liger_jax import processes
from liger_jax.config import QwenVLConfig, VisionConfig
from liger_jax.data.packing import join_conversations, pack
from liger_jax.errors import DataWarning, UserError, warn_skipped
from liger_jax.inputs.batch import LARGEST_ROW, Batch, bucket, check_patches, patch_bucket, power_of_two, prepare
from liger_jax.inputs.layout import count_slots
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor
from liger_jax.options import Batching
from liger_jax.progress import progress_bar

logger = logging.getLogger(__name__)
SORTED_BATCHES = 50  # number of batches whose sequences are sorted together, as in transformers' group_by_length
# The smallest value of each number in Batching. All but batch_size, accumulate and seed may also be None.
SMALLEST = {"batch_size": 1, "accumulate": 1, "length": 1, "patches": 1, "pack_length": 1, "seed": 0, "workers": 0}
LARGEST_SEED = 2**32 - 1
PATCH_SLACK = 1.1  # patches that fit into a packed sequence, relative to its even share of all patches


@dataclasses.dataclass(frozen=True, eq=False)
class BatchSchedule:
    """Which conversations each batch of a run contains.

    The schedule depends on sizes and a seed alone, so a run can resume at any step. Every sequence occurs once per epoch.
    The last batch of an epoch may be smaller.

    Attributes:
        sequences: the conversations of each sequence, by index.
        batch_size: sequences per batch.
        seed: determines the order, which differs between epochs. None keeps the order of `sequences`.
        sizes: [sequences, keys]; sequences of similar sizes share a batch, and the first key matters most. None: any
            sequences share a batch.

    Example:
        >>> from liger_jax.data.dataset import BatchSchedule
        >>> schedule = BatchSchedule([(0,), (1, 2), (3,)], batch_size=2)
        >>> [schedule.batch(step) for step in range(3)]
        [[(0,), (1, 2)], [(3,)], [(0,), (1, 2)]]
    """

    sequences: Sequence[tuple[int, ...]]
    batch_size: int
    seed: int | None = None
    sizes: np.ndarray | None = None

    @property
    def epoch_batches(self) -> int:
        """Number of batches per epoch."""
        return -(-len(self.sequences) // self.batch_size)

    def batch(self, step: int) -> list[tuple[int, ...]]:
        """Returns the sequences of a step's batch."""
        epoch, position = divmod(step, self.epoch_batches)
        order = _epoch_order(self, epoch)[position * self.batch_size : (position + 1) * self.batch_size]
        return [self.sequences[i] for i in order]


@functools.lru_cache(maxsize=4)
def _epoch_order(schedule: BatchSchedule, epoch: int) -> np.ndarray:
    """Returns the order of the sequences in an epoch."""
    count, batch_size = len(schedule.sequences), schedule.batch_size
    if schedule.seed is None:
        return np.arange(count)
    rng = np.random.default_rng((schedule.seed, epoch))
    order = rng.permutation(count)
    if schedule.sizes is None:
        return order
    chunks = np.split(order, range(SORTED_BATCHES * batch_size, count, SORTED_BATCHES * batch_size))
    order = np.concatenate([chunk[np.lexsort(schedule.sizes[chunk].T[::-1])] for chunk in chunks])
    full = count // batch_size * batch_size
    batches = order[:full].reshape(-1, batch_size)
    return np.concatenate([rng.permutation(batches).ravel(), order[full:]])


class BatchShape(NamedTuple):
    """The shape that all batches share. None: each batch uses its own bucket, see `Batch`."""

    length: int | None = None
    patches: int | None = None
    segments: int | None = None  # maximum number of conversations in a sequence
    frames: int | None = None  # maximum number of frames in a sequence; an image has one


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """The batches of a run. Called with a step, it returns that step's batch, which is the same in every process.

    Attributes:
        processor, config: those of the model.
        conversations: as returned by `read_conversations`.
        schedule: which of them each batch contains.
        shape: the shape of the batches.
        skip_broken: omit conversations that cannot be read, with a warning. The other conversations of the batch are not
            affected.
        rows: the rows of each batch that this process reads; None: all. The rows of all processes then form one batch, of
            a shape that follows from `sizes`.
        sizes: int64 [conversations, 3], as returned by `measure_conversations`. Required for `rows`.
    """

    processor: Processor
    config: QwenVLConfig
    conversations: Sequence[Conversation]
    schedule: BatchSchedule
    shape: BatchShape
    skip_broken: bool = False
    rows: tuple[int, ...] | None = None
    sizes: np.ndarray | None = None

    def __call__(self, step: int) -> Batch:
        batch_sequences, shape = self.schedule.batch(step), self.shape
        if self.rows is not None:
            shape = self._shared_shape(batch_sequences)
            batch_sequences = [batch_sequences[row] if row < len(batch_sequences) else () for row in self.rows]
        sequences = [[inputs for i in sequence if (inputs := self.read(i)) is not None] for sequence in batch_sequences]
        length, patches, segments, frames = shape
        arrays: dict[str, Any] = join_conversations(sequences)
        batch = prepare(self.config, **arrays, length=length, patches=patches)
        if batch.vision is not None and frames:
            batch = dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, max_segments=frames))
        batch = dataclasses.replace(batch, max_segments=segments or batch.max_segments)
        return batch.pad_rows(self.schedule.batch_size) if self.rows is None else batch

    def _shared_shape(self, sequences: list[tuple[int, ...]]) -> BatchShape:
        """Returns the shape of a batch whose rows are read by several processes, from the sizes of all its conversations."""
        assert self.sizes is not None, "rows without sizes"
        length, patches, segments, frames = self.shape
        sums = np.array([self.sizes[list(sequence)].sum(axis=0) for sequence in sequences])
        tokens, slots, images = (int(count) for count in sums.max(axis=0))
        return BatchShape(
            length or bucket(tokens, 64),
            patches or (patch_bucket(self.config.vision, slots) if slots else None),
            segments or power_of_two(max(map(len, sequences)), at_least=1),
            frames or power_of_two(images, at_least=4),
        )

    def read(self, index: int) -> dict[str, np.ndarray] | None:
        """Returns the arrays of one conversation, or None if it is skipped."""
        conversation, limit = self.conversations[index], self.config.text.max_position_embeddings
        try:
            arrays = self.processor([conversation], labels=True)
            if (tokens := arrays["input_ids"].size) > limit:
                raise UserError(
                    f"it has {tokens} tokens; expected at most the model's {limit} positions (max_position_embeddings)"
                )
        except UserError as error:
            _raise_or_skip([_describe(index, conversation, error)], self.skip_broken)
            return None
        return {name: array[0] if name in ("input_ids", "labels") else array for name, array in arrays.items()}


def make_dataset(
    processor: Processor,
    config: QwenVLConfig,
    conversations: Sequence[Conversation],
    batching: Batching,
    *,
    shuffle: bool = True,
    progress: bool = False,
    rows: tuple[int, ...] | None = None,
) -> Dataset:
    """Returns the dataset of a run, with all its batches scheduled.

    Packing, grouping, a fixed shape and several processes require the sizes of all conversations. They are measured in
    advance, a part in each process: each conversation is tokenized, and the header of each image file is read. This finds
    conversations that are too large or cannot be read. Damaged pixels are found only when a batch needs them.

    Args:
        processor, config: those of the model.
        conversations: as returned by `read_conversations`.
        batching: batch size, packing or grouping, shape, seed, treatment of broken conversations. Packed batches all have
            one shape; without `patches`, their sequences have room for a little more than their share of all patches.
        shuffle: visit the conversations in a different order in each epoch. False keeps their order.
        progress: show a progress bar while measuring.
        rows: the rows of each batch that this process reads, see `liger_jax.data.share`; None: all.

    Raises:
        UserError: a value out of range, contradictory options, a conversation that cannot be read or is too large (unless
            it is skipped), or no usable conversation.

    Example:
        >>> from liger_jax.data.dataset import make_dataset
        >>> from liger_jax.options import Batching
        >>> batching = Batching(batch_size=8, pack_length=2048)
        >>> data = make_dataset(processor, config, conversations, batching)  # doctest: +SKIP
        >>> data(0).shape  # doctest: +SKIP
        (8, 2048)
    """
    check_batching(batching, config.vision)
    if not len(conversations):
        raise UserError("conversations is empty; expected at least one")
    length, seed = batching.pack_length or batching.length, batching.seed if shuffle else None
    schedule, shape = BatchSchedule([(i,) for i in range(len(conversations))], batching.batch_size, seed), BatchShape()
    sizes, scheduled_by_size = np.zeros((0, 3), np.int64), length or batching.patches or batching.group_by_length
    if scheduled_by_size or rows is not None:
        sizes, problems = _measure_together(
            processor,
            config,
            conversations,
            max_tokens=min(length or math.inf, config.text.max_position_embeddings),
            max_patches=batching.patches,
            progress=progress,
        )
        if processes.is_first() or not batching.skip_broken:
            _raise_or_skip(problems, batching.skip_broken)
    if scheduled_by_size:
        usable = np.flatnonzero(sizes[:, 0])
        if not len(usable):
            raise UserError(
                f"None of {len(conversations)} conversations can be used: {'; '.join(problems[:3])}; expected at least one"
            )
        if batching.pack_length:
            schedule, shape = _schedule_packed(sizes[usable], batching, batching.pack_length, config.vision, seed)
        else:
            schedule, shape = _schedule_unpacked(sizes[usable], batching, seed)
        sequences = [tuple(int(usable[i]) for i in sequence) for sequence in schedule.sequences]
        schedule = dataclasses.replace(schedule, sequences=sequences)
    dataset = Dataset(processor, config, list(conversations), schedule, shape, batching.skip_broken)
    return dataset if rows is None else dataclasses.replace(dataset, rows=rows, sizes=sizes)


def check_batching(batching: Batching, vision: VisionConfig) -> None:
    """Raises UserError for a value out of range, for contradictory options, or for patches that do not suit the tower."""
    for name, smallest in SMALLEST.items():
        value = getattr(batching, name)
        if value is None and name not in ("batch_size", "accumulate", "seed"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise UserError(f"{name} is {value!r:.60}; expected an integer")
        if value < smallest:
            raise UserError(f"{name} is {value}; expected at least {smallest}")
        if value > (largest := LARGEST_SEED if name == "seed" else LARGEST_ROW):
            raise UserError(f"{name} is {value!s:.60}; expected at most {largest}")
    if batching.patches:
        check_patches(vision, batching.patches)
    if batching.pack_length and (batching.length or batching.group_by_length):
        raise UserError(
            f"pack_length is {batching.pack_length}, which fixes the length of all sequences; "
            "expected neither length nor group_by_length with it"
        )


def measure_conversations(
    processor: Processor,
    config: QwenVLConfig,
    conversations: Sequence[Conversation],
    *,
    max_tokens: float | None = None,
    max_patches: int | None = None,
    first: int = 0,
    progress: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Measures conversations without decoding their images; `first` is the number of the first one, for messages.

    Returns:
        sizes: int64 [conversations, 3]: tokens, patches, frames. For a tower with windows, patches are slots, see
            `count_slots`. All are 0 for a conversation that cannot be read or exceeds `max_tokens` or `max_patches`.
        problems: a message for each of those.
    """
    sizes, problems = np.zeros((len(conversations), 3), np.int64), []
    for i, conversation in enumerate(progress_bar(conversations, show=progress, desc="measuring: ")):
        try:
            tokens, grids = processor.measure(conversation)
            patches = count_slots(config.vision, grids)
            for name, count, limit in (("tokens", tokens, max_tokens), ("patches", patches, max_patches)):
                if limit and count > limit:
                    raise UserError(f"it has {count} {name}; expected at most the {limit} of a sequence")
            sizes[i] = tokens, patches, sum(t for t, _, _ in grids)
        except UserError as error:
            problems.append(_describe(first + i, conversation, error))
    return sizes, problems


def _measure_together(
    processor: Processor, config: QwenVLConfig, conversations: Sequence[Conversation], **options: Any
) -> tuple[np.ndarray, list[str]]:
    """Returns `measure_conversations` of all conversations, of which each process measures a part."""
    bounds = np.linspace(0, len(conversations), processes.count() + 1).astype(int)
    first, end = bounds[processes.index() : processes.index() + 2]
    sizes, problems = measure_conversations(processor, config, conversations[first:end], first=int(first), **options)
    if processes.count() == 1:
        return sizes, problems
    parts = processes.exchange([sizes.tolist(), problems])
    sizes = np.array([row for rows, _ in parts for row in rows], np.int64).reshape(-1, 3)
    return sizes, [problem for _, messages in parts for problem in messages]


def _schedule_packed(
    sizes: np.ndarray, batching: Batching, length: int, vision: VisionConfig, seed: int | None
) -> tuple[BatchSchedule, BatchShape]:
    """Schedules sequences of several conversations; all batches have one shape."""
    tokens, patches, frames = sizes.T
    max_patches = batching.patches
    if max_patches is None:
        share = PATCH_SLACK * length * patches.sum() / tokens.sum()
        max_patches = patch_bucket(vision, max(patches.max(), math.ceil(share))) if patches.any() else 0
    sequences = pack(tokens, patches, length=length, max_patches=max_patches, seed=seed or 0)
    capacities = [(tokens, length), (patches, max_patches)]
    used = [f"{counts.sum() / (len(sequences) * capacity):.1%}" for counts, capacity in capacities if capacity]
    logger.info(
        "packed %d conversations into %d sequences of %d tokens and %d patches, of which %s are used",
        *(len(sizes), len(sequences), length, max_patches, " and ".join(used)),
    )
    max_segments = max(map(len, sequences))
    max_frames = max(sum(int(frames[i]) for i in sequence) for sequence in sequences)
    shape = BatchShape(
        length, max_patches or None, power_of_two(max_segments, at_least=1), power_of_two(max_frames, at_least=4)
    )
    return BatchSchedule(sequences, batching.batch_size, seed), shape


def _schedule_unpacked(sizes: np.ndarray, batching: Batching, seed: int | None) -> tuple[BatchSchedule, BatchShape]:
    """Schedules one conversation per sequence."""
    # sorted by buckets of tokens, then by patches: few shapes, and little padding in each of them
    keys = np.stack([[bucket(int(tokens), 64) for tokens in sizes[:, 0]], sizes[:, 1]], axis=1)
    schedule = BatchSchedule(
        [(i,) for i in range(len(sizes))], batching.batch_size, seed, sizes=keys if batching.group_by_length else None
    )
    return schedule, BatchShape(batching.length, batching.patches, 1, power_of_two(sizes[:, 2].max(), at_least=4))


def _describe(index: int, conversation: Conversation, error: Exception) -> str:
    """Returns an error message with the conversation's index and the start of its question.

    The index alone does not identify a record of a file, since earlier records may have been left out.
    """
    try:
        content = next(message["content"] for message in conversation if message["role"] == "user")
        text = content if isinstance(content, str) else next(part["text"] for part in content if "text" in part)
    except (TypeError, KeyError, StopIteration):  # malformed, or a question without text
        return f"conversation {index}: {error}"
    return f"conversation {index}: {error} (it asks {text[:60]!r})"


def _raise_or_skip(problems: list[str], skip_broken: bool) -> None:
    """Raises the first problem, or warns about all of them."""
    if problems and not skip_broken:
        raise UserError(problems[0])
    warn_skipped(f"left out {len(problems)} conversations", problems, category=DataWarning)
