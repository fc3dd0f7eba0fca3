"""Prepares batches ahead of the steps that need them, in worker processes if there are enough cores."""

import os
from collections.abc import Callable, Iterator

import jax
import numpy as np

from liger_jax.errors import UserError
from liger_jax.inputs.batch import Batch


def load_batches(make: Callable[[int], Batch], indices: range, *, workers: int | None = None) -> Iterator[Batch]:
    """Computes make(i) for each index in the background, starting immediately.

    Args:
        make: returns the batch of an index. It must be picklable, and depend on the index alone, so that a run can resume at
            any step.
        indices: the indices, in order.
        workers: number of worker processes; a script that uses them needs Python's `if __name__ == "__main__":`. 0 uses a
            thread of this process. None uses up to 4 processes and leaves half of the cores free.

    Returns:
        An iterator over the batches, in order.

    Raises:
        UserError: `workers` is negative.
        Exception: an error of `make` is raised when its batch is requested.

    Example:
        >>> import numpy as np
        >>> from liger_jax.data.loader import load_batches
        >>> [batch.tolist() for batch in load_batches(lambda step: np.array([step]), range(2, 5), workers=0)]
        [[2], [3], [4]]
    """
    if workers is not None and workers < 0:
        raise UserError(f"workers is {workers}; expected at least 0")
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # Grain reads settings from absl's flags, which only an absl program parses
    if workers is None:
        workers = max(0, min(4, (os.cpu_count() or 1) // 2 - 1))
    dataset = grain.MapDataset.range(indices.start, indices.stop, indices.step).map(make)
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=4))
    batches = iter(batches)
    batches.start_prefetch()
    return (jax.tree.map(np.array, batch) for batch in batches)  # copied out of the memory that workers share
