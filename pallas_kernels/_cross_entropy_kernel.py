"""Triton kernels for the loss of rows of logits and its gradient, shared by both cross-entropies.

The formulas are those of _cross_entropy_math. A row is too wide to be held at once, so a program processes it in tiles
[blocks.rows, blocks.columns] of neighbouring logits. Each column of the tile keeps its own running maximum and sum, which
are combined at the end of the row, so that no warp waits for another within the row. Each tile is loaded before the previous
one is processed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _cross_entropy_math, _pallas, _tuning, _validate
from pallas_kernels._cross_entropy_math import Options, RowLosses, RowStats
from pallas_kernels._tuning import Blocks

LOWEST = -1e38  # finite, so that the difference of two is a number

# ---- on one device, by implementation: logits [..., V]; labels, lse, cotangent [...]; class_weights [V] or None -----------


def row_losses(implementation: str | None, options: Options, logits, labels, class_weights) -> RowLosses:
    """Computes RowLosses."""

    def xla(logits, labels, *weights):
        return _cross_entropy_math.row_stats_xla(options, logits, labels, *_or_none(weights))

    def kernel(logits, labels, *weights, interpret):
        return stats_kernel(options, logits, labels, *_or_none(weights), interpret=interpret)

    operands = logits, labels, *_present(class_weights)
    stats = _pallas.call_implementation(implementation, kernel, xla, *operands)
    return _cross_entropy_math.row_losses(options, stats, labels, class_weights, logits.shape[-1])


def gradient(implementation: str | None, options: Options, logits, labels, class_weights, lse, cotangent):
    """Computes the gradient [..., V] of the logits for a cotangent of RowLosses.loss."""

    def xla(logits, labels, lse, cotangent, *weights):
        return _cross_entropy_math.gradient_xla(options, logits, labels, *_or_none(weights), lse, cotangent)

    def kernel(logits, labels, lse, cotangent, *weights, interpret):
        return gradient_kernel(options, logits, labels, *_or_none(weights), lse, cotangent, interpret=interpret)

    operands = logits, labels, lse, cotangent, *_present(class_weights)
    return _pallas.call_implementation(implementation, kernel, xla, *operands)


def row_losses_and_gradient(
    implementation: str | None, options: Options, logits, labels, class_weights, cotangent
) -> tuple[RowLosses, jax.Array]:
    """Computes RowLosses and the gradient [..., V] for a known cotangent. The kernel writes the gradient over the logits."""

    def xla(logits, labels, cotangent, *weights):
        stats = _cross_entropy_math.row_stats_xla(options, logits, labels, *_or_none(weights))
        weights = _or_none(weights)
        return stats, _cross_entropy_math.gradient_xla(options, logits, labels, *weights, stats.lse, cotangent)

    def kernel(logits, labels, cotangent, *weights, interpret):
        return stats_and_gradient_kernel(options, logits, labels, *_or_none(weights), cotangent, interpret=interpret)

    operands = logits, labels, cotangent, *_present(class_weights)
    stats, dlogits = _pallas.call_implementation(implementation, kernel, xla, *operands)
    return _cross_entropy_math.row_losses(options, stats, labels, class_weights, logits.shape[-1]), dlogits


def _present(class_weights):
    return () if class_weights is None else (class_weights,)


def _or_none(weights: tuple) -> tuple:
    return weights or (None,)


# ---- launches ----------------------------------------------------------------------------------------------------------


def stats_kernel(
    options: Options, logits, labels, class_weights, *, interpret: bool, blocks: Blocks | None = None
) -> RowStats:
    """Computes RowStats, as row_stats_xla does."""
    operands = [labels, class_weights if options.label_smoothing else None]
    return RowStats(*_launch(_cross_entropy_forward, options, logits, operands, interpret, blocks, stats=True))


def gradient_kernel(
    options: Options, logits, labels, class_weights, lse, cotangent, *, interpret: bool, blocks: Blocks | None = None
) -> jax.Array:
    """Computes the gradient [..., V], as gradient_xla does."""
    operands = [labels, lse, cotangent, *_gradient_weights(options, logits, labels, class_weights)]
    (d_logits,) = _launch(_cross_entropy_backward, options, logits, operands, interpret, blocks, gradient=True)
    return d_logits


def stats_and_gradient_kernel(
    options: Options, logits, labels, class_weights, cotangent, *, interpret: bool, blocks: Blocks | None = None
) -> tuple[RowStats, jax.Array]:
    """Computes RowStats and the gradient [..., V] in one launch."""
    operands = [labels, cotangent, *_gradient_weights(options, logits, labels, class_weights)]
    *stats, d_logits = _launch(_cross_entropy, options, logits, operands, interpret, blocks, stats=True, gradient=True)
    return RowStats(*stats), d_logits


def _gradient_weights(options: Options, logits, labels, class_weights) -> tuple[jax.Array | None, ...]:
    """Returns the weight of each label, the class weights, and their sum; the last two only with label smoothing."""
    dtype = _validate.accumulation_dtype(logits.dtype)
    label_weight = _cross_entropy_math.label_weights(labels, class_weights, dtype)
    if not options.label_smoothing:
        return label_weight, None, None
    total_weight = _cross_entropy_math.total_weight(class_weights, logits.shape[-1], dtype)
    return label_weight, class_weights, total_weight


class _Static(NamedTuple):
    """The static arguments of a kernel."""

    options: Options
    rows: int
    vocab: int
    programs: int
    blocks: Blocks
    interpret: bool


def _launch(
    kernel: Callable,
    options: Options,
    logits: jax.Array,
    operands: Sequence[jax.Array | None],
    interpret: bool,
    blocks: Blocks | None,
    *,
    stats: bool = False,
    gradient: bool = False,
) -> list[jax.Array]:
    """Runs a kernel with refs (logits, *operands, *results) over all rows.

    The results are the statistics of each row, the gradient of the logits, or both, where the gradient overwrites the
    logits.
    """
    *leading, vocab = logits.shape
    rows = math.prod(leading)
    blocks = blocks or _tuning.blocks(kernel.__name__.strip("_"), rows=rows, width=vocab)
    static = _Static(options, rows, vocab, min(blocks.programs or rows, rows), blocks, interpret)
    results: list[tuple] = []
    if stats:
        results += [((rows,), _validate.accumulation_dtype(logits.dtype))] * len(RowStats._fields)
    if gradient:
        results += [((rows, vocab), logits.dtype)]
    outputs = _pallas.launch(
        functools.partial(kernel, static=static),
        [logits.reshape(rows, vocab), *(None if x is None else x.reshape(-1) for x in operands)],
        results,
        grid=(static.programs,),
        num_warps=blocks.num_warps,
        interpret=interpret,
        in_place={0: len(RowStats._fields)} if stats and gradient else None,
    )
    return [output.reshape(*leading, *output.shape[1:]) for output in outputs]


# ---- kernels, grid (programs,): program i processes the rows i, i + programs, ... ---------------------------------------
# The refs of class_weights and total_weight are None where they are not needed.


def _cross_entropy_forward(logits_ref, labels_ref, class_weights_ref, *stats_refs, static: _Static):
    """Writes the statistics of each row."""

    def step(index):
        row = _Row(static, index, logits_ref, labels_ref)
        row.store_scalars(stats_refs, _row_stats(row, class_weights_ref))

    _for_each_row(static, step)


def _cross_entropy_backward(
    logits_ref, labels_ref, lse_ref, cotangent_ref, label_weight_ref, class_weights_ref, total_weight_ref, gradient_ref,
    *, static: _Static,
):  # fmt: skip
    """Writes the gradient of each row, given its lse."""

    def step(index):
        row = _Row(static, index, logits_ref, labels_ref)
        factors = _gradient_factors(row, row.load_scalar(lse_ref), cotangent_ref, label_weight_ref, total_weight_ref)
        _store_gradient(row, gradient_ref, factors, class_weights_ref)

    _for_each_row(static, step)


def _cross_entropy(
    logits_ref, labels_ref, cotangent_ref, label_weight_ref, class_weights_ref, total_weight_ref, *result_refs,
    static: _Static,
):  # fmt: skip
    """Writes the statistics of each row, and its gradient over its logits."""
    *stats_refs, gradient_ref = result_refs

    def step(index):
        row = _Row(static, index, logits_ref, labels_ref)
        stats = _row_stats(row, class_weights_ref)
        row.store_scalars(stats_refs, stats)
        factors = _gradient_factors(row, stats.lse, cotangent_ref, label_weight_ref, total_weight_ref)
        _store_gradient(row, gradient_ref, factors, class_weights_ref)

    _for_each_row(static, step)


def _for_each_row(static: _Static, step: Callable[[jax.Array], None]) -> None:
    """Runs step(index) for each row of this program."""
    program = _pallas.program_id(0)

    def body(i, carry):
        step(program + i * static.programs)
        return carry

    if static.programs == static.rows:
        body(0, 0)
    else:
        jax.lax.fori_loop(0, _pallas.cdiv(static.rows - program, static.programs), body, 0)


class _Row:
    """One row of logits inside a kernel. Its scalars are arrays [1]."""

    def __init__(self, static: _Static, index: jax.Array, logits_ref, labels_ref):
        self.static, self.index, self.logits_ref = static, index, logits_ref
        self.dtype = _validate.accumulation_dtype(logits_ref.dtype)
        self.label = self.load_scalar(labels_ref, jnp.int32)
        self.counts = self.label != static.options.ignore_index
        self.in_vocab = (self.label >= 0) & (self.label < static.vocab)
        rows, columns = static.blocks.rows, static.blocks.columns
        self.offsets = jnp.arange(rows)[:, None] * columns + jnp.arange(columns)[None, :]
        self.tiles = _pallas.cdiv(static.vocab, self.offsets.size)

    def load_scalar(self, ref, dtype=None) -> jax.Array:
        return _pallas.load(ref, (_pallas.span(self.index, 1),), jnp.ones(1, bool), dtype or self.dtype)

    def store_scalars(self, refs: Sequence[Any], values: Sequence[jax.Array]) -> None:
        for ref, value in zip(refs, values, strict=True):
            _pallas.store(ref, (_pallas.span(self.index, 1),), value, jnp.ones(1, bool))

    def tile(self, i) -> tuple[jax.Array, jax.Array]:
        """Returns the vocabulary indices of the i-th tile, and the mask of those that exist."""
        columns = i * self.offsets.size + self.offsets
        return columns, columns < self.static.vocab

    def load(self, columns: jax.Array, inside: jax.Array) -> jax.Array:
        """Loads logits; -inf past the end. A row whose label is ignored is not read."""
        return _pallas.load(
            self.logits_ref, (jnp.full_like(columns, self.index), columns), inside & self.counts[None], other=-jnp.inf
        )

    def z(self, logits: jax.Array, inside: jax.Array) -> jax.Array:
        """Returns z of loaded logits; -inf past the end."""
        z, options = logits.astype(self.dtype), self.static.options
        if options.softcap is not None:
            z = jnp.where(inside, _cross_entropy_math.apply_softcap(options, z), -jnp.inf)
        return z

    def load_class_weights(self, ref, columns: jax.Array, inside: jax.Array) -> jax.Array:
        """Loads class weights, or ones if there are none; 0 past the end."""
        return inside.astype(self.dtype) if ref is None else _pallas.load(ref, (columns,), inside, self.dtype)

    def exp(self, x: jax.Array) -> jax.Array:
        return _pallas.exp2(x * _pallas.LOG2_E, interpret=self.static.interpret)


def _row_stats(row: _Row, class_weights_ref) -> RowStats:
    """Computes the statistics of a row in one pass over its tiles."""
    smoothing, columns_per_tile = row.static.options.label_smoothing, row.static.blocks.columns

    def step(i, state):
        (largest, total, weighted_z), logits = state
        next_logits = row.load(*row.tile(i + 1))
        columns, inside = row.tile(i)
        z = row.z(logits, inside)
        new_largest = jnp.maximum(largest, jnp.max(z, axis=0))
        total = total * row.exp(largest - new_largest) + jnp.sum(row.exp(z - new_largest[None, :]), axis=0)
        if smoothing:
            weights = row.load_class_weights(class_weights_ref, columns, inside)
            weighted_z += jnp.sum(weights * jnp.where(inside, z, 0), axis=0)
        return (new_largest, total, weighted_z), next_logits

    z_label = row.z(row.load(row.label[None], row.in_vocab[None]), jnp.ones((1, 1), bool))[0]
    zeros = jnp.zeros(columns_per_tile, row.dtype)
    state = (jnp.full(columns_per_tile, LOWEST, row.dtype), zeros, zeros), row.load(*row.tile(0))
    # The loop pauses at the label's tile to find the largest z before the label: of equal logits, the first is the argmax.
    tiles = jnp.max(jnp.where(row.counts, row.tiles, 0))
    label_tile = jnp.max(jnp.clip(row.label // row.offsets.size, 0, tiles))
    sums, logits = state = jax.lax.fori_loop(0, label_tile, step, state)
    columns, inside = row.tile(label_tile)
    largest_before_label = jnp.max(jnp.where(columns < row.label[None], row.z(logits, inside), -jnp.inf))
    largest_before_label = jnp.maximum(largest_before_label, jnp.max(sums[0]))
    (largest, total, weighted_z), _ = jax.lax.fori_loop(label_tile, tiles, step, state)

    row_largest = jnp.max(largest)
    lse = row_largest + jnp.log(jnp.sum(total * row.exp(largest - row_largest)))
    correct = row.in_vocab & (row_largest <= z_label) & (largest_before_label < z_label)
    return RowStats(jnp.full(1, lse), z_label, jnp.full(1, jnp.sum(weighted_z)), correct.astype(row.dtype))


class _GradientFactors(NamedTuple):
    """The factors of a row's gradient p_v a - b [v = y] - c w_v, times its cotangent."""

    lse: jax.Array
    a: jax.Array
    b: jax.Array
    c: jax.Array


