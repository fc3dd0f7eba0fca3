"""Estimates the GPU memory that a model needs, and the smallest GPU that has it.

    training     weights 2 bytes, and per trained weight: gradient 2 + moments 4 (float32 master weights: 14)
                 + activations: a factor per remat policy x the input of each layer that has gradients
    generation   weights 2 bytes + a second copy of the decoder layers, in the order in which decoding reads them + KV cache

The factors are fitted to the measured training steps. A test compares the estimates with all of them.
"""

import dataclasses
import functools

from benchmarks.record import FAMILY_NAMES
from liger_jax import QwenVL, QwenVLConfig
from liger_jax.model.params import find_row, param_paths

GIB = 2**30
TOKENS, PATCHES = 2048, 4096  # of a sequence in the benchmarks
ACTIVATIONS = {"dots": 12.5, "narrow": 6.0, "full": 1.6}  # remat policy -> bytes saved, relative to the layers' inputs
FORWARD_ONLY = 2.5  # the same for a tower without gradients: the arrays of a layer and the matmuls' operands
GPUS = {"24 GB": 24, "48 GB": 48, "80 GB": 80, "141 GB": 141}
MODELS = (
    *("qwen2_vl_2b", "qwen2_vl_7b", "qwen2_vl_72b"),
    *("qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_5_vl_32b", "qwen2_5_vl_72b"),
    *("qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b"),
)
USABLE = 0.92  # share of a GPU's memory; the rest is the CUDA context, and what fragmentation costs


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of training: which parts it trains, and what it keeps of each trained weight."""

    name: str
    bytes_per_trained_weight: int = 6
    trained: tuple[str, ...] = ("vision", "merger", "text")
    adapter: bool = False
    """Whether only a small adapter of the language model is trained. It needs the gradients of its layers' inputs."""


METHODS = (
    Method("all weights"),
    Method("all weights, `--master-weights`", bytes_per_trained_weight=14),
    Method("`--freeze vision`", trained=("merger", "text")),
    Method("`--lora 16`", trained=(), adapter=True),
)


@functools.cache
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


def training_gib(config: QwenVLConfig, method: Method, *, rows: int, remat: str) -> float:
    """Returns the memory that a training step needs on one GPU."""
    text, vision, counts = config.text, config.vision, count_weights(config)
    weights = sum(counts[part] for part in ("vision", "merger", "text"))
    state = 2 * weights + method.bytes_per_trained_weight * sum(counts[part] for part in method.trained)
    factors = {
        part: ACTIVATIONS[remat] if part in method.trained or (part == "text" and method.adapter) else FORWARD_ONLY
        for part in ("vision", "text")
    }
    activations = factors["text"] * 2 * text.num_hidden_layers * TOKENS * text.hidden_size
    activations += factors["vision"] * 2 * vision.depth * PATCHES * vision.embed_dim
    return (state + rows * activations) / GIB


def generation_gib(config: QwenVLConfig, *, rows: int = 1) -> float:
    """Returns the memory that generation needs on one GPU after prompts of TOKENS tokens."""
    text, counts = config.text, count_weights(config)
    weights = sum(counts.values())  # the layers count twice
    cache = 2 * rows * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * TOKENS
    return 2 * (weights + cache) / GIB


def memory_table() -> str:
    """Returns the memory of each model and method with one sequence at a time, and the smallest GPU that has it."""
    lines = [f"| | {' | '.join(method.name for method in METHODS)} | generate |", "|---" * (len(METHODS) + 2) + "|"]
    for model in MODELS:
        config = getattr(QwenVLConfig, model)()
        sizes = [training_gib(config, method, rows=1, remat="full") for method in METHODS]
        cells = [f"{gib:.0f} GiB: {_smallest_gpu(gib)}" for gib in (*sizes, generation_gib(config))]
        lines.append(f"| {_title(model)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def batch_table() -> str:
    """Returns the memory of the models that train on one GPU, all weights, by remat policy and number of sequences."""
    columns = [(remat, rows) for remat in ("full", "narrow", "dots") for rows in (4, 16)]
    titles = [f"`{remat}`, {rows} sequences" for remat, rows in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for model in MODELS:
        config = getattr(QwenVLConfig, model)()
        sizes = [training_gib(config, METHODS[0], rows=rows, remat=remat) for remat, rows in columns]
        if min(sizes) <= USABLE * max(GPUS.values()):
            lines.append(f"| {_title(model)} | {' | '.join(f'{gib:.0f} GiB' for gib in sizes)} |")
    return "\n".join(lines)


def _title(model: str) -> str:
    family, _, size = model.rpartition("_")
    return f"{FAMILY_NAMES[family]} {size.upper()}"


def _smallest_gpu(gib: float) -> str:
    return next((name for name, size in GPUS.items() if gib <= USABLE * size), "several")
