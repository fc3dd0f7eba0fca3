"""The log of a training run (metrics.jsonl, TensorBoard, a progress bar), and the throughput of its steps."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from liger_jax.config import QwenVLConfig
from liger_jax.errors import UserError
from liger_jax.files import atomic_write
from liger_jax.inputs.batch import Batch
from liger_jax.progress import progress_bar
from liger_jax.train.flops import peak_flops, step_flops

HELD_OUT = "held_out_"  # prefix of the metrics measured on held-out data


def batch_work(
    config: QwenVLConfig, batch: Batch, *, frozen: Collection[str] = (), adapted: Collection[str] = ()
) -> dict[str, float]:
    """Returns the amount of work in a batch, counted in host memory before the step is dispatched.

    Args:
        config: the model's configuration.
        batch: a batch of numpy arrays.
        frozen, adapted: see `step_flops`.

    Returns:
        "tokens", without padding; "positions", tokens and padding; "images", where each pair of video frames that shares
        patches counts as one; and "flops", see `step_flops`.
    """
    images = 0 if batch.vision is None else int(np.max(batch.vision.segment_ids, axis=1).sum())
    tokens, positions = int(np.count_nonzero(batch.segment_ids)), int(np.size(batch.segment_ids))
    flops = step_flops(config, batch, frozen=frozen, adapted=adapted)
    return {"tokens": tokens, "positions": positions, "images": images, "flops": flops}


def step_rates(
    work: dict[str, float], trained_tokens: float, seconds: float, devices: list[jax.Device]
) -> dict[str, float]:
    """Returns the throughput of a step, for the log.

    Args:
        work: as returned by `batch_work`.
        trained_tokens: number of tokens that the loss counts.
        seconds: time between the end of the previous step and the end of this one.
        devices: the devices that computed the step; the first one belongs to this process.

    Returns:
        tokens_per_second (without padding), trained_tokens_per_second, images_per_second; token_utilisation: fraction of
        positions that are tokens; model_flops_utilisation: fraction of the devices' peak bfloat16 FLOPs; peak_memory_gib:
        peak memory so far on the first device. The last two are omitted for devices that do not report them.

    Example:
        >>> import jax
        >>> work = {"tokens": 30, "positions": 40, "images": 2, "flops": 1e9}
        >>> rates = step_rates(work, trained_tokens=10, seconds=0.5, devices=jax.devices())
        >>> rates["tokens_per_second"], rates["images_per_second"], rates["token_utilisation"]
        (60.0, 4.0, 0.75)
    """
    rates = {
        "tokens_per_second": work["tokens"] / seconds,
        "trained_tokens_per_second": trained_tokens / seconds,
        "images_per_second": work["images"] / seconds,
        "token_utilisation": work["tokens"] / work["positions"],
    }
    if peak := peak_flops(devices[0]):
        rates["model_flops_utilisation"] = work["flops"] / seconds / (peak * len(devices))
    if memory := (devices[0].memory_stats() or {}).get("peak_bytes_in_use"):
        rates["peak_memory_gib"] = memory / 2**30
    return rates


class RunLog:
    """The log of a training run from a given step on: a file, TensorBoard curves and a progress bar.

    A context manager. Opening it drops lines of later steps, left by a run that was interrupted after its last checkpoint.

    Args:
        file: metrics.jsonl, with one line per step; None writes none.
        begin: number of steps already trained.
        steps: number of steps of the whole run.
        tensorboard: folder for the curves; None writes none.
        progress: show a progress bar.

    Attributes:
        history: the lines of the training steps logged so far.
        steps: number of steps of the whole run.

    Raises:
        UserError: a line of `file` is not a log entry.

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
        self, file: Path | None, *, begin: int, steps: int, tensorboard: Path | None = None, progress: bool = True
    ) -> None:
        if file is not None:
            truncate_after(file, begin)
        self.steps = steps
        self.history: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            self.file = None if file is None else stack.enter_context(file.open("a"))
            self.bar = stack.enter_context(progress_bar(show=progress, total=steps, initial=begin, unit="step"))
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

    def seconds_since_last(self) -> float:
        """Returns the seconds since the last call, or since the log was opened."""
        previous, self.clock = self.clock, time.perf_counter()
        return self.clock - previous

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a line to the file and a point to each curve.

        NaN and infinity, which JSON cannot represent, are null in the file and gaps in the curves.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step} | dict.fromkeys(values) | finite
        if self.file:
            print(json.dumps(line, allow_nan=False), file=self.file, flush=True)
        if self.writer:
            for name, value in finite.items():
                self.writer.add_scalar(name, value, step)

    def note(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

    def write_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Logs the metrics of the held-out conversations, and prints them above the progress bar."""
        self.write(step, values)
        shown = (
            f"{name} {f'{value:,}' if isinstance(value, int) else f'{value:.4g}'}" for name, value in values.items()
        )
        self.note(f"step {step}: {', '.join(shown)}")

    def write_step(self, step: int, values: dict[str, float]) -> None:
        """Logs a training step and advances the progress bar."""
        self.history.append({"step": step} | values)
        self.write(step, values)
        shown = {name: f"{values[name]:.3g}" for name in ("loss", "grad_norm") if name in values}
        self.bar.set_postfix(shown | {"tokens_per_s": f"{values['tokens_per_second']:,.0f}"}, refresh=False)
        self.bar.update()


def truncate_after(file: Path, step: int) -> None:
    """Drops the lines of steps after `step`, and an incomplete last line.

    Raises:
        UserError: a line of the file is not a log entry.
    """
    if file.exists():
        atomic_write(file, b"".join(line + b"\n" for line, values in _read_lines(file) if values["step"] <= step))


def was_evaluated(file: Path, step: int) -> bool:
    """Returns whether the log has held-out metrics for a step."""
    lines = [values for _, values in _read_lines(file) if values["step"] == step] if file.exists() else []
    return any(name.startswith(HELD_OUT) for values in lines for name in values)


def _read_lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns each complete line with its parsed content."""
    *lines, _ = file.read_bytes().split(b"\n")  # not splitlines: an answer may contain other line separators
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            values["step"] + 0  # must be a number
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}, line {number} is {line[:60]!r}; expected JSON with a step number") from error
        parsed.append((line, values))
    return parsed
