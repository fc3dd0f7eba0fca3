"""The formulas of both cross-entropies: the loss of a row of logits, its gradient, and the reduction over rows.

    z = logits, or softcap tanh(logits / softcap)
    lse = log sum_v exp(z_v),  p_v = exp(z_v - lse)
    loss = (1 - s) w_y (lse - z_y) + s/V sum_v w_v (lse - z_v) + z_loss w_y lse^2
    d loss / d z_v = p_v ((1 - s) w_y + s/V sum w + 2 z_loss w_y lse) - (1 - s) w_y [v = y] - s/V w_v

with label y, class weights w and label smoothing s. Everything but the logits is float32 (float64 for float64 logits).
"""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from pallas_kernels import _sharding, _validate

REDUCTIONS = ("mean", "sum", "none")


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of a cross-entropy."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    @classmethod
    def checked(cls, op: str, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None) -> Self:
        """Returns the options; raises ValueError for a value out of range."""
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"{op}: label_smoothing is {label_smoothing}; expected 0 <= label_smoothing <= 1")
        if not z_loss >= 0.0:
            raise ValueError(f"{op}: z_loss is {z_loss}; expected z_loss >= 0")
        if softcap is not None and not softcap > 0.0:
            raise ValueError(f"{op}: softcap is {softcap}; expected softcap > 0 or None")
        return cls(
            int(ignore_index), float(label_smoothing), float(z_loss), None if softcap is None else float(softcap)
        )


class RowStats(NamedTuple):
    """The statistics of each row of logits that determine its loss; all [...]."""

    lse: jax.Array  # log-sum-exp
    z_label: jax.Array  # z of the label; arbitrary for a label outside the vocabulary
    weighted_z: jax.Array  # sum of class weight times z; computed only with label smoothing
    correct: jax.Array  # float: 1 where the label is the first largest logit


class RowLosses(NamedTuple):
    """The losses of each row of logits; all [...]. The losses are 0 where the label is ignored."""

    loss: jax.Array  # includes class weights and z-loss, but no token weights
    z_loss: jax.Array  # the part of `loss` that is z-loss
    lse: jax.Array  # log-sum-exp
    correct: jax.Array  # float: 1 where the label counts and is the first largest logit


def check_operands(
    op: str,
    rows: tuple[int, ...],
    vocab: int,
    labels: jax.Array,
    class_weights: jax.Array | None,
    token_weights: jax.Array | None,
    reduction: str,
    normalizer: jax.Array | float | None,
) -> jax.Array:
    """Returns the labels as int32 or int64, which can represent both ignore_index and V.

    Raises ValueError unless labels and token_weights have the shape of the rows, class_weights is [V], and normalizer is
    None or a scalar for the reduction "mean".
    """
    _validate.integer(op, labels=labels)
    _validate.shape(op, "labels", labels.shape, rows)
    if class_weights is not None:
        _validate.shape(op, "class_weights", class_weights.shape, (vocab,))
    if token_weights is not None:
        _validate.shape(op, "token_weights", token_weights.shape, rows)
    _validate.choice(op, "reduction", reduction, REDUCTIONS)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"{op}: normalizer is given and reduction is {reduction!r}; expected reduction='mean'")
    if normalizer is not None:
        _validate.shape(op, "normalizer", jnp.shape(normalizer), ())
    return labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)


# ---- per row ----------------------------------------------------------------------------------------------------------


def row_stats_xla(options: Options, logits: jax.Array, labels: jax.Array, class_weights: jax.Array | None) -> RowStats:
    """Computes the statistics of logits [..., V] with labels [...].

    A masked sum selects the label's z. A gather would neither fuse with the other sums over the row nor work on a sharded
    vocabulary.
    """
    vocab = logits.shape[-1]
    z = apply_softcap(options, logits)
    largest = jnp.max(z, axis=-1)
    lse = largest + jnp.log(jnp.sum(jnp.exp(z - largest[..., None]), axis=-1))
    z_label = jnp.sum(jnp.where(jnp.arange(vocab) == labels[..., None], z, 0), axis=-1)
    argmax = jnp.min(jnp.where(z == largest[..., None], jnp.arange(vocab), vocab), axis=-1)
    weighted_z = jnp.zeros_like(lse)
    if options.label_smoothing:
        weighted_z = jnp.sum(z if class_weights is None else class_weights.astype(z.dtype) * z, axis=-1)
    return RowStats(lse, z_label, weighted_z, (argmax == labels) * 1.0)


