"""Softmax cross-entropy of a linear layer, computed without ever holding all logits in memory."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _cross_entropy_kernel, _cross_entropy_math, _sharding, _validate
from pallas_kernels._cross_entropy_math import Options, RowLosses
from pallas_kernels._operation import Pass

MAX_CHUNKS = 6  # each chunk reads the weight twice, and reads and writes the weight's gradient in float32
MIN_QUARTER = 256  # the fewest rows of a quarter chunk that are worth a separate matmul


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
    """Computes cross_entropy(x @ weight.T + bias, labels) in chunks of the rows whose label counts.

    Those rows are gathered first, so that ignored rows cost at most a quarter of a chunk. The logits of a chunk have x's
    dtype, as a matmul returns them; the loss and the sums of the gradients over chunks are float32.

    For "mean" and "sum", the forward pass also computes the gradient of each chunk while its logits exist, and the backward
    pass only scales it. A forward pass that is not differentiated computes and saves no gradient. For "none", the backward
    pass recomputes the logits.

    Args:
        x: [..., H], float.
        weight: [V, H], x's dtype.
        labels: [...], int.
        bias: [V], float, or None.
        chunk_rows: the largest number of rows, on each device, whose logits are in memory at once. None means H, so that the
            logits take no more memory than the weight, or a sixth of the rows if that is more.
        implementation: None, "triton", "xla" or "interpret": how loss and gradient are computed from a chunk's logits. The
            matmuls always use XLA.

    The other options are those of `cross_entropy`.

    Returns:
        As `cross_entropy`. On a mesh, rows may be sharded over any axes; a sharded weight is gathered, x is not, and the
        gradient of the weight is summed over the mesh once.

    Raises:
        ValueError: a shape, dtype or option does not fit.

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
    *rows, hidden = x.shape
    vocab = weight.shape[0]
    _validate.shape(op, "weight", weight.shape, (vocab, hidden))
    if bias is not None:
        _validate.shape(op, "bias", bias.shape, (vocab,))
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows is {chunk_rows}; expected chunk_rows >= 1 or None")
    options = Options.checked(op, ignore_index, label_smoothing, z_loss, softcap)
    labels = _cross_entropy_math.check_operands(
        op, tuple(rows), vocab, labels, class_weights, token_weights, reduction, normalizer
    )

    static = StaticArgs(options, chunk_rows, implementation, _sharding.rows_over.get())
    dtype = _validate.accumulation_dtype(x.dtype)
    scale = _cross_entropy_math.loss_scale(options, labels, class_weights, token_weights, reduction, normalizer, dtype)
    x, labels, scale, weight, bias, class_weights = _LOSSES_AND_GRADIENTS.align(
        static, x, labels, scale, weight, bias, class_weights
    )
    if reduction == "none":
        losses = _row_losses(static, x, weight, bias, labels, class_weights)
        loss = scale * losses.loss
    else:
        loss, losses = _total_loss(static, x, weight, bias, scale, labels, class_weights)
    return (loss, _cross_entropy_math.loss_metrics(options, losses, labels, scale)) if return_metrics else loss


class StaticArgs(NamedTuple):
    """Options of the operation that are fixed when it is traced."""

    options: Options
    chunk_rows: int | None
    implementation: str | None
    rows_over: tuple[str, ...] = ()  # see `_sharding.split_rows_over`


# ---- on one device: x [..., H], labels and scale [...], weight [V, H], bias and class_weights [V] or None ---------------


def _losses(static: StaticArgs, x, labels, weight, bias, class_weights) -> tuple[jax.Array, ...]:
    """Computes RowLosses."""

    def process_chunk(_, x, labels):
        logits = _logits(x, weight, bias)
        return (), _cross_entropy_kernel.row_losses(
            static.implementation, static.options, logits, labels, class_weights
        )

    _, losses = _over_chunks(static, process_chunk, weight, x, labels)
    return tuple(losses)


def _losses_and_gradients(static: StaticArgs, x, labels, scale, weight, bias, class_weights) -> tuple:
    """Computes RowLosses, and the gradients d_x, d_weight, d_bias of sum(scale * RowLosses.loss) in float32."""
    dtype = _validate.accumulation_dtype(x.dtype)

    def process_chunk(sums, x, labels, scale):
        losses, d_logits = _cross_entropy_kernel.row_losses_and_gradient(
            static.implementation, static.options, _logits(x, weight, bias), labels, class_weights, scale
        )
        d_x = jnp.einsum("nv,vh->nh", d_logits, weight, preferred_element_type=dtype)
        d_weight = jnp.einsum("nv,nh->vh", d_logits, x, preferred_element_type=dtype)
        d_bias = None if bias is None else jnp.sum(d_logits, axis=0, dtype=dtype)
        products = d_weight, d_bias
        return products if sums is None else jax.tree.map(operator.add, sums, products), (losses, d_x)

    (d_weight, d_bias), (losses, d_x) = _over_chunks(static, process_chunk, weight, x, labels, scale)
    return *losses, d_x, d_weight, d_bias


