"""Floating point operations that training on a batch needs, and what devices can do of them."""

import re
from collections.abc import Collection

import jax
import numpy as np

from liger_jax.config import Qwen2VLConfig
from liger_jax.inputs.batch import IGNORE, Batch

# What a device is called -> bfloat16 operations a second on its tensor cores, without sparsity; the first that fits.
PEAKS = (
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100|H200", 989.4e12),
    (r"A100", 312e12),
    (r"B200", 2250e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """bfloat16 operations a second that the device's data sheet promises; None for one that is not in the table."""
    return next((peak for name, peak in PEAKS if re.search(name, device.device_kind)), None)


def step_flops(
    config: Qwen2VLConfig, batch: Batch, *, frozen: Collection[str] = (), adapted: Collection[str] = ()
) -> float:
    """Operations that a training step on a batch needs.

        products with weights:  2 x tokens x weights forward, the same for the gradient of the input, and of the weights
        attention:              4 x pairs x heads x head size forward, twice that backward

    Only what the result depends on is counted: not padding, not what the backward pass computes again, of causal
    attention the half that is not masked, and of the vocabulary's logits those of trained tokens. Norms, rotations and
    the optimizer are left out, and LoRA's own thin products.

    Args:
        config: of the model.
        batch: as `prepare` returns it, in host memory.
        frozen: parts that are not trained ("vision", "merger", "text"): what only their gradients need is not counted.
        adapted: parts with LoRA: their inputs have gradients even where their weights have none.

    Example:
        >>> import numpy as np
        >>> from liger_jax import Qwen2VLConfig, prepare
        >>> from liger_jax.train.flops import step_flops
        >>> config, ids = Qwen2VLConfig.qwen2_vl_2b(), np.ones((4, 2048), int)
        >>> f"{step_flops(config, prepare(config, input_ids=ids, labels=ids)):.3g}"
        '8.02e+13'
    """
    text, vision = config.text, config.vision
    tokens, patches = _lengths(batch.segment_ids), np.zeros(0)
    if batch.vision is not None:
        patches = _lengths(batch.vision.segment_ids)
    trained = 0 if batch.labels is None else np.count_nonzero(np.asarray(batch.labels) != IGNORE)

    block = 4 * vision.embed_dim**2 + 2 * vision.embed_dim * vision.intermediate_size
    wide = vision.embed_dim * vision.merge_unit
    heads = text.num_attention_heads + text.num_key_value_heads
    layer = 2 * text.hidden_size * heads * text.head_dim + 3 * text.hidden_size * text.intermediate_size
    # part -> products with weights, and pairs of attention; in the order in which the values go through them
    parts = {
        "vision": (
            patches.sum() * (vision.patch_values * vision.embed_dim + vision.depth * block),
            vision.depth * vision.embed_dim * np.square(patches).sum(),
        ),
        "merger": (patches.sum() / vision.merge_unit * (wide**2 + wide * vision.hidden_size), 0),
        "text": (
            tokens.sum() * text.num_hidden_layers * layer + trained * text.hidden_size * text.vocab_size,
            text.num_hidden_layers * text.num_attention_heads * text.head_dim * np.square(tokens).sum() / 2,
        ),
    }
    total, gradient_goes_through = 0.0, False
    for part, (products, pairs) in parts.items():
        gradient_goes_through |= part not in frozen or part in adapted
        total += 2 * products * (1 + gradient_goes_through + (part not in frozen))
        total += 4 * pairs * (1 + 2 * gradient_goes_through)
    return float(total)


def _lengths(segment_ids: np.ndarray) -> np.ndarray:
    """How long each segment is, over all rows; padding (0) is none."""
    segment_ids = np.asarray(segment_ids, np.int64)
    most = segment_ids.max(initial=0) + 1
    numbers = segment_ids + most * np.arange(len(segment_ids))[:, None]
    counts = np.bincount(numbers.ravel(), minlength=most * len(segment_ids))
    return counts.reshape(-1, most)[:, 1:].ravel().astype(np.float64)
