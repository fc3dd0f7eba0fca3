"""A part of the model that runs by rows on four (simulated) devices gives the values and gradients of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from liger_jax import QwenVL, QwenVLConfig, loss_fn, prepare
from liger_jax.model import by_rows
from liger_jax.model.sharding import make_mesh, mesh_context, shard_batch
from tests._support import family_parity

MESHES = {"tensor": {"tensor": 2}, "data-tensor": {"data": 2, "tensor": 2}, "fsdp-tensor": {"fsdp": 2, "tensor": 2}}


@pytest.mark.parametrize("name", MESHES)
def test_rows_and_gradients_are_those_of_one_device(name):
    """Each device sees whole weights and its own rows; the gradients of weights are summed over all rows."""
    config, mesh = QwenVLConfig.tiny(), make_mesh(**MESHES[name])
    merger = QwenVL.init(config, dtype="float32").visual.merger
    split = QwenVL.init(config, dtype="float32", mesh=mesh).visual.merger
    x = np.random.default_rng(0).normal(size=(4, 8, config.vision.embed_dim)).astype(np.float32)
    seen = []

    def run(parts, rows):
        seen.append((parts["visual"]["merger"].fc1.kernel.shape, rows.shape))
        return parts["visual"]["merger"](rows)

    def by_rows_loss(merger, x):
        return jnp.sum(jnp.sin(by_rows.run_by_rows(run, {"visual": {"merger": merger}}, x)))

    with mesh_context(mesh):
        value, grads = jax.jit(jax.value_and_grad(by_rows_loss, argnums=(0, 1)))(split, x)
    expected, expected_grads = jax.value_and_grad(lambda m, x: jnp.sum(jnp.sin(m(x))), argnums=(0, 1))(merger, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), grads, expected_grads)
    assert set(seen) == {(merger.fc1.kernel.shape, (4 // mesh.size, 8, config.vision.embed_dim))}


def test_only_rows_that_divide_on_meshes_with_tensor():
    for sizes, rows, expected in (
        ({"tensor": 2}, 2, True),
        ({"tensor": 2}, 3, False),
        ({"data": 2, "tensor": 2}, 2, False),
        ({"fsdp": 2}, 4, False),
        ({"sequence": 2, "tensor": 2}, 4, False),
    ):
        with mesh_context(make_mesh(**sizes)):
            assert by_rows.divides_rows(rows) is expected, (sizes, rows)
    assert not by_rows.divides_rows(4)


@pytest.mark.parametrize("family", family_parity.FAMILIES)
def test_windows_and_deepstack(family):
    """The loss and the gradients of the vision tower equal one device's."""
    config, rows = QwenVLConfig.tiny(family=family), 2
    grid = np.array([[1, 4, 4]] * rows)
    ids = np.full((rows, 24), 7)
    ids[:, 2:6] = config.image_token_id
    pixels = np.random.default_rng(1).normal(size=(16 * rows, config.vision.patch_values)).astype(np.float32)
    arrays = {"input_ids": ids, "labels": ids, "pixel_values": pixels, "image_grid_thw": grid}
    batch, mesh = prepare(config, **arrays), make_mesh(tensor=2)
    results = []
    for devices in (None, mesh):
        model = QwenVL.init(config, dtype="float32", mesh=devices)
        placed = shard_batch(batch, devices)
        (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(model, placed)
        results.append((loss, grads.visual))
    (loss, grads), (split_loss, split_grads) = results
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * largest), split_grads, grads)


def test_tower_inside_a_shard_map_over_other_axes():
    """Regression: the tower ran in a second shard_map, and JAX did not sum its gradients over the caller's axis."""
    config, mesh = QwenVLConfig.tiny(), make_mesh(data=2, tensor=2)
    pixels = np.random.default_rng(1).normal(size=(64, config.vision.patch_values)).astype(np.float32)
    ids = np.full((4, 24), 7)
    ids[:, 2:6] = config.image_token_id
    vision = prepare(config, input_ids=ids, pixel_values=pixels, image_grid_thw=np.array([[1, 4, 4]] * 4)).vision

    def loss(tower, vision):
        return jnp.sum(jnp.sin(tower(vision)[0]))

    def local_loss(tower, vision):
        return jax.lax.psum(loss(tower, vision), "data")

    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "axis_names": {"data"}}
    split_loss = jax.shard_map(local_loss, mesh=mesh, **specs)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    tower = QwenVL.init(config, dtype="float32").visual
    tower = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape), tower)
    placed = jax.tree.map(
        lambda w, like: jax.device_put(w, like.sharding), tower, QwenVL.init(config, mesh=mesh).visual
    )
    expected, expected_grads = jax.jit(jax.value_and_grad(loss))(tower, vision)
    value, grads = jax.jit(jax.value_and_grad(split_loss))(placed, vision)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, expected_grad in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5 * np.abs(expected_grad).max())
