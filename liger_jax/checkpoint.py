"""Orbax checkpoints: a model's weights with their configuration, and the whole state of a training run.

A saved model is a folder that says itself what it is:

    config.json, generation_config.json   as Hugging Face has them
    lora.json                             what `add_lora` was told, if the model has LoRA
    params/                               Orbax: one array for each parameter, under the parameter's path

A training run is a folder of steps, 100/, 200/, ..., which Orbax's CheckpointManager keeps, with the same JSON files
beside them. Orbax writes under a temporary name and renames at the end: what has a step's or `params`' name is whole.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from liger_jax.config import Qwen2VLConfig
from liger_jax.files import atomic_write
from liger_jax.model import Qwen2VL
from liger_jax.model.lora import add_lora, lora_config
from liger_jax.model.params import param_paths, path_name
from liger_jax.model.sharding import param_shardings

if TYPE_CHECKING:  # Orbax takes half a second to import
    from orbax.checkpoint import CheckpointManager

    from liger_jax.train.step import TrainState

LORA = "lora.json"
GENERATION = "generation_config.json"
HUB_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PIECE_BYTES = 256 * 2**20  # of arrays that are on the host at a time while they are saved; a larger array on its own


def save_model(model: Qwen2VL, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes the weights and the configuration of `model` to the folder `path`.

    Raises:
        FileExistsError: there are files at `path` and `overwrite` is false, or there is a training run, whose weights these
            would hide.

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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise FileExistsError(
            f"{folder} exists and is not an empty folder; overwrite=True (--overwrite) replaces what is there"
        )
    if steps := _steps(folder):
        raise FileExistsError(
            f"{folder} holds a training run, steps {steps}; expected another folder to save a model in"
        )
    folder.mkdir(parents=True, exist_ok=True)
    arrays = param_paths(model)
    write_config(folder, model.config, str(next(iter(arrays.values())).dtype))
    _write_lora(folder, model)
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(folder / "params", ocp.args.PyTreeSave(_nest(arrays)), force=overwrite)
    for old in [file for pattern in HUB_WEIGHTS for file in folder.glob(pattern)]:
        old.unlink()  # of another model: transformers would take it for this one


def load_model(path: str | Path, *, mesh: Mesh | None = None, dtype=None) -> Qwen2VL:
    """Reads a model that `save_model` or `python -m convert` wrote, or the latest weights of a training run.

    Args:
        path: the folder.
        mesh: where the weights go; None: the default device.
        dtype: of the weights; None: as they are stored.

    Raises:
        FileNotFoundError: no model at `path`.
        ValueError: what is stored does not fit config.json (all names are in the message), or is damaged.

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
    config = Qwen2VLConfig.from_hf(folder)
    dtype = None if dtype is None else float_dtype(dtype)
    abstract = _with_stored_lora(Qwen2VL.abstract(config), folder)
    names = {prefix + name: leaf for name, leaf in param_paths(abstract).items()}
    stored = {name: leaf for name, leaf in _describe(items).items() if name.startswith(prefix)}
    _compare(items, {n: leaf.shape for n, leaf in names.items()}, {n: leaf.shape for n, leaf in stored.items()})
    shardings = [None] * len(names) if mesh is None else jax.tree.leaves(param_shardings(abstract, mesh))
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or stored[name].dtype, sharding=sharding)
        for (name, leaf), sharding in zip(names.items(), shardings, strict=True)
    }
    return jax.tree.unflatten(jax.tree.structure(abstract), _restore(items, wanted, stored))


def is_model(path: str | Path) -> bool:
    """Whether `load_model` would find a model in this folder."""
    try:
        return bool(_find_params(Path(path).absolute()))
    except FileNotFoundError:
        return False


