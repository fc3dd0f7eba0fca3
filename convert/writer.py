"""This model's weights as Hugging Face writes them, one tensor at a time."""

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

from convert.assemble import SMALL
from convert.reader import patch_of
from convert.table import LM_HEAD, TABLE, HubTensor, from_stack, hub_tensors, read_sizes
from convert.weights import FLOATS, INDEX, SINGLE
from liger_jax.checkpoint import HUB_WEIGHTS, LORA, write_config
from liger_jax.config import Qwen2VLConfig, VisionConfig
from liger_jax.model import Qwen2VL
from liger_jax.model.lora import lora_leaves
from liger_jax.model.params import param_paths
from liger_jax.train.run import is_run

_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def to_hf_state(tree: Any, *, config: Qwen2VLConfig | None = None) -> dict[str, np.ndarray]:
    """Weights, or anything shaped like them, under the hub's names and in the hub's shapes.

    Args:
        tree: a `Qwen2VL`, its gradients, an `nnx.State` or nested dicts, of JAX or numpy arrays; may hold only some of
            the parameters.
        config: of the model, for a tree that does not carry it and whose patches are not 3 channels x 2 frames.

    Returns:
        {original hub name: array}; the dtypes stay. A tied model has no `lm_head.weight`.

    Raises:
        ValueError: a path that is no parameter of a Qwen2-VL, shapes that contradict each other, or LoRA.

    Example:
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig
        >>> to_hf_state(Qwen2VL.init(Qwen2VLConfig.tiny()))["model.layers.0.self_attn.q_proj.weight"].shape
        (64, 64)
    """
    _refuse_lora(tree)
    leaves = param_paths(tree)
    config = config or getattr(tree, "config", None)
    sizes = read_sizes(
        {path: leaf.shape for path, leaf in leaves.items()}, patch_of(config.vision if config else VisionConfig())
    )
    # one copy to the host for each parameter, not for each layer
    values = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    return {
        tensor.name: np.ascontiguousarray(from_stack(tensor.row.layout, values[tensor.row.path], tensor.layer, sizes))
        for tensor in hub_tensors(leaves, sizes)
    }


def to_hf(model: Qwen2VL, directory: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Writes a checkpoint that transformers loads, in the layout of `save_pretrained`.

    That is config.json, generation_config.json and model.safetensors, or shards with an index. Each tensor is fetched
    from its device and written on its own. The folder is made or gets the files all at once at the end: a write that
    fails leaves what was there. Other files in the folder (a tokenizer, say) stay.

    Args:
        model: all weights of a Qwen2-VL, in float32, bfloat16 or float16.
        directory: the folder to write.
        max_shard_size: the largest file: bytes, or a number with KB, MB or GB. A single larger tensor has a file of its
            own.

    Raises:
        FileExistsError: a training run in the folder.
        ValueError: weights that are missing, or that the hub's layout has no name for, LoRA's among them; numbers that
            are not floating point.

    Example:
        >>> import tempfile
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_hf(Qwen2VL.init(Qwen2VLConfig.tiny()), folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['config.json', 'model.safetensors']
    """
    _refuse_lora(model)
    leaves, config = param_paths(model), model.config
    limit = _bytes(max_shard_size)
    sizes = read_sizes({path: leaf.shape for path, leaf in leaves.items()}, patch_of(config.vision))
    missing = [
        row.path for row in TABLE if row.path not in leaves and not (row.hub == LM_HEAD and config.tie_word_embeddings)
    ]
    if missing:
        raise ValueError(f"The model lacks {missing}")
    odd = {path: str(leaf.dtype) for path, leaf in leaves.items() if leaf.dtype not in _NAMES}
    if odd:
        raise ValueError(f"Weights that are not floating point: {odd}; expected one of {list(_TORCH_NAMES.values())}")
    shards = _split(hub_tensors(leaves, sizes), leaves, limit)
    if is_run(Path(directory)):
        raise FileExistsError(f"{directory} holds a training run; expected a folder of its own for the hub's files")
    # an earlier checkpoint's files would be read in place of these
    of_orbax = ("params",) if (Path(directory) / "params" / "_METADATA").is_file() else ()
    with arriving_together(Path(directory), stale=(*HUB_WEIGHTS, LORA, *of_orbax)) as folder:
        write_config(folder, config, _TORCH_NAMES[_NAMES[leaves["language_model/norm/weight"].dtype]])
        weight_map, total = {}, 0
        for number, tensors in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= {tensor.name: name for tensor in tensors}
            total += write_safetensors(folder / name, tensors, leaves, sizes)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG])B", str(size).upper())
    if not match:
        raise ValueError(f"max_shard_size is {size!r}; expected bytes, or a number with KB, MB or GB, as '5GB'")
    return int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def _refuse_lora(tree: Any) -> None:
    found = next(iter(lora_leaves(tree)), None)
    if found:
        raise ValueError(
            f"The model has LoRA ({found}, ...), which a checkpoint has no names for; expected merge_lora(model), or "
            "save_adapter to write A and B alone"
        )


def _split(tensors: list[HubTensor], leaves: dict[str, Any], limit: int) -> list[list[HubTensor]]:
    shards, room = [], 0
    for tensor in tensors:
        size = _nbytes(tensor, leaves)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= size
    return shards


def _nbytes(tensor: HubTensor, leaves: dict[str, Any]) -> int:
    return int(np.prod(tensor.shape)) * leaves[tensor.row.path].dtype.itemsize


def write_safetensors(file: Path, tensors: list[HubTensor], leaves: dict[str, Any], sizes: dict[str, int]) -> int:
    """The format: length of the header (8 bytes), the header (JSON), the numbers. -> bytes of numbers.

    Written here because safetensors.numpy.save_file wants all tensors of a file in memory.
    https://github.com/huggingface/safetensors
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for tensor in tensors:
        start, end = end, end + _nbytes(tensor, leaves)
        dtype = _NAMES[leaves[tensor.row.path].dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(_fetch(tensor, leaves[tensor.row.path], sizes).reshape(-1).view(np.uint8))
    return end


def _fetch(tensor: HubTensor, leaf: Any, sizes: dict[str, int]) -> np.ndarray:
    if leaf.nbytes <= SMALL:
        return np.ascontiguousarray(from_stack(tensor.row.layout, np.asarray(leaf), tensor.layer, sizes))
    return np.asarray(_rearranged(leaf, tensor.layer, tensor.row.layout, tuple(sizes.items())))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _rearranged(value: jax.Array, layer: int | None, layout: str, sizes: tuple) -> jax.Array:
    # a copy, since the host's view of an array lives as long as the array: the model's own would stay in host memory
    return jnp.copy(from_stack(layout, value, layer, dict(sizes)))


# ---- all files or none -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def arriving_together(directory: Path, *, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write to; its files come into `directory` when the block ends without an error.

    Files there that a pattern in `stale` fits and that were not written go.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; expected a folder, or a place for one")
    directory = directory.absolute()
    # beside what is new, to be renamed; inside of what exists, which may be a disk of its own
    beside = directory if directory.exists() else directory.parent
    beside.mkdir(parents=True, exist_ok=True)
    folder = beside / f".{directory.name}.{secrets.token_hex(4)}.tmp"  # a killed process leaves its own behind
    folder.mkdir()
    try:
        yield folder
        if not directory.exists():
            folder.rename(directory)
            return
        written = {file.name for file in folder.iterdir()}
        for name in sorted(written):
            (folder / name).replace(directory / name)
        for old in [file for pattern in stale for file in directory.glob(pattern)]:
            if old.name not in written:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
