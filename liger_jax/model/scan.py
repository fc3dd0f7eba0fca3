"""Running a stack of equal layers as one compiled loop, and what of it is kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from liger_jax.mesh import split_rows

# What a backward pass finds in memory rather than computes again.
#   none: everything the operations save.   full: each layer's input only.
#   dots: the results of matrix products and of attention, whose recomputation is dear; norms, gates and rotations are
#         cheap to do again. Less memory traffic than "none", so usually the fastest as well. Of a product and its LoRA
#         the sum is kept, in place of both.
REMAT = ("none", "dots", "full")
_keep = jax.checkpoint_policies
_POLICIES = {
    "dots": _keep.save_from_both_policies(_keep.dots_saveable, _keep.save_only_these_names("attention", "adapted")),
    "full": _keep.nothing_saveable,
}


def rematerialise(layer: Callable, remat: str) -> Callable:
    """`layer` with the intermediates that its backward pass keeps chosen by name, see `REMAT`."""
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; expected one of {REMAT}")
    if remat == "none":
        return layer
    # prevent_cse guards against a compiler that merges the recomputation away; a scan's body does that already
    return jax.checkpoint(layer, policy=_POLICIES[remat], prevent_cse=False)


def scan_layers(
    layer: Callable[[jax.Array, Any], tuple[jax.Array, Any]], x: jax.Array, layers: nnx.Module, *, remat: str = "none"
) -> tuple[jax.Array, Any]:
    """x, aux_i = layer(x, layers[i]) for each i; -> the last x and all aux, stacked. `layers` has a leading layer axis."""

    def split(x, weights):
        x, aux = layer(x, weights)
        return split_rows(x), aux

    return jax.lax.scan(rematerialise(split, remat), split_rows(x), layers)
