"""What two processes do together in the tests of `liger_jax.processes`, which start this program once per process.

Each process has two simulated devices, runs the scenarios one after the other, and writes what it saw to PROCESS.json.
"""

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import liger_jax.train.finetune as finetune_module
import liger_jax.train.step as step_module
from convert import from_hf
from liger_jax import QwenVL, cli, make_train_step, processes, save_model
from liger_jax.checkpoint import load_model
from liger_jax.data.dataset import make_dataset
from liger_jax.data.share import RowShare
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.errors import UserError
from liger_jax.files import lock_folder
from liger_jax.model.sharding import make_mesh, param_shardings
from liger_jax.options import Batching, Evaluation, LayerExecution, Saving
from liger_jax.train.finetune import finetune
from liger_jax.train.metrics import RunLog
from liger_jax.train.optimizer import make_optimizer
from liger_jax.train.step import TrainStep

# Neither the devices nor the epoch divide into batches of 3.
BATCH_SIZE, CONVERSATIONS, STEPS = 3, 8, 6
OPTIMIZER = make_optimizer(1e-3)
SHAPE = {"length": 64, "patches": 64}  # all runs with this optimizer and mesh share a program


def make_data() -> list:
    return list(itertools.islice(conversations(load_digits()[0], np.random.default_rng(0)), CONVERSATIONS))


@functools.cache
def shared_processor():
    return make_processor(load_digits()[0])


def dataset_of(data: list, rows: tuple[int, ...] | None = None):
    config = make_config(shared_processor())
    return make_dataset(shared_processor(), config, data, Batching(batch_size=BATCH_SIZE), rows=rows)


@functools.cache
def initial_weights() -> QwenVL:
    return jax.tree.map(np.asarray, QwenVL.init(make_config(shared_processor()), dtype="float32"))


def initial_model(mesh=None) -> QwenVL:
    """Returns the same weights on one device or on a mesh, without another compilation."""
    if mesh is None:
        return jax.tree.map(jax.numpy.array, initial_weights())
    return jax.tree.map(processes.put, initial_weights(), param_shardings(initial_weights(), mesh))


def train(folder: Path, steps: int, *, data: list | None = None, mesh=None) -> int:
    """Trains the demo's model in a folder. Returns the number of steps."""
    state = finetune(
        initial_model(mesh),
        shared_processor(),
        make_data() if data is None else data,
        folder,
        steps=steps,
        optimizer=OPTIMIZER,
        batching=Batching(batch_size=BATCH_SIZE, workers=0, **SHAPE),
        execution=LayerExecution(remat="none"),
        saving=Saving(save_every=2),
        held_out=make_data()[:2],
        evaluation=Evaluation(eval_generate=1, max_new_tokens=4),
        progress=False,
    )
    return int(state.step)


# ---- scenarios: each receives the folder of the test and the mesh of all devices ----------------------------------------


def batches(folder: Path, mesh) -> dict:
    """The rows that a process reads, and the batches that the rows of both form."""
    share = RowShare.create(mesh, BATCH_SIZE)
    dataset = dataset_of(make_data(), share.rows)
    whole = [jax.tree.map(processes.to_host, share.place(dataset(step))) for step in range(3)]
    return {
        "rows": share.rows,
        "copies": [share.copies, RowShare.create(make_mesh(tensor=4), BATCH_SIZE).copies],
        "segments": [[batch.max_segments, batch.vision.max_segments] for batch in whole],
        "arrays": [[leaf.tolist() for leaf in jax.tree.leaves(batch)] for batch in whole],
    }


def models(folder: Path, mesh) -> list[float]:
    """A model that is split over both processes: largest differences after saving and loading, and to the hub's format."""
    model = initial_model(mesh)
    save_model(model, folder / "saved")
    loaded = [load_model(folder / "saved", mesh=mesh), from_hf(folder / "hub", dtype="float32", mesh=mesh)]
    weights, *others = ([processes.to_host(leaf) for leaf in jax.tree.leaves(tree)] for tree in (model, *loaded))
    return [max(float(np.abs(a - b).max()) for a, b in zip(weights, other, strict=True)) for other in others]