def float_dtype(dtype: Any) -> np.dtype:
    """The dtype; a ValueError for one that weights cannot have."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating) or jax.dtypes.canonicalize_dtype(found) != found:
        raise ValueError(
            f"dtype is {dtype!r}; expected 'bfloat16', 'float32' or 'float16' (float64 with jax_enable_x64)"
        )
    return found


def write_config(folder: Path, config: Qwen2VLConfig, dtype: str, *, keep: bool = False) -> None:
    """Writes config.json, and generation_config.json if the config knows the ids that belong there.

    `keep` what else a generation_config.json in the folder says.
    """
    # transformers reads `dtype` since 4.56, `torch_dtype` before
    hub = config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}
    atomic_write(folder / "config.json", json.dumps(hub, indent=2) + "\n")
    ids = {"eos_token_id": list(config.eos_token_ids) or None, "pad_token_id": config.pad_token_id}
    generation = {name: value for name, value in ids.items() if value is not None}
    if keep and (folder / GENERATION).is_file():
        generation = json.loads((folder / GENERATION).read_text()) | generation
    if generation:
        atomic_write(folder / GENERATION, json.dumps(generation, indent=2) + "\n")


def _write_lora(folder: Path, model: Qwen2VL) -> None:
    told = lora_config(model)
    if told is None:
        (folder / LORA).unlink(missing_ok=True)  # of a model that was here before
    else:
        atomic_write(folder / LORA, json.dumps(told, indent=2) + "\n")


def _with_stored_lora(abstract: Qwen2VL, folder: Path) -> Qwen2VL:
    file = folder / LORA
    if not file.is_file():
        return abstract
    try:
        told = json.loads(file.read_text())
        return jax.eval_shape(lambda model: add_lora(model, **told), abstract)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not what save_model writes: {error}") from None


# ---- the state of a training run -------------------------------------------------------------------------------------


def checkpoint_manager(
    directory: str | Path, *, keep: int | None = 3, asynchronous: bool = False
) -> "CheckpointManager":
    """Opens (or starts) the folder of a training run, for `save_state` and `restore_state`. A context manager.

    Args:
        directory: the folder.
        keep: how many of the latest steps stay; None: all.
        asynchronous: `save_state` returns when the state has been copied to the host; writing goes on while training
            does. Costs host memory for the whole state. Leaving the `with` block waits.
    """
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        Path(directory).absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=asynchronous),
        item_handlers=_handler(piecewise=not asynchronous),
    )


def save_state(target: "CheckpointManager | str | Path", state: "TrainState") -> int:
    """Saves all of a training state (step, weights, optimizer) under its step. -> the step.

    Args:
        target: what `checkpoint_manager` returned, or a folder, of which the latest 3 steps are kept.
        state: a `TrainState`, or any pytree of arrays with the attributes `step` and `model`.

    Raises:
        ValueError: the step is there already.
    """
    import orbax.checkpoint as ocp

    with _opened(target) as manager:
        step = int(state.step)
        folder = Path(manager.directory) / str(step)
        if _is_whole(folder):
            raise ValueError(f"{manager.directory} holds step {step} already")
        if folder.exists():  # a copy or a deletion that was interrupted
            shutil.rmtree(folder)
            manager.reload()
        dtype = str(jax.tree.leaves(state.model)[0].dtype)
        write_config(Path(manager.directory), state.model.config, dtype, keep=True)
        _write_lora(Path(manager.directory), state.model)
        manager.save(step, args=ocp.args.PyTreeSave(_nest(param_paths(state))), force=True)
    return step


def restore_state(
    target: "CheckpointManager | str | Path", like: "TrainState", *, step: int | None = None
) -> "TrainState":
    """Reads a training state that `save_state` wrote, to the last bit.

    Args:
        target: what `checkpoint_manager` returned, or the folder.
        like: a state of the same structure, as made for a fresh run: gives names, shapes, dtypes, and the devices the
            arrays go to. Also an abstract one (`jax.eval_shape`), which needs no memory.
        step: which one; None: the latest.

    Raises:
        FileNotFoundError: no such step, or none at all.
        ValueError: the stored state has other arrays than `like` (another optimizer, another model; all are named), or
            is damaged.

    Example:
        >>> import optax, tempfile
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState
        >>> state = TrainState.create(Qwen2VL.init(Qwen2VLConfig.tiny()), optax.adam(1e-3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_state(folder, state)
        ...     int(restore_state(folder, state).step)
        0
    """
    directory = Path(target if isinstance(target, str | Path) else target.directory).absolute()
    if not isinstance(target, str | Path):
        target.wait_until_finished()
    items = _step_items(directory, step)
    wanted = {
        name: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None))
        for name, leaf in param_paths(like).items()
    }
    stored = _describe(items)
    _compare(
        items,
        {name: (leaf.shape, str(leaf.dtype)) for name, leaf in wanted.items()},
        {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in stored.items()},
    )
    return jax.tree.unflatten(jax.tree.structure(like), _restore(items, wanted, stored))


@contextlib.contextmanager
def _opened(target: "CheckpointManager | str | Path") -> Iterator["CheckpointManager"]:
    if isinstance(target, str | Path):
        with checkpoint_manager(target) as manager:
            yield manager
    else:
        yield target


# ---- Orbax -----------------------------------------------------------------------------------------------------------


def _handler(*, piecewise: bool = True, largest: int = 0):
    """Reads and writes a nested dict of arrays. Weights hardly compress, so that is off.

    `piecewise` writes a few arrays after the other. It must be off for asynchronous saves: training goes on, and overwrites
    what has not been fetched yet. For reading, Orbax has to know the bytes of the `largest` array: it refuses what is over
    its bound.
    """
    import orbax.checkpoint as ocp

    class Piecewise(ocp.type_handlers.ArrayHandler):
        """Takes PIECE_BYTES of arrays to the host when those before are on the disk.

        It writes copies made on the device: what JAX keeps on the host of an array that was fetched goes with the copy.
        """

        async def serialize(self, values, infos, args=None):
            piece, size = [], 0
            for item in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                if piece and size + item[0].nbytes > PIECE_BYTES:
                    await self.write(piece)
                    piece, size = [], 0
                piece.append(item)
                size += item[0].nbytes
            await self.write(piece)
            return []

        async def write(self, piece):
            values, infos, args = zip(*piece, strict=True)
            for written in await super().serialize([jnp.copy(value) for value in values], infos, args):
                written.result()

    arrays = Piecewise() if piecewise else ocp.type_handlers.ArrayHandler()
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        enable_pinned_host_transfer=False if piecewise else None,  # memory pinned for transfers is never given back
        restore_concurrent_gb=1 + math.ceil(largest / 1e9),
        use_compression=False,
    )


def _nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}, which is how other programs expect to find an Orbax checkpoint."""
    nested: dict[str, Any] = {}
    for path, array in arrays.items():
        *outer, name = path.split("/")
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[name] = array
    return nested


def _find_params(folder: Path) -> tuple[Path, str]:
    """Where Orbax keeps the weights of a model or of a run's latest step, and what its names for them begin with."""
    if (folder / "config.json").is_file():
        if (folder / "params" / "_METADATA").is_file():
            return folder / "params", ""
        with contextlib.suppress(FileNotFoundError):
            return _step_items(folder, None), "model/"
    raise FileNotFoundError(
        f"No model at {folder}: expected config.json and params/ (save_model), or steps (save_state)"
    )


def latest_step(directory: str | Path) -> int:
    """The step of the last whole checkpoint of a training run.

    Raises:
        FileNotFoundError: there is none.
    """
    return int(_step_items(Path(directory), None).parent.name)


def _step_items(directory: Path, step: int | None) -> Path:
    steps = _steps(directory)
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(
            f"No {'training state' if step is None else f'step {step}'} in {directory}: found steps {steps}"
        )
    return directory / str(steps[-1] if step is None else step) / "default"


def _steps(directory: Path) -> list[int]:
    """The whole checkpoints of a run, in order."""
    return sorted(int(found.name) for found in directory.glob("*") if found.name.isdigit() and _is_whole(found))


def _is_whole(step: Path) -> bool:
    """Whether the folder of a step is no copy or deletion that was interrupted."""
    return (step / "default" / "_METADATA").is_file()


def _describe(items: Path) -> dict[str, Any]:
    """{path: shape and dtype} of what is stored."""
    with _damage_named(items):
        leaves, _ = jax.tree_util.tree_flatten_with_path(_handler().metadata(items).tree)
        return {path_name(path): leaf for path, leaf in leaves}


def _restore(items: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], stored: Mapping[str, Any]) -> list[jax.Array]:
    """The arrays called so, in that order, each where its sharding says (None: the default device)."""
    import orbax.checkpoint as ocp

    default = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    placed = _nest({name: leaf.update(sharding=leaf.sharding or default) for name, leaf in wanted.items()})
    how = ocp.checkpoint_utils.construct_restore_args(placed)
    largest = max(leaf.size * max(leaf.dtype.itemsize, stored[name].dtype.itemsize) for name, leaf in wanted.items())
    with _damage_named(items):
        args = ocp.args.PyTreeRestore(placed, restore_args=how, partial_restore=True)
        restored = _handler(largest=largest).restore(items, args=args)
    arrays = param_paths(restored)
    return [arrays[name] for name in wanted]


@contextlib.contextmanager
def _damage_named(items: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds for a file that is missing or cut short
        step = items.parent
        hint = f". Without {step} a run goes on from the step before" if step.name.isdigit() else ""
        raise ValueError(f"{items} is damaged, or no Orbax checkpoint: {str(error).splitlines()[0]}{hint}") from error


def _compare(items: Path, expected: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "different": [
            f"{name} is {stored[name]}, expected {value}"
            for name, value in expected.items()
            if stored.get(name, value) != value
        ],
    }
    told = "".join(f"\n  {what}: {'; '.join(names)}" for what, names in problems.items() if names)
    if told:
        raise ValueError(f"The arrays in {items} are not the expected ones:{told}")
