"""Hugging Face weights into this model, one tensor at a time."""

import contextlib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from convert.assemble import assemble
from convert.hub import find_checkpoint
from convert.table import (
    EMBEDDING,
    LM_HEAD,
    HubTensor,
    hub_tensors,
    original_name,
    read_sizes,
)
from convert.weights import FLOATS, Stored, list_tensors, open_weights, read_json
from liger_jax.checkpoint import float_dtype
from liger_jax.config import Qwen2VLConfig, VisionConfig
from liger_jax.model import Qwen2VL
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import param_shardings


def from_hf(
    path_or_repo_id: str | Path,
    *,
    dtype="bfloat16",
    mesh: Mesh | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
) -> Qwen2VL:
    """Loads a Qwen2-VL that transformers wrote: a folder, or the id of one on the Hugging Face hub.

    Takes the original tensor names and those of transformers 4.52 and later, one file or shards, a tied head or one of
    its own. Each tensor goes to the device as it is read and is rearranged there, so that the host never holds more
    than the largest of them.

    Args:
        path_or_repo_id: the folder (config.json, model.safetensors or shards with an index), or a hub id.
        dtype: the floating point type of the weights; what is stored in another one is converted.
        mesh: where the weights go, cut as `liger_jax.model.sharding` says; None: the default device.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept, if not in huggingface_hub's own cache.
        allow_pickle: also take pytorch_model.bin, which needs torch, and trust in whoever made it.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file is missing from it.
        ValueError: a damaged file, or tensors that do not fit the configuration: all that are missing, unexpected, of
            another shape or not floating point are named together. Nothing has been put on a device then.

    Example:
        >>> model = from_hf("Qwen/Qwen2-VL-2B-Instruct")  # doctest: +SKIP
    """
    dtype = float_dtype(dtype)
    folder = find_checkpoint(path_or_repo_id, revision=revision, cache_dir=cache_dir, allow_pickle=allow_pickle)
    config = read_config(folder)
    abstract = Qwen2VL.abstract(config, dtype=dtype)
    shapes = {path: leaf.shape for path, leaf in param_paths(abstract).items()}
    sizes = read_sizes(shapes, patch_of(config.vision))
    expected = {tensor.name: tensor for tensor in hub_tensors(shapes, sizes)}
    spare = [LM_HEAD] if config.tie_word_embeddings else []
    found = list_tensors(folder, allow_pickle=allow_pickle)
    stored = match(expected, found, f"The tensors in {folder} do not fit its config.json", also=spare)
    if spare and LM_HEAD in stored:
        _check_equal(stored.pop(LM_HEAD), stored[EMBEDDING])
    read = fill(param_paths(abstract), mesh, [(stored[name], tensor) for name, tensor in expected.items()], sizes)
    return jax.tree.unflatten(jax.tree.structure(abstract), list(read.values()))


def read_config(folder: Path) -> Qwen2VLConfig:
    """The configuration in a checkpoint's folder; a ValueError or FileNotFoundError names the file."""
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)  # for the error that names the file
    try:
        return Qwen2VLConfig.from_hf(folder)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def patch_of(vision: VisionConfig) -> tuple[int, int, int]:
    """Channels, frames and side length of a patch, for `read_sizes`."""
    return vision.in_channels, vision.temporal_patch_size, vision.patch_size


# ---- checking what the files hold ------------------------------------------------------------------------------------


def match(
    expected: Mapping[str, HubTensor],
    found: Iterable[Stored],
    complaint: str,
    *,
    rename: Callable[[str], str] = original_name,
    also: Collection[str] = (),
) -> dict[str, Stored]:
    """{name: where it is stored} for all that is expected, and for what may be there `also`.

    Raises:
        ValueError: the complaint, and everything that does not fit.
    """
    stored: dict[str, Stored] = {}
    twice = []
    for tensor in found:
        name = rename(tensor.name)
        if name in stored:
            twice.append(
                f"{tensor.name} (in {tensor.file.name} and, as {stored[name].name}, in {stored[name].file.name})"
            )
        stored[name] = tensor
    both = [(tensor, expected[name]) for name, tensor in stored.items() if name in expected]
    problems = {
        "missing": _summary([name for name in expected if name not in stored]),
        "unexpected": _summary([t.name for name, t in stored.items() if name not in expected and name not in also]),
        "stored twice": twice,
        "wrong shape": [f"{s.name} {list(s.shape)}, expected {list(e.shape)}" for s, e in both if s.shape != e.shape],
        "not floating point": [
            f"{s.name} {s.dtype}, expected one of {list(FLOATS)}" for s, _ in both if s.dtype not in FLOATS
        ],
    }
    told = "".join(f"\n  {what}: {'; '.join(sorted(names))}" for what, names in problems.items() if names)
    if told:
        raise ValueError(f"{complaint}:{told}")
    return stored


def _summary(names: list[str], most: int = 30) -> list[str]:
    """Names as they are if they are few; many are told by layer, `model.layers.{0,1,2}.mlp.up_proj.weight`."""
    if len(names) <= most:
        return names
    layers: dict[str, list[str]] = {}
    for name in names:
        pattern = re.sub(r"(layers|blocks)\.\d+\.", r"\1.{}.", name)
        layers.setdefault(pattern, []).extend(re.findall(r"(?:layers|blocks)\.(\d+)\.", name))
    return [pattern.replace("{}", "{" + ",".join(numbers) + "}") for pattern, numbers in layers.items()]


def _check_equal(head: Stored, embedding: Stored, rows: int = 65_536) -> None:
    """A tied model may store its head as well, provided that it is the embedding."""
    with contextlib.ExitStack() as stack:
        read = [(stack.enter_context(open_weights(tensor.file)).read, tensor.name) for tensor in (head, embedding)]
        equal = head.shape == embedding.shape and all(
            np.array_equal(*(one(name, start, min(start + rows, head.shape[0])) for one, name in read))
            for start in range(0, head.shape[0], rows)
        )
    if not equal:
        raise ValueError(
            f"config.json ties the head to the embedding (tie_word_embeddings), but {head.name} in {head.file} differs "
            f"from {embedding.name}: expected no {LM_HEAD}, an equal one, or tie_word_embeddings false"
        )


# ---- filling the parameters ------------------------------------------------------------------------------------------


def fill(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh | None,
    stored: Iterable[tuple[Stored, HubTensor]],
    sizes: dict[str, int],
) -> dict[str, jax.Array]:
    """{path: parameter}, of the shapes and dtypes in `leaves`, in the same order."""
    by_file = sorted(stored, key=lambda pair: str(pair[0].file))
    layouts = {tensor.row.path: tensor.row.layout for _, tensor in by_file}
    shardings = dict.fromkeys(leaves) if mesh is None else param_shardings(leaves, mesh)
    parameters = {path: assemble(layouts[path], sizes, leaf, shardings[path]) for path, leaf in leaves.items()}
    for file, pairs in itertools.groupby(by_file, key=lambda pair: pair[0].file):
        with open_weights(file) as weights:
            for here, tensor in pairs:
                parameters[tensor.row.path].put(weights.read(here.name), tensor.layer)
    return {path: parameter.finish() for path, parameter in parameters.items()}
