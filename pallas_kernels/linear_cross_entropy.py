"""Softmax cross-entropy of a linear layer, without its logits ever being in memory at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _sharding, _token_loss, _validate
from pallas_kernels._token_loss import Options, Rows

CHUNK_BYTES = (
    640_000_000  # of logits; large enough for library matrix products at full rate and few passes over the weight
)


def linear_cross_entropy(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weights: jax.Array | None = None,
    token_weights: jax.Array | None = None,
    reduction: str = "mean",
    normalizer: jax.Array | float | None = None,
    return_metrics: bool = False,
    chunk_rows: int | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """cross_entropy(x @ weight.T + bias, labels), computed over chunks of rows.

    The logits of a chunk are in x's dtype, as a matrix product leaves them; the loss and the gradients' sums over chunks
    are float32. For "mean" and "sum" the gradient is made in the forward pass, chunk by chunk, while the logits are
    there, and scaled in the backward pass; a forward pass that nobody differentiates computes and keeps no gradient.
    For "none" the backward pass computes the logits again.

    Args:
        x: [..., H], float.
        weight: [V, H], x's dtype.
        labels: [...], int.
        bias: [V], float, or None.
        chunk_rows: largest number of rows (of each device) whose logits are in memory; None for a budget of 640 MB.
        implementation: None or "xla".
        The other options, the results and the errors are those of `cross_entropy`.

    Returns:
        As `cross_entropy`. On a mesh, rows may be sharded over any axes; the weight is gathered where it is sharded, x is
        not, and the gradient of the weight is added up over the mesh once.

    Raises:
        ValueError: a shape, dtype or option that does not fit.
        NotImplementedError: an implementation that does not exist yet.

    Source: Liger-Kernel's fused linear cross-entropy, https://arxiv.org/abs/2410.10989

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import linear_cross_entropy
        >>> x, weight = jnp.ones((3, 2)), jnp.zeros((4, 2))
        >>> round(float(linear_cross_entropy(x, weight, jnp.array([0, 3, -100]))), 3)  # log 4
        1.386
    """
    op = "linear_cross_entropy"
    _validate.implementation_exists(op, implementation)
    _validate.floating(op, x=x, weight=weight)
    _validate.same_dtype(op, x=x, weight=weight)
    if x.ndim < 1 or weight.ndim != 2:
        raise ValueError(f"{op}: x has shape {x.shape}, weight {weight.shape}; expected [..., H] and [V, H]")
    *leading, hidden = x.shape
    vocab = weight.shape[0]
    _validate.shape(op, "weight", weight.shape, (vocab, hidden))
    if bias is not None:
        _validate.shape(op, "bias", bias.shape, (vocab,))
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows is {chunk_rows}; expected chunk_rows >= 1 or None")
    options = Options.checked(op, ignore_index, label_smoothing, z_loss, softcap)
    _token_loss.check_rows(op, leading, vocab, labels, class_weights, token_weights, reduction, normalizer)

    static = _Static(options, chunk_rows, bias is not None, class_weights is not None)
    scale = _token_loss.scale_of_rows(
        options, labels, class_weights, token_weights, reduction, normalizer, _validate.wide(x.dtype)
    )
    x, labels, scale, weight, bias, class_weights = _agree(static, x, labels, scale, weight, bias, class_weights)
    if reduction == "none":
        rows = _rows(static, x, weight, bias, labels, class_weights)
        loss = scale * rows.loss
    else:
        loss, rows = _total(static, x, weight, bias, scale, labels, class_weights)
    return (loss, _token_loss.metrics_of_rows(options, rows, labels, scale)) if return_metrics else loss


class _Static(NamedTuple):
    options: Options
    chunk_rows: int | None
    has_bias: bool
    has_class_weights: bool


# ---- XLA implementation: a loop over chunks of the rows of one device ------------------------------------------------


def _forward_local(static: _Static, x, labels, weight, *optional) -> tuple[jax.Array, ...]:
    """x [..., H], labels [...], weight [V, H], bias [V] and class_weights [V] if there are any -> Rows, each [...]."""
    bias, class_weights = _unpacked(static, optional)

    def chunk(_, rows):
        x, labels = rows
        return None, _token_loss.rows_of_logits(static.options, _logits(x, weight, bias), labels, class_weights)

    _, rows = _over_chunks(static, chunk, None, weight, x, labels)
    return tuple(rows)


def _gradient_local(static: _Static, x, labels, scale, weight, *optional) -> tuple[jax.Array, ...]:
    """As _forward_local, with the gradients of sum(scale * Rows.loss): -> *Rows, dx [..., H], dweight [V, H], dbias [V].

    dx, dweight and dbias are in float32, dbias only if there is a bias.
    """
    bias, class_weights = _unpacked(static, optional)
    wide = _validate.wide(x.dtype)
    zeros = jnp.zeros(weight.shape, wide), jnp.zeros(weight.shape[:1] if static.has_bias else (0,), wide)

    def chunk(sums, rows):
        x, labels, scale = rows
        logits = _logits(x, weight, bias)
        found = _token_loss.rows_of_logits(static.options, logits, labels, class_weights)
        dlogits = _token_loss.gradient_of_logits(static.options, logits, labels, class_weights, found.lse, scale)
        dx = jnp.einsum("nv,vh->nh", dlogits, weight, preferred_element_type=wide)
        dweight, dbias = sums
        dweight = dweight + jnp.einsum("nv,nh->vh", dlogits, x, preferred_element_type=wide)
        if static.has_bias:
            dbias = dbias + jnp.sum(dlogits, axis=0, dtype=wide)
        return (dweight, dbias), (found, dx)

    (dweight, dbias), (rows, dx) = _over_chunks(static, chunk, zeros, weight, x, labels, scale)
    return (*rows, dx, dweight, dbias) if static.has_bias else (*rows, dx, dweight)


def _logits(x, weight, bias):
    logits = jnp.einsum("nh,vh->nv", x, weight)
    return logits if bias is None else (logits + bias).astype(logits.dtype)


def _over_chunks(static: _Static, chunk, sums, weight, x, labels, *more):
    """Runs chunk(sums, some rows of (x, labels, *more)) -> (sums, found) over all rows, and joins what is found."""
    row_axes, ignored = labels.shape, static.options.ignore_index
    flat = [array.reshape(-1, *array.shape[len(row_axes) :]) for array in (x, labels, *more)]
    rows = flat[0].shape[0]
    chunks = _number_of_chunks(static, rows, weight.shape[0] * x.dtype.itemsize)
    if chunks == 1:
        sums, found = chunk(sums, flat)
    else:
        missing = -rows % chunks
        padded = [
            jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)), constant_values=ignored if i == 1 else 0)
            for i, array in enumerate(flat)
        ]
        sums = jax.tree.map(lambda zeros: _sharding.varying_as(x, zeros), sums)
        sums, found = jax.lax.scan(chunk, sums, [array.reshape(chunks, -1, *array.shape[1:]) for array in padded])
        found = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:rows], found)
    return sums, jax.tree.map(lambda array: array.reshape(*row_axes, *array.shape[1:]), found)


def _number_of_chunks(static: _Static, rows: int, bytes_per_row: int) -> int:
    """Fewest chunks within the budget; a few more if that divides the rows evenly, so that nothing is padded."""
    limit = static.chunk_rows or max(1, CHUNK_BYTES // bytes_per_row)
    fewest = max(1, -(-rows // limit))
    return next((chunks for chunks in range(fewest, 2 * fewest) if rows % chunks == 0), fewest)


def _unpacked(static: _Static, optional):
    arrays = iter(optional)
    return next(arrays) if static.has_bias else None, next(arrays) if static.has_class_weights else None


# ---- gradient and mesh ------------------------------------------------------------------------------------------------


def _optional_signature(static: _Static) -> tuple[str, ...]:
    return ("v",) * (static.has_bias + static.has_class_weights)


def _forward_op(static: _Static) -> _sharding.ParallelOp:
    operands = (".h", ".", "vh", *_optional_signature(static))
    return _sharding.ParallelOp(_forward_local, operands, (".",) * 4, ".", static)


def _gradient_op(static: _Static) -> _sharding.ParallelOp:
    operands = (".h", ".", ".", "vh", *_optional_signature(static))
    results = (*(".",) * 4, ".h", "vh", *("v",) * static.has_bias)
    return _sharding.ParallelOp(_gradient_local, operands, results, ".", static)


def _agree(static: _Static, x, labels, scale, weight, bias, class_weights):
    optional = [array for array in (bias, class_weights) if array is not None]
    x, labels, scale, weight, *optional = _sharding.agree(_gradient_op(static), x, labels, scale, weight, *optional)
    return x, labels, scale, weight, *_unpacked(static, optional)


def _present(*arrays):
    return [array for array in arrays if array is not None]


def _gradients(static: _Static, x, weight, bias, scale, labels, class_weights):
    """-> Rows, and the gradients of sum(scale * Rows.loss) for x, weight and bias, in their dtypes.

    The gradient of the logits is made for scales of at most 1 and the rest is multiplied in afterwards, in float32: the
    1/N of a mean would push it below the smallest float16.
    """
    largest = jnp.max(jnp.abs(scale), initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    op = _gradient_op(static)
    results = _sharding.run(op, x, labels, scale / largest, weight, *_present(bias, class_weights))
    gradients = [(g * largest).astype(of.dtype) for g, of in zip(results[4:], _present(x, weight, bias), strict=True)]
    return Rows(*results[:4]), (*gradients, None)[:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(static: _Static, x, weight, bias, scale, labels, class_weights):
    """-> sum(scale * Rows.loss), Rows. The gradient is made in the forward pass."""
    rows = _rows_only(static, x, weight, bias, labels, class_weights)
    return jnp.sum(scale * rows.loss), rows


def _total_forward(static, x, weight, bias, scale, labels, class_weights):
    rows, gradients = _gradients(static, x, weight, bias, scale, labels, class_weights)
    return (jnp.sum(scale * rows.loss), rows), (*gradients, rows.loss)


def _total_backward(static, saved, cotangents):
    cotangent, _ = cotangents  # Rows is for metrics and carries no gradient
    dx, dweight, dbias = (None if g is None else (g * cotangent).astype(g.dtype) for g in saved[:3])
    return dx, dweight, dbias, saved[3] * cotangent, None, None


_total.defvjp(_total_forward, _total_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(static: _Static, x, weight, bias, labels, class_weights) -> Rows:
    """The gradient is made in the backward pass, for a cotangent of its own for each row."""
    return _rows_only(static, x, weight, bias, labels, class_weights)


def _rows_forward(static, x, weight, bias, labels, class_weights):
    return _rows_only(static, x, weight, bias, labels, class_weights), (x, weight, bias, labels, class_weights)


def _rows_backward(static, saved, cotangent: Rows):
    x, weight, bias, labels, class_weights = saved
    _, gradients = _gradients(static, x, weight, bias, cotangent.loss, labels, class_weights)
    return *gradients, None, None


_rows.defvjp(_rows_forward, _rows_backward)


def _rows_only(static: _Static, x, weight, bias, labels, class_weights) -> Rows:
    return Rows(*_sharding.run(_forward_op(static), x, labels, weight, *_present(bias, class_weights)))
