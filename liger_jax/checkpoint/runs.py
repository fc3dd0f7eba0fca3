"""Saves and restores the states of a training run."""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from liger_jax import processes
from liger_jax.checkpoint.arrays import check_arrays, check_finite_arrays, make_handler, nest, read_arrays, read_shapes
from liger_jax.checkpoint.models import write_config, write_lora
from liger_jax.checkpoint.steps import DAMAGED, check_space, find_items, is_complete, move_aside, saved_steps
from liger_jax.errors import AlreadyExistsError, DamagedError, LigerWarning, NotFoundError
from liger_jax.finite import non_finite
from liger_jax.model.params import param_paths

if TYPE_CHECKING:  # Orbax takes half a second to import
    from orbax.checkpoint import CheckpointManager

    from liger_jax.train.step import TrainState


def checkpoint_manager(
    directory: str | Path, *, max_to_keep: int | None = 3, asynchronous: bool = False
) -> "CheckpointManager":
    """Opens (or creates) the folder of a training run for `save_state` and `restore_state`.

    Args:
        directory: the folder.
        max_to_keep: number of latest steps to keep; None: all.
        asynchronous: `save_state` returns once the state has been copied to the host, and writing continues during
            training. This takes host memory for the whole state. Leaving the `with` block waits for pending writes.

    Returns:
        Orbax's CheckpointManager, to be used in a `with` statement.
    """
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        Path(directory).absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=asynchronous),
        item_handlers=make_handler(in_chunks=not asynchronous),
    )


@contextlib.contextmanager
def _as_manager(target: "CheckpointManager | str | Path") -> Iterator["CheckpointManager"]:
    if isinstance(target, str | Path):
        with checkpoint_manager(target) as manager:
            yield manager
    else:
        yield target


def save_state(target: "CheckpointManager | str | Path", state: "TrainState") -> int:
    """Saves a training state (step, weights, optimizer) under its step.

    Args:
        target: a manager from `checkpoint_manager`, or a folder, which keeps its latest 3 steps.
        state: a `TrainState`, or any pytree of arrays with the attributes `step` and `model`.

    Returns:
        The step.

    Raises:
        AlreadyExistsError: the step is already saved.
        UserError: a weight or an array of the optimizer's state holds NaN or infinity, or the disk has too little free
            space. Nothing is written.
    """
    import orbax.checkpoint as ocp

    with _as_manager(target) as manager:
        step, together = int(state.step), processes.spans(state)
        directory = Path(manager.directory)
        if processes.from_first(lambda: _remove_interrupted(directory / str(step)), together=together):
            manager.reload()
        with processes.agree(together=together):
            # a number of an optimizer may be infinite: that of optax.contrib.reduce_on_plateau is, at first
            check_finite_arrays(directory / str(step), {name: x for name, x in param_paths(state).items() if x.ndim})
        manager.wait_until_finished()  # it deletes the oldest checkpoint at the end
        processes.from_first(lambda: _write_model_files(directory, state), together=together)
        manager.save(step, args=ocp.args.PyTreeSave(nest(param_paths(state))), force=True)
    return step


def _remove_interrupted(step: Path) -> bool:
    """Removes what an interrupted copy or deletion left of a step. Returns whether there was anything.

    Raises:
        AlreadyExistsError: the step is complete.
    """
    if is_complete(step):
        raise AlreadyExistsError(
            f"{step.parent} already holds step {step.name}; expected another folder or a later step"
        )
    if not step.exists():
        return False
    shutil.rmtree(step)
    return True


def _write_model_files(directory: Path, state: "TrainState") -> None:
    """Writes the files that describe the model, if there is space for its arrays as well."""
    check_space(directory, state)
    write_config(directory, state.model.config, str(jax.tree.leaves(state.model)[0].dtype), preserve_existing=True)
    write_lora(directory, state.model)


