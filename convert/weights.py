"""The weight files of a checkpoint folder: which tensors they hold, and their values one at a time."""

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# Names of the kinds of number in a safetensors header. What is not here (integers, 8-bit floats) is no weight of this
# model.
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what its file says about it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as in FLOATS, or the name of something else


def read_json(path: Path) -> Any:
    """A JSON file; a ValueError names the file when it is something else."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {_disguise(path) or error}") from None


def list_tensors(folder: Path, *, allow_pickle: bool = False) -> list[Stored]:
    """Every tensor of the checkpoint in `folder`, read from the headers of its files.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: only pickle files are there and `allow_pickle` is false; a file is damaged or something else; the
            index and the shards disagree.
    """
    if (folder / SINGLE).is_file():
        return list_file(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _list_shards(folder / INDEX)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles and not allow_pickle:
        raise ValueError(
            f"{folder} holds its weights as pickle files only {pickles}; expected {SINGLE} or {INDEX}. Loading a pickle "
            "can run what its author put into it: if you trust it, say allow_pickle=True (on the command line "
            "--allow-pickle)"
        )
    if (folder / PICKLE).is_file():
        return list_file(folder / PICKLE)
    if (folder / PICKLE_INDEX).is_file():
        return _list_shards(folder / PICKLE_INDEX)
    found = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(f"No weights in {folder}: expected {SINGLE} or {INDEX}, found {found}")


def _list_shards(index: Path) -> list[Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; expected {{tensor name: file name}}")
    # a shard lies beside its index: a path that leads elsewhere is a mistake or an attack
    astray = sorted({name for name in weight_map.values() if Path(name).name != name})
    if astray:
        raise ValueError(f"{index} names files outside its folder: {astray}")
    files = [index.with_name(name) for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names files that are not in its folder: {missing}")
    tensors = [tensor for file in files for tensor in list_file(file)]
    held = {(tensor.name, tensor.file.name) for tensor in tensors}
    wrong = [f"{name} is not in {file}" for name, file in weight_map.items() if (name, file) not in held]
    wrong += [f"{name} in {file} is not in the index" for name, file in sorted(held) if weight_map.get(name) != file]
    if wrong:
        raise ValueError(f"{index} disagrees with the files it names: " + "; ".join(wrong))
    return tensors


def list_file(file: Path) -> list[Stored]:
    """Every tensor of one file."""
    with open_weights(file) as weights:
        return [Stored(file, name, *weights.describe(name)) for name in weights.names]


# ---- opening one file ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weights:
    """An open file. `read` gives a tensor, or its rows start:stop, as a numpy array of its own."""

    names: list[str]
    describe: Callable[[str], tuple[tuple[int, ...], str]]
    read: Callable[..., np.ndarray]


@contextlib.contextmanager
def open_weights(file: Path) -> Iterator[Weights]:
    """Opens a .safetensors or pickle file; a ValueError says what is wrong with it."""
    if file.suffix == ".bin":
        yield _open_pickle(file)
        return
    try:
        # read, not mapped: the pages of a map count as this process's memory until the file is closed
        handle = safe_open(file, framework="numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        reason = _disguise(file) or f"damaged, or its download was cut short ({error})"
        raise ValueError(f"{file} is not a safetensors file: {reason}") from None

    def describe(name):
        header = handle.get_slice(name)
        return tuple(header.get_shape()), header.get_dtype()

    def read(name, start=None, stop=None):
        return handle.get_tensor(name) if start is None else handle.get_slice(name)[start:stop]

    with handle:
        yield Weights(list(handle.keys()), describe, read)


def _disguise(file: Path) -> str | None:
    """What a file is that should have been something else, as far as its first bytes tell."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start.lstrip().startswith((b"<!", b"<html", b"<?xml")):
        return "it is a web page, saved in place of the file"
    return None


def _open_pickle(file: Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise ValueError(f"{file} is a pickle, which only torch can read, and torch is not installed") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (
        Exception
    ) as error:  # torch raises whatever the damage leads to: EOFError, UnpicklingError, RuntimeError, ...
        reason = _disguise(file) or str(error).split("\n")[0]
        raise ValueError(f"{file} is not a readable pickle of weights: {reason}") from None
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def describe(name):
        return tuple(state[name].shape), kinds.get(state[name].dtype, str(state[name].dtype))

    def read(name, start=None, stop=None):
        tensor = state[name][start:stop].contiguous()
        if tensor.dtype == torch.bfloat16:  # which torch cannot hand to numpy
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Weights(list(state), describe, read)
