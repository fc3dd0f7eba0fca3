"""LoRA as PEFT keeps it: adapter_model.safetensors and adapter_config.json.

Which tensor is which A or B follows from the table of the weights: where a weight [out, in] is called `x.weight`, PEFT
calls A [r, in] `base_model.model.x.lora_A.weight` and B [out, r] `base_model.model.x.lora_B.weight`, x being the module's
name in transformers 4.52 and later.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from convert.hub import find_checkpoint
from convert.reader import fill, match, patch_of
from convert.table import TABLE, Row, current_name, hub_tensors, original_name, read_sizes
from convert.weights import list_file, read_json
from convert.writer import arriving_together, write_safetensors
from liger_jax.checkpoint import float_dtype
from liger_jax.model import Qwen2VL
from liger_jax.model.lora import TARGETS, add_lora, lora_config, lora_leaves
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import get_mesh

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
ADAPTED = {
    row.path.removesuffix("/kernel"): row for row in TABLE if row.path.removesuffix("/kernel") in TARGETS.values()
}

# What an adapter_config.json may say besides rank, alpha and targets without changing what a trained adapter computes.
# Any other option has to be off: null, false, empty or "none".
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",  # how A was made
    "inference_mode",
    "layers_pattern",  # read with layers_to_transform only
    "lora_dropout",  # of training
    "megatron_core",  # read with megatron_config only
    "peft_version",
    "qalora_group_size",  # read with use_qalora only
    "revision",
    "runtime_config",
    "task_type",
}
# Ways to make A and B that leave the weights beside them alone; others (PiSSA, LoftQ, ...) belong to changed weights.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def _rows(row: Row) -> tuple[Row, Row]:
    """A and B of a weight: `(N D) H -> H N D` becomes `r H -> H r` and `(N D) r -> r N D`."""
    outputs, inputs = re.findall(r"\([^)]*\)|\w+", row.layout.partition(" -> ")[0])
    module, path = PREFIX + current_name(row.hub).removesuffix(".weight"), row.path.removesuffix("/kernel")
    return (
        Row(f"{module}.lora_A.weight", f"{path}/lora/a", f"r {inputs} -> {inputs.strip('()')} r"),
        Row(f"{module}.lora_B.weight", f"{path}/lora/b", f"{outputs} r -> r {outputs.strip('()')}"),
    )


ADAPTER = tuple(half for row in ADAPTED.values() for half in _rows(row))


def save_adapter(model: Qwen2VL, directory: str | Path, *, base_model: str | None = None) -> None:
    """Writes the model's LoRA as a folder that PEFT loads, on top of the model without it.

    The files arrive in the folder together at the end; other files there stay.

    Args:
        model: one with LoRA.
        directory: the folder to write.
        base_model: hub id or folder of the model without LoRA, for PEFT's AutoPeftModel.

    Raises:
        ValueError: the model has no LoRA.

    Example:
        >>> import tempfile
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(add_lora(Qwen2VL.init(Qwen2VLConfig.tiny())), folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    told = lora_config(model)
    if told is None:
        raise ValueError("The model has no LoRA to save; to_hf writes its weights")
    leaves = lora_leaves(model)
    sizes = _sizes(model, leaves)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": told["rank"],
        "lora_alpha": told["alpha"],
        "use_rslora": told["rslora"],
        "target_modules": told["targets"],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with arriving_together(Path(directory)) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(folder / WEIGHTS, hub_tensors(leaves, sizes, ADAPTER), leaves, sizes)


def load_adapter(
    model: Qwen2VL,
    path_or_repo_id: str | Path,
    *,
    dtype="float32",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Qwen2VL:
    """The model with an adapter that PEFT or `save_adapter` wrote: a folder, or the id of one on the Hugging Face hub.

    Takes the module names of all versions of transformers. The weights are shared with `model`, not copied. A dropout in
    the configuration, which belongs to its training, is left out.

    Args:
        model: one without LoRA, which the adapter was trained for.
        path_or_repo_id: the folder (adapter_config.json, adapter_model.safetensors), or a hub id.
        dtype: of A and B.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept, if not in huggingface_hub's own cache.

    Returns:
        A new model; on a mesh, if `model` is on one.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file is missing from it.
        ValueError: an option that is not supported (DoRA, trained biases, other modules saved in full, ranks of their own
            for some modules, some layers only, ...), or tensors that do not fit: all that are missing, unexpected or of
            another shape are named together.

    Example:
        >>> load_adapter(model, "runs/adapter")  # doctest: +SKIP
    """
    folder = find_checkpoint(path_or_repo_id, revision=revision, cache_dir=cache_dir)
    absent = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if absent:
        found = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(f"No adapter in {folder}: {' and '.join(absent)} missing, found {found}")
    told = read_adapter_config(folder / CONFIG)
    abstract = jax.eval_shape(lambda model: add_lora(model, **told, dtype=float_dtype(dtype)), model)
    leaves = lora_leaves(abstract)
    sizes = _sizes(model, leaves)
    expected = {tensor.name: tensor for tensor in hub_tensors(leaves, sizes, ADAPTER)}
    complaint = f"The tensors in {folder / WEIGHTS} do not fit its {CONFIG} and the model"
    stored = match(expected, list_file(folder / WEIGHTS), complaint, rename=_current)
    pairs = [(stored[name], tensor) for name, tensor in expected.items()]
    values = param_paths(model) | fill(leaves, get_mesh(model), pairs, sizes)
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[path] for path in param_paths(abstract)])


