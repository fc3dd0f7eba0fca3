"""The folder of a training run: which steps it holds, which are complete, and whether there is space for another."""

import shutil
from pathlib import Path
from typing import Any

import jax

from liger_jax.errors import NotFoundError, UserError

DAMAGED = ".damaged"  # suffix of a step that a resumed run has moved aside


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps of a training run whose folders exist, whether or not they are intact."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def complete_steps(directory: Path) -> list[int]:
    """Returns the steps that were written completely, in order."""
    return [step for step in saved_steps(directory) if is_complete(directory / str(step))]


def is_complete(step: Path) -> bool:
    """Returns whether the folder of a step is complete, and not an interrupted copy or deletion."""
    return (step / "default" / "_METADATA").is_file()


def find_items(directory: Path, step: int | None) -> Path:
    """Returns the Orbax folder of a step, by default of the latest. Raises NotFoundError if it does not exist."""
    steps = complete_steps(directory)
    if not steps:
        raise NotFoundError(f"{directory} has no training state; expected a folder that save_state wrote")
    if step is not None and step not in steps:
        raise NotFoundError(f"{directory} has no step {step}; expected one of its steps {steps}")
    return directory / str(steps[-1] if step is None else step) / "default"


def move_aside(step: Path) -> None:
    """Renames the folder of a damaged step, to a name that is not taken."""
    target, number = step.with_name(f"{step.name}{DAMAGED}"), 1
    while target.exists():
        number += 1
        target = step.with_name(f"{step.name}{DAMAGED}-{number}")
    step.rename(target)


def remove_unfinished(directory: Path) -> None:
    """Removes the checkpoints that were being written when a process was killed or its disk was full.

    No other process may write to the folder.
    """
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def check_space(directory: Path, state: Any) -> None:
    """Raises UserError if the disk of a folder has too little free space for a checkpoint of a state."""
    disk = shutil.disk_usage(directory)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    if disk.total > 0 and disk.free < size:  # some network disks report a size of 0
        raise UserError(
            f"{directory} has {disk.free / 2**20:,.0f} MiB of free space; expected at least {size / 2**20:,.0f} MiB for a "
            "checkpoint"
        )
