"""Lists and reads the tensors in the weight files of a checkpoint, one at a time."""

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from liger_jax.checkpoint import is_model
from liger_jax.errors import NotFoundError, UserError, list_some
from liger_jax.files import read_json_object, wrong_content

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# Patterns of names in folders that hold something else, and what the error says of them.
OTHER_FOLDERS = {
    "*.gguf": "has its weights only as GGUF {names}; expected unquantized weights, {SINGLE} or {INDEX}",
    "adapter_config.json": "is a PEFT adapter; expected its base model, to which convert.load_adapter adds the adapter",
    "global_step*": "is a DeepSpeed checkpoint, {names}; expected {SINGLE} or {INDEX}, as its zero_to_fp32.py writes them "
    "with --safe_serialization",
    "pytorch_model_fsdp_*": "is an FSDP checkpoint, {names}; expected {SINGLE} or {INDEX}, as `accelerate merge-weights` "
    "writes them",
    "*.distcp": "is a torch.distributed checkpoint, {names}; expected {SINGLE} or {INDEX}, as `accelerate "
    "merge-weights` writes them",
    "checkpoint-*": "has its weights in {names}; expected one of these folders",
}

# Names of dtypes in a safetensors header. All others (integers, 8-bit floats) are not weights of this model.
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor, and its shape and dtype according to its file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of FLOATS, or the name of another dtype


def list_tensors(folder: Path, *, allow_pickle: bool = False) -> list[StoredTensor]:
    """Returns every tensor of the checkpoint in a folder, read from the headers of its files.

    Raises:
        NotFoundError: the folder has no weights, or a shard that the index names is missing.
        UserError: there are only pickle files and `allow_pickle` is false; a file is damaged or of another kind; the
            index and the shards disagree.
    """
    if (folder / SINGLE).is_file():
        return list_file(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _list_shards(folder / INDEX)
    pickles = [name for name in (PICKLE, PICKLE_INDEX) if (folder / name).is_file()]
    if pickles and not allow_pickle:
        raise UserError(
            f"{folder} has its weights only as pickle files {pickles}; expected {SINGLE} or {INDEX}. Loading a pickle can "
            "run code that its author put into it: if you trust it, pass allow_pickle=True (--allow-pickle)"
        )
    if (folder / PICKLE).is_file():
        return list_file(folder / PICKLE)
    if (folder / PICKLE_INDEX).is_file():
        return _list_shards(folder / PICKLE_INDEX)
    if is_model(folder):
        raise NotFoundError(
            f"{folder} is an Orbax folder; expected a Hugging Face folder. convert.open_model reads both"
        )
    refuse_other_folder(folder)
    files = sorted(path.name for path in folder.iterdir())
    raise NotFoundError(f"{folder} has no weights, only {files!r:.300}; expected {SINGLE} or {INDEX}")


def refuse_other_folder(folder: Path) -> None:
    """Raises NotFoundError for a folder without weights that is an adapter or a training checkpoint, by name."""
    for pattern, problem in OTHER_FOLDERS.items():
        if names := sorted(path.name for path in folder.glob(pattern)):
            raise NotFoundError(f"{folder} {problem.format(names=f'{names!r:.100}', SINGLE=SINGLE, INDEX=INDEX)}")


def _list_shards(index: Path) -> list[StoredTensor]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is {weight_map!r:.60}; expected {{tensor name: file name}}")
    # a shard lies next to its index: a path that leads elsewhere is a mistake or an attack
    odd_names = [
        name for name in weight_map.values() if not isinstance(name, str) or not name or Path(name).name != name
    ]
    if odd_names:
        raise UserError(f"{index} names files outside its folder, {odd_names!r:.300}; expected plain file names")
    files = [index.with_name(name) for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not os.path.isfile(file)]  # no error for a name that is too long
    if missing:
        raise NotFoundError(f"{index} names files that do not exist, {missing!r:.300}; expected them in its folder")
    tensors = [tensor for file in files for tensor in list_file(file)]
    stored = {(tensor.name, tensor.file.name) for tensor in tensors}
    problems = [f"{name} is not in {file}" for name, file in weight_map.items() if (name, file) not in stored]
    problems += [
        f"{name} in {file} is not in the index" for name, file in sorted(stored) if weight_map.get(name) != file
    ]
    if problems:
        raise UserError(f"{index} disagrees with the files that it names: {list_some(problems)}")
    return tensors


def list_file(file: Path) -> list[StoredTensor]:
    """Returns every tensor in one weight file."""
    with open_weights(file) as weights:
        return [StoredTensor(file, name, *weights.describe(name)) for name in weights.names]


# ---- opening one file ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weights:
    """An open weight file."""

    names: list[str]
    describe: Callable[[str], tuple[tuple[int, ...], str]]
    """Returns a tensor's shape and dtype."""
    read: Callable[..., np.ndarray]
    """Returns a tensor, or its slice start:stop along the first axis, as a new numpy array."""


@contextlib.contextmanager
def open_weights(file: Path) -> Iterator[Weights]:
    """Opens a .safetensors or pickle file. Raises UserError for a file that is damaged or of another kind."""
    if file.suffix == ".bin":
        yield _open_pickle(file)
        return
    try:
        # pread, not mmap: mapped pages count as memory of this process until the file is closed
        handle = safe_open(file, framework="numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        problem = wrong_content(file) or f"damaged, or its download was cut short ({error})"
        raise UserError(f"{file} is {problem}; expected a safetensors file") from error

    def describe(name):
        header = handle.get_slice(name)
        return tuple(header.get_shape()), header.get_dtype()

    def read(name, start=None, stop=None):
        return handle.get_tensor(name) if start is None else handle.get_slice(name)[start:stop]

    with handle:
        yield Weights(list(handle.keys()), describe, read)


def _open_pickle(file: Path) -> Weights:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file} is a pickle, which only torch can read; expected torch to be installed") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # depending on the damage: EOFError, UnpicklingError, RuntimeError, ...
        problem = wrong_content(file) or f"unreadable ({str(error).splitlines()[0]})"
        raise UserError(f"{file} is {problem}; expected a pickle of weights") from error
    if odd := _not_a_tensor(state):
        raise UserError(f"{file} holds {odd}; expected {{tensor name: tensor}}, as save_pretrained writes it")
    dtypes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def describe(name):
        return tuple(state[name].shape), dtypes.get(state[name].dtype, str(state[name].dtype))

    def read(name, start=None, stop=None):
        tensor = state[name].detach()[start:stop].contiguous()
        if tensor.dtype == torch.bfloat16:  # torch cannot convert bfloat16 to numpy
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Weights(list(state), describe, read)


def _not_a_tensor(state: Any) -> str | None:
    """Returns what a pickle holds, or its first entry that is not a dense tensor in memory under a name; None if all are."""
    import torch

    if not isinstance(state, dict):
        return type(state).__name__
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            return f"{name!r:.60} of type {type(value).__name__}"
        if value.layout != torch.strided or value.is_meta:
            return f"{name!r:.60}, which is {'on the meta device' if value.is_meta else 'sparse'}"
    return None
