"""Batches are the same in a thread and in worker processes; workers neither hang nor outlive their parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from liger_jax.data.dataset import make_dataset
from liger_jax.data.loader import default_workers, load_batches
from liger_jax.errors import UserError
from liger_jax.options import Batching


def test_workers_make_the_same_batches(config, processor, data):
    """In a thread or in processes, starting at any step. Their errors reach the caller."""
    dataset = make_dataset(processor, config, data, Batching(batch_size=2))
    for workers in (0, 2):
        batches = list(load_batches(dataset, range(1, 4), workers=workers))
        assert len(batches) == 3
        for batch, index in zip(batches, range(1, 4), strict=True):
            assert (batch.input_ids == dataset(index).input_ids).all()
            assert (batch.vision.pixel_values == dataset(index).vision.pixel_values).all()
    broken = make_dataset(processor, config, [*data[:2], [{"role": "user", "content": "?"}]], Batching(batch_size=3))
    for workers in (0, 2):
        with pytest.raises(Exception, match=r"conversation 2: .*no assistant message"):
            list(load_batches(broken, range(2), workers=workers))


def test_killed_worker_is_an_error(config, processor, data):
    """Nothing hangs, and the message says how to go on."""
    dataset = make_dataset(processor, config, data, Batching(batch_size=2))
    batches = load_batches(dataset, range(10_000), workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(UserError, match=r"data worker ended with exit code -9; expected .* fewer workers"):
        list(batches)


@pytest.mark.parametrize(
    "granted, host, processes, workers", [(16, 16, 1, 4), (16, 16, 4, 1), (4, 64, 1, 1), (4, 64, 8, 1), (1, 64, 1, 0)]
)
def test_workers_by_default(monkeypatch, granted, host, processes, workers):
    """Half of the cores that a process has: of those of the host, or of those that a scheduler such as SLURM grants it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(granted)))
    monkeypatch.setattr(os, "cpu_count", lambda: host)
    assert default_workers(processes) == workers


def test_workers_without_a_scheduler(monkeypatch):
    """Regression: macOS does not say which cores are granted, and the default number of workers was an AttributeError."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert default_workers(4) == 1


def test_signals_do_not_reach_starting_workers():
    """Regression: Ctrl-C in the seconds in which workers import their packages ended them, each with a traceback."""

    def interrupt_worker():
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        for _ in range(20):
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(workers[0].pid, number)
            time.sleep(0.05)

    batches = load_batches(np.array, range(3), workers=1)
    thread = threading.Thread(target=interrupt_worker)
    thread.start()
    assert [batch.tolist() for batch in batches] == [0, 1, 2]
    thread.join()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()  # of this thread


def test_workers_end_with_their_parent():
    """Also if it is killed: workers that outlive it would keep their memory for ever."""
    script = """
        import multiprocessing, os, signal
        import numpy as np
        from liger_jax.data.loader import load_batches
        if __name__ == "__main__":
            batches = load_batches(np.array, range(10_000), workers=1)
            next(batches)
            (worker,) = multiprocessing.active_children()
            print(worker.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    worker = Path(f"/proc/{killed.stdout.strip()}")
    deadline = time.monotonic() + 30
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists()
