"""Master weights: small updates accumulate, and the model's weights equal the rounded masters to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from liger_jax.train.master_weights import MasterState, with_master_weights


def train(optimizer, weights, gradients, steps):
    """Returns weights and optimizer state after each step, computed in one compiled program, as in a training step."""

    @jax.jit
    def step(weights, state, grads):
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    state, history = optimizer.init(weights), []
    for number in range(steps):
        weights, state = step(weights, state, gradients(number))
        history.append((weights, state))
    return history


def bits(x):
    return np.asarray(x).view(np.uint16)


def test_tiny_updates_accumulate():
    """After a thousand updates of 2^-10, a bfloat16 weight is unchanged; with a master, it has the exact sum."""
    one, gradient = jnp.ones(3, "bfloat16"), jnp.ones(3, "bfloat16")
    sgd = optax.sgd(2.0**-10)
    unchanged, _ = train(sgd, one, lambda step: gradient, 1000)[-1]
    weight, state = train(with_master_weights(sgd), one, lambda step: gradient, 1000)[-1]
    assert (unchanged == 1).all()
    np.testing.assert_array_equal(state.weights, np.float32(1 - 1000 * 2.0**-10))
    np.testing.assert_array_equal(weight, jnp.asarray(state.weights, "bfloat16"))


def test_equals_float32_training():
    """Masters and moments equal those of optax.adamw on float32 weights with the same gradients."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=1000), "bfloat16")
    grads = [jnp.asarray(rng.normal(size=1000), "bfloat16") for _ in range(20)]
    adamw = optax.adamw(1e-3, weight_decay=0.1)
    expected, _ = train(adamw, weights.astype("float32"), lambda step: grads[step].astype("float32"), 20)[-1]
    _, state = train(with_master_weights(adamw), weights, lambda step: grads[step], 20)[-1]
    np.testing.assert_allclose(state.weights, expected, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.inner) if leaf.ndim} == {np.dtype("float32")}


def test_weights_are_the_rounded_masters():
    """Equal to the last bit, for updates much larger and smaller than the weights, sign changes, and results near zero."""
    rng = np.random.default_rng(1)
    scale = 2.0 ** rng.integers(-20, 8, size=20_000)
    weights = jnp.asarray(rng.normal(size=20_000) * scale, "bfloat16")

    def gradients(step):
        other = rng.normal(size=20_000) * 2.0 ** rng.integers(-30, 8, size=20_000)
        return jnp.asarray(np.where(rng.random(20_000) < 0.5, np.asarray(weights, np.float32), other), "bfloat16")

    optimizer = with_master_weights(optax.sgd(0.9999))  # half of the first updates bring a weight close to zero
    for rounded, state in train(optimizer, weights, gradients, 5):
        np.testing.assert_array_equal(bits(rounded), bits(jnp.asarray(state.weights, "bfloat16")))


def test_through_make_optimizer():
    """Frozen parts have no masters."""
    from liger_jax import Qwen2VL, Qwen2VLConfig
    from liger_jax.model.params import param_paths
    from liger_jax.train.optimizer import make_optimizer

    model = Qwen2VL.abstract(Qwen2VLConfig.tiny(), dtype="bfloat16")
    optimizer = make_optimizer(1e-3, freeze=["vision"], master_weights=True)
    state = jax.eval_shape(optimizer.init, model)
    masters = {path: leaf for path, leaf in param_paths(state).items() if "/weights/" in path}
    weights = [path for path in param_paths(model) if not path.startswith("visual/") or "merger" in path]
    assert len(masters) == len(weights) and {leaf.dtype for leaf in masters.values()} == {np.dtype("float32")}


def test_invalid_arguments_are_rejected():
    optimizer = with_master_weights(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"weights in \['float32'\]; expected all in bfloat16"):
        optimizer.init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="params is None"):
        optimizer.update(jnp.ones(2), MasterState(jnp.ones(2), ()), None)


@pytest.mark.parametrize("options", [{}, {"finite": False}, {"finite": True}], ids=str)
def test_gradients_that_are_not_finite_change_no_weight(options):
    """Neither weights nor masters, unless the caller says that the step is finite: it knows all gradients and the loss."""
    weights, optimizer = jnp.linspace(-1, 1, 8).astype("bfloat16"), with_master_weights(optax.sgd(0.5))
    state = optimizer.init(weights)
    updates, new_state = optimizer.update(jnp.ones(8, "bfloat16").at[3].set(jnp.nan), state, weights, **options)
    unchanged = not options.get("finite", False)
    assert (optax.apply_updates(weights, updates) == weights).all() == unchanged
    assert (new_state.weights == state.weights).all() == unchanged
