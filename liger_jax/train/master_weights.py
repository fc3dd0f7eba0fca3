"""Weights in float32 beside those in bfloat16 that a model computes with: small updates add up instead of vanishing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

BITS = {"exponent_bits": 8, "mantissa_bits": 7}  # of bfloat16


class MasterState(NamedTuple):
    """The weights as they would be without rounding, float32, and the state of the optimizer that moves them."""

    weights: Any
    inner: optax.OptState


def with_master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer on float32 copies of bfloat16 weights; its moments are float32, too.

        master = master + update(gradient, master)
        weight = bfloat16(master)

    A bfloat16 has 8 significant bits: an update of less than 1/512 of a weight is lost where the weight is all there is.

    After `optax.apply_updates` each weight equals its rounded master to the last bit. Where a weight falls to less than
    2^-15 of itself in one step, no sum can reach the rounded master; the master then takes the weight's value, from which
    it differs by no more than the rounding of a float32 of the old size.

    Raises:
        ValueError: when used, a weight that is not bfloat16.

    Source: Micikevicius et al. 2018, Mixed Precision Training, https://arxiv.org/abs/1710.03740

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from liger_jax.train.master_weights import with_master_weights
        >>> weight, optimizer = jnp.ones((), "bfloat16"), with_master_weights(optax.sgd(1e-3))
        >>> state = optimizer.init(weight)
        >>> for _ in range(10):
        ...     updates, state = optimizer.update(jnp.ones((), "bfloat16"), state, weight)
        ...     weight = optax.apply_updates(weight, updates)
        >>> float(weight)
        0.98828125
    """

    def init(params):
        strange = {str(w.dtype) for w in jax.tree.leaves(params)} - {"bfloat16"}
        if strange:
            raise ValueError(f"Master weights are for a model in bfloat16; found weights in {sorted(strange)}")
        weights = _float32(params)
        return MasterState(weights, optimizer.init(weights))

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("Master weights need the weights: give params to update()")
        updates, inner = optimizer.update(_float32(grads), state.inner, state.weights)
        weights = _float32(params)
        masters = jax.tree.map(_reachable, jax.tree.map(jnp.add, state.weights, updates), weights)
        # computed once: XLA would compute them for the changes again, perhaps with other roundings
        masters = jax.lax.optimization_barrier(masters)
        return jax.tree.map(_change, masters, weights), MasterState(masters, inner)

    return optax.GradientTransformation(init, update)


def _change(master: jax.Array, weight: jax.Array) -> jax.Array:
    """What to add to a weight to get its rounded master."""
    return _rounded(master) - weight


def _reachable(master: jax.Array, weight: jax.Array) -> jax.Array:
    """The master; where no sum leads to it, what the sum leads to."""
    reached = _rounded(weight + _change(master, weight))
    return jnp.where(_rounded(master) == reached, master, reached)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _rounded(x: jax.Array) -> jax.Array:
    """As bfloat16, in a float32: XLA may drop a cast there and back, but not this."""
    return jax.lax.reduce_precision(x, **BITS)
