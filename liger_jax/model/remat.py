"""Runs a stack of identical layers, scanned or unrolled, and decides which activations the backward pass recomputes."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from liger_jax.errors import UserError
from liger_jax.model.sharding import constrain_batch
from liger_jax.options import LayerExecution


def _narrow_matmuls(primitive: Any, *operands: Any, **params: Any) -> bool:
    """A checkpoint policy that saves the results of matmuls that are no wider than their input."""
    if primitive is not jax.lax.dot_general_p:
        return False
    (left, right), ((contracted, _), _) = operands, params["dimension_numbers"]
    depth = math.prod(left.shape[i] for i in contracted)
    return right.size <= depth**2


# The activations that are saved for the backward pass instead of being recomputed, from the most memory to the least:
#   none: everything that the operations save.
#   dots: the results of matmuls and attention, which are expensive to recompute. Norms, activations and RoPE are cheap.
#         Memory traffic is lower than with "none", so this is usually the fastest as well. For a matmul with LoRA, the
#         sum is saved instead of its two terms.
#   narrow: like dots, without the matmuls whose result is wider than their input (those into an MLP's hidden size). Takes
#         67 to 80 % of the memory of dots and 3 to 12 % more time.
#   attention: each layer's input and the result of attention.
#   full: each layer's input only.
_policies = jax.checkpoint_policies
_POLICIES = {
    "none": None,
    "dots": _policies.save_from_both_policies(
        _policies.dots_saveable, _policies.save_only_these_names("attention", "adapted")
    ),
    "narrow": _policies.save_from_both_policies(_narrow_matmuls, _policies.save_only_these_names("attention")),
    "attention": _policies.save_only_these_names("attention"),
    "full": _policies.nothing_saveable,
}
REMAT = tuple(_POLICIES)


def scan_layers(
    layer: Callable[..., tuple[jax.Array, Any]],
    x: jax.Array,
    layers: nnx.Module,
    execution: LayerExecution,
    *,
    tower: Literal["vision", "text"],
    kinds: Sequence[Hashable] = (),
    taps: Sequence[int] = (),
    after_first: tuple[Callable[[jax.Array, jax.Array], jax.Array], list[jax.Array]] | None = None,
) -> tuple[jax.Array, Any, list[jax.Array]]:
    """Applies x, aux_i = layer(x, layers[i]) for each i.

    Args:
        layer: takes activations and the weights of one layer; and its kind, if there are kinds.
        x: activations; the first dimension is the batch.
        layers: a module whose weights have a leading layer axis.
        execution: which towers to unroll, and which activations to recompute.
        tower: the tower that the layers belong to.
        kinds: one value per layer, in a repeating pattern. Layers of one kind share a compiled program; a scan's body is one
            period of the pattern.
        taps: the layers, in increasing order, whose outputs are returned, too.
        after_first: (update, extras). After layer i, x = update(x, extras[i]) while there are extras.

    Returns:
        The last x; all aux_i, stacked; and the outputs of the layers in `taps`, after any update.

    Raises:
        UserError: `execution.remat` is not one of REMAT.
    """
    if execution.remat not in REMAT:
        raise UserError(f"remat is {execution.remat!r}; expected one of {REMAT}")
    unroll = execution.unrolls(tower)

    def constrained_layer(kind: tuple[Hashable, ...], x, weights):
        x, aux = layer(x, weights, *kind)
        return constrain_batch(x), aux

    count = len(jax.tree.leaves(layers)[0])
    patterns: list[tuple[Hashable, ...]] = [(kind,) for kind in kinds] if kinds else [()] * count
    steps: dict[Any, Callable] = {kind: functools.partial(constrained_layer, kind) for kind in patterns}
    if execution.remat != "none":
        # prevent_cse keeps the compiler from merging the recomputation with the original; a scan's body does that already
        remat = functools.partial(jax.checkpoint, policy=_POLICIES[execution.remat], prevent_cse=unroll)
        steps = {kind: remat(step) for kind, step in steps.items()}
    if unroll:
        steps = {kind: jax.jit(step) for kind, step in steps.items()}  # traced once
    run = _unroll if unroll else _scan
    return run([steps[kind] for kind in patterns], constrain_batch(x), layers, taps, after_first)


def _unroll(steps: list[Callable], x: jax.Array, layers: Any, taps: Sequence[int], after_first: Any):
    """Runs `scan_layers` without a loop.

    This avoids a scan's copies: of each layer's weights out of the stack, and of its gradient and saved activations into
    other stacks, which have to be filled with zeros first.
    """
    outputs, tapped = [], []
    for i, weights in enumerate(unstack(layers)):
        x, aux = steps[i](x, weights)
        outputs.append(aux)
        if after_first and i < len(after_first[1]):
            x = after_first[0](x, after_first[1][i])
        if i in taps:
            tapped.append(x)
    return x, _stack(*outputs), tapped


def _scan(steps: list[Callable], x: jax.Array, layers: Any, taps: Sequence[int], after_first: Any):
    """Runs `scan_layers` as a loop, whose body is one period of the steps.

    The outputs to return are carried in an array with one entry per tap, and a last one that all other layers overwrite, so
    that each layer runs the same program.
    """
    count = len(steps)
    period = next(p for p in range(1, count + 1) if count % p == 0 and steps == steps[:p] * (count // p))
    numbers: Any = None
    slots: Any = None
    tapped: Any = None
    if after_first:
        numbers = jnp.arange(count).reshape(-1, period)
        update, extras = after_first[0], jnp.stack(after_first[1])
    if taps:
        slots = jnp.array([taps.index(i) if i in taps else len(taps) for i in range(count)]).reshape(-1, period)
        tapped = jnp.zeros((len(x), len(taps) + 1, *x.shape[1:]), x.dtype)

    def body(carry, group):
        (x, tapped), (weights, numbers, slots) = carry, group
        outputs = []
        for j, layer in enumerate([weights] if period == 1 else unstack(weights)):
            x, aux = steps[j](x, layer)
            outputs.append(aux)
            if after_first:
                extra = jnp.where(numbers[j] < len(extras), extras[jnp.minimum(numbers[j], len(extras) - 1)], 0)
                x = update(x, extra)
            if taps:
                tapped = tapped.at[:, slots[j]].set(x)
        return (x, tapped), outputs[0] if period == 1 else _stack(*outputs)

    if period > 1:
        layers = jax.tree.map(lambda w: w.reshape(-1, period, *w.shape[1:]), layers)
    (x, tapped), aux = jax.lax.scan(body, (x, tapped), (layers, numbers, slots))
    if period > 1:
        aux = jax.tree.map(lambda a: a.reshape(count, *a.shape[2:]), aux)
    return x, aux, [tapped[:, k] for k in range(len(taps))]


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.custom_vjp
def unstack(layers: Any) -> tuple:
    """Returns one tree per layer.

    The backward pass stacks their gradients; the derivative of indexing would add up arrays of zeros instead.
    """
    return tuple(jax.tree.map(lambda leaf: leaf[i], layers) for i in range(len(jax.tree.leaves(layers)[0])))


unstack.defvjp(lambda layers: (unstack(layers), None), lambda _, grads: (_stack(*grads),))
