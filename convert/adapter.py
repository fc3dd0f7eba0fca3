"""Reads and writes LoRA in PEFT's format: adapter_model.safetensors and adapter_config.json.

The names follow from the table of weights. For the weight [out, in] of a module that transformers 4.52 and later call x,
PEFT stores A [r, in] as `base_model.model.x.lora_A.weight` and B [out, r] as `base_model.model.x.lora_B.weight`.
"""

import dataclasses
import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from convert.reader import find_checkpoint, load_parameters, match_tensors, patch_shape
from convert.table import Row, current_name, hub_tensors, original_name, read_sizes, table_of
from convert.weights import list_file
from convert.writer import staged_folder, write_safetensors
from liger_jax import processes
from liger_jax.checkpoint import float_dtype
from liger_jax.config.hub import is_integer, is_number
from liger_jax.errors import NotFoundError, UserError
from liger_jax.files import read_json_object, write_json
from liger_jax.model import QwenVL
from liger_jax.model.lora import TARGETS, LoraOptions, add_lora, find_targets, lora_config, lora_leaves
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import get_mesh

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Files in which other trainers store the weights that they train in full next to LoRA.
FULLY_TRAINED = ("non_lora_state_dict.bin", "non_lora_trainables.bin")
PREFIX = "base_model.model."

# Options of an adapter_config.json, besides rank, alpha and targets, that do not change the outputs of a trained adapter.
# Any other option must be off: null, false, empty or "none".
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",  # initialization of A
    "inference_mode",
    "layers_pattern",  # used with layers_to_transform only
    "lora_dropout",  # training only
    "megatron_core",  # used with megatron_config only
    "peft_version",
    "qalora_group_size",  # used with use_qalora only
    "revision",
    "runtime_config",
    "task_type",
}
# Initialisations of A and B that leave the base weights alone. Others (PiSSA, LoftQ, ...) need modified base weights.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@functools.cache
def adapted_rows(family: str) -> dict[str, Row]:
    """Returns {path of a linear layer that LoRA can adapt: the row of its weight} for a member of the family."""
    rows = {row.path.removesuffix("/kernel"): row for row in table_of(family)}
    return {path: rows[path] for path in TARGETS.values() if path in rows}


@functools.cache
def adapter_table(family: str) -> tuple[Row, ...]:
    """Returns the rows of the tensors of an adapter."""
    return tuple(lora_row for row in adapted_rows(family).values() for lora_row in _lora_rows(row))


def _lora_rows(row: Row) -> tuple[Row, Row]:
    """Returns the rows of A and B for a weight: `(N D) H` becomes `r H` and `(N D) r`."""
    outputs, inputs = re.findall(r"\([^)]*\)|\w+", row.hub_axes)
    path = row.path.removesuffix("/kernel")
    return (
        Row(_peft_name(row.hub, "A"), f"r {inputs}", f"{path}/lora/a"),
        Row(_peft_name(row.hub, "B"), f"{outputs} r", f"{path}/lora/b"),
    )


def _peft_name(hub: str, matrix: str) -> str:
    """Returns PEFT's name of the matrix A or B of a weight, with transformers 4.52 and later."""
    return f"{PREFIX}{current_name(hub).removesuffix('.weight')}.lora_{matrix}.weight"


