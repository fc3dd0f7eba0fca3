"""Saves and loads Orbax checkpoints of a model (weights and configuration) or of a training run (the whole state).

A saved model is a self-contained folder:

    config.json, generation_config.json   as on the Hugging Face hub
    lora.json                             the options of `add_lora`, if the model has LoRA
    params/                               Orbax: one array per parameter, under the parameter's path

A training run is a folder of steps, 100/, 200/, ..., managed by Orbax's CheckpointManager, with the same JSON files next to
them. Orbax writes under a temporary name and renames at the end, so a folder named `params` or by a step is complete.
"""

import asyncio
import contextlib
import dataclasses
import math
import shutil
import warnings
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from liger_jax.config import Qwen2VLConfig
from liger_jax.errors import AlreadyExistsError, DamagedError, LigerWarning, NotFoundError, UserError
from liger_jax.files import CONFIG, GENERATION_CONFIG, check_new_folder, make_folder, read_json_object, write_json
from liger_jax.finite import check_finite, non_finite
from liger_jax.model import Qwen2VL
from liger_jax.model.lora import add_lora, lora_config
from liger_jax.model.params import param_paths, path_name
from liger_jax.model.sharding import param_shardings

if TYPE_CHECKING:  # Orbax takes half a second to import
    from orbax.checkpoint import CheckpointManager

    from liger_jax.train.step import TrainState

LORA = "lora.json"
HUB_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
# Bytes of arrays that are on the host at a time during a save. A larger array forms its own chunk.
CHUNK_BYTES = 256 * 2**20
DAMAGED = ".damaged"  # suffix of a step that a resumed run has moved aside
# Errors of reading an intact file.
NOT_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "Permission denied", "Too many open files")


# ---- models ----------------------------------------------------------------------------------------------------------


def save_model(model: Qwen2VL, path: str | Path, *, overwrite: bool = False, allow_non_finite: bool = False) -> None:
    """Writes the weights and configuration of a model to a folder.

    Args:
        model: the model, with or without LoRA.
        path: the folder.
        overwrite: replace the model in the folder. Its other files are kept.
        allow_non_finite: also save weights that hold NaN or infinity.

    Raises:
        UserError: a weight holds NaN or infinity. Nothing is written.
        AlreadyExistsError: the folder is not empty and `overwrite` is false, or it holds a training run, whose weights
            `load_model` would no longer find.

    Example:
        >>> import tempfile
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(Qwen2VL.init(Qwen2VLConfig.tiny()), folder)
        ...     load_model(folder).config == Qwen2VLConfig.tiny()
        True
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute()
    check_new_folder(folder, overwrite=overwrite)
    if steps := _complete_steps(folder):
        raise AlreadyExistsError(f"{folder} holds a training run, steps {steps}; expected another folder for a model")
    arrays = param_paths(model)
    if not allow_non_finite:
        _check_finite(folder, arrays)
    make_folder(folder)
    write_config(folder, model.config, str(next(iter(arrays.values())).dtype))
    _write_lora(folder, model)
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(folder / "params", ocp.args.PyTreeSave(_nest(arrays)), force=overwrite)
    for file in [file for pattern in HUB_WEIGHTS for file in folder.glob(pattern)]:
        file.unlink()  # transformers would load these weights of an earlier model instead


def load_model(path: str | Path, *, mesh: Mesh | None = None, dtype=None, allow_non_finite: bool = False) -> Qwen2VL:
    """Loads a model that `save_model` or `python -m convert` wrote, or the latest weights of a training run.

    Args:
        path: the folder.
        mesh: devices to place the weights on; None: the default device.
        dtype: dtype of the weights; None: as stored.
        allow_non_finite: also load weights that hold NaN or infinity, or numbers that become infinite in `dtype`.

    Raises:
        NotFoundError: the folder has no model.
        DamagedError: the latest checkpoint is damaged.
        UserError: the stored arrays do not fit config.json (the message lists all of them), or hold NaN, infinity or
            numbers too large for `dtype`.

    Example:
        >>> import tempfile
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(Qwen2VL.init(Qwen2VLConfig.tiny()), folder)
        ...     str(load_model(folder, dtype="float32").head.dtype)
        'float32'
    """
    folder = Path(path).absolute()
    items, prefix = _find_params(folder)
    if prefix and (incomplete := [step for step in saved_steps(folder) if step > int(items.parent.name)]):
        message = f"{folder}: steps {incomplete} are incomplete; loads step {items.parent.name}"
        warnings.warn(message, LigerWarning, stacklevel=2)
    config = Qwen2VLConfig.from_hf(folder)
    dtype = None if dtype is None else float_dtype(dtype)
    abstract = _with_stored_lora(Qwen2VL.abstract(config), folder)
    leaves = {prefix + name: leaf for name, leaf in param_paths(abstract).items()}
    stored = {name: leaf for name, leaf in _stored_arrays(items).items() if name.startswith(prefix)}
    _check_arrays(items, {n: leaf.shape for n, leaf in leaves.items()}, {n: leaf.shape for n, leaf in stored.items()})
    shardings = [None] * len(leaves) if mesh is None else jax.tree.leaves(param_shardings(abstract, mesh))
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or stored[name].dtype, sharding=sharding)
        for (name, leaf), sharding in zip(leaves.items(), shardings, strict=True)
    }
    arrays = _restore(items, targets, stored)
    for name in () if allow_non_finite else non_finite(dict(zip(targets, arrays, strict=True))):
        # in the stored dtype, an overflow still differs from infinity
        (values,) = _restore(items, {name: targets[name].update(dtype=stored[name].dtype)}, stored)
        check_finite(f"{items}: {name}", np.asarray(values), targets[name].dtype)
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def is_model(path: str | Path) -> bool:
    """Returns whether a folder holds a model that `load_model` can load."""
    try:
        return bool(_find_params(Path(path).absolute()))
    except NotFoundError:
        return False


def float_dtype(dtype: Any) -> np.dtype:
    """Returns `dtype` as a numpy dtype. Raises UserError unless it is floating point and enabled in JAX."""
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if (
        resolved is None
        or not jnp.issubdtype(resolved, jnp.floating)
        or jax.dtypes.canonicalize_dtype(resolved) != resolved
    ):
        raise UserError(
            f"dtype is {dtype!r}; expected 'bfloat16', 'float32' or 'float16' (float64 with jax_enable_x64)"
        )
    return resolved


def write_config(folder: Path, config: Qwen2VLConfig, dtype: str, *, preserve_existing: bool = False) -> None:
    """Writes config.json, and generation_config.json if the configuration has EOS or padding token ids.

    Args:
        folder: an existing folder.
        config: the model's configuration.
        dtype: name of the weights' dtype.
        preserve_existing: keep the other settings of an existing generation_config.json.
    """
    # transformers reads `dtype` since 4.56, `torch_dtype` before
    write_json(folder / CONFIG, config.to_hf() | {"dtype": dtype, "torch_dtype": dtype})
    ids = {"eos_token_id": list(config.eos_token_ids) or None, "pad_token_id": config.pad_token_id}
    generation = {name: value for name, value in ids.items() if value is not None}
    if preserve_existing and (folder / GENERATION_CONFIG).is_file():
        generation = read_json_object(folder / GENERATION_CONFIG) | generation
    if generation:
        write_json(folder / GENERATION_CONFIG, generation)


def _check_finite(target: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Raises UserError if an array to be saved holds NaN or infinity."""
    if names := non_finite(arrays):
        raise UserError(f"{target}: {names[0]} holds NaN or infinity; expected finite numbers. Nothing was saved")


