"""Loads Hugging Face weights into this model, one tensor at a time."""

import contextlib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from convert.assemble import make_assembler
from convert.table import EMBEDDING, LM_HEAD, SPELLING, HubTensor, hub_tensors, read_sizes, table_of
from convert.weights import FLOATS, StoredTensor, list_tensors, open_weights, refuse_other_folder
from liger_jax.checkpoint import float_dtype
from liger_jax.config import QwenVLConfig, VisionConfig
from liger_jax.errors import UserError, list_some
from liger_jax.files import CONFIG, local_folder, read_json_object
from liger_jax.finite import check_finite
from liger_jax.model import QwenVL
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import auto_mesh, param_shardings, with_axes_of

# Files to download from a hub repository. Pickles are downloaded only on request.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
PICKLES = ("pytorch_model*.bin",)


def from_hf(
    path_or_repo_id: str | Path,
    *,
    dtype="bfloat16",
    mesh: Mesh | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
    allow_non_finite: bool = False,
) -> QwenVL:
    """Loads a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint in transformers' format, from a folder or the Hugging Face hub.

    Supports the original tensor names and those of transformers 4.52 and later, a single file or shards, tied and separate
    heads. Each large tensor is sent to its devices right after it is read, and rearranged there, so the host holds one of
    them at a time.

    Args:
        path_or_repo_id: the folder (config.json, model.safetensors or shards with an index), or a hub id.
        dtype: floating-point dtype of the weights; weights stored in another dtype are converted.
        mesh: devices to place the weights on, split as `liger_jax.model.sharding` describes; None: the default device.
        revision: branch, tag or commit on the hub.
        cache_dir: download cache; None: huggingface_hub's own.
        allow_pickle: also read pytorch_model.bin. This needs torch, and trust in the author of the file.
        allow_non_finite: also load tensors that hold NaN or infinity, or numbers that become infinite in `dtype`.

    Raises:
        NotFoundError: the folder, the repository, or a file in it does not exist.
        UserError: a damaged file, a quantized checkpoint, a tensor that holds NaN, infinity or numbers too large for
            `dtype`, or tensors that do not fit the configuration. One error lists all tensors that are missing, unexpected,
            mis-shaped or not floating point, before anything is placed on a device.

    Example:
        >>> model = from_hf("Qwen/Qwen2-VL-2B-Instruct")  # doctest: +SKIP
    """
    dtype = float_dtype(dtype)
    folder = find_checkpoint(path_or_repo_id, revision=revision, cache_dir=cache_dir, allow_pickle=allow_pickle)
    if not (folder / CONFIG).is_file():
        refuse_other_folder(folder)
    _refuse_quantized_config(folder)
    config = QwenVLConfig.from_hf(folder)
    abstract = QwenVL.abstract(config, dtype=dtype)
    shapes = {path: leaf.shape for path, leaf in param_paths(abstract).items()}
    table = table_of(config.family)
    sizes = read_sizes(shapes, patch_shape(config.vision), table)
    expected = {tensor.name: tensor for tensor in hub_tensors(shapes, sizes, table)}
    optional = [LM_HEAD] if config.tie_word_embeddings else []
    tensors = list_tensors(folder, allow_pickle=allow_pickle)
    _refuse_quantized_tensors(folder, tensors)
    complaint = f"{folder} has tensors that do not fit its config.json"
    if not optional and LM_HEAD not in (tensor.name for tensor in tensors):
        complaint += (
            f" (there is no {LM_HEAD}; if the head is the embedding, set tie_word_embeddings to true in config.json)"
        )
    stored = match_tensors(expected, tensors, complaint, rename=SPELLING[config.family], optional=optional)
    if optional and LM_HEAD in stored:
        (embedding,) = (name for name, tensor in expected.items() if tensor.row.path == EMBEDDING)
        _check_tied_head(stored.pop(LM_HEAD), stored[embedding])
    pairs = [(stored[name], tensor) for name, tensor in expected.items()]
    parameters = load_parameters(param_paths(abstract), mesh, pairs, sizes, allow_non_finite=allow_non_finite)
    return jax.tree.unflatten(jax.tree.structure(abstract), list(parameters.values()))


def find_checkpoint(
    path_or_repo_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
    other_files: Sequence[str] = (),
) -> Path:
    """Returns the local folder of a checkpoint, downloaded from the hub if necessary; see `local_folder`."""
    patterns = (*PATTERNS, *(PICKLES if allow_pickle else ()), *other_files)
    return local_folder(path_or_repo_id, patterns, revision=revision, cache_dir=cache_dir)


def patch_shape(vision: VisionConfig) -> tuple[int, int, int]:
    """Returns the channels, frames and side length of a patch, for `read_sizes`."""
    return vision.in_channels, vision.temporal_patch_size, vision.patch_size


# ---- checking the stored tensors -------------------------------------------------------------------------------------

# Ends (or GGUF's beginnings) of tensor names that only quantized checkpoints have, and their methods.
QUANTIZED_NAMES = {
    "AWQ or GPTQ": r"\.(qweight|qzeros|g_idx)$",
    "bitsandbytes": r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.",
    "compressed-tensors or FP8": r"\.(weight_packed|weight_scale|weight_scale_inv|input_scale|weight_zero_point)$",
    "GGUF": r"^(blk\.\d+|token_embd|output_norm)\.",
}


def _refuse_quantized_config(folder: Path) -> None:
    """Raises UserError if config.json has a quantization_config."""
    file = folder / CONFIG
    settings = read_json_object(file).get("quantization_config") if file.is_file() else None
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        raise UserError(f"{file}: quantization_config: {_quantized(str(method or 'an unnamed method'))}")