def _gradient_factors(row: _Row, lse, cotangent_ref, label_weight_ref, total_weight_ref) -> _GradientFactors:
    options, vocab = row.static.options, row.static.vocab
    label_weight, cotangent = row.load_scalar(label_weight_ref), row.load_scalar(cotangent_ref)
    cotangent = jnp.where(row.in_vocab, cotangent, jnp.nan)
    total_weight: jax.Array | float = 0.0
    if total_weight_ref is not None:
        total_weight = _pallas.load(total_weight_ref, (_pallas.span(0, 1),), jnp.ones(1, bool), row.dtype)
    terms = _cross_entropy_math.gradient_terms(options, vocab, label_weight, total_weight, lse)
    return _GradientFactors(lse, *(term * cotangent for term in terms))


def _store_gradient(row: _Row, gradient_ref, factors: _GradientFactors, class_weights_ref) -> None:
    """Writes the gradient of a row, with the derivative of the softcap, in one pass over its tiles."""
    options, (lse, a, b, c) = row.static.options, factors

    def step(step_index, logits):
        i = row.tiles - 1 - step_index  # backwards, because the tiles read last are the likeliest to be in a cache
        next_logits = row.load(*row.tile(jnp.maximum(i - 1, 0)))
        columns, inside = row.tile(i)
        z = row.z(logits, inside)
        gradient = row.exp(z - lse[None]) * a[None] - jnp.where(columns == row.label[None], b[None], 0)
        if options.label_smoothing:
            gradient -= c[None] * row.load_class_weights(class_weights_ref, columns, inside)
        if options.softcap is not None:
            gradient *= 1 - jnp.square(z / options.softcap)
        gradient = jnp.where(row.counts[None], gradient, 0)
        _pallas.store(gradient_ref, (jnp.full_like(columns, row.index), columns), gradient, inside)
        return next_logits

    jax.lax.fori_loop(0, row.tiles, step, row.load(*row.tile(row.tiles - 1)))