def read_adapter_config(file: Path) -> dict[str, Any]:
    """PEFT's configuration as what `add_lora` takes.

    Raises:
        ValueError: not LoRA, no rank or alpha, nothing adapted, or an option that changes what is computed.
    """
    config = read_json(file)
    kind = config.pop("peft_type", None)
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type is {kind!r}; expected 'LORA'")
    init = config.pop("init_lora_weights", None)
    if init not in INITS:
        raise ValueError(f"{file}: init_lora_weights is {init!r}, which changes the weights; expected one of {INITS}")
    rank, alpha, rslora = config.pop("r", None), config.pop("lora_alpha", None), config.pop("use_rslora", False)
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ValueError(f"{file}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers")
    chosen, excluded = config.pop("target_modules", None), config.pop("exclude_modules", None)
    extras = {name: value for name, value in config.items() if name not in WITHOUT_EFFECT and not _is_off(value)}
    if extras:
        raise ValueError(f"{file}: {extras} is not supported; expected LoRA of all layers alike and nothing else")
    try:
        targets = [name for name, path in TARGETS.items() if _hits(chosen, path) and not _hits(excluded, path)]
    except re.error as error:
        raise ValueError(f"{file}: no regular expression in target_modules or exclude_modules: {error}") from None
    if not targets:
        raise ValueError(f"{file}: target_modules is {chosen!r}, none of {list(TARGETS)}")
    return {"rank": rank, "alpha": alpha, "rslora": bool(rslora), "targets": targets}


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("none", "", [], {})


def _hits(modules: str | Collection[str] | None, path: str) -> bool:
    """Whether PEFT finds the module at `path` in `modules`: a regular expression, or names or their last parts."""
    if modules == "all-linear":
        return True
    original = ADAPTED[path].hub.removesuffix(".weight").replace("{i}", "0")
    names = (original, current_name(original))
    if isinstance(modules, str):
        return any(re.fullmatch(modules, name) for name in names)
    return any(f".{name}".endswith(f".{module}") for name in names for module in modules or ())


def _current(name: str) -> str:
    return PREFIX + current_name(original_name(name.removeprefix(PREFIX)))


def _sizes(model: Qwen2VL, leaves: dict[str, Any]) -> dict[str, int]:
    return read_sizes({path: leaf.shape for path, leaf in leaves.items()}, patch_of(model.config.vision), ADAPTER)
