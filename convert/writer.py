"""Writes this model's weights as a Hugging Face checkpoint, one tensor at a time."""

import contextlib
import functools
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.assemble import SMALL_BYTES
from convert.reader import patch_shape
from convert.table import HubTensor, from_stack, hub_tensors, read_sizes, table_of
from convert.weights import FLOATS, INDEX, SINGLE
from liger_jax import processes
from liger_jax.checkpoint import HUB_WEIGHTS, LORA, write_config
from liger_jax.config import QwenVLConfig
from liger_jax.errors import AlreadyExistsError, UserError
from liger_jax.files import make_folder, write_json
from liger_jax.model import QwenVL
from liger_jax.model.lora import lora_leaves
from liger_jax.model.params import param_paths
from liger_jax.train.run import is_run

_DTYPE_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def to_hf_state(tree: Any, *, config: QwenVLConfig | None = None) -> dict[str, np.ndarray]:
    """Returns weights, or anything of the same structure, under the hub's names and in the hub's shapes.

    Args:
        tree: a `QwenVL`, its gradients, an `nnx.State` or nested dicts, with JAX or numpy arrays of all parameters or
            some.
        config: the model's configuration. If neither it nor a configuration in `tree` is given, the patches must be those of
            the published models, and the names are Qwen3-VL's if only Qwen3-VL has all the parameters, else Qwen2-VL's.

    Returns:
        {original hub name: array}, in the same dtypes. A tied model has no `lm_head.weight`.

    Raises:
        UserError: the tree has a path that is not a parameter of the model, contradictory shapes, or LoRA.

    Example:
        >>> from liger_jax import QwenVL, QwenVLConfig
        >>> to_hf_state(QwenVL.init(QwenVLConfig.tiny()))["model.layers.0.self_attn.q_proj.weight"].shape
        (64, 64)
    """
    _refuse_lora(tree)
    _refuse_several_processes(tree)
    leaves = param_paths(tree)
    config = config or getattr(tree, "config", None)
    if config is None:
        is_qwen3 = not leaves.keys() <= {row.path for row in table_of("qwen2_vl")}
        config = QwenVLConfig.qwen3_vl_2b() if is_qwen3 else QwenVLConfig.qwen2_vl_2b()
    table = table_of(config.family)
    sizes = read_sizes({path: leaf.shape for path, leaf in leaves.items()}, patch_shape(config.vision), table)
    # one transfer to the host per parameter, not per layer
    values = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    return {
        tensor.name: np.ascontiguousarray(from_stack(tensor.row.layout, values[tensor.row.path], tensor.layer, sizes))
        for tensor in hub_tensors(leaves, sizes, table)
    }


def _refuse_several_processes(tree: Any) -> None:
    if processes.spans(tree):
        raise UserError(
            "The weights are split over several processes; expected those of one process: write them with save_model, and "
            "convert the folder afterwards"
        )


