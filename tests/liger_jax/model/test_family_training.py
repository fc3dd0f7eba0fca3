"""Training of Qwen2.5-VL and Qwen3-VL: on meshes as on one device, frozen parts that cost nothing, and their FLOPs."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from convert import from_hf, to_hf_state
from liger_jax import TrainState, make_train_step
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import get_mesh, param_shardings, shard_batch
from liger_jax.train.optimizer import make_optimizer
from tests._support import family_parity as parity
from tests._support.parity import REFERENCES, assert_near
from tests.liger_jax.model.test_sharding import gathered_shapes, sorted_sizes

FAMILIES = parity.FAMILIES


@functools.cache
def mesh():
    return jax.make_mesh((2, 2), ("fsdp", "tensor"))


@functools.cache
def model(family, on_mesh):
    return from_hf(REFERENCES / f"model_{family}", dtype="float32", mesh=mesh()) if on_mesh else parity.model(family)


@functools.cache
def batch(family):
    return parity.common(parity.config(family), parity.inputs(family, "batch"))


UNROLL = {"qwen2_5_vl": "none", "qwen3_vl": "vision"}  # a scan over periods of layers; outputs of unrolled layers
step = functools.cache(lambda family, on_mesh: make_train_step(remat="dots", unroll=UNROLL[family]))


@functools.cache
def trained(family, on_mesh):
    """Returns the state after one step, and its metrics."""
    state = TrainState.create(jax.tree.map(jax.numpy.copy, model(family, on_mesh)), optax.sgd(0.25))
    return step(family, on_mesh)(state, batch(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_on_four_devices(family):
    """Metrics and updated weights equal those of one device to 1e-5; the state keeps its sharding."""
    (state, metrics), (one_state, one_metrics) = trained(family, True), trained(family, False)
    for key, value in one_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
    weights, expected = to_hf_state(state.model), to_hf_state(one_state.model)
    for key, value in expected.items():
        assert_near(weights[key], value, tolerance=1e-5, name=key)
    shardings = param_paths(param_shardings(state.model, mesh()))
    for path, leaf in param_paths(state.model).items():
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path


@pytest.mark.parametrize("family", FAMILIES)
def test_only_weights_and_inputs_of_matmuls_are_gathered(family):
    """No collective of the compiled step gathers other activations. Each device along `tensor` has a part of the positions.

    The two layers of the language model appear once, with two inputs and two gradients; so do the head's input and the
    first gradient.
    """
    state, _ = trained(family, True)
    [compiled] = step(family, True).compiled.values()
    allowed, config = set(), state.model.config
    for path, leaf in param_paths(state.model).items():
        shape = leaf.shape[1:] if re.search("/(layers|blocks|deepstack)/", path) else leaf.shape
        allowed |= {sorted_sizes((*shape[:i], n // 2, *shape[i + 1 :])) for i, n in enumerate(shape)} | {
            sorted_sizes(shape)
        }
    sizes = [sorted_sizes(shape) for shape in gathered_shapes(compiled.as_text())]
    tokens = sorted_sizes((batch(family).shape[1], config.text.hidden_size))  # of the row of a device
    patches = sorted_sizes((batch(family).vision.pixel_values.shape[1], config.vision.embed_dim))
    assert {size for size in sizes if size not in allowed} == {tokens, patches}
    assert sizes.count(tokens) == 4 + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_axes(family):
    """A model and a batch that a user has placed on Explicit axes give the same logits."""
    explicit = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh(), x.sharding.spec)), model(family, True))
    placed = jax.device_put(batch(family), NamedSharding(mesh(), jax.sharding.PartitionSpec("fsdp")))
    logits = np.asarray(jax.jit(lambda model, batch: model(batch))(explicit, placed))
    mask = parity.inputs(family, "batch")["attention_mask"] > 0
    assert_near(logits[:, : mask.shape[1]][mask], parity.expected(family, "batch", "logits")[mask], name="logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_data_parallel_gathers_nothing(family):
    """With replicated weights, a forward pass communicates nothing: windows and deepstack stay with their rows."""
    replicated = from_hf(REFERENCES / f"model_{family}", dtype="float32", mesh=jax.make_mesh((2,), ("data",)))
    placed = shard_batch(batch(family), get_mesh(replicated))
    compiled = jax.jit(lambda model, batch: model(batch)).lower(replicated, placed).compile()
    assert not re.findall(r"\b(all-\w+|collective-permute|reduce-scatter)\(", compiled.as_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_tower_has_no_backward_pass(family):
    """With the tower and its mergers frozen, no gradient flows into them, not through deepstack either."""

    def flops(freeze):
        state = TrainState.create(
            jax.tree.map(jax.numpy.copy, parity.model(family)), make_optimizer(1e-3, freeze=freeze)
        )
        return make_train_step(remat="none", unroll="none").compile(state, batch(family)).cost_analysis()["flops"]

    # the body of each loop counts once: that over the tower's layers, backward, is most of what is missing
    assert flops(["vision", "merger"]) < 0.7 * flops([])
