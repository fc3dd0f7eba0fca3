"""Master weights: small updates add up, and the model's weights are the rounded masters to the last bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from liger_jax.train.master_weights import MasterState, with_master_weights


def train(optimizer, weights, gradients, steps):
    """-> weights and optimizer state after each step, in one compiled program, as a training step is."""

    @jax.jit
    def step(weights, state, grads):
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    state, found = optimizer.init(weights), []
    for number in range(steps):
        weights, state = step(weights, state, gradients(number))
        found.append((weights, state))
    return found


def bits(x):
    return np.asarray(x).view(np.uint16)


def test_tiny_updates_accumulate():
    """A thousand steps of a 2^-10th: bfloat16 alone never moves, with masters the weight arrives where it should."""
    one, gradient = jnp.ones(3, "bfloat16"), jnp.ones(3, "bfloat16")
    sgd = optax.sgd(2.0**-10)
    lost, _ = train(sgd, one, lambda step: gradient, 1000)[-1]
    kept, state = train(with_master_weights(sgd), one, lambda step: gradient, 1000)[-1]
    assert (lost == 1).all()
    np.testing.assert_array_equal(state.weights, np.float32(1 - 1000 * 2.0**-10))
    np.testing.assert_array_equal(kept, jnp.asarray(state.weights, "bfloat16"))


def test_equals_float32_training():
    """Masters and moments are those of optax.adamw on float32 weights, given the same gradients."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=1000), "bfloat16")
    grads = [jnp.asarray(rng.normal(size=1000), "bfloat16") for _ in range(20)]
    adamw = optax.adamw(1e-3, weight_decay=0.1)
    plain, _ = train(adamw, weights.astype("float32"), lambda step: grads[step].astype("float32"), 20)[-1]
    _, state = train(with_master_weights(adamw), weights, lambda step: grads[step], 20)[-1]
    np.testing.assert_allclose(state.weights, plain, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.inner) if leaf.ndim} == {np.dtype("float32")}


def test_weights_are_the_rounded_masters():
    """To the last bit, whatever the sizes: updates far above and below the weights, signs that change, near zeros."""
    rng = np.random.default_rng(1)
    scale = 2.0 ** rng.integers(-20, 8, size=20_000)
    weights = jnp.asarray(rng.normal(size=20_000) * scale, "bfloat16")

    def gradients(step):
        other = rng.normal(size=20_000) * 2.0 ** rng.integers(-30, 8, size=20_000)
        return jnp.asarray(np.where(rng.random(20_000) < 0.5, np.asarray(weights, np.float32), other), "bfloat16")

    optimizer = with_master_weights(optax.sgd(0.9999))  # half of the first updates bring a weight close to zero
    for found, state in train(optimizer, weights, gradients, 5):
        np.testing.assert_array_equal(bits(found), bits(jnp.asarray(state.weights, "bfloat16")))


def test_through_make_optimizer():
    """Frozen parts have no masters; the state is saved and restored as any other."""
    from liger_jax import Qwen2VL, Qwen2VLConfig
    from liger_jax.model.params import param_paths
    from liger_jax.train.optimizer import make_optimizer

    model = Qwen2VL.abstract(dataclasses.replace(Qwen2VLConfig.tiny()), dtype="bfloat16")
    optimizer = make_optimizer(1e-3, freeze=["vision"], master_weights=True)
    state = jax.eval_shape(optimizer.init, model)
    masters = {path: leaf for path, leaf in param_paths(state).items() if "/weights/" in path}
    weights = [path for path in param_paths(model) if not path.startswith("visual/") or "merger" in path]
    assert len(masters) == len(weights) and {leaf.dtype for leaf in masters.values()} == {np.dtype("float32")}


def test_what_cannot_be():
    optimizer = with_master_weights(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"bfloat16; found weights in \['float32'\]"):
        optimizer.init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="give params"):
        optimizer.update(jnp.ones(2), MasterState(jnp.ones(2), ()), None)