def locked(folder: Path, mesh) -> int:
    """Another run has locked the folder, which only process 0 can know."""
    with lock_folder(folder / "locked") if processes.is_first() else contextlib.nullcontext():
        processes.exchange()
        try:
            return train(folder / "locked", 1, mesh=mesh)
        finally:
            processes.exchange()


def other_data(folder: Path, mesh) -> int:
    return train(folder / "other", 1, mesh=mesh, data=make_data()[: 5 + processes.index()])


def damaged_image(folder: Path, mesh) -> int:
    """Process 1 alone reads the last row of the second batch, whose image file ends too early."""
    data, file = make_data(), folder / "damaged.png"
    ((index,),) = dataset_of(data).schedule.batch(1)[2:]
    image = next(part["image"] for message in data[index] for part in message["content"] if "image" in part)
    stream = io.BytesIO()
    image.save(stream, "png")
    processes.from_first(lambda: file.write_bytes(stream.getvalue()[:-40]))
    data[index] = [
        message | {"content": [part | {"image": str(file)} if "image" in part else part for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in data[index]
    ]
    return train(folder / "damaged_image", 2, mesh=mesh, data=data)


def full_disk(folder: Path, mesh) -> int:
    """Process 0 cannot write the first line of the log."""
    write_step = RunLog.write_step

    def write_or_fail(log: RunLog, step: int, values: dict) -> None:
        if processes.is_first() and step == 1 and not log.history:
            log.history.append({"step": 1, "num_tokens": 1})
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "full_disk" / "metrics.jsonl"))
        write_step(log, step, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write_step", write_or_fail)
        return train(folder / "full_disk", 4, mesh=mesh)


def resumed(folder: Path, mesh) -> int:
    """Resumes a run that one process began."""
    while not (folder / "resumed").exists():
        time.sleep(0.1)
    return train(folder / "resumed", 4, mesh=mesh)


def damaged_checkpoint(folder: Path, mesh) -> int:
    """Files of the newest checkpoint are empty."""

    def damage() -> None:
        shutil.copytree(folder / "resumed", folder / "damaged_checkpoint")
        for file in (folder / "damaged_checkpoint" / "4" / "default").glob("**/d/*"):
            file.write_bytes(b"")

    processes.from_first(damage)
    return train(folder / "damaged_checkpoint", 4, mesh=mesh)


def refused_command(folder: Path, mesh) -> list:
    return command(folder, "refused", "--fsdp", "2")


def terminated_command(folder: Path, mesh) -> list:
    """SIGTERM to process 1 alone, during its first step."""

    class Terminated(TrainStep):
        def __call__(self, state, batch):
            if processes.index() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(state, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "TrainStep", Terminated)
        patch.setattr(finetune_module, "make_train_step", make_train_step)  # not the cached one
        return command(folder, "terminated", "--data", "2", "--fsdp", "2", "--lora", "2", "--remat", "none")


def command(folder: Path, output: str, *flags: str) -> list:
    """Runs `liger-jax finetune`. Returns its exit status, or the message that sys.exit prints; stderr; and stdout."""
    arguments = ["finetune", folder / "hub", folder / "data.json", "--output", folder / output, "--steps", "3"]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()) as stdout:
        try:
            cli.main([*map(str, arguments), "--batch-size", "3", "--workers", "0", *flags])
            status = 0
        except SystemExit as end:
            status = end.code
    return [status, stderr.getvalue(), stdout.getvalue()]


SCENARIOS: tuple[Callable, ...] = (
    *(batches, models, locked, other_data, damaged_image, full_disk, refused_command, terminated_command),
    *(resumed, damaged_checkpoint),
)


def main(port: str, process: str, folder: str) -> None:
    finetune_module.make_train_step = functools.cache(make_train_step)
    seen = {}
    with processes.connected(f"localhost:{port}", 2, int(process)):
        mesh = make_mesh(data=2, fsdp=2)
        for scenario in SCENARIOS:
            start = time.perf_counter()
            try:
                seen[scenario.__name__] = scenario(Path(folder), mesh)
            except UserError as error:
                assert processes.is_agreed(error)
                seen[scenario.__name__] = f"{type(error).__name__}: {error}"
            print(f"{scenario.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
    Path(folder, f"{process}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_default_matmul_precision", "highest")
    main(*sys.argv[1:])
