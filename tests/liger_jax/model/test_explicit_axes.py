"""Batches and models on a mesh with Explicit axes, which `jax.make_mesh` returns, work in every entry point."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from convert import from_hf
from liger_jax import Chat, TrainState, generate, loss_fn, make_train_step
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import with_auto_axes
from tests._support import parity
from tests._support.demo_model import model_and_processor

CONTEXTS = {"without a context": contextlib.nullcontext, "jax.set_mesh": lambda: jax.set_mesh(mesh())}


@functools.cache
def mesh():
    return jax.make_mesh((2, 2), ("fsdp", "tensor"))


@functools.cache
def models():
    """Returns the model on one device, on the mesh as `from_hf` places it, and on Auto axes of the same devices."""
    placed = from_hf(parity.REFERENCES / "model_untied", dtype="float32", mesh=mesh())
    return {"one device": parity.model(), "auto": with_auto_axes(placed), "explicit": placed}


@functools.cache
def batches():
    """Returns a batch with images, as `prepare` returns it and as a user places it on the mesh."""
    host = parity.batch("batch_left")
    host = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), host)
    return {"host": host, "explicit": jax.device_put(host, NamedSharding(mesh(), P("fsdp")))}


def test_make_mesh_returns_explicit_axes():
    assert set(mesh().axis_types) == {AxisType.Explicit}


def test_moving_to_auto_axes_copies_nothing():
    placed = batches()["explicit"].input_ids
    moved = with_auto_axes(placed)
    assert set(moved.sharding.mesh.axis_types) == {AxisType.Auto}
    for before, after in zip(placed.addressable_shards, moved.addressable_shards, strict=True):
        assert before.data.unsafe_buffer_pointer() == after.data.unsafe_buffer_pointer()


def loss(model, batch):
    return loss_fn(model, batch)[0]


@functools.cache
def run():
    """Returns a jitted function that returns logits, loss and gradients."""
    return jax.jit(lambda model, batch: (model(batch), *jax.value_and_grad(loss)(model, batch)))


@functools.cache
def expected():
    return run()(models()["one device"], batches()["host"])


@pytest.mark.parametrize(
    ("model", "batch", "context"),
    [
        ("auto", "explicit", "without a context"),
        ("explicit", "explicit", "jax.set_mesh"),
        ("explicit", "host", "without a context"),
    ],
)
def test_jit_and_grad(model, batch, context):
    """In the user's own program. Results follow the batch, gradients follow the weights."""
    with CONTEXTS[context]():
        logits, value, grads = run()(models()[model], batches()[batch])
    spec = P("fsdp", None, None) if batch == "explicit" else P(None, None, None)
    assert jax.typeof(logits).sharding.spec == spec
    mask = batches()["host"].segment_ids > 0
    parity.assert_near(np.asarray(logits)[mask], np.asarray(expected()[0])[mask])
    parity.assert_near(value, expected()[1])
    weights, expected_grads = param_paths(models()[model]), param_paths(expected()[2])
    for path, grad in param_paths(grads).items():
        parity.assert_near(grad, expected_grads[path], name=path)
        assert jax.typeof(grad) == jax.typeof(weights[path]), path


def test_bfloat16_on_axes_of_both_types():
    """Regression test: with bfloat16, attention is cuDNN's on a GPU, which JAX refused in such a program."""
    weights, logits = {}, {}
    for name, model, batch in (("one device", "one device", "host"), ("both", "auto", "explicit")):
        weights[name] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models()[model])
        logits[name] = jax.jit(lambda model, batch: model(batch))(weights[name], text(batch))
    difference = np.abs(np.asarray(logits["both"] - logits["one device"], np.float32))
    assert difference.max() < 0.05 * np.abs(np.asarray(logits["one device"], np.float32)).max()


def test_train_step():
    """Of a model on Explicit axes, with a batch on them; two steps equal those on one device."""
    losses = {}
    for name, batch in (("one device", "host"), ("explicit", "explicit")):
        with jax.set_mesh(mesh()) if name == "explicit" else contextlib.nullcontext():
            state = TrainState.create(jax.tree.map(jnp.copy, models()[name]), optax.adamw(1e-2))
            step = make_train_step(remat="dots")
            for _ in range(2):
                state, metrics = step(state, text(batch))
            losses[name] = float(metrics["loss"])
    np.testing.assert_allclose(losses["explicit"], losses["one device"], rtol=1e-4)


@functools.cache
def text(name):
    """Returns a text batch; as `prepare` returns it, or on Explicit axes."""
    host = parity.batch("text_batch_left")
    return host if name == "host" else jax.device_put(host, NamedSharding(mesh(), P("fsdp")))


@pytest.mark.parametrize("context", CONTEXTS)
def test_generate(context):
    """Outside of jit, and inside of it, where it is a part of the user's program."""
    prompts = parity.common(parity.batch("text_batch_left", prompt=True))
    placed = jax.device_put(prompts, NamedSharding(mesh(), P("fsdp")))

    def run(model, batch):
        return generate(model, batch, max_new_tokens=8, eos_token_id=())

    expected_tokens = parity.expected("text_batch_left", "greedy")
    with CONTEXTS[context]():
        for model, batch in (("auto", placed), ("explicit", placed), ("explicit", prompts), ("one device", placed)):
            np.testing.assert_array_equal(run(models()[model], batch), expected_tokens, err_msg=model)
        model = "auto" if context == "without a context" else "explicit"
        np.testing.assert_array_equal(jax.jit(run)(models()[model], placed), expected_tokens)


def test_mesh_that_does_not_divide_the_rows():
    """In the user's own jit, nothing pads the batch."""
    prompts = parity.common(parity.batch("text", prompt=True))
    run = jax.jit(lambda model, batch: generate(model, batch, max_new_tokens=8, eos_token_id=()))
    np.testing.assert_array_equal(run(models()["auto"], prompts), parity.expected("text", "greedy"))


def test_chat():
    model, processor = model_and_processor()
    replicated = jax.device_put(model, NamedSharding(mesh(), P()))
    answers = {Chat(m, processor, max_new_tokens=4).ask("Which digit?") for m in (model, replicated)}
    assert len(answers) == 1
