"""The loss of a row of logits, its gradient, and how rows become one number: for both cross-entropies."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from pallas_kernels import _sharding, _validate

REDUCTIONS = ("mean", "sum", "none")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a cross-entropy."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    @classmethod
    def checked(cls, op: str, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None) -> Self:
        """Raises ValueError for a value out of range."""
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"{op}: label_smoothing is {label_smoothing}; expected 0 <= label_smoothing <= 1")
        if not z_loss >= 0.0:
            raise ValueError(f"{op}: z_loss is {z_loss}; expected z_loss >= 0")
        if softcap is not None and not softcap > 0.0:
            raise ValueError(f"{op}: softcap is {softcap}; expected softcap > 0 or None")
        return cls(
            int(ignore_index), float(label_smoothing), float(z_loss), None if softcap is None else float(softcap)
        )


class Rows(NamedTuple):
    """What one pass finds for each row of logits, all [...]; the losses are 0 where the label does not count."""

    loss: jax.Array  # with class weights and z-loss, without token weights
    z_loss: jax.Array  # the part of it that is z-loss
    lse: jax.Array  # log-sum-exp
    hit: jax.Array  # float: 1 where the label is the first largest logit


def check_rows(
    op: str,
    rows: tuple[int, ...],
    vocab: int,
    labels: jax.Array,
    class_weights: jax.Array | None,
    token_weights: jax.Array | None,
    reduction: str,
    normalizer: jax.Array | float | None,
) -> jax.Array:
    """The labels in int32 or int64, which hold ignore_index and V as they are.

    Raises ValueError unless labels and token_weights are [...] as the rows, class_weights [V], normalizer a scalar.
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


# ---- one row ----------------------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """What has to be known of each row of capped logits z, all [...]."""

    lse: jax.Array  # log-sum-exp
    z_label: jax.Array  # of the label; anything for a label outside the vocabulary
    weighted_z: jax.Array  # sum of class weight times z; only with label smoothing
    first_largest: jax.Array  # float: 1 where the label is the first largest


def statistics_xla(options: Options, logits: jax.Array, labels: jax.Array, class_weights: jax.Array | None):
    """logits [..., V], labels [...] -> Statistics.

    A sum under a mask picks the label's logit, where a gather would not fuse with the other sums over the row, nor
    work on a vocabulary that is sharded.
    """
    vocab = logits.shape[-1]
    z = capped(options, logits)
    largest = jnp.max(z, axis=-1)
    lse = largest + jnp.log(jnp.sum(jnp.exp(z - largest[..., None]), axis=-1))
    z_label = jnp.sum(jnp.where(jnp.arange(vocab) == labels[..., None], z, 0), axis=-1)
    first_largest = jnp.min(jnp.where(z == largest[..., None], jnp.arange(vocab), vocab), axis=-1)
    weighted_z = jnp.zeros_like(lse)
    if options.label_smoothing:
        weighted_z = jnp.sum(z if class_weights is None else class_weights.astype(z.dtype) * z, axis=-1)
    return Statistics(lse, z_label, weighted_z, (first_largest == labels) * 1.0)


def rows_of_statistics(
    options: Options, found: Statistics, labels: jax.Array, class_weights: jax.Array | None, vocab: int
) -> Rows:
    """The losses of rows with those statistics."""
    lse = found.lse
    weight = weight_of_label(labels, class_weights, lse.dtype)
    loss = (1 - options.label_smoothing) * weight * (lse - found.z_label)
    if options.label_smoothing:
        spread = total_weight(class_weights, vocab, lse.dtype) * lse - found.weighted_z
        loss += options.label_smoothing / vocab * spread
    z_loss = options.z_loss * weight * lse * lse
    counts, known = labels != options.ignore_index, (labels >= 0) & (labels < vocab)

    def where_counted(value: jax.Array) -> jax.Array:
        return jnp.where(counts, jnp.where(known, value, jnp.nan), 0.0)

    return Rows(where_counted(loss + z_loss), where_counted(z_loss), lse, counts * found.first_largest)


