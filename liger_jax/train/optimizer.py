"""AdamW for fine-tuning. Parts of the model can be frozen or have their own learning rates; norms and biases never decay."""

import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from liger_jax.errors import LigerWarning, UserError
from liger_jax.model.params import PARTS, find_row, param_group, path_name
from liger_jax.options import Optimization
from liger_jax.train.master_weights import MasterState, with_master_weights
from liger_jax.train.stochastic_rounding import LearningRate, StochasticState, stochastic_adamw

LARGEST_STEP = 2**31 - 1


def build_optimizer(options: Optimization, steps: int, *, seed: int = 0) -> optax.GradientTransformation:
    """Returns the optimizer of a training run: AdamW with warmup and cosine decay over `steps` steps.

    The seed is that of stochastic rounding.

    Raises:
        UserError: A value is out of range, or a part is frozen and has a learning rate of its own.

    Example:
        >>> from liger_jax.options import Optimization
        >>> optimizer = build_optimizer(Optimization(learning_rate=2e-5, freeze=("vision",)), steps=1000)
    """

    def schedule(peak: float) -> optax.Schedule:
        return warmup_cosine(peak, steps, options.warmup)

    if options.max_skipped_updates < 1:
        raise UserError(f"max_skipped_updates is {options.max_skipped_updates}; expected at least 1")
    vision, merger = options.vision_learning_rate, options.merger_learning_rate
    return make_optimizer(
        schedule(options.learning_rate),
        vision=None if vision is None else schedule(vision),
        merger=None if merger is None else schedule(merger),
        freeze=options.freeze,
        weight_decay=options.weight_decay,
        master_weights=options.master_weights,
        stochastic_rounding=options.stochastic_rounding,
        seed=seed,
    )


def make_optimizer(
    learning_rate: LearningRate,
    *,
    vision: LearningRate | None = None,
    merger: LearningRate | None = None,
    freeze: Collection[str] = (),
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    master_weights: bool = False,
    stochastic_rounding: bool = True,
    seed: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Returns AdamW for a `TrainState`.

        m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      (g: clipped to the norm max_grad_norm)
        w = w - learning_rate (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)

    Args:
        learning_rate: a number, or an optax schedule.
        vision: learning rate of the vision tower; by default, `learning_rate`.
        merger: learning rate of the merger between vision tower and language model; by default, `learning_rate`.
        freeze: parts that are not trained, any of vision, merger, text and lora. They have no moments. Their gradients are
            not computed and do not count in the norm. To train LoRA alone, freeze `liger_jax.model.params.PARTS`.
        weight_decay: weight decay of matmul weights and embeddings; norms and biases never decay.
        max_grad_norm: upper limit of the global gradient norm, or None for no limit.
        master_weights: for a model in bfloat16, keep weights and moments of the trained parts in float32.
        stochastic_rounding: round bfloat16 weights and their moments at random, in proportion to the distance, instead of to
            the nearest, which loses small updates (`liger_jax.train.stochastic_rounding`). No effect on float32 weights or
            with master_weights.
        seed: seed of stochastic rounding.
        b1: decay of the first moment, see the formula.
        b2: decay of the second moment.
        eps: added to the root of the second moment.

    Returns:
        An `optax.GradientTransformation`. Its state records the values that `read_grad_stats` returns.

    Raises:
        UserError: An unknown part, a frozen part with a learning rate of its own, or a max_grad_norm that is not positive.
            From `TrainState.create`, if no part is left to train.

    Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101

    Example:
        >>> from liger_jax import QwenVL, QwenVLConfig, TrainState
        >>> from liger_jax.train.optimizer import make_optimizer
        >>> optimizer = make_optimizer(1e-5, merger=2e-5, freeze=["vision"], weight_decay=0.1)
        >>> int(TrainState.create(QwenVL.init(QwenVLConfig.tiny()), optimizer).step)
        0
    """
    parts = (*PARTS, "lora")
    unknown = set(freeze) - set(parts)
    if unknown:
        raise UserError(f"freeze has {sorted(unknown)}; expected some of {sorted(parts)}")
    rates = {"vision": vision, "merger": merger}
    if contradictory := [part for part, rate in rates.items() if rate is not None and part in freeze]:
        raise UserError(f"freeze has {contradictory}, which also have learning rates; expected one or the other")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise UserError(f"max_grad_norm is {max_grad_norm}; expected above 0, or None for no limit")

    def build_part(part: str) -> optax.GradientTransformation:
        if part in freeze:
            return optax.set_to_zero()
        own_rate = rates.get(part)
        rate = learning_rate if own_rate is None else own_rate
        options: dict[str, Any] = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay, "mask": _decay_mask}
        if stochastic_rounding and not master_weights:
            return stochastic_adamw(rate, **options, seed=seed)
        adamw = optax.adamw(rate, **options)
        return with_master_weights(adamw) if master_weights else adamw

    def frozen_mask(tree):
        mask = _map_paths(lambda path: param_group(path) in freeze, tree)
        if all(jax.tree.leaves(mask)):
            raise UserError(f"freeze is {sorted(freeze)}, every part of the model; expected at least one part to train")
        return mask

    return optax.chain(
        # first, so that the gradients of frozen parts need not be computed at all
        optax.masked(optax.set_to_zero(), frozen_mask),
        with_grad_stats(learning_rate),
        optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm),
        optax.multi_transform({part: build_part(part) for part in parts}, lambda tree: _map_paths(param_group, tree)),
    )


def warmup_cosine(peak: float, steps: int, warmup: float) -> optax.Schedule:
    """Returns a schedule that rises to `peak` over a fraction `warmup` of the steps and then falls to 0 along a cosine.

    The learning rate of the first step is above 0.

    Raises:
        UserError: The peak or the fraction is out of range.

    Example:
        >>> [round(float(warmup_cosine(1.0, steps=6, warmup=0.34)(step)), 2) for step in range(7)]
        [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if not (0 <= peak < float("inf")):
        raise UserError(f"learning_rate is {peak}; expected 0 or more")
    if not 0 <= warmup <= 1:
        raise UserError(f"warmup is {warmup}; expected a fraction of the steps, from 0 to 1")
    if steps > LARGEST_STEP:
        raise UserError(f"steps is {steps!s:.60}; expected at most {LARGEST_STEP}, since the optimizer counts in int32")
    warmup_steps = round(steps * warmup)
    rise = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    fall = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1))
    return optax.join_schedules([rise, fall], [warmup_steps])


