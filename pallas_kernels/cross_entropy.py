"""Softmax cross-entropy of logits that exist in memory."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _token_loss, _validate
from pallas_kernels._token_loss import Options, Rows


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weights: jax.Array | None = None,
    token_weights: jax.Array | None = None,
    reduction: str = "mean",
    normalizer: jax.Array | float | None = None,
    return_metrics: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of each row of logits with its label.

        z = logits, or softcap tanh(logits / softcap)
        lse = log sum_v exp(z_v)         w = class_weights, t = token_weights, s = label_smoothing, y = label
        loss = t [ (1 - s) w_y (lse - z_y) + s/V sum_v w_v (lse - z_v) + z_loss w_y lse^2 ]

    "mean" divides the sum of the losses by the sum of t w_y over the labels that count, or by `normalizer`.

    Args:
        logits: [..., V], float. Left as they are.
        labels: [...], int. `ignore_index` does not count: loss 0, gradient 0. Any other label outside [0, V) gives NaN.
        ignore_index: the label that does not count.
        label_smoothing: s, in [0, 1].
        z_loss: weight of the squared log-sum-exp.
        softcap: positive, or None.
        class_weights: [V]; a constant, no gradient flows into it.
        token_weights: [...] as labels.
        reduction: "mean", "sum", or "none" for the loss of each token.
        normalizer: a number, or scalar array, that "mean" divides by in place of the sum of the weights.
        return_metrics: also return what the same pass found.
        implementation: None or "xla".

    Returns:
        A scalar, or [...] for "none", in float32. If no label counts, or there are no rows: 0, with gradients 0.
        With return_metrics (loss, metrics): scalars without gradient, "loss" (summed over the tokens even for "none"),
        "z_loss" (the part of it that is z-loss), "num_tokens" (int32, the labels that count) and "accuracy" (the share
        of them that are their row's first largest logit; 0 if there are none).
        Backward keeps the logits as they came and one number a row.

    Raises:
        ValueError: a shape, dtype or option that does not fit.
        NotImplementedError: an implementation that does not exist yet.

    Source: torch.nn.functional.cross_entropy and Liger-Kernel for the options; Szegedy et al. 2016 (label smoothing),
        https://arxiv.org/abs/1512.00567; Chowdhery et al. 2022 (z-loss), https://arxiv.org/abs/2204.02311

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import cross_entropy
        >>> round(float(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 3, -100]))), 3)  # log 4
        1.386
    """
    op = "cross_entropy"
    _validate.implementation_exists(op, implementation)
    _validate.floating(op, logits=logits)
    if logits.ndim < 1:
        raise ValueError(f"{op}: logits has shape (); expected [..., V]")
    options = Options.checked(op, ignore_index, label_smoothing, z_loss, softcap)
    *leading, vocab = logits.shape
    _token_loss.check_rows(op, leading, vocab, labels, class_weights, token_weights, reduction, normalizer)

    wide = _validate.wide(logits.dtype)
    scale = _token_loss.scale_of_rows(options, labels, class_weights, token_weights, reduction, normalizer, wide)
    rows = _rows(options, logits, labels, class_weights)
    loss = scale * rows.loss
    loss = loss if reduction == "none" else jnp.sum(loss)
    return (loss, _token_loss.metrics_of_rows(options, rows, labels, scale)) if return_metrics else loss


# ---- XLA implementation and its gradient: the formulas are in _token_loss -----------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(options: Options, logits: jax.Array, labels: jax.Array, class_weights: jax.Array | None) -> Rows:
    return _token_loss.rows_of_logits(options, logits, labels, class_weights)


def _rows_forward(options, logits, labels, class_weights):
    rows = _token_loss.rows_of_logits(options, logits, labels, class_weights)
    return rows, (logits, labels, class_weights, rows.lse)


def _rows_backward(options, saved, cotangent: Rows):
    logits, labels, class_weights, lse = saved
    gradient = _token_loss.gradient_of_logits(options, logits, labels, class_weights, lse, cotangent.loss)
    return gradient, None, None  # the rest of Rows is for metrics and carries no gradient


_rows.defvjp(_rows_forward, _rows_backward)