def restore_state(
    target: "CheckpointManager | str | Path",
    like: "TrainState",
    *,
    step: int | None = None,
    allow_non_finite: bool = False,
) -> "TrainState":
    """Loads a training state that `save_state` wrote, bit for bit.

    Args:
        target: a manager from `checkpoint_manager`, or the folder.
        like: a state of the same structure, as created for a new run. It determines names, shapes, dtypes, and the
            devices to place the arrays on. It may be abstract (`jax.eval_shape`), which needs no memory.
        step: the step to load; None: the latest.
        allow_non_finite: also load weights that hold NaN or infinity.

    Raises:
        NotFoundError: the folder does not have the step, or has no steps at all.
        DamagedError: the checkpoint is damaged, or its weights hold NaN or infinity.
        UserError: the arrays differ from those of `like` (another optimizer or model; the message lists all of them).

    Example:
        >>> import tempfile
        >>> from liger_jax import QwenVL, QwenVLConfig, TrainState, make_optimizer
        >>> state = TrainState.create(QwenVL.init(QwenVLConfig.tiny()), make_optimizer(1e-5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_state(folder, state)
        ...     int(restore_state(folder, state).step)
        0
    """
    directory = Path(target if isinstance(target, str | Path) else target.directory).absolute()
    if not isinstance(target, str | Path):
        target.wait_until_finished()
    items = find_items(directory, step)
    targets = {
        name: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None))
        for name, leaf in param_paths(like).items()
    }
    together = processes.spans(targets)
    with processes.agree(together=together):
        stored = read_shapes(items)
        check_arrays(
            items,
            {name: (leaf.shape, str(leaf.dtype)) for name, leaf in targets.items()},
            {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in stored.items()},
        )
        arrays = read_arrays(items, targets, stored)
    weights = {name: array for name, array in zip(targets, arrays, strict=True) if name.startswith("model/")}
    with processes.agree(together=together):
        if not allow_non_finite and (names := non_finite(weights)):
            raise DamagedError(
                f"{items}: {names[0]} holds NaN or infinity; expected finite weights, or allow_non_finite=True"
            )
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def restore_intact_state(directory: str | Path, like: "TrainState") -> "TrainState":
    """Loads the latest training state that is intact, and moves damaged ones aside.

    A damaged or incomplete step is renamed to `<step>.damaged`, so that it does not count as one of the latest steps to
    keep, and its step can be saved again. A warning names it.

    Args:
        directory: the folder, to which no other process may write.
        like: as for `restore_state`.

    Raises:
        DamagedError: no step is intact. The message lists all of them, and nothing is moved.
        NotFoundError: the folder has no steps.
        UserError: as for `restore_state`.
    """
    directory, together = Path(directory).absolute(), processes.spans(like)
    problems: dict[int, str] = {}
    # process 0 lists the steps: on a network disk, another process may still see an older state of the folder
    steps = processes.from_first(lambda: _list_steps(directory), together=together)
    for step, complete in reversed(steps):
        if not complete:
            problems[step] = f"{directory / str(step)} is incomplete"
            continue
        try:
            state = restore_state(directory, like, step=step)
        except DamagedError as error:
            problems[step] = str(error).partition("; expected")[0]
            continue
        if problems and (processes.is_first() or not together):
            for damaged in problems:
                move_aside(directory / str(damaged))
            listed = "; ".join(problems.values())
            warnings.warn(f"{listed}: moved to *{DAMAGED}, and resumed from step {step}", LigerWarning, stacklevel=3)
        return state
    if not problems:
        raise NotFoundError(f"{directory} has no training state; expected a folder that save_state wrote")
    raise DamagedError(f"No checkpoint is intact: {'; '.join(problems.values())}; expected at least one intact step")


def _list_steps(directory: Path) -> list[tuple[int, bool]]:
    """Returns the steps in a folder, in order, each with whether it is complete."""
    return [(step, is_complete(directory / str(step))) for step in saved_steps(directory)]
