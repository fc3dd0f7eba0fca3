"""What a training run tells while it runs: metrics.jsonl, TensorBoard, a progress bar."""

import contextlib
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from tqdm import tqdm

from liger_jax.config import Qwen2VLConfig
from liger_jax.files import atomic_write
from liger_jax.inputs.batch import Batch
from liger_jax.train.flops import peak_flops, step_flops

HELD_OUT = "held_out_"  # what names of what was measured there begin with


def batch_work(
    config: Qwen2VLConfig, batch: Batch, *, frozen: Collection[str] = (), adapted: Collection[str] = ()
) -> dict[str, float]:
    """What there is to do in a batch, counted in host memory before the step is handed to the device.

    Returns:
        tokens: padding aside; columns: with it; images: pictures, and of a video each pair of frames that
        makes one layer of patches; flops, `step_flops`.
    """
    images = 0 if batch.vision is None else int(np.max(batch.vision.segment_ids, axis=1).sum())
    tokens, columns = int(np.count_nonzero(batch.segment_ids)), int(np.size(batch.segment_ids))
    flops = step_flops(config, batch, frozen=frozen, adapted=adapted)
    return {"tokens": tokens, "columns": columns, "images": images, "flops": flops}


def step_rates(work: dict[str, float], trained: float, seconds: float, devices: list[jax.Device]) -> dict[str, float]:
    """What a step achieved, for the log.

    Args:
        work: from `batch_work`.
        trained: trained tokens.
        seconds: from the end of the step before to the end of this one.
        devices: those that computed it.

    Returns:
        tokens_per_second (padding aside), trained_tokens_per_second, images_per_second; token_utilisation: share of the
        columns that are tokens; model_flops_utilisation: share of what the devices can do in bfloat16, and
        peak_memory_gib: most memory so far in use on the first, where they tell.

    Example:
        >>> import jax
        >>> work = {"tokens": 30, "columns": 40, "images": 2, "flops": 1e9}
        >>> rates = step_rates(work, trained=10, seconds=0.5, devices=jax.devices())
        >>> rates["tokens_per_second"], rates["images_per_second"], rates["token_utilisation"]
        (60.0, 4.0, 0.75)
    """
    rates = {
        "tokens_per_second": work["tokens"] / seconds,
        "trained_tokens_per_second": trained / seconds,
        "images_per_second": work["images"] / seconds,
        "token_utilisation": work["tokens"] / work["columns"],
    }
    if peak := peak_flops(devices[0]):
        rates["model_flops_utilisation"] = work["flops"] / seconds / (peak * len(devices))
    if memory := (devices[0].memory_stats() or {}).get("peak_bytes_in_use"):
        rates["peak_memory_gib"] = memory / 2**30
    return rates


class RunLog:
    """The log of a run that begins at a step; what an earlier one wrote of later steps is dropped. A context manager.

    Args:
        file: metrics.jsonl; a line a step.
        begin, steps: the step that training goes on from, and the last one.
        tensorboard: folder for TensorBoard; None for none.
        progress: show a bar.

    Example:
        >>> import pathlib, tempfile
        >>> from liger_jax.train.metrics import RunLog
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "metrics.jsonl")
        ...     with RunLog(file, begin=0, steps=1, progress=False) as log:
        ...         log.write(1, {"loss": 2.5})
        ...     file.read_text()
        '{"step": 1, "loss": 2.5}\\n'
    """

    def __init__(
        self, file: Path, *, begin: int, steps: int, tensorboard: Path | None = None, progress: bool = True
    ) -> None:
        truncate_after(file, begin)
        with contextlib.ExitStack() as stack:
            self.file = stack.enter_context(file.open("a"))
            self.bar = stack.enter_context(tqdm(total=steps, initial=begin, unit="step", disable=not progress))
            self.writer: Any = None
            if tensorboard is not None:
                from tensorboardX import SummaryWriter

                self.writer = stack.enter_context(SummaryWriter(str(tensorboard), purge_step=begin + 1))
            self.stack = stack.pop_all()
        self.clock = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self.clock = self.clock, time.perf_counter()
        return self.clock - before

    def write(self, step: int, values: dict[str, float]) -> None:
        """A line of the file, and a point of each curve."""
        print(json.dumps({"step": step} | values), file=self.file, flush=True)
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def advance(self, values: dict[str, float]) -> None:
        """A step more on the bar."""
        shown = {name: f"{values[name]:.3g}" for name in ("loss", "grad_norm") if name in values}
        self.bar.set_postfix(shown | {"tokens_per_s": f"{values['tokens_per_second']:,.0f}"}, refresh=False)
        self.bar.update()


def truncate_after(file: Path, step: int) -> None:
    """Drops lines of steps after the checkpoint that a run continues from, the last of which may have been cut short.

    Raises:
        ValueError: a line that is none of a log's.
    """
    if file.exists():
        atomic_write(file, b"".join(line + b"\n" for line, values in _lines(file) if values["step"] <= step))


def was_measured(file: Path, step: int) -> bool:
    """Whether the log has what was measured on held-out data at a step."""
    told = [values for _, values in _lines(file) if values["step"] == step] if file.exists() else []
    return any(name.startswith(HELD_OUT) for values in told for name in values)


def _lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line, and what is in it."""
    *lines, _ = file.read_bytes().split(b"\n")  # not splitlines: an answer may hold other line ends
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            values["step"] + 0  # a number
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}, line {number} is {line[:60]!r}; expected JSON with a step, or no such line"
            ) from error
        found.append((line, values))
    return found