def gradient_xla(
    options: Options,
    logits: jax.Array,
    labels: jax.Array,
    class_weights: jax.Array | None,
    lse: jax.Array,
    cotangent: jax.Array,
) -> jax.Array:
    """cotangent [...] of Rows.loss -> gradient [..., V] in the dtype of the logits.

    d loss / d z_v = p_v ((1 - s) w_y + s/V sum w + 2 z_loss w_y lse) - (1 - s) w_y [v = y] - s/V w_v
    """
    vocab = logits.shape[-1]
    z = capped(options, logits)
    counts, known = labels != options.ignore_index, (labels >= 0) & (labels < vocab)
    weight = weight_of_label(labels, class_weights, z.dtype)
    of_label = (1 - options.label_smoothing) * weight
    of_softmax = of_label + 2 * options.z_loss * weight * lse
    if options.label_smoothing:
        spread = options.label_smoothing / vocab
        of_softmax += spread * total_weight(class_weights, vocab, z.dtype)
    is_label = jnp.arange(vocab) == labels[..., None]
    gradient = jnp.exp(z - lse[..., None]) * of_softmax[..., None] - jnp.where(is_label, of_label[..., None], 0)
    if options.label_smoothing:
        gradient -= spread if class_weights is None else spread * class_weights.astype(z.dtype)
    if options.softcap is not None:
        gradient *= 1 - jnp.square(z / options.softcap)
    gradient *= jnp.where(known, cotangent.astype(z.dtype), jnp.nan)[..., None]
    return jnp.where(counts[..., None], gradient, 0).astype(logits.dtype)  # not a product: 0 x inf would be NaN


def weight_of_label(labels: jax.Array, class_weights: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """[...]: the class weight of each label; anything for a label outside the vocabulary."""
    if class_weights is None:
        return jnp.ones(labels.shape, dtype)
    return _sharding.lookup(class_weights.astype(dtype), labels)


def total_weight(class_weights: jax.Array | None, vocab: int, dtype: jnp.dtype) -> jax.Array:
    """The sum of all class weights."""
    return jnp.asarray(vocab, dtype) if class_weights is None else jnp.sum(class_weights.astype(dtype))


def capped(options: Options, logits: jax.Array) -> jax.Array:
    """z of the logits, in float32."""
    z = logits.astype(_validate.wide(logits.dtype))
    return z if options.softcap is None else options.softcap * jnp.tanh(z / options.softcap)


# ---- all rows ---------------------------------------------------------------------------------------------------------


def scale_of_rows(
    options: Options,
    labels: jax.Array,
    class_weights: jax.Array | None,
    token_weights: jax.Array | None,
    reduction: str,
    normalizer: jax.Array | float | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """[...]: what Rows.loss is multiplied by before it is summed ("mean", "sum") or returned ("none")."""
    counts = labels != options.ignore_index
    scale = jnp.where(counts, 1 if token_weights is None else token_weights.astype(dtype), 0).astype(dtype)
    if reduction != "mean":
        return scale
    if normalizer is None:
        divisor = jnp.sum(scale * weight_of_label(labels, class_weights, dtype))
        nothing_counts = divisor == 0
    else:
        divisor = jnp.asarray(normalizer, dtype)
        nothing_counts = (divisor == 0) & ~jnp.any(counts)
    return scale / jnp.where(nothing_counts, 1, divisor)


def metrics_of_rows(options: Options, rows: Rows, labels: jax.Array, scale: jax.Array) -> dict[str, jax.Array]:
    """Scalars without gradient; see the docstring of cross_entropy."""
    num_tokens = jnp.sum(labels != options.ignore_index)
    return jax.lax.stop_gradient(
        {
            "loss": jnp.sum(scale * rows.loss),
            "z_loss": jnp.sum(scale * rows.z_loss),
            "num_tokens": num_tokens,
            "accuracy": jnp.sum(rows.hit) / jnp.maximum(num_tokens, 1),
        }
    )
