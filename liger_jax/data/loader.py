"""Prepares batches ahead of the steps that need them, in worker processes if there are enough cores."""

import contextlib
import functools
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from multiprocessing import resource_tracker
from typing import Any

import jax
import numpy as np

from liger_jax.errors import UserError
from liger_jax.inputs.batch import Batch
from liger_jax.runtime import worker_initializer


def load_batches(
    make: Callable[[int], Batch], indices: range, *, workers: int | None = None
) -> Generator[Batch, None, None]:
    """Computes make(i) for each index in the background.

    A thread starts immediately, worker processes when the first batch is requested.

    Args:
        make: returns the batch of an index. It must be picklable, and depend on the index alone, so that a run can resume at
            any step.
        indices: the indices, in order.
        workers: number of worker processes; a script that uses them needs Python's `if __name__ == "__main__":`. 0 uses a
            thread of this process. None uses up to 4 processes and leaves half of the cores free.

    Returns:
        An iterator over the batches, in order. Closing it stops the workers.

    Raises:
        UserError: `workers` is negative; or, when a batch is requested, a worker was killed.
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
        workers = default_workers()
    dataset = grain.MapDataset.range(indices.start, indices.stop, indices.step).map(make)
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if workers:
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=4)
        _start_resource_tracker()
        start_worker = functools.partial(_start_worker, worker_initializer())
        batches = batches.mp_prefetch(options, worker_init_fn=start_worker)
    batches = iter(batches)
    batches.start_prefetch()
    return _copies(batches)


def default_workers(processes: int = 1) -> int:
    """Returns the number of workers of one of the processes on a host: up to 4, leaving half of its cores free.

    Its cores are an equal share of the host's, or fewer if the scheduler grants it fewer.
    """
    cores = (os.cpu_count() or 1) // processes
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(0, min(4, cores // 2 - 1))


def _copies(batches: Any) -> Generator[Batch, None, None]:
    """Yields the batches, copied out of the memory that workers share, and stops the workers at the end."""
    with contextlib.closing(batches), _named_worker_errors():
        with _blocked_signals():  # the first call starts the workers
            batch = next(batches, None)
        while batch is not None:
            yield jax.tree.map(np.array, batch)
            batch = next(batches, None)
    gc.collect()  # Grain keeps the last batch in a reference cycle, and would free its shared memory too late


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Keeps signals to the process group from threads and processes that are started in the block, for as long as they run.

    A worker could not do so itself: it would be open to signals during the seconds in which it imports its packages. This
    process still handles signals, in its other threads.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextlib.contextmanager
def _named_worker_errors() -> Iterator[None]:
    """Turns Grain's error about a worker that was killed into a UserError."""
    try:
        yield
    except RuntimeError as error:
        exit_code = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if not exit_code:
            raise
        raise UserError(
            f"A data worker ended with exit code {exit_code[1]}; expected it to run until the last step. -9 often means "
            "that the host ran out of memory, and -7 that /dev/shm is full: use fewer workers (--workers)"
        ) from error


def _start_resource_tracker() -> None:
    """Starts the process that frees the shared memory of killed workers, so that it does so without a warning."""
    option = "ignore:resource_tracker"
    sys.warnoptions.append(option)  # the tracker inherits it
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(option)


def _start_worker(silence: Callable[[int, int], None] | None, index: int, count: int) -> None:
    """Makes a worker silent, and lets it end with its parent, even if the parent is killed."""
    if silence:
        silence(index, count)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
