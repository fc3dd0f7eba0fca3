"""AdamW as Qwen2-VL is trained: parts of the model frozen or at learning rates of their own, no decay where it harms."""

import re
from collections.abc import Collection
from typing import Any

import jax
import optax

from liger_jax.model.params import path_name
from liger_jax.train.grad_stats import reporting
from liger_jax.train.master_weights import with_master_weights

LearningRate = float | optax.Schedule
# The parts of a model and how the paths of their weights look; the first that fits counts.
PARTS = {"lora": "/lora/", "merger": "^visual/merger/", "vision": "^visual/", "text": "^(language_model|lm_head)/"}
BASE = ("merger", "vision", "text")  # what stays frozen while LoRA alone is trained
# Weights that decay: of products and tables. Norms and biases do not, as in transformers.
DECAYING = ("/kernel", "/lora/a", "/lora/b", "embed_tokens/weight", "lm_head/weight")


def make_optimizer(
    learning_rate: LearningRate,
    *,
    vision: LearningRate | None = None,
    merger: LearningRate | None = None,
    freeze: Collection[str] = (),
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    master_weights: bool = False,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW for a `TrainState`.

        m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      (g: clipped to the norm max_grad_norm)
        w = w - learning_rate (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)

    Args:
        learning_rate: a number, or an optax schedule from the step to one.
        vision, merger: learning rates of the vision tower and of its merger; None: the same.
        freeze: parts that stay as they are: any of "vision", "merger", "text", "lora"; `BASE` to train a model's LoRA
            alone. They have no moments, their gradients are not computed, and do not count in the norm.
        weight_decay: of the weights of products and tables; norms and biases never decay.
        max_grad_norm: largest norm of all gradients together; None for no limit.
        master_weights: for a model in bfloat16, keep weights and moments of what is trained in float32.
        b1, b2, eps: of Adam.

    Returns:
        An `optax.GradientTransformation`, which reports the norm of the gradient and `learning_rate` to the metrics.

    Raises:
        ValueError: an unknown part; when a `TrainState` is made, nothing left to train.

    Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101

    Example:
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState
        >>> from liger_jax.train.optimizer import make_optimizer
        >>> optimizer = make_optimizer(1e-5, merger=2e-5, freeze=["vision"], weight_decay=0.1)
        >>> int(TrainState.create(Qwen2VL.init(Qwen2VLConfig.tiny()), optimizer).step)
        0
    """
    unknown = set(freeze) - set(PARTS)
    if unknown:
        raise ValueError(f"freeze has {sorted(unknown)}; expected some of {sorted(PARTS)}")
    if useless := [
        part for part, rate in (("vision", vision), ("merger", merger)) if rate is not None and part in freeze
    ]:
        raise ValueError(f"freeze has {useless}, which have learning rates of their own; expected one of the two")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; expected above 0, or None for gradients as they are")
    keep = with_master_weights if master_weights else lambda optimizer: optimizer
    rates = {"vision": vision, "merger": merger}
    of_part = {
        part: optax.set_to_zero()
        if part in freeze
        else keep(
            optax.adamw(
                learning_rate if rates.get(part) is None else rates[part],
                b1=b1,
                b2=b2,
                eps=eps,
                weight_decay=weight_decay,
                mask=_decays,
            )
        )
        for part in PARTS
    }

    def frozen(tree):
        mask = _by_path(lambda path: param_group(path) in freeze, tree)
        if all(jax.tree.leaves(mask)):
            raise ValueError(f"freeze is {sorted(freeze)}, all that the model has; expected at least one part to train")
        return mask

    without_frozen = optax.masked(optax.set_to_zero(), frozen)
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    adamw = optax.multi_transform(of_part, lambda tree: _by_path(param_group, tree))
    return optax.chain(without_frozen, reporting(learning_rate), clip, adamw)


def warmup_cosine(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Rises to `peak` in a share `warmup` of the steps, from the first on, then falls to 0 along a cosine.

    Raises:
        ValueError: a peak or share out of range.

    >>> [round(float(warmup_cosine(1.0, steps=6, warmup=0.34)(step)), 2) for step in range(7)]
    [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if not (0 <= peak < float("inf")):
        raise ValueError(f"learning_rate is {peak}; expected 0 or more")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is {warmup}; expected a share of the steps, from 0 to 1")
    rising = round(steps * warmup)
    rise = optax.linear_schedule(peak / (rising + 1), peak, rising)
    return optax.join_schedules([rise, optax.cosine_decay_schedule(peak, max(steps - rising, 1))], [rising])


def param_group(path: str) -> str:
    """The part that a weight belongs to, by its path."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, path))


def _decays(tree: Any) -> Any:
    return _by_path(lambda path: path.endswith(DECAYING), tree)


def _by_path(function, tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: function(path_name(path)), tree)
