"""Saves and loads a model: weights, configuration, and LoRA's options."""

import contextlib
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from liger_jax import processes
from liger_jax.checkpoint.arrays import check_arrays, check_finite_arrays, make_handler, nest, read_arrays, read_shapes
from liger_jax.checkpoint.steps import complete_steps, find_items, saved_steps
from liger_jax.config import QwenVLConfig
from liger_jax.errors import AlreadyExistsError, LigerWarning, NotFoundError, UserError
from liger_jax.files import CONFIG, GENERATION_CONFIG, check_new_folder, make_folder, read_json_object, write_json
from liger_jax.finite import check_finite, non_finite
from liger_jax.model import QwenVL
from liger_jax.model.lora import add_lora, lora_config
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import param_shardings

LORA = "lora.json"
HUB_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def save_model(model: QwenVL, path: str | Path, *, overwrite: bool = False, allow_non_finite: bool = False) -> None:
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
        >>> from liger_jax import QwenVL, QwenVLConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(QwenVL.init(QwenVLConfig.tiny()), folder)
        ...     load_model(folder).config == QwenVLConfig.tiny()
        True
    """
    import orbax.checkpoint as ocp

    folder, arrays, together = Path(path).absolute(), param_paths(model), processes.spans(model)
    processes.from_first(lambda: _check_target(folder, overwrite=overwrite), together=together)
    with processes.agree(together=together):
        if not allow_non_finite:
            check_finite_arrays(folder, arrays)

    def write_files():
        make_folder(folder)
        write_config(folder, model.config, str(next(iter(arrays.values())).dtype))
        write_lora(folder, model)

    def remove_hub_weights():
        for file in [file for pattern in HUB_WEIGHTS for file in folder.glob(pattern)]:
            file.unlink()  # transformers would load these weights of an earlier model instead

    processes.from_first(write_files, together=together)
    with ocp.Checkpointer(make_handler()) as checkpointer:
        checkpointer.save(folder / "params", ocp.args.PyTreeSave(nest(arrays)), force=overwrite)
    processes.from_first(remove_hub_weights, together=together)


def _check_target(folder: Path, *, overwrite: bool) -> None:
    """Raises AlreadyExistsError for a folder that a model may not be written to."""
    check_new_folder(folder, overwrite=overwrite)
    if steps := complete_steps(folder):
        raise AlreadyExistsError(f"{folder} holds a training run, steps {steps}; expected another folder for a model")


def load_model(path: str | Path, *, mesh: Mesh | None = None, dtype=None, allow_non_finite: bool = False) -> QwenVL:
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
        >>> from liger_jax import QwenVL, QwenVLConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(QwenVL.init(QwenVLConfig.tiny()), folder)
        ...     str(load_model(folder, dtype="float32").head.dtype)
        'float32'
    """
    folder = Path(path).absolute()
    items, prefix = _find_params(folder)
    if prefix and (incomplete := [step for step in saved_steps(folder) if step > int(items.parent.name)]):
        message = f"{folder}: steps {incomplete} are incomplete; loading step {items.parent.name}"
        warnings.warn(message, LigerWarning, stacklevel=2)
    config = QwenVLConfig.from_hf(folder)
    dtype = None if dtype is None else float_dtype(dtype)
    abstract = _with_stored_lora(QwenVL.abstract(config), folder)
    leaves = {prefix + name: leaf for name, leaf in param_paths(abstract).items()}
    stored = {name: leaf for name, leaf in read_shapes(items).items() if name.startswith(prefix)}
    check_arrays(items, {n: leaf.shape for n, leaf in leaves.items()}, {n: leaf.shape for n, leaf in stored.items()})
    shardings = [None] * len(leaves) if mesh is None else jax.tree.leaves(param_shardings(abstract, mesh))
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or stored[name].dtype, sharding=sharding)
        for (name, leaf), sharding in zip(leaves.items(), shardings, strict=True)
    }
    arrays = read_arrays(items, targets, stored)
    for name in () if allow_non_finite else non_finite(dict(zip(targets, arrays, strict=True))):
        # in the stored dtype, an overflow still differs from infinity
        (values,) = read_arrays(items, {name: targets[name].update(dtype=stored[name].dtype)}, stored)
        check_finite(f"{items}: {name}", np.asarray(values), targets[name].dtype)
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def is_model(path: str | Path) -> bool:
    """Returns whether a folder holds a model that `load_model` can load."""
    try:
        return bool(_find_params(Path(path).absolute()))
    except NotFoundError:
        return False


def _find_params(folder: Path) -> tuple[Path, str]:
    """Returns the Orbax folder of a model, or of a run's latest step, and the prefix of the weights' names in it."""
    if (folder / CONFIG).is_file():
        if (folder / "params" / "_METADATA").is_file():
            return folder / "params", ""
        with contextlib.suppress(NotFoundError):
            return find_items(folder, None), "model/"
    raise NotFoundError(
        f"{folder} has no model; expected config.json with params/ (from save_model) or with steps (from save_state)"
    )


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


def write_config(folder: Path, config: QwenVLConfig, dtype: str, *, preserve_existing: bool = False) -> None:
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


def write_lora(folder: Path, model: QwenVL) -> None:
    options = lora_config(model)
    if options is None:
        (folder / LORA).unlink(missing_ok=True)  # left by an earlier model
    else:
        write_json(folder / LORA, dataclasses.asdict(options))


def _with_stored_lora(abstract: QwenVL, folder: Path) -> QwenVL:
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
