"""Softmax cross-entropy of logits that exist in memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _cross_entropy_kernel as _kernel
from pallas_kernels import _cross_entropy_math, _sharding, _validate
from pallas_kernels._cross_entropy_math import Options, Rows


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
        implementation: None, "triton", "xla" or "interpret".

    Returns:
        A scalar, or [...] for "none", in float32. If no label counts, or there are no rows: 0, with gradients 0.
        With return_metrics (loss, metrics): scalars without gradient, "loss" (summed over the tokens even for "none"),
        "z_loss" (the part of it that is z-loss), "num_tokens" (int32, the labels that count) and "accuracy" (the share
        of them that are their row's first largest logit; 0 if there are none).
        Backward keeps the logits and one number a row, and makes the gradient for whatever cotangent in one pass, rounded
        once. On a mesh rows may be sharded; a sharded vocabulary is gathered.

    Raises:
        ValueError: a shape, dtype or option that does not fit.

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
    *leading, vocab = logits.shape
    labels = _cross_entropy_math.check_rows(
        op, leading, vocab, labels, class_weights, token_weights, reduction, normalizer
    )

    static = _Static(options, class_weights is not None, implementation)
    wide = _validate.wide(logits.dtype)
    scale = _cross_entropy_math.scale_of_rows(
        options, labels, class_weights, token_weights, reduction, normalizer, wide
    )
    weights = () if class_weights is None else (class_weights,)
    logits, labels, *weights = _sharding.agree(_rows_op(static), logits, labels, *weights)
    rows = _rows(static, logits, labels, *weights)
    loss = scale * rows.loss
    loss = loss if reduction == "none" else jnp.sum(loss)
    return (loss, _cross_entropy_math.metrics_of_rows(options, rows, labels, scale)) if return_metrics else loss


class _Static(NamedTuple):
    options: Options
    has_class_weights: bool
    implementation: str | None


# ---- on one device: logits [..., V], labels [...], class weights [V] if there are any; see _cross_entropy_math for the formula


def _rows_local(static: _Static, logits, labels, *weights):
    return tuple(_kernel.rows(static.implementation, static.options, logits, labels, *(weights or (None,))))


def _backward_local(static: _Static, logits, labels, cotangent, lse, *weights):
    gradient = _kernel.gradient(
        static.implementation, static.options, logits, labels, *(weights or (None,)), lse, cotangent
    )
    return (gradient,)


# ---- gradient and mesh -----------------------------------------------------------------------------------------------


def _rows_op(static: _Static) -> _sharding.ParallelOp:
    return _op(static, _rows_local, (".v", "."), (".",) * 4)


def _backward_op(static: _Static) -> _sharding.ParallelOp:
    return _op(static, _backward_local, (".v", ".", ".", "."), (".v",))


def _op(static: _Static, local, operands, results) -> _sharding.ParallelOp:
    return _sharding.ParallelOp(local, (*operands, *("v",) * static.has_class_weights), results, ".", static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(static: _Static, logits, labels, *weights) -> Rows:
    return Rows(*_sharding.run(_rows_op(static), logits, labels, *weights))


def _rows_forward(static, logits, labels, *weights):
    rows = _rows(static, logits, labels, *weights)
    return rows, (logits, labels, rows.lse, weights)


def _rows_backward(static, saved, cotangent: Rows):
    logits, labels, lse, weights = saved
    (dlogits,) = _sharding.run(_backward_op(static), logits, labels, cotangent.loss, lse, *weights)
    return dlogits, None, *(None for _ in weights)


_rows.defvjp(_rows_forward, _rows_backward)