def _refuse_quantized_tensors(folder: Path, tensors: Iterable[StoredTensor]) -> None:
    """Raises UserError if the names of the tensors are those of a quantized checkpoint."""
    for tensor in tensors:
        for method, pattern in QUANTIZED_NAMES.items():
            if re.search(pattern, tensor.name):
                raise UserError(f"{folder} has the tensor {tensor.name}: {_quantized(method)}")


def _quantized(method: str) -> str:
    return (
        f"the checkpoint is quantized with {method}; expected unquantized weights, such as the model that it was made "
        "from, or a copy dequantized with transformers (model.dequantize())"
    )


def match_tensors(
    expected: Mapping[str, HubTensor],
    tensors: Iterable[StoredTensor],
    complaint: str,
    *,
    rename: Callable[[str], str],
    optional: Collection[str] = (),
) -> dict[str, StoredTensor]:
    """Returns {name in `expected`: stored tensor} for all expected tensors, and for the optional ones that are stored.

    Args:
        expected: {name: tensor} of all tensors that must be stored.
        tensors: the stored ones.
        complaint: first line of the error.
        rename: maps a stored name to the name in `expected`.
        optional: further names that may be stored.

    Raises:
        UserError: any tensor does not match. The message is the complaint, and a list of all mismatches.
    """
    stored: dict[str, StoredTensor] = {}
    duplicates = []
    for tensor in tensors:
        name = rename(tensor.name)
        if name in stored:
            first = stored[name]
            duplicates.append(f"{tensor.name} (in {tensor.file.name} and, as {first.name}, in {first.file.name})")
        stored[name] = tensor
    pairs = [(tensor, expected[name]) for name, tensor in stored.items() if name in expected]
    unexpected = [tensor.name for name, tensor in stored.items() if name not in expected and name not in optional]
    problems = {
        "missing": _merge_layers([name for name in expected if name not in stored]),
        "unexpected": _merge_layers(unexpected),
        "stored twice": duplicates,
        "wrong shape": [f"{s.name} {list(s.shape)}, expected {list(e.shape)}" for s, e in pairs if s.shape != e.shape],
        "not floating point": [
            f"{s.name} {s.dtype}, expected one of {list(FLOATS)}" for s, _ in pairs if s.dtype not in FLOATS
        ],
    }
    report = "".join(f"\n  {problem}: {list_some(sorted(names), 30)}" for problem, names in problems.items() if names)
    if report:
        raise UserError(f"{complaint}:{report}")
    return stored


def _merge_layers(names: list[str], limit: int = 30) -> list[str]:
    """Shortens a long list: the names of all layers become one, such as `model.layers.{0,1,2}.mlp.up_proj.weight`."""
    if len(names) <= limit:
        return names
    layers: dict[str, list[str]] = {}
    for name in names:
        pattern = re.sub(r"(layers|blocks|list)\.\d+\.", r"\1.{}.", name)
        layers.setdefault(pattern, []).extend(re.findall(r"(?:layers|blocks|list)\.(\d+)\.", name))
    for pattern, numbers in layers.items():
        if len(numbers) > limit:
            layers[pattern] = [*numbers[:2], "...", numbers[-1]]
    return [pattern.replace("{}", "{" + ",".join(numbers) + "}") for pattern, numbers in layers.items()]


def _check_tied_head(head: StoredTensor, embedding: StoredTensor, rows: int = 65_536) -> None:
    """Raises UserError if the stored head of a tied model differs from its embedding. Compares `rows` rows at a time."""
    with contextlib.ExitStack() as stack:
        head_file = stack.enter_context(open_weights(head.file))
        embedding_file = stack.enter_context(open_weights(embedding.file))
        length = embedding.shape[0]
        slices = [(start, min(start + rows, length)) for start in range(0, length, rows)]
        equal = (
            head.shape == embedding.shape
            and head.dtype in FLOATS
            and all(
                np.array_equal(head_file.read(head.name, *part), embedding_file.read(embedding.name, *part))
                for part in slices
            )
        )
    if not equal:
        raise UserError(
            f"{head.file}: {head.name} differs from {embedding.name}, but config.json ties them (tie_word_embeddings); "
            f"expected no {LM_HEAD}, an equal one, or tie_word_embeddings false"
        )


# ---- loading the parameters ------------------------------------------------------------------------------------------


def load_parameters(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh | None,
    stored: Iterable[tuple[StoredTensor, HubTensor]],
    sizes: dict[str, int],
    *,
    allow_non_finite: bool = False,
) -> dict[str, jax.Array]:
    """Returns {path: parameter} with the shapes and dtypes of `leaves`, in the same order.

    Raises:
        UserError: a tensor holds NaN, infinity, or numbers that overflow the dtype, unless `allow_non_finite` is true.
    """
    by_file = sorted(stored, key=lambda pair: str(pair[0].file))
    layouts = {tensor.row.path: tensor.row.layout for _, tensor in by_file}
    # on Auto axes, where tensors can be rearranged freely
    shardings = dict.fromkeys(leaves) if mesh is None else param_shardings(leaves, auto_mesh(mesh))
    assemblers = {path: make_assembler(layouts[path], sizes, leaf, shardings[path]) for path, leaf in leaves.items()}
    for file, pairs in itertools.groupby(by_file, key=lambda pair: pair[0].file):
        with open_weights(file) as weights:
            for source, tensor in pairs:
                value = weights.read(source.name)
                if not allow_non_finite:
                    check_finite(f"{file}: {source.name}", value, leaves[tensor.row.path].dtype)
                assemblers[tensor.row.path].put(value, tensor.layer)
    parameters = {path: assembler.finish() for path, assembler in assemblers.items()}
    return parameters if mesh is None else with_axes_of(mesh, parameters)
