"""Softmax cross-entropy of a linear layer, without its logits ever being in memory at once."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _cross_entropy_kernel as _kernel
from pallas_kernels import _cross_entropy_math, _sharding, _validate
from pallas_kernels._cross_entropy_math import Options, Rows

MOST_CHUNKS = 6  # each chunk reads the weight twice, and reads and writes its gradient in float32
SMALLEST_PART = 256  # rows of a chunk's quarter that are still worth a matrix product of their own


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
    """cross_entropy(x @ weight.T + bias, labels), computed over chunks of the rows whose label counts.

    Those rows are brought together first, so that ignored ones cost a quarter of a chunk at most. The logits of a chunk
    are in x's dtype, as a matrix product leaves them; the loss and the gradients' sums over chunks are float32. For "mean"
    and "sum" the gradient is made in the forward pass, chunk by chunk, while the logits are there, and scaled in the
    backward pass; a forward pass that nobody differentiates computes and keeps no gradient. For "none" the backward pass
    computes the logits again.

    Args:
        x: [..., H], float.
        weight: [V, H], x's dtype.
        labels: [...], int.
        bias: [V], float, or None.
        chunk_rows: largest number of rows (of each device) whose logits are in memory. None: H, so that they take no more
            memory than the weight, or a sixth of the rows if that is more.
        implementation: None, "triton", "xla" or "interpret": of the loss and the gradient of a chunk's logits. The matrix
            products are XLA's in all of them.
        The other options, the results and the errors are those of `cross_entropy`.

    Returns:
        As `cross_entropy`. On a mesh, rows may be sharded over any axes; the weight is gathered where it is sharded, x is
        not, and the gradient of the weight is added up over the mesh once.

    Raises:
        ValueError: a shape, dtype or option that does not fit.

    Source: Liger-Kernel's fused linear cross-entropy, https://arxiv.org/abs/2410.10989

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import linear_cross_entropy
        >>> x, weight = jnp.ones((3, 2)), jnp.zeros((4, 2))
        >>> round(float(linear_cross_entropy(x, weight, jnp.array([0, 3, -100]))), 3)  # log 4
        1.386
    """
    op = "linear_cross_entropy"
    _validate.known_implementation(op, implementation)
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
    labels = _cross_entropy_math.check_rows(
        op, leading, vocab, labels, class_weights, token_weights, reduction, normalizer
    )

    static = _Static(options, chunk_rows, bias is not None, class_weights is not None, implementation)
    scale = _cross_entropy_math.scale_of_rows(
        options, labels, class_weights, token_weights, reduction, normalizer, _validate.wide(x.dtype)
    )
    x, labels, scale, weight, bias, class_weights = _agree(static, x, labels, scale, weight, bias, class_weights)
    if reduction == "none":
        rows = _rows(static, x, weight, bias, labels, class_weights)
        loss = scale * rows.loss
    else:
        loss, rows = _total(static, x, weight, bias, scale, labels, class_weights)
    return (loss, _cross_entropy_math.metrics_of_rows(options, rows, labels, scale)) if return_metrics else loss


class _Static(NamedTuple):
    options: Options
    chunk_rows: int | None
    has_bias: bool
    has_class_weights: bool
    implementation: str | None


# ---- on one device: a loop over chunks of rows; loss and gradient of a chunk's logits are those of cross_entropy -----


def _forward_local(static: _Static, x, labels, weight, *optional) -> tuple[jax.Array, ...]:
    """x [..., H], labels [...], weight [V, H], bias [V] and class_weights [V] if there are any -> Rows, each [...]."""
    bias, class_weights = _unpacked(static, optional)

    def chunk(_, x, labels):
        logits = _logits(x, weight, bias)
        return [], _kernel.rows(static.implementation, static.options, logits, labels, class_weights)

    _, rows = _over_chunks(static, chunk, weight, x, labels)
    return tuple(rows)


def _gradient_local(static: _Static, x, labels, scale, weight, *optional) -> tuple[jax.Array, ...]:
    """As _forward_local, with the gradients of sum(scale * Rows.loss): -> *Rows, dx [..., H], dweight [V, H], dbias [V].

    dx, dweight and dbias are in float32, dbias only if there is a bias.
    """
    bias, class_weights = _unpacked(static, optional)
    wide = _validate.wide(x.dtype)

    def chunk(sums, x, labels, scale):
        rows, dlogits = _kernel.rows_and_gradient(
            static.implementation,
            static.options,
            _logits(x, weight, bias),
            labels,
            class_weights,
            scale,
        )
        dx = jnp.einsum("nv,vh->nh", dlogits, weight, preferred_element_type=wide)
        new = [jnp.einsum("nv,nh->vh", dlogits, x, preferred_element_type=wide)]
        if static.has_bias:
            new.append(jnp.sum(dlogits, axis=0, dtype=wide))
        return [old + product for old, product in zip(sums, new, strict=True)] if sums else new, (rows, dx)

    sums, (rows, dx) = _over_chunks(static, chunk, weight, x, labels, scale)
    return (*rows, dx, *sums)


def _logits(x, weight, bias):
    logits = jnp.einsum("nh,vh->nv", x, weight)
    return logits if bias is None else (logits + bias).astype(logits.dtype)


def _over_chunks(static: _Static, chunk, weight, x, labels, *more):
    """chunk(sums, some rows of x, labels, *more) -> (sums, found), over the rows whose label counts. -> sums, found [...].

    What is found for the other rows is zero. How many chunks there are is known at run time only: a loop over whole
    chunks, then one over quarters for what is left. The first of them starts the sums (they are None there), which saves
    writing and reading zeros as large as the weight.
    """
    row_axes = labels.shape
    flat = [array.reshape(-1, *array.shape[len(row_axes) :]) for array in (x, labels, *more)]
    rows = flat[1].size
    size, part = _chunk_sizes(static, rows, weight.shape[1])
    if part == rows:  # one chunk, and no smaller one
        sums, found = chunk(None, *flat)
        return sums, jax.tree.map(lambda array: array.reshape(*row_axes, *array.shape[1:]), found)

    counts = flat[1] != static.options.ignore_index
    number = jnp.sum(counts)
    place = jnp.where(counts, jnp.cumsum(counts), number + jnp.cumsum(~counts)) - 1  # those that count come first
    order = jnp.zeros(rows, place.dtype).at[place].set(jnp.arange(rows, dtype=place.dtype), unique_indices=True)
    missing = -rows % size
    fill = (0, static.options.ignore_index, *(0 for _ in more))
    ordered = [
        jnp.pad(array[order], ((0, missing), *((0, 0),) * (array.ndim - 1)), constant_values=value)
        for array, value in zip(flat, fill, strict=True)
    ]
    chunks = -(-jnp.maximum(number - (size - part), 0) // size)
    parts = -(-jnp.maximum(number - chunks * size, 0) // part)

    def put(found, start, of_chunk):
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(update, found, of_chunk)

    def first(size):
        sums, of_chunk = chunk(None, *(array[:size] for array in ordered))
        zeros = jax.tree.map(lambda of: jnp.zeros((rows + missing, *of.shape[1:]), of.dtype), of_chunk)
        return sums, put(jax.tree.map(functools.partial(_sharding.varying_as, x), zeros), 0, of_chunk)

    def loop(size, start, begin, end, state):
        def step(i, state):
            sums, found = state
            here = start + i * size
            sums, of_chunk = chunk(sums, *(jax.lax.dynamic_slice_in_dim(array, here, size) for array in ordered))
            return sums, put(found, here, of_chunk)

        return jax.lax.fori_loop(begin, end, step, state)

    if part == size:
        state = loop(size, 0, 1, chunks, first(size))
    else:
        state = jax.lax.cond(chunks > 0, functools.partial(first, size), functools.partial(first, part))
        state = loop(size, 0, 1, chunks, state)
        state = loop(part, chunks * size, jnp.where(chunks > 0, 0, 1), parts, state)
    sums, found = state
    return sums, jax.tree.map(lambda array: array[place].reshape(*row_axes, *array.shape[1:]), found)


def _chunk_sizes(static: _Static, rows: int, hidden: int) -> tuple[int, int]:
    """-> rows of a chunk, and of the parts for what is left: a quarter of it, or all of it if that would be too few."""
    limit = static.chunk_rows or max(hidden, -(-rows // MOST_CHUNKS))
    chunks = max(1, -(-rows // limit))
    size = -(-rows // chunks)
    if size < 4 * SMALLEST_PART:
        return size, size
    part = 8 * math.ceil(size / 32)
    if static.chunk_rows:
        part = min(part, static.chunk_rows // 4)
    return 4 * part, part


def _unpacked(static: _Static, optional):
    arrays = iter(optional)
    return next(arrays) if static.has_bias else None, next(arrays) if static.has_class_weights else None


# ---- gradient and mesh -----------------------------------------------------------------------------------------------


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
    """-> Rows, and the gradients of sum(scale * Rows.loss) for x, weight and bias, each as (array, float32 factor).

    The gradient of the logits is made for scales of at most 1 and the rest is multiplied in afterwards, in float32: the
    1/N of a mean would push it below the smallest float16. The factor is 1 but for float16, where it keeps the array's
    largest number near 1, until a loss scale, which comes with the cotangent, lifts the rest.
    """
    largest = jnp.max(jnp.abs(scale), initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    op = _gradient_op(static)
    results = _sharding.run(op, x, labels, scale / largest, weight, *_present(bias, class_weights))

    def parts(g, dtype):
        g = g * largest
        if dtype != jnp.float16:
            return g.astype(dtype), 1.0
        _, exponent = jnp.frexp(jnp.max(jnp.abs(g), initial=0))  # a power of two, so that nothing is rounded twice
        peak = jnp.ldexp(jnp.float32(1), exponent)
        return (g / peak).astype(dtype), peak

    gradients = [parts(g, of.dtype) for g, of in zip(results[4:], _present(x, weight, bias), strict=True)]
    return Rows(*results[:4]), (*gradients, None)[:3]


def _times(gradient, factor=1.0):
    """A gradient of `_gradients` as one array, times a factor; None stays."""
    if gradient is None:
        return None
    array, own = gradient
    return (array * (own * factor)).astype(array.dtype)


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
    return *(_times(gradient, cotangent) for gradient in saved[:3]), saved[3] * cotangent, None, None


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
    return *map(_times, gradients), None, None


_rows.defvjp(_rows_forward, _rows_backward)


def _rows_only(static: _Static, x, weight, bias, labels, class_weights) -> Rows:
    return Rows(*_sharding.run(_forward_op(static), x, labels, weight, *_present(bias, class_weights)))