def to_hf(model: QwenVL, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Writes a checkpoint in the layout of `save_pretrained`, which transformers loads.

    The checkpoint consists of config.json, generation_config.json, and model.safetensors or shards with an index. Each
    tensor is fetched from its device and written separately. All files appear in the folder together at the end, so a
    write that fails leaves the folder unchanged. Other files in the folder (such as a tokenizer) are kept.

    Args:
        model: all weights of a model, in float32, bfloat16 or float16.
        directory: the folder to write.
        max_shard_size: maximum size of a file: bytes, or a number with KB, MB or GB. A larger tensor gets its own file.

    Raises:
        AlreadyExistsError: the folder holds a training run.
        UserError: weights are missing, have no name on the hub (such as LoRA's), are not floating point, or are split over
            several processes.

    Example:
        >>> import tempfile
        >>> from liger_jax import QwenVL, QwenVLConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_hf(QwenVL.init(QwenVLConfig.tiny()), folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['config.json', 'model.safetensors']
    """
    _refuse_lora(model)
    _refuse_several_processes(model)
    leaves, config, directory = param_paths(model), model.config, Path(directory)
    shard_bytes = _parse_bytes(max_shard_size)
    table = table_of(config.family)
    sizes = read_sizes({path: leaf.shape for path, leaf in leaves.items()}, patch_shape(config.vision), table)
    missing = sorted(param_paths(QwenVL.abstract(config)).keys() - leaves.keys())
    if missing:
        raise UserError(f"model lacks {missing}; expected all parameters of its config")
    dtypes = {path: str(leaf.dtype) for path, leaf in leaves.items() if leaf.dtype not in _DTYPE_NAMES}
    if dtypes:
        raise UserError(f"weights are not floating point: {dtypes}; expected one of {list(_TORCH_NAMES.values())}")
    shards = _split(hub_tensors(leaves, sizes, table), leaves, shard_bytes)
    if is_run(directory):
        raise AlreadyExistsError(f"{directory} holds a training run; expected another folder for the hub's files")
    # weights of an earlier checkpoint that would be loaded instead of these
    orbax = ("params",) if (directory / "params" / "_METADATA").is_file() else ()
    with staged_folder(directory, stale=(*HUB_WEIGHTS, LORA, *orbax)) as folder:
        write_config(folder, config, _TORCH_NAMES[_DTYPE_NAMES[leaves["language_model/norm/weight"].dtype]])
        weight_map: dict[str, str] = {}
        total = 0
        for number, tensors in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= {tensor.name: name for tensor in tensors}
            total += write_safetensors(folder / name, tensors, leaves, sizes)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / INDEX, index)


def _parse_bytes(size: int | str) -> int:
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG])B", str(size).upper())
    if not match:
        raise UserError(f"max_shard_size is {size!r}; expected bytes, or a number with KB, MB or GB, such as '5GB'")
    return int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def _refuse_lora(tree: Any) -> None:
    path = next(iter(lora_leaves(tree)), None)
    if path:
        raise UserError(
            f"model has LoRA ({path}, ...), which has no names in a checkpoint; expected merge_lora(model), or "
            "save_adapter to write A and B alone"
        )


def _split(tensors: list[HubTensor], leaves: dict[str, Any], shard_bytes: int) -> list[list[HubTensor]]:
    """Returns the tensors of each shard: as many as fit into `shard_bytes`, in order."""
    shards: list[list[HubTensor]] = []
    free = 0
    for tensor in tensors:
        size = _nbytes(tensor, leaves)
        if not shards or size > free:
            shards.append([])
            free = shard_bytes
        shards[-1].append(tensor)
        free -= size
    return shards


def _nbytes(tensor: HubTensor, leaves: dict[str, Any]) -> int:
    return int(np.prod(tensor.shape)) * leaves[tensor.row.path].dtype.itemsize


def write_safetensors(file: Path, tensors: list[HubTensor], leaves: dict[str, Any], sizes: dict[str, int]) -> int:
    """Writes a safetensors file: the length of the header (8 bytes), the header (JSON), and the values.

    safetensors.numpy.save_file is not used because it needs all tensors of a file in memory.
    Format: https://github.com/huggingface/safetensors

    Returns:
        The number of bytes of the values.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for tensor in tensors:
        start, end = end, end + _nbytes(tensor, leaves)
        dtype = _DTYPE_NAMES[leaves[tensor.row.path].dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(_fetch(tensor, leaves[tensor.row.path], sizes).reshape(-1).view(np.uint8).data)
    return end


def _fetch(tensor: HubTensor, leaf: Any, sizes: dict[str, int]) -> np.ndarray:
    """Returns one hub tensor of a parameter in host memory."""
    if leaf.nbytes <= SMALL_BYTES:
        return np.ascontiguousarray(from_stack(tensor.row.layout, np.asarray(leaf), tensor.layer, sizes))
    return np.asarray(_rearrange(leaf, tensor.layer, tensor.row.layout, tuple(sizes.items())))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _rearrange(value: jax.Array, layer: int | None, layout: str, sizes: tuple) -> jax.Array:
    # copied, because JAX caches the host value of an array as long as the array lives: the model's would stay in memory
    return jnp.copy(from_stack(layout, value, layer, dict(sizes)))


# ---- all files or none -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_folder(directory: Path, *, stale: Iterable[str] = ()) -> Iterator[Path]:
    """Yields a temporary folder. Its files move to `directory` if the `with` block ends without an error.

    Args:
        directory: the folder to write, new or existing.
        stale: file name patterns of an earlier checkpoint. Matching files that were not written are deleted.

    Raises:
        UserError: `directory` is a file or cannot be created.
    """
    directory = directory.absolute()
    # next to a new folder, so that it can be renamed; inside an existing one, which may be on a separate disk
    parent = make_folder(directory if directory.exists() else directory.parent)
    folder = make_folder(parent / f".{directory.name}.{secrets.token_hex(4)}.tmp")  # remains if the process is killed
    try:
        yield folder
        if not directory.exists():
            folder.rename(directory)
            return
        written = {file.name for file in folder.iterdir()}
        for name in sorted(written):
            (folder / name).replace(directory / name)
        for path in [path for pattern in stale for path in directory.glob(pattern)]:
            if path.name not in written:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
