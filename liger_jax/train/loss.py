"""The training loss."""

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from liger_jax.errors import UserError
from liger_jax.inputs.batch import IGNORE, Batch
from liger_jax.model import QwenVL
from liger_jax.model.sharding import constrain_batch_and_seq, run_on_auto_axes
from liger_jax.options import LayerExecution, Remat, Unroll

Metrics = dict[str, jax.Array]


def next_token_labels(batch: Batch) -> jax.Array:
    """Returns the label that each position predicts, [B, T]: that of the next position in the same sequence, or IGNORE.

    Raises:
        UserError: the batch has no labels.
    """
    check_labels(batch)
    labels, segments = jnp.asarray(batch.labels), jnp.asarray(batch.segment_ids)
    next_labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    same_sequence = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1))) & (segments > 0)
    return jnp.where(same_sequence, next_labels, IGNORE)


def check_labels(batch: Batch) -> None:
    """Raises UserError if the batch has no labels."""
    if batch.labels is None:
        raise UserError("batch.labels is None; expected labels, which prepare(..., labels=) adds")


def loss_fn(
    model: QwenVL,
    batch: Batch,
    num_items: jax.Array | float | None = None,
    *,
    remat: Remat = "none",
    unroll: Unroll = "none",
) -> tuple[jax.Array, Metrics]:
    """Returns the next-token cross entropy, computed without materializing the logits.

        loss = - sum over trained tokens of log p(token | previous tokens) / num_items

    Args:
        model: the model.
        batch: a batch with labels. The labels are shifted here, as in Hugging Face's models.
        num_items: divisor of the sum; by default, the number of trained tokens. When a batch is split over several calls,
            pass the total over all calls.
        remat: activations to recompute in the backward pass, see `liger_jax.LayerExecution`.
        unroll: layers to unroll instead of scanning over them, see `liger_jax.LayerExecution`.

    Returns:
        loss: float32 scalar.
        metrics: {"loss", "num_tokens", "accuracy"}: the loss, the number of trained tokens, and the fraction of them that
            argmax predicts correctly. Without trained tokens, all metrics and gradients are 0.

    Raises:
        UserError: the batch has no labels.

    Example:
        >>> import jax, numpy as np
        >>> from liger_jax import QwenVL, QwenVLConfig, loss_fn, prepare
        >>> model = QwenVL.init(QwenVLConfig.tiny(), dtype="float32")
        >>> ids = np.array([[5, 6, 7]])
        >>> loss, metrics = jax.jit(loss_fn)(model, prepare(model.config, input_ids=ids, labels=ids))
        >>> int(metrics["num_tokens"])
        2
    """
    return run_on_auto_axes(_loss, model, batch, num_items, execution=LayerExecution(remat, unroll))


def _loss(
    model: QwenVL, batch: Batch, num_items: jax.Array | float | None, *, execution: LayerExecution
) -> tuple[jax.Array, Metrics]:
    targets = next_token_labels(batch)
    hidden = constrain_batch_and_seq(model.hidden_states(batch, execution=execution))
    loss, metrics = pk.linear_cross_entropy(hidden, model.head, targets, normalizer=num_items, return_metrics=True)
    return loss, {"loss": loss, "num_tokens": metrics["num_tokens"], "accuracy": metrics["accuracy"]}
