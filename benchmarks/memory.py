"""`python -m benchmarks memory`: estimates the GPU memory that each model needs. Needs no GPU.

    training     the estimate of `liger-jax plan`, see `liger_jax.train.memory`
    generation   weights 2 bytes + a second copy of the decoder layers, in the order in which decoding reads them + KV cache

A test compares the estimates of generation with all measurements.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import work
from benchmarks.environment import GIB, RESULTS
from benchmarks.record import FAMILY_NAMES
from liger_jax import QwenVL, QwenVLConfig
from liger_jax.files import atomic_write
from liger_jax.model.params import find_row, param_paths
from liger_jax.options import PlanOptions, Remat
from liger_jax.plan import make_training
from liger_jax.train.memory import estimate_memory

GPUS = {"24 GB": 24, "48 GB": 48, "80 GB": 80, "141 GB": 141}
MODELS = (
    *("qwen2_vl_2b", "qwen2_vl_7b", "qwen2_vl_72b"),
    *("qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_5_vl_32b", "qwen2_5_vl_72b"),
    *("qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b"),
)
USABLE = 0.92  # share of a GPU's memory; the rest is the CUDA context, and what fragmentation costs
# The ways of training in the tables, and their options.
METHODS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, `--master-weights`": {"master_weights": True},
    "`--freeze vision`": {"freeze": ("vision",)},
    "`--lora 16`": {"lora": 16},
}
REMATS: tuple[Remat, ...] = ("full", "narrow", "dots")
BATCH_SIZES = (4, 16)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Estimates the memory of training and generation on one GPU. Needs no GPU. Writes memory.json."""

    models: tuple[str, ...] = MODELS
    """Presets of `QwenVLConfig`."""
    results: Path = RESULTS
    """Folder of the result file."""

    def run(self) -> Path:
        records = []
        for model in self.models:
            for record in estimates(getattr(QwenVLConfig, model)()):
                records.append({"model": model, **record})
                print(records[-1], flush=True)
        file = self.results / "memory.json"
        atomic_write(file, json.dumps(records, indent=1) + "\n")
        return file


def estimates(config: QwenVLConfig) -> Iterator[dict[str, Any]]:
    """Yields what the tables show of a model: all methods and generation with one row, and all weights with batches."""
    for method, options in METHODS.items():
        gib = training_gib(config, rows=1, remat="full", **options)
        yield {"what": method, "remat": "full", "rows": 1, "gib": gib}
    yield {"what": "generate", "rows": 1, "gib": generation_gib(config)}
    for remat in REMATS:
        for rows in BATCH_SIZES:
            yield {"what": "batch", "remat": remat, "rows": rows, "gib": training_gib(config, rows=rows, remat=remat)}


def training_gib(config: QwenVLConfig, *, rows: int, remat: Remat, **options: Any) -> float:
    """Returns the memory that a training step needs on one GPU. `options` are those of `PlanOptions`."""
    plan_options = PlanOptions(length=work.LENGTH, patches=4 * work.IMAGE_TOKENS, **options)
    return estimate_memory(make_training(config, plan_options, remat), {}, rows).total / GIB


def count_weights(config: QwenVLConfig) -> dict[str, int]:
    """Returns the number of weights of each part of a model, and of its decoder layers.

    >>> from liger_jax import QwenVLConfig
    >>> count_weights(QwenVLConfig.qwen2_vl_2b())
    {'vision': 631183360, 'merger': 34087936, 'text': 1543714304, 'layers': 1310339072}
    """
    counts = dict.fromkeys(("vision", "merger", "text", "layers"), 0)
    for path, leaf in param_paths(QwenVL.abstract(config)).items():
        row = find_row(path)
        counts[row.part] += leaf.size
        counts["layers"] += leaf.size * (row.part == "text" and row.stack is not None)
    return counts


def generation_gib(config: QwenVLConfig, *, rows: int = 1) -> float:
    """Returns the memory that generation needs on one GPU after prompts as long as the sequences of the benchmarks.

    The layers count twice, because their weights are packed for decoding, and so do keys and values: those of the prompts
    are copied to the cache, which has room for new tokens.
    """
    text, counts = config.text, count_weights(config)
    weights = sum(counts.values())  # the layers count twice
    keys_and_values = 2 * rows * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * work.LENGTH
    return 2 * (weights + 2 * keys_and_values) / GIB


def memory_table(records: list[dict]) -> str:
    """Returns the memory of each model and method with one sequence at a time, and the smallest GPU that has it."""
    lines = [f"| | {' | '.join(METHODS)} | generate |", "|---" * (len(METHODS) + 2) + "|"]
    for model in dict.fromkeys(record["model"] for record in records):
        sizes = [r["gib"] for r in records if r["model"] == model and r["what"] != "batch"]
        lines.append(f"| {_title(model)} | {' | '.join(f'{gib:.0f} GiB: {_smallest_gpu(gib)}' for gib in sizes)} |")
    return "\n".join(lines)


def batch_table(records: list[dict]) -> str:
    """Returns the memory of the models that train on one GPU, all weights, by remat policy and number of sequences."""
    titles = [f"`{remat}`, {rows} sequences" for remat in REMATS for rows in BATCH_SIZES]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for model in dict.fromkeys(record["model"] for record in records):
        sizes = [r["gib"] for r in records if r["model"] == model and r["what"] == "batch"]
        if min(sizes) <= USABLE * max(GPUS.values()):
            lines.append(f"| {_title(model)} | {' | '.join(f'{gib:.0f} GiB' for gib in sizes)} |")
    return "\n".join(lines)


def _title(model: str) -> str:
    family, _, size = model.rpartition("_")
    return f"{FAMILY_NAMES[family]} {size.upper()}"


def _smallest_gpu(gib: float) -> str:
    return next((name for name, size in GPUS.items() if gib <= USABLE * size), "several")
