"""Batches made ahead of the step that needs them, by worker processes where there are cores for them."""

import os
from collections.abc import Callable, Iterator

import jax
import numpy as np

from liger_jax.inputs.batch import Batch


def load_batches(make: Callable[[int], Batch], indices: range, *, workers: int | None = None) -> Iterator[Batch]:
    """make(i) for each index, in order, computed in the background from now on.

    Args:
        make: the batch of an index. Depends on nothing else, so that a run can go on from any step; can be pickled.
        indices: which batches.
        workers: processes that make them, for which a script needs Python's `if __name__ == "__main__":`; 0 for a thread
            of this process. None: up to 4, leaving half of the cores free.

    Raises:
        ValueError: workers below 0.
        Exception: what `make` raises, when that batch is asked for.

    Example:
        >>> import numpy as np
        >>> from liger_jax.data.loader import load_batches
        >>> [batch.tolist() for batch in load_batches(lambda step: np.array([step]), range(2, 5), workers=0)]
        [[2], [3], [4]]
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; expected at least 0")
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
    return (jax.tree.map(np.array, batch) for batch in batches)  # out of the memory that is shared with the workers
