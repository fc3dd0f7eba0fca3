"""Which rows of every batch a process reads, and the batch that the rows of all processes form on their devices."""

import dataclasses
import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from liger_jax import processes
from liger_jax.inputs.batch import Batch
from liger_jax.model.sharding import BATCH_AXES, batch_shardings


@dataclasses.dataclass(frozen=True)
class RowShare:
    """The rows that the devices of this process hold.

    Processes whose devices are split over `tensor` alone hold the same rows, and each of them reads these rows.

    Attributes:
        mesh: the devices of all processes.
        total: number of rows in a batch, with those that fill up the devices.
        rows: numbers of the rows of this process, in order.
    """

    mesh: Mesh
    total: int
    rows: tuple[int, ...]

    @classmethod
    def create(cls, mesh: Mesh, batch_size: int, *, multiple: int = 1) -> Self:
        """Returns this process's share of batches of `batch_size` rows; each device has a multiple of `multiple` rows."""
        axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
        smallest = multiple * math.prod(mesh.shape[name] for name in axes)
        total = -(-batch_size // smallest) * smallest
        parts = NamedSharding(mesh, P(axes)).addressable_devices_indices_map((total,)).values()
        rows = {row for part in parts if part is not None for row in range(total)[part[0]]}
        return cls(mesh, total, tuple(sorted(rows)))

    @property
    def copies(self) -> float:
        """Number of processes that hold each row."""
        return len(self.rows) * processes.count() / self.total

    def place(self, batch: Batch) -> Batch:
        """Returns the whole batch, on the devices of all processes, from this process's rows of it."""

        same_rows = self.copies == processes.count()  # so that all processes move patches to the same places
        batch = batch.split_positions(self.mesh.shape.get("sequence", 1), whole_frames=same_rows)

        def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
            def read(part: Any) -> np.ndarray:
                first, end, _ = part[0].indices(self.total)
                start = self.rows.index(first)
                return array[(slice(start, start + end - first), *part[1:])]

            return jax.make_array_from_callback((self.total, *array.shape[1:]), sharding, read)

        return jax.tree.map(place, batch, batch_shardings(batch, self.mesh))


def place_batches(
    batches: Iterator[Batch], share: RowShare | None, count_work: Callable[[Batch], dict[str, float]] | None = None
) -> Generator[tuple[Batch, dict[str, float]], None, None]:
    """Yields each batch, and its work in all processes. If a process cannot read its part, all raise its error.

    Args:
        batches: this process's part of each batch.
        share: which part this is; None in a single process, whose batches stay in host memory.
        count_work: counts the work in a batch; None: it is not counted.
    """
    while True:
        batch: Batch | None = None
        work: dict[str, float] = {}
        error: Exception | None = None
        try:
            batch = next(batches, None)
            work = count_work(batch) if count_work and batch is not None else {}
        except Exception as caught:
            error = caught
        works = processes.exchange(work, error)
        if batch is None:
            return
        if share is not None:
            work = {name: sum(part[name] for part in works) / share.copies for name in work}
            batch = share.place(batch)
        yield batch, work