def _decay_mask(tree: Any) -> Any:
    return _map_paths(lambda path: find_row(path).decays, tree)


def _map_paths(function: Callable[[str], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: function(path_name(path)), tree)


# ---- statistics for the log ------------------------------------------------------------------------------------------


class GradStats(NamedTuple):
    """The part of an optimizer's state that is logged."""

    count: jax.Array  # type: ignore[assignment]  # number of updates; shadows tuple.count
    grad_norm: jax.Array  # of the latest gradients
    learning_rate: jax.Array


def with_grad_stats(learning_rate: LearningRate) -> optax.GradientTransformation:
    """Returns a transformation that records the gradient norm and the learning rate, and leaves the gradients unchanged.

    In `optax.chain`, it belongs after the transformation that removes frozen parts and before clipping.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from liger_jax.train.optimizer import read_grad_stats, with_grad_stats
        >>> optimizer = optax.chain(with_grad_stats(0.5), optax.sgd(0.5))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(jnp.zeros(2)))
        >>> {name: float(value) for name, value in read_grad_stats(state).items()}
        {'grad_norm': 5.0, 'learning_rate': 0.5}
    """

    def init(params):
        return GradStats(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))

    def update(grads, state, params=None):
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        return grads, GradStats(state.count + 1, norm, jnp.asarray(rate, jnp.float32))

    return optax.GradientTransformation(init, update)


def read_grad_stats(opt_state: Any) -> dict[str, jax.Array]:
    """Returns statistics of the latest update, or {} for an optimizer that does not record them.

    grad_norm and learning_rate, from `with_grad_stats`; and with stochastic rounding changed_weights: the fraction of the
    trained bfloat16 weights that the update before the latest one changed, estimated from evenly spaced ones.
    """
    stats: dict[str, jax.Array] = {}
    for state in find_states(opt_state, GradStats):
        stats |= {"grad_norm": state.grad_norm, "learning_rate": state.learning_rate}
    if parts := find_states(opt_state, StochasticState):
        sizes = [sum(weights.size for weights in jax.tree.leaves(part.sample)) for part in parts]
        stats["changed_weights"] = sum(p.changed * size for p, size in zip(parts, sizes, strict=True)) / sum(sizes)
    return stats


def find_states(opt_state: Any, kinds: Any) -> list[Any]:
    """Returns the parts of an optimizer's state that have one of these types."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda state: isinstance(state, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def warn_if_updates_vanish(model: Any, opt_state: Any, *, stacklevel: int) -> None:
    """Warns about bfloat16 weights and an optimizer that rounds them to the nearest without being asked to.

    Such an optimizer is not from `make_optimizer`, has no master weights, and keeps bfloat16 moments or none. Abstract
    models, which are not trained, get no warning.
    """
    abstract = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model))
    if abstract or find_states(opt_state, (GradStats, StochasticState, MasterState)):
        return
    bfloat16 = jnp.dtype("bfloat16")
    moments = {leaf.dtype for leaf in jax.tree.leaves(opt_state) if leaf.ndim}
    if bfloat16 in {weight.dtype for weight in jax.tree.leaves(model)} and (not moments or bfloat16 in moments):
        warnings.warn(
            "The weights are bfloat16 and the optimizer rounds them to the nearest: updates below 1/512 of a weight are "
            "lost, which at usual learning rates is most of them. liger_jax.make_optimizer rounds stochastically and keeps "
            "them; so do float32 weights",
            LigerWarning,
            stacklevel=stacklevel + 1,
        )
