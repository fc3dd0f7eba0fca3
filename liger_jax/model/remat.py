"""Running a stack of equal layers, as one compiled loop or one after the other, and what is kept for the backward pass."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from liger_jax.model.sharding import constrain_batch

# What a backward pass finds in memory rather than computes again, in the order of memory needed.
#   none: everything the operations save.
#   dots: the results of matrix products and of attention, whose recomputation is dear; norms, gates and rotations are
#         cheap to do again. Less memory traffic than "none", so usually the fastest as well. Of a product and its LoRA
#         the sum is kept, in place of both.
#   narrow: as dots, but not the products that are wider than what goes in, those into an MLP's hidden size: two thirds of
#         the memory of dots, for 2 % more time.
#   attention: each layer's input and attention's result.
#   full: each layer's input only.
_keep = jax.checkpoint_policies


def _narrow_products(primitive: Any, *operands: Any, **params: Any) -> bool:
    if primitive is not jax.lax.dot_general_p:
        return False
    (left, right), ((summed, _), _) = operands, params["dimension_numbers"]
    depth = math.prod(left.shape[i] for i in summed)
    return right.size <= depth**2


_POLICIES = {
    "none": None,
    "dots": _keep.save_from_both_policies(_keep.dots_saveable, _keep.save_only_these_names("attention", "adapted")),
    "narrow": _keep.save_from_both_policies(_narrow_products, _keep.save_only_these_names("attention")),
    "attention": _keep.save_only_these_names("attention"),
    "full": _keep.nothing_saveable,
}
REMAT = tuple(_POLICIES)


class LayerExecution(NamedTuple):
    """How the layers of a tower run.

    remat: one of `REMAT`.
    unroll: each layer stands in the program by itself. The program is larger and takes several times longer to compile,
        but what a loop does to the stack of layers falls away: copying each layer's weights out of it, its gradient and
        what the backward pass needs into others, and filling those with zeros first.
    """

    remat: str = "none"
    unroll: bool = False


DEFAULT_EXECUTION = LayerExecution()


def scan_layers(
    layer: Callable[[jax.Array, Any], tuple[jax.Array, Any]], x: jax.Array, layers: nnx.Module, loop: LayerExecution
) -> tuple[jax.Array, Any]:
    """x, aux_i = layer(x, layers[i]) for each i; -> the last x and all aux, stacked. `layers` has a leading layer axis."""
    if loop.remat not in REMAT:
        raise ValueError(f"remat is {loop.remat!r}; expected one of {REMAT}")

    def split(x, weights):
        x, aux = layer(x, weights)
        return constrain_batch(x), aux

    if loop.remat != "none":
        # prevent_cse guards against a compiler that merges the recomputation away; a scan's body does that already
        split = jax.checkpoint(split, policy=_POLICIES[loop.remat], prevent_cse=loop.unroll)
    x = constrain_batch(x)
    if not loop.unroll:
        return jax.lax.scan(split, x, layers)
    split = jax.jit(split)  # traced once
    outputs = []
    for weights in _unstack(layers):
        x, aux = split(x, weights)
        outputs.append(aux)
    return x, _stack(*outputs)


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.custom_vjp
def _unstack(layers: Any) -> tuple:
    """One tree a layer. Their gradients are stacked, where the derivative of indexing would add up arrays of zeros."""
    return tuple(jax.tree.map(lambda leaf: leaf[i], layers) for i in range(len(jax.tree.leaves(layers)[0])))


_unstack.defvjp(lambda layers: (_unstack(layers), None), lambda _, grads: (_stack(*grads),))
