"""Master weights: float32 copies of bfloat16 weights, in which small updates accumulate instead of vanishing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from liger_jax.errors import UserError

BFLOAT16_BITS = {"exponent_bits": 8, "mantissa_bits": 7}


class MasterState(NamedTuple):
    """The unrounded weights, in float32, and the state of the optimizer that updates them."""

    weights: Any
    inner: optax.OptState


def with_master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer that updates float32 copies of bfloat16 weights. Its moments are float32 too.

        master = master + update(gradient, master)
        weight = bfloat16(master)

    A bfloat16 has 8 significant bits: without a master, an update of less than 1/512 of a weight is lost.

    After `optax.apply_updates` each weight equals its rounded master to the last bit. Where a weight shrinks to less than
    2^-15 of itself in one step, no sum can reach the rounded master. The master then takes the weight's value, from which
    it differs by no more than the rounding error of a float32 of the old size.

    `update` takes the argument `finite`: if it is false, weights and masters stay as they are. By default, it is whether the
    norm of these gradients is finite.

    Raises:
        UserError: From `init`, if a weight is not bfloat16.

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
        other_dtypes = {str(w.dtype) for w in jax.tree.leaves(params)} - {"bfloat16"}
        if other_dtypes:
            raise UserError(
                f"The model has weights in {sorted(other_dtypes)}; expected all in bfloat16 for master_weights"
            )
        weights = _float32(params)
        return MasterState(weights, optimizer.init(weights))

    def update(grads, state, params=None, *, finite=None, **_):
        if params is None:
            raise ValueError("params is None; expected the weights, which master weights need in update()")
        finite = jnp.isfinite(optax.tree.norm(_float32(grads))) if finite is None else finite
        updates, inner = optimizer.update(_float32(grads), state.inner, state.weights)
        weights = _float32(params)
        masters = jax.tree.map(_reachable_master, jax.tree.map(jnp.add, state.weights, updates), weights)
        masters = jax.tree.map(lambda new, old: jnp.where(finite, new, old), masters, state.weights)
        # XLA would otherwise recompute the masters for the updates, perhaps with different rounding
        masters = jax.lax.optimization_barrier(masters)
        return jax.tree.map(_weight_update, masters, weights), MasterState(masters, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _weight_update(master: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the update that turns a weight into its rounded master."""
    return _rounded(master) - weight


def _reachable_master(master: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the master, or, where no update of the weight can reach it, the value that the update reaches."""
    reached = _rounded(weight + _weight_update(master, weight))
    return jnp.where(_rounded(master) == reached, master, reached)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _rounded(x: jax.Array) -> jax.Array:
    """Returns x rounded to bfloat16, as float32. XLA may remove a cast to bfloat16 and back, but not this."""
    return jax.lax.reduce_precision(x, **BFLOAT16_BITS)