def _write_lora(folder: Path, model: Qwen2VL) -> None:
    options = lora_config(model)
    if options is None:
        (folder / LORA).unlink(missing_ok=True)  # left by an earlier model
    else:
        write_json(folder / LORA, dataclasses.asdict(options))


def _with_stored_lora(abstract: Qwen2VL, folder: Path) -> Qwen2VL:
    """Returns an abstract model with LoRA, as described by the folder's lora.json, or unchanged if there is none."""
    file = folder / LORA
    if not file.is_file():
        return abstract
    options = read_json_object(file)
    try:
        return jax.eval_shape(lambda model: add_lora(model, **options), abstract)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{file} is invalid ({error}); expected the options of add_lora, as save_model writes them"
        ) from error


# ---- training runs ---------------------------------------------------------------------------------------------------


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
        item_handlers=_handler(in_chunks=not asynchronous),
    )


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
        step = int(state.step)
        directory = Path(manager.directory)
        if _is_complete(directory / str(step)):
            raise AlreadyExistsError(f"{directory} already holds step {step}; expected another folder or a later step")
        if (directory / str(step)).exists():  # an interrupted copy or deletion
            shutil.rmtree(directory / str(step))
            manager.reload()
        # a number of an optimizer may be infinite: that of optax.contrib.reduce_on_plateau is, at first
        _check_finite(directory / str(step), {name: x for name, x in param_paths(state).items() if x.ndim})
        manager.wait_until_finished()  # it deletes the oldest checkpoint at the end
        check_space(directory, state)
        write_config(directory, state.model.config, str(jax.tree.leaves(state.model)[0].dtype), preserve_existing=True)
        _write_lora(directory, state.model)
        manager.save(step, args=ocp.args.PyTreeSave(_nest(param_paths(state))), force=True)
    return step


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
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState, make_optimizer
        >>> state = TrainState.create(Qwen2VL.init(Qwen2VLConfig.tiny()), make_optimizer(1e-5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_state(folder, state)
        ...     int(restore_state(folder, state).step)
        0
    """
    directory = Path(target if isinstance(target, str | Path) else target.directory).absolute()
    if not isinstance(target, str | Path):
        target.wait_until_finished()
    items = _step_items(directory, step)
    targets = {
        name: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None))
        for name, leaf in param_paths(like).items()
    }
    stored = _stored_arrays(items)
    _check_arrays(
        items,
        {name: (leaf.shape, str(leaf.dtype)) for name, leaf in targets.items()},
        {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in stored.items()},
    )
    arrays = _restore(items, targets, stored)
    weights = {name: array for name, array in zip(targets, arrays, strict=True) if name.startswith("model/")}
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
    directory = Path(directory).absolute()
    problems: dict[int, str] = {}
    for step in reversed(saved_steps(directory)):
        if not _is_complete(directory / str(step)):
            problems[step] = f"{directory / str(step)} is incomplete"
            continue
        try:
            state = restore_state(directory, like, step=step)
        except DamagedError as error:
            problems[step] = str(error).partition("; expected")[0]
            continue
        for damaged in problems:
            _move_aside(directory / str(damaged))
        if problems:
            listed = "; ".join(problems.values())
            warnings.warn(f"{listed}: moved to *{DAMAGED}, and resumed from step {step}", LigerWarning, stacklevel=3)
        return state
    if not problems:
        raise NotFoundError(f"{directory} has no training state; expected a folder that save_state wrote")
    raise DamagedError(f"No checkpoint is intact: {'; '.join(problems.values())}; expected at least one intact step")


def _move_aside(step: Path) -> None:
    """Renames the folder of a damaged step, to a name that is not taken."""
    target, number = step.with_name(f"{step.name}{DAMAGED}"), 1
    while target.exists():
        number += 1
        target = step.with_name(f"{step.name}{DAMAGED}-{number}")
    step.rename(target)


def latest_step(directory: str | Path) -> int:
    """Returns the step of the last complete checkpoint of a training run. Raises NotFoundError if there is none."""
    return int(_step_items(Path(directory), None).parent.name)


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps of a training run whose folders exist, whether or not they are intact."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def check_space(directory: Path, state: "TrainState") -> None:
    """Raises UserError if the disk of a folder has too little free space for a checkpoint."""
    disk, size = shutil.disk_usage(directory), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    if disk.total > 0 and disk.free < size:
        raise UserError(
            f"{directory} has {disk.free / 2**20:,.0f} MiB of free space; expected at least {size / 2**20:,.0f} MiB for a "
            "checkpoint"
        )


def remove_unfinished(directory: Path) -> None:
    """Removes the checkpoints that were being written when a process was killed or its disk was full.

    No other process may write to the folder.
    """
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _as_manager(target: "CheckpointManager | str | Path") -> Iterator["CheckpointManager"]:
    if isinstance(target, str | Path):
        with checkpoint_manager(target) as manager:
            yield manager
    else:
        yield target


def _find_params(folder: Path) -> tuple[Path, str]:
    """Returns the Orbax folder of a model, or of a run's latest step, and the prefix of the weights' names in it."""
    if (folder / CONFIG).is_file():
        if (folder / "params" / "_METADATA").is_file():
            return folder / "params", ""
        with contextlib.suppress(NotFoundError):
            return _step_items(folder, None), "model/"
    raise NotFoundError(
        f"{folder} has no model; expected config.json with params/ (from save_model) or with steps (from save_state)"
    )


def _step_items(directory: Path, step: int | None) -> Path:
    """Returns the Orbax folder of a step, or of the latest."""
    steps = _complete_steps(directory)
    if not steps:
        raise NotFoundError(f"{directory} has no training state; expected a folder that save_state wrote")
    if step is not None and step not in steps:
        raise NotFoundError(f"{directory} has no step {step}; expected one of its steps {steps}")
    return directory / str(steps[-1] if step is None else step) / "default"


def _complete_steps(directory: Path) -> list[int]:
    return [step for step in saved_steps(directory) if _is_complete(directory / str(step))]


def _is_complete(step: Path) -> bool:
    """Returns whether the folder of a step is complete, and not an interrupted copy or deletion."""
    return (step / "default" / "_METADATA").is_file()


# ---- Orbax -----------------------------------------------------------------------------------------------------------


def _handler(*, in_chunks: bool = True, largest: int = 0):
    """Returns Orbax's handler for a nested dict of arrays. Compression is off, since weights hardly compress.

    Args:
        in_chunks: write a few arrays at a time. Must be false for asynchronous saves: training continues meanwhile, and
            overwrites arrays that have not been fetched yet.
        largest: size of the largest array to read, in bytes. Orbax refuses arrays above its limit, which follows from it.
    """
    import orbax.checkpoint as ocp

    class PatientHandler(ocp.type_handlers.ArrayHandler):
        """Finishes all reads before the error of one is raised, since TensorStore prints errors of abandoned reads."""

        async def metadata(self, infos):
            return await _read_all([super(PatientHandler, self).metadata([info]) for info in infos])

        async def deserialize(self, infos, args=None):
            one_by_one = zip(infos, args or [None] * len(infos), strict=True)
            return await _read_all([super(PatientHandler, self).deserialize([info], [arg]) for info, arg in one_by_one])

    class ChunkedHandler(PatientHandler):
        """Copies arrays to the host in chunks of CHUNK_BYTES, each one after the previous one is on the disk.

        Fetches copies that it makes on the device. JAX caches the host value of a fetched array as long as the array
        lives; that of a copy is freed with the copy.
        """

        async def serialize(self, values, infos, args=None):
            chunk, size = [], 0
            for item in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                if chunk and size + item[0].nbytes > CHUNK_BYTES:
                    await self.write(chunk)
                    chunk, size = [], 0
                chunk.append(item)
                size += item[0].nbytes
            await self.write(chunk)
            return []

        async def write(self, chunk):
            values, infos, args = zip(*chunk, strict=True)
            for future in await super().serialize([jnp.copy(value) for value in values], infos, args):
                future.result()

    arrays = ChunkedHandler() if in_chunks else ocp.type_handlers.ArrayHandler()
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        enable_pinned_host_transfer=False if in_chunks else None,  # memory pinned for transfers is never released
        restore_concurrent_gb=1 + math.ceil(largest / 1e9),
        use_compression=False,
    )


async def _read_all(reads: Sequence[Awaitable[Sequence[Any]]]) -> list[Any]:
    """Returns the results of reads of one array each, or raises the first error after all of them have ended."""
    results: list[Any] = await asyncio.gather(*reads, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [array for (array,) in results]


def _nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Turns {"a/b": x} into {"a": {"b": x}}, the structure that other programs expect in an Orbax checkpoint."""
    nested: dict[str, Any] = {}
    for path, array in arrays.items():
        *outer, name = path.split("/")
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[name] = array
    return nested


def _stored_arrays(items: Path) -> dict[str, Any]:
    """Returns {path: shape and dtype} of the arrays in an Orbax folder."""
    with _raise_damage(items):
        leaves, _ = jax.tree_util.tree_flatten_with_path(_handler().metadata(items).tree)
        return {path_name(path): leaf for path, leaf in leaves}


def _restore(items: Path, targets: Mapping[str, jax.ShapeDtypeStruct], stored: Mapping[str, Any]) -> list[jax.Array]:
    """Returns the arrays named in `targets`, in that order, each on the devices of its sharding (None: the default)."""
    import orbax.checkpoint as ocp

    default = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    placed = _nest({name: leaf.update(sharding=leaf.sharding or default) for name, leaf in targets.items()})
    restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
    largest = max(leaf.size * max(leaf.dtype.itemsize, stored[name].dtype.itemsize) for name, leaf in targets.items())
    with _raise_damage(items):
        args = ocp.args.PyTreeRestore(placed, restore_args=restore_args, partial_restore=True)
        restored = _handler(largest=largest).restore(items, args=args)
    arrays = param_paths(restored)
    return [arrays[name] for name in targets]


@contextlib.contextmanager
def _raise_damage(items: Path) -> Iterator[None]:
    """Turns an error about the content of a checkpoint into a DamagedError."""
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):  # the files may be intact
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for a file that is missing or truncated
        if any(text in str(error) for text in NOT_DAMAGE):
            raise
        step, hint = items.parent, ""
        if step.name.isdigit():
            earlier = [number for number in _complete_steps(step.parent) if number < int(step.name)]
            hint = f" (without {step}, the run resumes from step {earlier[-1]})" if earlier else ""
        reason = str(error).splitlines()[0].partition(" See full TensorStore")[0][:200] or type(error).__name__
        raise DamagedError(f"{items} is damaged ({reason}); expected an intact Orbax checkpoint{hint}") from error


def _check_arrays(items: Path, expected: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises a UserError that lists all missing, unexpected and differing arrays, unless there are none."""
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "different": [
            f"{name} is {stored[name]}, expected {value}"
            for name, value in expected.items()
            if stored.get(name, value) != value
        ],
    }
    report = "".join(f"\n  {problem}: {'; '.join(names)}" for problem, names in problems.items() if names)
    if report:
        raise UserError(f"{items} does not hold the expected arrays:{report}")
