"""Counts the floating-point operations of a training step, and looks up the peak rate of a device."""

import functools
import re
from collections.abc import Collection

import jax
import numpy as np

from liger_jax.config import QwenVLConfig
from liger_jax.inputs.batch import IGNORE, Batch
from liger_jax.model import QwenVL
from liger_jax.model.params import PARTS, find_row, param_paths

# Device name -> bfloat16 operations per second on its tensor cores, without sparsity. The first match counts.
PEAKS = (
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100|H200", 989.4e12),
    (r"A100", 312e12),
    (r"B200", 2250e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """Returns the bfloat16 operations per second from the device's data sheet, or None for a device that is not listed."""
    return next((peak for name, peak in PEAKS if re.search(name, device.device_kind)), None)


def step_flops(
    config: QwenVLConfig,
    batch: Batch,
    *,
    frozen: Collection[str] = (),
    adapted: Collection[str] = (),
    heads: int | None = None,
) -> float:
    """Returns the number of floating-point operations of a training step on a batch.

        matmuls with weights:  2 x tokens x weights forward, and the same for each gradient: of the input, and of the weights
        attention:             4 x pairs x heads x head size forward, twice that backward

    Counts only necessary operations: no padding, no recomputation in the backward pass, only the unmasked half of causal
    attention, and only the logits of trained tokens. Ignores norms, RoPE, the optimizer and LoRA's low-rank matmuls. The
    number of weights in each part follows from the table of parameters.

    Args:
        config: the model's configuration.
        batch: as `prepare` returns it, in host memory.
        frozen: parts that are not trained (vision, merger, text). Operations that only their gradients need do not count.
        adapted: parts with LoRA. They need the gradients of their inputs even if their weights are frozen.
        heads: query heads of the language model's attention, including a mesh's padding heads; by default, the model's own.

    Example:
        >>> import numpy as np
        >>> from liger_jax import Qwen2VLConfig, prepare
        >>> from liger_jax.train.flops import step_flops
        >>> config, ids = Qwen2VLConfig.qwen2_vl_2b(), np.ones((4, 2048), int)
        >>> f"{step_flops(config, prepare(config, input_ids=ids, labels=ids)):.3g}"
        '8.02e+13'
    """
    text, vision = config.text, config.vision
    tokens, patches, windows = _segment_lengths(batch.segment_ids), np.zeros(0), np.zeros(0)
    if batch.vision is not None:
        patches = _segment_lengths(batch.vision.segment_ids)
        if batch.vision.window_ids is not None:
            windows = _segment_lengths(batch.vision.window_ids)
    full_layers = len(vision.full_attention_layers) if vision.window_size else vision.depth
    patch_pairs = full_layers * np.square(patches).sum() + (vision.depth - full_layers) * np.square(windows).sum()
    trained_tokens = 0 if batch.labels is None else np.count_nonzero(np.asarray(batch.labels) != IGNORE)

    weights, head = _weights(config), text.vocab_size * text.hidden_size
    # part -> multiply-adds with weights, and query-key pairs x heads x head size; in the order of the data flow
    parts = {
        "vision": (patches.sum() * weights["vision"], vision.embed_dim * patch_pairs),
        "merger": (patches.sum() / vision.merge_unit * weights["merger"], 0),
        "text": (
            tokens.sum() * weights["text"] + trained_tokens * head,
            text.num_hidden_layers * (heads or text.num_attention_heads) * text.head_dim * np.square(tokens).sum() / 2,
        ),
    }
    total, needs_input_gradient = 0.0, False
    for part, (matmuls, attention) in parts.items():
        needs_input_gradient |= part not in frozen or part in adapted
        total += 2 * matmuls * (1 + needs_input_gradient + (part not in frozen))
        total += 4 * attention * (1 + 2 * needs_input_gradient)
    return float(total)


@functools.cache
def _weights(config: QwenVLConfig) -> dict[str, int]:
    """Returns the number of weights in the kernels of each part of the model."""
    weights: dict[str, int] = dict.fromkeys(PARTS, 0)
    for path, leaf in param_paths(QwenVL.abstract(config)).items():
        if find_row(path).is_kernel:
            weights[find_row(path).part] += leaf.size
    return weights


def _segment_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Returns the length of each segment in all rows. Padding (0) is not a segment."""
    segment_ids = np.asarray(segment_ids, np.int64)
    ids_per_row = segment_ids.max(initial=0) + 1
    numbers = segment_ids + ids_per_row * np.arange(len(segment_ids))[:, None]
    counts = np.bincount(numbers.ravel(), minlength=ids_per_row * len(segment_ids))
    return counts.reshape(-1, ids_per_row)[:, 1:].ravel().astype(np.float64)
