"""Softmax cross-entropy of logits that are in memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _cross_entropy_kernel, _cross_entropy_math, _validate
from pallas_kernels._cross_entropy_math import Options, RowLosses
from pallas_kernels._operation import DifferentiableOp, Pass


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
    """Computes the cross-entropy of each row of logits with its label, and reduces it over the rows.

        z = logits, or softcap tanh(logits / softcap)
        lse = log sum_v exp(z_v)         w = class_weights, t = token_weights, s = label_smoothing, y = label
        loss = t [ (1 - s) w_y (lse - z_y) + s/V sum_v w_v (lse - z_v) + z_loss w_y lse^2 ]

    "mean" divides the sum of the losses by the sum of t w_y over the labels that count, or by `normalizer`.

    Args:
        logits: [..., V], float. Not modified.
        labels: [...], int. A label outside [0, V) gives NaN, unless it is `ignore_index`.
        ignore_index: the label of rows that do not count: their loss and gradient are 0.
        label_smoothing: s, in [0, 1].
        z_loss: weight of the squared log-sum-exp.
        softcap: a positive number, or None.
        class_weights: [V]; a constant that receives no gradient.
        token_weights: [...], the shape of labels.
        reduction: "mean", "sum", or "none" for the loss of each token.
        normalizer: a number or scalar array that "mean" divides by instead of the sum of the weights.
        return_metrics: whether to return metrics as well, computed in the same pass.
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        A float32 scalar, or [...] for "none". If no label counts, or there are no rows, it is 0 and so are the gradients.
        With return_metrics, (loss, metrics). The metrics are scalars without gradient: "loss" (summed over the tokens even
        for "none"), "z_loss" (the z-loss in it), "num_tokens" (int32, the number of labels that count) and "accuracy" (the
        fraction of these labels that are the first largest logit of their row; 0 if no label counts). The backward pass
        saves the logits and one number per row. It computes the gradient for any cotangent in one pass and rounds it once.
        On a mesh, rows may be sharded; a sharded vocabulary is gathered.

    Raises:
        ValueError: a shape, dtype or option does not fit.

    Source: torch.nn.functional.cross_entropy and Liger-Kernel for the options; Szegedy et al. 2016 (label smoothing),
        https://arxiv.org/abs/1512.00567; Chowdhery et al. 2022 (z-loss), https://arxiv.org/abs/2204.02311

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import cross_entropy
        >>> round(float(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 3, -100]))), 3)  # log 4
        1.386
    """
    op = "cross_entropy"
    _validate.known_implementation(op, implementation)
    _validate.floating(op, logits=logits)
    if logits.ndim < 1:
        raise ValueError(f"{op}: logits has shape (); expected [..., V]")
    options = Options.checked(op, ignore_index, label_smoothing, z_loss, softcap)
    *rows, vocab = logits.shape
    labels = _cross_entropy_math.check_operands(
        op, tuple(rows), vocab, labels, class_weights, token_weights, reduction, normalizer
    )

    dtype = _validate.accumulation_dtype(logits.dtype)
    scale = _cross_entropy_math.loss_scale(options, labels, class_weights, token_weights, reduction, normalizer, dtype)
    static = StaticArgs(options, implementation)
    logits, labels, class_weights = _OPERATION.align(static, logits, labels, class_weights)
    losses = RowLosses(*_OPERATION.apply(static, logits, labels, class_weights))
    loss = scale * losses.loss
    loss = loss if reduction == "none" else jnp.sum(loss)
    return (loss, _cross_entropy_math.loss_metrics(options, losses, labels, scale)) if return_metrics else loss


class StaticArgs(NamedTuple):
    """Options of the operation that are fixed when it is traced."""

    options: Options
    implementation: str | None


# ---- per row; the formulas are in _cross_entropy_math ------------------------------------------------------------------


def _forward(static: StaticArgs, logits, labels, class_weights) -> tuple[jax.Array, ...]:
    rows = logits, labels, class_weights
    return tuple(_cross_entropy_kernel.row_losses(static.implementation, static.options, *rows))


def _backward(static: StaticArgs, logits, labels, d_loss, lse, class_weights) -> tuple[jax.Array]:
    rows = logits, labels, class_weights
    return (_cross_entropy_kernel.gradient(static.implementation, static.options, *rows, lse, d_loss),)


_OPERATION = DifferentiableOp(
    forward=Pass(
        _forward,
        operands={"logits": "... V", "labels": "...", "class_weights": "V"},
        results=dict.fromkeys(RowLosses._fields, "..."),
        parallel=("...",),
    ),
    backward=Pass(
        _backward,
        operands={"logits": "... V", "labels": "...", "d_loss": "...", "lse": "...", "class_weights": "V"},
        results={"d_logits": "... V"},
        parallel=("...",),
    ),
    returns=RowLosses._fields,
)