def _logits(x, weight, bias):
    logits = jnp.einsum("nh,vh->nv", x, weight)
    return logits if bias is None else (logits + bias).astype(logits.dtype)


def _over_chunks(static: StaticArgs, process_chunk: Callable, weight, *row_arrays) -> tuple[Any, Any]:
    """Runs sums, results = process_chunk(sums, *row_arrays of a chunk) over the rows whose label counts.

    `row_arrays` are x, labels, and more arrays [...]. Returns the last sums and the results of all rows; those of ignored
    rows are 0. The number of chunks is known only at run time: one loop processes whole chunks, and a second loop processes
    the remainder in quarter chunks. The first chunk receives None as sums and creates them, which saves writing and reading
    zeros of the weight's size.
    """
    row_axes = row_arrays[1].shape
    flat = [array.reshape(-1, *array.shape[len(row_axes) :]) for array in row_arrays]
    labels = flat[1]
    size, quarter = _chunk_sizes(static, labels.size, weight.shape[1])
    if quarter == labels.size:  # one chunk, too small to be divided
        sums, results = process_chunk(None, *flat)
        return sums, jax.tree.map(lambda result: result.reshape(*row_axes, *result.shape[1:]), results)

    counts = labels != static.options.ignore_index
    num_counted = jnp.sum(counts)
    # position[row] is the row's place when the rows that count are moved to the front, in order; `order` is its inverse.
    position = jnp.where(counts, jnp.cumsum(counts), num_counted + jnp.cumsum(~counts)) - 1
    order = jnp.zeros(labels.size, position.dtype)
    order = order.at[position].set(jnp.arange(labels.size, dtype=position.dtype), unique_indices=True)
    padding = -labels.size % size
    fill_values = (0, static.options.ignore_index, *(0 for _ in flat[2:]))
    ordered = [
        jnp.pad(array[order], ((0, padding), *((0, 0),) * (array.ndim - 1)), constant_values=value)
        for array, value in zip(flat, fill_values, strict=True)
    ]
    num_chunks = -(-jnp.maximum(num_counted - (size - quarter), 0) // size)
    num_quarters = -(-jnp.maximum(num_counted - num_chunks * size, 0) // quarter)

    def write(results, start, chunk_results):
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(update, results, chunk_results)

    def first_chunk(size):
        def zeros(chunk_result):
            shape = labels.size + padding, *chunk_result.shape[1:]
            return _sharding.varying_as(row_arrays[0], jnp.zeros(shape, chunk_result.dtype))

        sums, chunk_results = process_chunk(None, *(array[:size] for array in ordered))
        return sums, write(jax.tree.map(zeros, chunk_results), 0, chunk_results)

    def loop(size, offset, begin, end, state):
        def step(i, state):
            sums, results = state
            start = offset + i * size
            sums, chunk_results = process_chunk(
                sums, *(jax.lax.dynamic_slice_in_dim(array, start, size) for array in ordered)
            )
            return sums, write(results, start, chunk_results)

        return jax.lax.fori_loop(begin, end, step, state)

    if quarter == size:
        state = loop(size, 0, 1, num_chunks, first_chunk(size))
    else:
        first = functools.partial(first_chunk, size), functools.partial(first_chunk, quarter)
        state = jax.lax.cond(num_chunks > 0, *first)
        state = loop(size, 0, 1, num_chunks, state)
        state = loop(quarter, num_chunks * size, jnp.where(num_chunks > 0, 0, 1), num_quarters, state)
    sums, results = state
    return sums, jax.tree.map(lambda result: result[position].reshape(*row_axes, *result.shape[1:]), results)


def _chunk_sizes(static: StaticArgs, rows: int, hidden: int) -> tuple[int, int]:
    """Returns the number of rows of a chunk, and of the parts into which the last, incomplete chunk is divided.

    A part is a quarter of a chunk, or the whole chunk if a quarter would be too small.
    """
    limit = static.chunk_rows or max(hidden, -(-rows // MAX_CHUNKS))
    chunks = max(1, -(-rows // limit))
    size = -(-rows // chunks)
    if size < 4 * MIN_QUARTER:
        return size, size
    quarter = 8 * math.ceil(size / 32)
    if static.chunk_rows:
        quarter = min(quarter, static.chunk_rows // 4)
    return 4 * quarter, quarter


_LOSSES = Pass(
    _losses,
    operands={"x": "... H", "labels": "...", "weight": "V H", "bias": "V", "class_weights": "V"},
    results=dict.fromkeys(RowLosses._fields, "..."),
    parallel=("...",),
)
_LOSSES_AND_GRADIENTS = Pass(
    _losses_and_gradients,
    operands={"x": "... H", "labels": "...", "scale": "...", "weight": "V H", "bias": "V", "class_weights": "V"},
    results=dict.fromkeys(RowLosses._fields, "...") | {"d_x": "... H", "d_weight": "V H", "d_bias": "V"},
    parallel=("...",),
)


# ---- gradient ----------------------------------------------------------------------------------------------------------
# Not a DifferentiableOp, because the gradient is computed in the forward pass where possible, and because its scale, for
# float16, depends on all rows of all devices.


class _Gradient(NamedTuple):
    """A gradient array * factor. For float16, the factor keeps the array's largest element near 1; otherwise it is 1."""

    array: jax.Array
    factor: jax.Array | float

    @classmethod
    def rounded(cls, value: jax.Array, dtype: Any) -> "_Gradient":
        """Rounds a float32 gradient to `dtype`."""
        if dtype != jnp.float16:
            return cls(value.astype(dtype), 1.0)
        _, exponent = jnp.frexp(jnp.max(jnp.abs(value), initial=0))  # a power of two, so that nothing is rounded twice
        factor = jnp.ldexp(jnp.float32(1), exponent)
        return cls((value / factor).astype(dtype), factor)

    def times(self, scale: jax.Array | float) -> jax.Array:
        return (self.array * (self.factor * scale)).astype(self.array.dtype)


def _over(static: StaticArgs, operation_pass: Pass) -> Pass:
    return dataclasses.replace(operation_pass, rows_over=static.rows_over)


def _run_losses(static: StaticArgs, x, weight, bias, labels, class_weights) -> RowLosses:
    return RowLosses(**_over(static, _LOSSES).run(static, x, labels, weight, bias, class_weights))


def _run_losses_and_gradients(static: StaticArgs, x, weight, bias, scale, labels, class_weights):
    """Returns RowLosses, and the _Gradients of sum(scale * RowLosses.loss) for x, weight and bias (None without one).

    The scales are divided by the largest one, because the 1/N of a mean would push the gradient of float16 logits below the
    smallest float16; the gradients are multiplied by it afterwards, in float32. Float16 gradients then stay near 1 until the
    backward pass multiplies by the cotangent, which includes the loss scale.
    """
    largest = jnp.max(jnp.abs(scale), initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    results = _over(static, _LOSSES_AND_GRADIENTS).run(static, x, labels, scale / largest, weight, bias, class_weights)
    losses = RowLosses(*(results[name] for name in RowLosses._fields))
    gradients = [
        None if operand is None else _Gradient.rounded(results[name] * largest, operand.dtype)
        for name, operand in (("d_x", x), ("d_weight", weight), ("d_bias", bias))
    ]
    return losses, gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total_loss(static: StaticArgs, x, weight, bias, scale, labels, class_weights) -> tuple[jax.Array, RowLosses]:
    """Returns sum(scale * RowLosses.loss) and RowLosses. The forward pass computes the gradient."""
    losses = _run_losses(static, x, weight, bias, labels, class_weights)
    return jnp.sum(scale * losses.loss), losses


def _total_loss_forward(static, x, weight, bias, scale, labels, class_weights):
    losses, gradients = _run_losses_and_gradients(static, x, weight, bias, scale, labels, class_weights)
    return (jnp.sum(scale * losses.loss), losses), (gradients, losses.loss)


def _total_loss_backward(static, residuals, cotangents):
    gradients, loss = residuals
    cotangent, _ = cotangents  # RowLosses is for metrics and carries no gradient
    return *_scaled(gradients, cotangent), loss * cotangent, None, None


_total_loss.defvjp(_total_loss_forward, _total_loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_losses(static: StaticArgs, x, weight, bias, labels, class_weights) -> RowLosses:
    """Returns RowLosses. The backward pass computes the gradient, because each row has its own cotangent."""
    return _run_losses(static, x, weight, bias, labels, class_weights)


def _row_losses_forward(static, *operands):
    return _run_losses(static, *operands), operands


def _row_losses_backward(static, operands, cotangents: RowLosses):
    x, weight, bias, labels, class_weights = operands
    _, gradients = _run_losses_and_gradients(static, x, weight, bias, cotangents.loss, labels, class_weights)
    return *_scaled(gradients, 1.0), None, None


_row_losses.defvjp(_row_losses_forward, _row_losses_backward)


def _scaled(gradients: list[_Gradient | None], scale: jax.Array | float) -> list[jax.Array | None]:
    return [None if gradient is None else gradient.times(scale) for gradient in gradients]
