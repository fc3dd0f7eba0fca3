"""What the log shows of an update: the norm of the gradient and the learning rate, as the optimizer saw them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Report(NamedTuple):
    """A part of an optimizer's state."""

    count: jax.Array  # updates so far
    grad_norm: jax.Array  # of the gradients that came in
    learning_rate: jax.Array


def reporting(learning_rate: float | optax.Schedule) -> optax.GradientTransformation:
    """Leaves the gradients as they are, and keeps a `Report` on them.

    It stands in `optax.chain` behind what removes frozen weights, so that their gradients need not be computed for it,
    and before what clips.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from liger_jax.train.grad_stats import reported, reporting
        >>> optimizer = optax.chain(reporting(0.5), optax.sgd(0.5))
        >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(jnp.zeros(2)))
        >>> {name: float(value) for name, value in reported(state).items()}
        {'grad_norm': 5.0, 'learning_rate': 0.5}
    """

    def init(params):
        return Report(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))

    def update(grads, state, params=None):
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        return grads, Report(state.count + 1, norm, jnp.asarray(rate, jnp.float32))

    return optax.GradientTransformation(init, update)


def reported(opt_state: Any) -> dict[str, jax.Array]:
    """{"grad_norm", "learning_rate"} of the last update; empty for an optimizer that keeps no `Report`."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, Report))
    found = next((part for part in parts if isinstance(part, Report)), None)
    return {} if found is None else {"grad_norm": found.grad_norm, "learning_rate": found.learning_rate}
