"""Runs a stack of identical layers, scanned or unrolled, and decides which activations the backward pass recomputes."""

import math
from collections.abc import Callable
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
    layer: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    layers: nnx.Module,
    execution: LayerExecution,
    *,
    tower: Literal["vision", "text"],
) -> tuple[jax.Array, Any]:
    """Applies x, aux_i = layer(x, layers[i]) for each i.

    Args:
        layer: takes activations and the weights of one layer.
        x: activations; the first dimension is the batch.
        layers: a module whose weights have a leading layer axis.
        execution: which towers to unroll, and which activations to recompute.
        tower: the tower that the layers belong to.

    Returns:
        The last x, and all aux_i, stacked.

    Raises:
        UserError: `execution.remat` is not one of REMAT.
    """
    if execution.remat not in REMAT:
        raise UserError(f"remat is {execution.remat!r}; expected one of {REMAT}")
    unroll = execution.unrolls(tower)

    def constrained_layer(x, weights):
        x, aux = layer(x, weights)
        return constrain_batch(x), aux

    if execution.remat != "none":
        # prevent_cse keeps the compiler from merging the recomputation with the original; a scan's body does that already
        constrained_layer = jax.checkpoint(constrained_layer, policy=_POLICIES[execution.remat], prevent_cse=unroll)
    x = constrain_batch(x)
    if not unroll:
        return jax.lax.scan(constrained_layer, x, layers)
    # Unrolling avoids a scan's copies: of each layer's weights out of the stack, and of its gradient and saved activations
    # into other stacks, which have to be filled with zeros first.
    constrained_layer = jax.jit(constrained_layer)  # traced once
    outputs = []
    for weights in _unstack(layers):
        x, aux = constrained_layer(x, weights)
        outputs.append(aux)
    return x, _stack(*outputs)


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.custom_vjp
def _unstack(layers: Any) -> tuple:
    """Returns one tree per layer.

    The backward pass stacks their gradients; the derivative of indexing would add up arrays of zeros instead.
    """
    return tuple(jax.tree.map(lambda leaf: leaf[i], layers) for i in range(len(jax.tree.leaves(layers)[0])))


_unstack.defvjp(lambda layers: (_unstack(layers), None), lambda _, grads: (_stack(*grads),))