def save_adapter(model: QwenVL, directory: str | Path, *, base_model: str | None = None) -> None:
    """Writes the model's LoRA weights and options to a folder that PEFT loads on top of the base model.

    All files appear in the folder together at the end. Other files in it are kept.

    Args:
        model: the model, with LoRA.
        directory: the folder to write.
        base_model: hub id or folder of the model without LoRA, for PEFT's AutoPeftModel.

    Raises:
        UserError: the model has no LoRA.

    Example:
        >>> import tempfile
        >>> from liger_jax import QwenVL, QwenVLConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(add_lora(QwenVL.init(QwenVLConfig.tiny())), folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    options = lora_config(model)
    if options is None:
        raise UserError("model has no LoRA to save; expected one with LoRA (to_hf writes the weights of a model)")
    leaves = lora_leaves(model)
    if together := processes.spans(leaves):
        leaves = {path: processes.to_host(leaf) for path, leaf in leaves.items()}
    table = adapter_table(model.config.family)
    sizes = _read_sizes(model, leaves)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "use_rslora": options.rslora,
        "target_modules": _target_modules(model, [TARGETS[name] for name in options.targets]),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }

    def write() -> None:
        with staged_folder(Path(directory)) as folder:
            write_json(folder / CONFIG, config)
            write_safetensors(folder / WEIGHTS, hub_tensors(leaves, sizes, table), leaves, sizes)

    processes.from_first(write, together=together)


def load_adapter(
    model: QwenVL,
    path_or_repo_id: str | Path,
    *,
    dtype="float32",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_non_finite: bool = False,
) -> QwenVL:
    """Returns the model with an adapter that PEFT or `save_adapter` wrote, from a folder or from the Hugging Face hub.

    Supports the module names of all versions of transformers. The weights are shared with `model`, not copied. Dropout in
    the adapter's configuration is ignored, since it applies to training only.

    Args:
        model: the model that the adapter was trained for, without LoRA.
        path_or_repo_id: the folder (adapter_config.json, adapter_model.safetensors), or a hub id.
        dtype: dtype of A and B.
        revision: branch, tag or commit on the hub.
        cache_dir: download cache; None: huggingface_hub's own.
        allow_non_finite: also load tensors that hold NaN or infinity, or numbers that become infinite in `dtype`.

    Returns:
        A new model, on the same mesh as `model`.

    Raises:
        NotFoundError: the folder, the repository, or a file in it does not exist.
        UserError: an unsupported option (DoRA, trained biases, fully trained modules, separate ranks for some modules, only
            some layers, ...), weights next to the adapter that were trained in full (non_lora_state_dict.bin), a tensor
            that holds NaN, infinity or numbers too large for `dtype`, or tensors that do not match. One error lists all
            tensors that are missing, unexpected, mis-shaped or not floating point.

    Example:
        >>> load_adapter(model, "runs/adapter")  # doctest: +SKIP
    """
    folder = find_checkpoint(path_or_repo_id, revision=revision, cache_dir=cache_dir, other_files=FULLY_TRAINED)
    if unread := [name for name in FULLY_TRAINED if (folder / name).is_file()]:
        raise UserError(
            f"{folder} has {' and '.join(unread)} next to the adapter: weights that were trained in full, which are not "
            "read; expected an adapter alone, or a merged checkpoint (from_hf)"
        )
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        files = sorted(path.name for path in folder.iterdir())
        raise NotFoundError(f"{folder} has no {' and no '.join(missing)}, only {files}; expected a PEFT adapter")
    tensors = list_file(folder / WEIGHTS)
    adapted = {_current_peft_name(tensor.name) for tensor in tensors}
    options, dtype = dataclasses.asdict(read_adapter_config(folder / CONFIG, model, adapted)), float_dtype(dtype)
    abstract = jax.eval_shape(lambda model: add_lora(model, **options, dtype=dtype), model)
    leaves = lora_leaves(abstract)
    sizes = _read_sizes(model, leaves)
    expected = {tensor.name: tensor for tensor in hub_tensors(leaves, sizes, adapter_table(model.config.family))}
    complaint = f"{folder / WEIGHTS} has tensors that do not fit its {CONFIG} and the model"
    stored = match_tensors(expected, tensors, complaint, rename=_current_peft_name)
    pairs = [(stored[name], tensor) for name, tensor in expected.items()]
    values = param_paths(model) | load_parameters(
        leaves, get_mesh(model), pairs, sizes, allow_non_finite=allow_non_finite
    )
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[path] for path in param_paths(abstract)])


def read_adapter_config(file: Path, model: QwenVL, stored: Collection[str] = ()) -> LoraOptions:
    """Returns the LoRA options in an adapter_config.json for a model.

    Args:
        file: the adapter_config.json.
        model: the model that the adapter was trained for.
        stored: names of the adapter's tensors, as `_current_peft_name` spells them. They tell which version of transformers
            named the modules, if the target modules adapt other layers with each.

    Raises:
        UserError: it is not LoRA, has no rank or alpha, adapts no module, or sets an unsupported option that changes the
            outputs.
    """
    config = read_json_object(file)
    peft_type = config.pop("peft_type", None)
    if peft_type != "LORA":
        raise UserError(f"{file}: peft_type is {peft_type!r:.60}; expected 'LORA'")
    init = config.pop("init_lora_weights", None)
    if init not in INITS:
        raise UserError(
            f"{file}: init_lora_weights is {init!r:.60}, which changes the base weights; expected one of {INITS}"
        )
    rank, alpha, rslora = config.pop("r", None), config.pop("lora_alpha", None), config.pop("use_rslora", None)
    if not is_integer(rank) or not is_number(alpha):
        raise UserError(f"{file}: r is {rank!r:.60} and lora_alpha is {alpha!r:.60}; expected numbers")
    if not isinstance(rslora, bool | None):
        raise UserError(f"{file}: use_rslora is {rslora!r:.60}; expected true or false")
    modules, excluded = config.pop("target_modules", None), config.pop("exclude_modules", None)
    for name, value in (("target_modules", modules), ("exclude_modules", excluded)):
        if not (
            isinstance(value, str | None) or (isinstance(value, list) and all(isinstance(part, str) for part in value))
        ):
            raise UserError(f"{file}: {name} is {value!r:.300}; expected a text or a list of texts")
    unsupported = {name: value for name, value in config.items() if name not in WITHOUT_EFFECT and not _is_off(value)}
    if unsupported:
        raise UserError(
            f"{file}: {unsupported!r:.300} is not supported; expected plain LoRA with the same options in all layers"
        )
    try:
        targets = _find_adapted(model, modules, excluded, stored)
    except re.error as error:
        raise UserError(
            f"{file}: target_modules is {modules!r:.300} and exclude_modules is {excluded!r:.300}; expected valid regular "
            f"expressions ({error})"
        ) from error
    if not targets:
        raise UserError(f"{file}: target_modules is {modules!r:.300}; expected some of {list(find_targets(model))}")
    try:
        return LoraOptions(rank=rank, alpha=alpha, targets=targets, rslora=bool(rslora))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _find_adapted(
    model: QwenVL,
    modules: str | Collection[str] | None,
    excluded: str | Collection[str] | None,
    stored: Collection[str],
) -> list[str]:
    """Returns the layers that PEFT would adapt, some of `TARGETS`, under the module names of one version of transformers."""
    rows = adapted_rows(model.config.family)
    hub = {target: rows[path].hub.replace("{i}", "0") for target, path in find_targets(model).items()}
    choices = []
    for spell in (current_name, original_name):
        names = {target: spell(weight).removesuffix(".weight") for target, weight in hub.items()}
        choices.append([t for t, name in names.items() if _matches(modules, name) and not _matches(excluded, name)])
    adapted = [target for target, weight in hub.items() if _peft_name(weight, "A") in stored]
    return adapted if adapted and adapted in choices else max(choices, key=len)


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("none", "", [], {})


def _matches(modules: str | Collection[str] | None, name: str) -> bool:
    """Returns whether PEFT's target_modules or exclude_modules contain a module.

    They are a regular expression, or a list of names or of their last parts.
    """
    if modules == "all-linear":
        return True
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(f".{name}".endswith(f".{module}") for module in modules or ())


def _current_peft_name(name: str) -> str:
    """Returns PEFT's name of a tensor with transformers 4.52 and later, given its name with any version."""
    return PREFIX + current_name(name.removeprefix(PREFIX))


