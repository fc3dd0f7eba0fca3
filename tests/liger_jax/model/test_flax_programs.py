"""The model works inside programs written for Flax NNX, flax.training and plain optax, with the values of our own step."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import liger_jax
from liger_jax import Qwen2VL, Qwen2VLConfig, loss_fn, make_train_step, prepare
from liger_jax.errors import UserError
from liger_jax.model.params import param_paths

CONFIG = Qwen2VLConfig.tiny()
STEPS = 2
RATE = 0.5


def make_model(dtype="float32"):
    return Qwen2VL.init(CONFIG, dtype=dtype)


@functools.cache
def make_batch():
    ids = 5 + np.arange(2 * 12).reshape(2, 12)
    return prepare(CONFIG, input_ids=ids, labels=ids)


def loss(model, batch):
    return loss_fn(model, batch)[0]


@functools.cache
def expected():
    """Returns the losses of two steps of our own training loop, and the weights after them."""
    state, step, losses = liger_jax.TrainState.create(make_model(), optax.sgd(RATE)), make_train_step(), []
    for _ in range(STEPS):
        state, metrics = step(state, make_batch())
        losses.append(float(metrics["loss"]))
    return losses, param_paths(state.model)


def assert_trained(losses, model):
    """Asserts that losses and weights equal those of our own training loop."""
    expected_losses, weights = expected()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for path, weight in param_paths(model).items():
        np.testing.assert_allclose(weight, weights[path], atol=1e-5, err_msg=path)


def test_nnx_optimizer():
    model = make_model()
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        value, grads = nnx.value_and_grad(loss)(model, batch)
        optimizer.update(model, grads)
        return value

    assert_trained([step(model, optimizer, make_batch()) for _ in range(STEPS)], model)


def test_split_and_merge_with_optax():
    graphdef, params = nnx.split(make_model(), nnx.Param)
    optimizer = optax.sgd(RATE)

    @jax.jit
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(lambda params: loss(nnx.merge(graphdef, params), batch))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = optimizer.init(params), []
    for _ in range(STEPS):
        params, opt_state, value = step(params, opt_state, make_batch())
        losses.append(value)
    assert_trained(losses, nnx.merge(graphdef, params))


def test_flax_train_state():
    graphdef, params = nnx.split(make_model(), nnx.Param)
    state = train_state.TrainState.create(
        apply_fn=lambda params, batch: loss(nnx.merge(graphdef, params), batch), params=params, tx=optax.sgd(RATE)
    )

    @jax.jit
    def step(state, batch):
        value, grads = jax.value_and_grad(state.apply_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(STEPS):
        state, value = step(state, make_batch())
        losses.append(value)
    assert int(state.step) == STEPS
    assert_trained(losses, nnx.merge(graphdef, state.params))


@functools.cache
def gradients():
    return param_paths(jax.jit(jax.grad(loss))(make_model(), make_batch()))


def test_nnx_grad_with_a_filter():
    """Only the selected weights have gradients, equal to those of jax.grad."""
    grad = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.PathContains("self_attn"))))
    grads = param_paths(grad(make_model(), make_batch()))
    assert grads.keys() == {path for path in gradients() if "self_attn" in path}
    for path, value in grads.items():
        np.testing.assert_allclose(value, gradients()[path], atol=1e-6, err_msg=path)


def test_multi_transform_and_multi_steps():
    """Two micro-steps with half of the gradient each move the language model by SGD and leave the vision tower alone."""
    model, micro_steps = make_model(), 2

    def labels(model):  # a function, since optax would call the model, which is callable itself
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "train" if "language_model" in jax.tree_util.keystr(path) else "freeze", model
        )

    transforms = {"train": optax.sgd(RATE), "freeze": optax.set_to_zero()}
    optimizer = optax.MultiSteps(optax.multi_transform(transforms, labels), micro_steps).gradient_transformation()
    before, opt_state = param_paths(model), optimizer.init(model)

    @jax.jit
    def step(model, opt_state, batch):
        updates, opt_state = optimizer.update(jax.grad(loss)(model, batch), opt_state, model)
        return optax.apply_updates(model, updates), opt_state

    for _ in range(micro_steps):
        model, opt_state = step(model, opt_state, make_batch())
    for path, weight in param_paths(model).items():
        moved = RATE * gradients()[path] if path.startswith("language_model") else 0
        np.testing.assert_allclose(weight, before[path] - moved, atol=1e-6, err_msg=path)


def test_vmap_over_batches_and_over_models():
    """Each entry equals a call of its own."""
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1]]), make_batch())
    models = [make_model(), Qwen2VL.init(CONFIG, dtype="float32", seed=1)]
    stacked = jax.tree.map(lambda *weights: jnp.stack(weights), *models)
    forward = jax.jit(lambda model, batch: model(batch))
    single = [forward(model, make_batch()) for model in models]
    over_batches = jax.jit(jax.vmap(forward, in_axes=(None, 0)))(models[0], batches)
    np.testing.assert_allclose(over_batches, [single[0], single[0][::-1]], atol=1e-5)
    over_models = jax.jit(jax.vmap(forward, in_axes=(0, None)))(stacked, make_batch())
    np.testing.assert_allclose(over_models, single, atol=1e-5)


def test_eval_shape():
    logits = jax.eval_shape(lambda model, batch: model(batch), Qwen2VL.abstract(CONFIG), make_batch())
    assert (logits.shape, logits.dtype) == ((2, 64, CONFIG.text.vocab_size), jnp.bfloat16)


def test_deepcopy_is_independent():
    model = make_model()
    clone, logits = copy.deepcopy(model), model(make_batch())
    clone.language_model.norm.weight[...] *= 2
    np.testing.assert_allclose(clone(make_batch()), 2 * logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model(make_batch()), logits)


def test_float16():
    """Loss and gradients are close to those of float32."""
    weights = jax.tree.map(lambda x: x.astype(jnp.float16), make_model())
    value, grads = jax.jit(jax.value_and_grad(loss))(weights, make_batch())
    np.testing.assert_allclose(value, expected()[0][0], rtol=2e-3)
    for path, grad in param_paths(grads).items():
        assert grad.dtype == jnp.float16
        scale = np.abs(gradients()[path]).max()
        np.testing.assert_allclose(grad, gradients()[path], atol=0.03 * scale + 1e-5, err_msg=path)


# ---- summaries


def test_summary():
    """Lists each parameter and activation, and the sums of a real size, without computing anything."""
    lines = Qwen2VL.abstract(CONFIG).summary(make_batch()).splitlines()
    assert lines[1].split() == ["language_model/embed_tokens/weight", "V", "H", "320", "64", "bfloat16", "20,480"]
    assert lines[-2].split() == ["logits", "2", "64", "320", "bfloat16"]
    size = sum(weight.size for weight in jax.tree.leaves(Qwen2VL.abstract(CONFIG)))
    assert any(line.startswith("total:") and line.endswith(f"{size:,}") for line in lines)


def test_nnx_tabulate_is_refused_and_leaves_the_model_working():
    """Regression test: it failed with an AssertionError and left the methods of all models replaced."""
    model = make_model()
    logits = model(make_batch())
    with pytest.raises(UserError, match=r"model\.summary"):
        nnx.tabulate(model, make_batch())
    np.testing.assert_array_equal(model(make_batch()), logits)