def row_losses(
    options: Options, stats: RowStats, labels: jax.Array, class_weights: jax.Array | None, vocab: int
) -> RowLosses:
    """Computes the losses from the statistics; NaN for a label outside the vocabulary that is not ignore_index."""
    lse = stats.lse
    weight = label_weights(labels, class_weights, lse.dtype)
    loss = (1 - options.label_smoothing) * weight * (lse - stats.z_label)
    if options.label_smoothing:
        weighted_difference = total_weight(class_weights, vocab, lse.dtype) * lse - stats.weighted_z
        loss += options.label_smoothing / vocab * weighted_difference
    z_loss = options.z_loss * weight * lse * lse
    counts, in_vocab = labels != options.ignore_index, (labels >= 0) & (labels < vocab)

    def where_counted(value: jax.Array) -> jax.Array:
        return jnp.where(counts, jnp.where(in_vocab, value, jnp.nan), 0.0)

    return RowLosses(where_counted(loss + z_loss), where_counted(z_loss), lse, counts * stats.correct)


def gradient_xla(
    options: Options,
    logits: jax.Array,
    labels: jax.Array,
    class_weights: jax.Array | None,
    lse: jax.Array,
    cotangent: jax.Array,
) -> jax.Array:
    """Computes the gradient [..., V], in the dtype of the logits, for a cotangent [...] of RowLosses.loss."""
    vocab = logits.shape[-1]
    z = apply_softcap(options, logits)
    counts, in_vocab = labels != options.ignore_index, (labels >= 0) & (labels < vocab)
    weight = label_weights(labels, class_weights, z.dtype)
    weight_sum = total_weight(class_weights, vocab, z.dtype) if options.label_smoothing else 0.0
    a, b, c = gradient_terms(options, vocab, weight, weight_sum, lse)
    is_label = jnp.arange(vocab) == labels[..., None]
    gradient = jnp.exp(z - lse[..., None]) * a[..., None] - jnp.where(is_label, b[..., None], 0)
    if options.label_smoothing:
        gradient -= c if class_weights is None else c * class_weights.astype(z.dtype)
    if options.softcap is not None:
        gradient *= 1 - jnp.square(z / options.softcap)
    gradient *= jnp.where(in_vocab, cotangent.astype(z.dtype), jnp.nan)[..., None]
    return jnp.where(counts[..., None], gradient, 0).astype(logits.dtype)  # no product, because 0 x inf would be NaN


def gradient_terms(
    options: Options, vocab: int, weight: jax.Array, weight_sum: jax.Array | float, lse: jax.Array
) -> tuple[jax.Array, jax.Array, float]:
    """Returns (a, b, c) of d loss / d z_v = p_v a - b [v = y] - c w_v; weight_sum is used only with label smoothing."""
    c = options.label_smoothing / vocab
    b = (1 - options.label_smoothing) * weight
    a = b + 2 * options.z_loss * weight * lse
    if options.label_smoothing:
        a += c * weight_sum
    return a, b, c


def label_weights(labels: jax.Array, class_weights: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Returns the class weight of each label [...]; arbitrary for a label outside the vocabulary."""
    if class_weights is None:
        return jnp.ones(labels.shape, dtype)
    return _sharding.lookup(class_weights.astype(dtype), labels)


def total_weight(class_weights: jax.Array | None, vocab: int, dtype: jnp.dtype) -> jax.Array:
    """Returns the sum of all class weights."""
    return jnp.asarray(vocab, dtype) if class_weights is None else jnp.sum(class_weights.astype(dtype))


def apply_softcap(options: Options, logits: jax.Array) -> jax.Array:
    """Returns z, the logits after the softcap, in the accumulation dtype."""
    z = logits.astype(_validate.accumulation_dtype(logits.dtype))
    return z if options.softcap is None else options.softcap * jnp.tanh(z / options.softcap)


# ---- over all rows ----------------------------------------------------------------------------------------------------


def loss_scale(
    options: Options,
    labels: jax.Array,
    class_weights: jax.Array | None,
    token_weights: jax.Array | None,
    reduction: str,
    normalizer: jax.Array | float | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns the factor [...] that multiplies RowLosses.loss before it is summed ("mean", "sum") or returned ("none")."""
    counts = labels != options.ignore_index
    scale = jnp.where(counts, 1 if token_weights is None else token_weights.astype(dtype), 0).astype(dtype)
    if reduction != "mean":
        return scale
    if normalizer is None:
        divisor = jnp.sum(scale * label_weights(labels, class_weights, dtype))
        no_label_counts = divisor == 0
    else:
        divisor = jnp.asarray(normalizer, dtype)
        no_label_counts = (divisor == 0) & ~jnp.any(counts)
    return scale / jnp.where(no_label_counts, 1, divisor)


def loss_metrics(options: Options, losses: RowLosses, labels: jax.Array, scale: jax.Array) -> dict[str, jax.Array]:
    """Returns the metrics that `cross_entropy` documents: scalars without gradient."""
    num_tokens = jnp.sum(labels != options.ignore_index)
    return jax.lax.stop_gradient(
        {
            "loss": jnp.sum(scale * losses.loss),
            "z_loss": jnp.sum(scale * losses.z_loss),
            "num_tokens": num_tokens,
            "accuracy": jnp.sum(losses.correct) / jnp.maximum(num_tokens, 1),
        }
    )