def _target_modules(model: QwenVL, paths: Collection[str]) -> list[str] | str:
    """Returns PEFT's target_modules for the linear layers at these paths.

    A list of the shortest ends of their names that no other layer shares; or, where only the start of the name differs, as
    between the MLPs of Qwen2.5-VL's towers, a regular expression.
    """
    rows = adapted_rows(model.config.family)
    modules = {path: rows[path].hub.removesuffix(".weight").split(".") for path in find_targets(model).values()}
    other_modules = [module for path, module in modules.items() if path not in paths] + [
        ["visual", "patch_embed", "proj"]
    ]

    def shortest_end(module: list[str]) -> list[str]:
        lengths = range(1 if module[-1].isidentifier() else 2, len(module))
        return next((module[-n:] for n in lengths if all(other[-n:] != module[-n:] for other in other_modules)), module)

    ends = [shortest_end(modules[path]) for path in paths]
    if not any("{i}" in end for end in ends):
        return list(dict.fromkeys(".".join(end) for end in ends))
    patterns = [r"\.".join(r"\d+" if part == "{i}" else part for part in modules[path][1:]) for path in paths]
    return rf".*\.({'|'.join(patterns)})"


def _read_sizes(model: QwenVL, leaves: dict[str, Any]) -> dict[str, int]:
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    return read_sizes(shapes, patch_shape(model.config.vision), adapter_table(model.config.family))
