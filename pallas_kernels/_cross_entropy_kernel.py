"""The loss of rows of logits and its gradient as Triton kernels, with the formulas of _cross_entropy_math: for both cross-entropies.

One program has one row, too wide to be held, and walks over it in tiles [blocks.rows, blocks.columns] of neighbouring
logits. Each column of the tile keeps a running maximum and sum of its own; they meet at the end of the row, so that
nothing waits for other warps on the way. Each tile is loaded before the one in front of it is worked on.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _cross_entropy_math, _pallas, _tuning, _validate
from pallas_kernels._cross_entropy_math import Options, Rows, Statistics
from pallas_kernels._tuning import Blocks

LOWEST = -1e38  # finite, so that a difference of two is a number


def rows(implementation: str | None, options: Options, logits, labels, class_weights) -> Rows:
    """logits [..., V], labels [...] -> Rows, each [...]."""

    def xla(logits, labels, *weights):
        return _cross_entropy_math.statistics_xla(options, logits, labels, *_or_none(weights))

    def kernel(logits, labels, *weights, interpret):
        return _launch(options, logits, labels, *_or_none(weights), interpret=interpret)[0]

    found = _pallas.pick(_unless_empty(implementation, logits), kernel, xla, logits, labels, *_present(class_weights))
    return _cross_entropy_math.rows_of_statistics(options, found, labels, class_weights, logits.shape[-1])


def gradient(implementation: str | None, options: Options, logits, labels, class_weights, lse, cotangent):
    """The gradient [..., V] of the logits for a cotangent [...] of Rows.loss."""

    def xla(logits, labels, lse, cotangent, *weights):
        return _cross_entropy_math.gradient_xla(options, logits, labels, *_or_none(weights), lse, cotangent)

    def kernel(logits, labels, lse, cotangent, *weights, interpret):
        return _launch(options, logits, labels, *_or_none(weights), lse, cotangent, interpret=interpret)[1]

    operands = logits, labels, lse, cotangent, *_present(class_weights)
    return _pallas.pick(_unless_empty(implementation, logits), kernel, xla, *operands)


def rows_and_gradient(
    implementation: str | None, options: Options, logits, labels, class_weights, cotangent
) -> tuple[Rows, jax.Array]:
    """Rows, and the gradient of the logits for a cotangent that is known already, written over the logits."""

    def xla(logits, labels, cotangent, *weights):
        found = _cross_entropy_math.statistics_xla(options, logits, labels, *_or_none(weights))
        return found, _cross_entropy_math.gradient_xla(
            options, logits, labels, *_or_none(weights), found.lse, cotangent
        )

    def kernel(logits, labels, cotangent, *weights, interpret):
        return _launch(options, logits, labels, *_or_none(weights), None, cotangent, interpret=interpret, in_place=True)

    operands = logits, labels, cotangent, *_present(class_weights)
    found, dlogits = _pallas.pick(_unless_empty(implementation, logits), kernel, xla, *operands)
    return _cross_entropy_math.rows_of_statistics(options, found, labels, class_weights, logits.shape[-1]), dlogits


def _present(class_weights):
    return () if class_weights is None else (class_weights,)


def _or_none(weights: tuple) -> tuple:
    return weights or (None,)


def _unless_empty(implementation: str | None, logits: jax.Array) -> str | None:
    return implementation if logits.size else "xla"


# ---- the kernel ------------------------------------------------------------------------------------------------------


def _cross_entropy(*refs, names: tuple[str, ...], rows: int, programs: int, **of_row: Any):
    """Grid (programs,), which take turns with the rows."""
    ref, program = dict(zip(names, refs, strict=True)), _pallas.program_id(0)

    def step(i, nothing):
        _one_row(program + i * programs, ref, **of_row)
        return nothing

    if programs == rows:
        step(0, 0)
    else:
        jax.lax.fori_loop(0, _pallas.cdiv(rows - program, programs), step, 0)


def _one_row(row: jax.Array, ref: dict[str, Any], *, options: Options, vocab: int, blocks: Blocks, interpret: bool):
    """Finds the statistics unless the lse is given; writes the gradient if there is a cotangent."""
    logits = ref["logits"]
    wide = _validate.wide(logits.dtype)
    one, always = (_pallas.span(row, 1),), jnp.ones(1, bool)
    label = _pallas.load(ref["labels"], one, always, jnp.int32)
    counts, known = label != options.ignore_index, (label >= 0) & (label < vocab)
    offsets = jnp.arange(blocks.rows)[:, None] * blocks.columns + jnp.arange(blocks.columns)[None, :]
    steps = _pallas.cdiv(vocab, offsets.size)

    def tile(i):
        columns = i * offsets.size + offsets
        return columns, columns < vocab

    def load(columns, inside):
        # the row of an ignored label is not read
        return _pallas.load(logits, (jnp.full_like(columns, row), columns), inside & counts[None], other=-jnp.inf)

    def z_of(loaded, inside):
        z = loaded.astype(wide)  # -inf past the end of the row
        return z if options.softcap is None else jnp.where(inside, _cross_entropy_math.capped(options, z), -jnp.inf)

    def class_weights_at(columns, inside):
        if "class_weights" not in ref:
            return inside.astype(wide)
        return _pallas.load(ref["class_weights"], (columns,), inside, wide)

    def exp(x):
        return _pallas.exp2(x * _pallas.LOG2_E, interpret=interpret)

    if "lse" not in ref:
        z_label = z_of(load(label[None], known[None]), True)[0]

        def gather(i, state):
            (largest, total, weighted), loaded = state
            following = load(*tile(i + 1))
            columns, inside = tile(i)
            z = z_of(loaded, inside)
            new = jnp.maximum(largest, jnp.max(z, axis=0))
            total = total * exp(largest - new) + jnp.sum(exp(z - new[None, :]), axis=0)
            if options.label_smoothing:
                weighted += jnp.sum(class_weights_at(columns, inside) * jnp.where(inside, z, 0), axis=0)
            return (new, total, weighted), following

        zeros = jnp.zeros(blocks.columns, wide)
        walked = jnp.max(jnp.where(counts, steps, 0))
        label_tile = jnp.max(jnp.clip(label // offsets.size, 0, walked))
        state = (jnp.full(blocks.columns, LOWEST, wide), zeros, zeros), load(*tile(0))
        before, loaded = state = jax.lax.fori_loop(0, label_tile, gather, state)
        columns, inside = tile(label_tile)
        earlier = jnp.max(jnp.where(columns < label[None], z_of(loaded, inside), -jnp.inf))
        earlier = jnp.maximum(earlier, jnp.max(before[0]))
        (largest, total, weighted), _ = jax.lax.fori_loop(label_tile, walked, gather, state)
        of_row = jnp.max(largest)
        lse = jnp.full(1, of_row + jnp.log(jnp.sum(total * exp(largest - of_row))))
        first_largest = known & (of_row <= z_label) & (earlier < z_label)
        _pallas.store(ref["out_lse"], one, lse, always)
        _pallas.store(ref["out_z_label"], one, z_label, always)
        _pallas.store(ref["out_weighted_z"], one, jnp.full(1, jnp.sum(weighted)), always)
        _pallas.store(ref["out_first_largest"], one, first_largest.astype(wide), always)
    else:
        lse = _pallas.load(ref["lse"], one, always, wide)

    if "cotangent" not in ref:
        return
    weight, cotangent = (_pallas.load(ref[name], one, always, wide) for name in ("label_weight", "cotangent"))
    cotangent = jnp.where(known, cotangent, jnp.nan)
    spread = options.label_smoothing / vocab
    of_label = (1 - options.label_smoothing) * weight
    of_softmax = of_label + 2 * options.z_loss * weight * lse
    if options.label_smoothing:
        of_softmax += spread * _pallas.load(ref["total_weight"], (_pallas.span(0, 1),), always, wide)
    of_label, of_softmax, spread = (factor * cotangent for factor in (of_label, of_softmax, spread))

    def scatter(back, loaded):
        i = steps - 1 - back  # backwards: what was read last is the likeliest to be in a cache
        following = load(*tile(jnp.maximum(i - 1, 0)))
        columns, inside = tile(i)
        z = z_of(loaded, inside)
        gradient = exp(z - lse[None]) * of_softmax[None] - jnp.where(columns == label[None], of_label[None], 0)
        if options.label_smoothing:
            gradient -= spread[None] * class_weights_at(columns, inside)
        if options.softcap is not None:
            gradient *= 1 - jnp.square(z / options.softcap)
        gradient = jnp.where(counts[None], gradient, 0)
        _pallas.store(ref["out_gradient"], (jnp.full_like(columns, row), columns), gradient, inside)
        return following

    jax.lax.fori_loop(0, steps, scatter, load(*tile(steps - 1)))


def _launch(
    options: Options,
    logits: jax.Array,
    labels: jax.Array,
    class_weights: jax.Array | None,
    lse: jax.Array | None = None,
    cotangent: jax.Array | None = None,
    *,
    interpret: bool,
    in_place: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Statistics | None, jax.Array | None]:
    """Statistics unless the lse is given, the gradient if there is a cotangent."""
    *leading, vocab = logits.shape
    count, wide = math.prod(leading), _validate.wide(logits.dtype)
    operands = {"logits": logits.reshape(count, vocab), "labels": labels, "lse": lse, "cotangent": cotangent}
    if cotangent is not None:
        operands["label_weight"] = _cross_entropy_math.weight_of_label(labels, class_weights, wide)
    if options.label_smoothing:
        operands |= {"class_weights": class_weights, "total_weight": None}
        if cotangent is not None:
            operands["total_weight"] = _cross_entropy_math.total_weight(class_weights, vocab, wide).reshape(1)
    per_row = {"labels", "lse", "cotangent", "label_weight"}
    operands = {name: x.reshape(count) if name in per_row else x for name, x in operands.items() if x is not None}
    results = {}
    if lse is None:
        results |= {f"out_{name}": ((count,), wide) for name in Statistics._fields}
    if cotangent is not None:
        results["out_gradient"] = ((count, vocab), logits.dtype)
    op = "cross_entropy" + ("_forward" if cotangent is None else "" if lse is None else "_backward")
    blocks = blocks or _tuning.blocks(op, rows=count, width=vocab)
    programs = min(blocks.programs or count, count)
    found = _pallas.launch(
        functools.partial(
            _cross_entropy,
            names=(*operands, *results),
            rows=count,
            programs=programs,
            options=options,
            vocab=vocab,
            blocks=blocks,
            interpret=interpret,
        ),
        list(operands.values()),
        list(results.values()),
        grid=(programs,),
        num_warps=blocks.num_warps,
        interpret=interpret,
        in_place={0: len(results) - 1} if in_place else None,
    )
    statistics = Statistics(*(x.reshape(leading) for x in found[:4])) if lse is None else None
    return statistics, found[-1].reshape(logits.shape) if cotangent is not None else None
