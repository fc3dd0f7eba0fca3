"""On meshes that split rows, each device computes whole gradients of its rows: equal to one device's, in few collectives."""

import functools
import math
import re
from collections import Counter

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from liger_jax import QwenVL, QwenVLConfig, TrainState, make_train_step, prepare
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import make_mesh, param_shardings, split_over_data
from liger_jax.train import step as step_module
from liger_jax.train.data_parallel import splits_only_rows

OPTIMIZER = optax.sgd(0.25, momentum=0.5)
COLLECTIVES = r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


@functools.cache
def mesh(**sizes):
    return make_mesh(**sizes)


def state(on):
    return TrainState.create(QwenVL.init(QwenVLConfig.tiny(), dtype="float32", mesh=on), OPTIMIZER)


@functools.cache
def batch(rows=8):
    """Returns rows with images and different numbers of trained tokens, the last without any."""
    config, rng = QwenVLConfig.tiny(), np.random.default_rng(0)
    ids = rng.integers(5, 200, (rows, 24))
    ids[:, 2], ids[:, 3:7], ids[:, 7] = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    labels = np.where(np.arange(24) < np.linspace(8, 24, rows)[:, None], -100, ids)
    pixels = rng.normal(size=(rows * 16, config.vision.patch_values)).astype(np.float32)
    return prepare(
        config, input_ids=ids, labels=labels, pixel_values=pixels, image_grid_thw=np.array([[1, 4, 4]] * rows)
    )


@functools.cache
def trained(accumulate=1, **sizes):
    """Returns the step, the state after it, and its metrics."""
    step = make_train_step(remat="dots", accumulate=accumulate)
    return step, *step(state(mesh(**sizes)), batch())


def assert_equals_one_device(state, metrics):
    _, expected, expected_metrics = trained()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    weights = param_paths(state.model)
    for path, weight in param_paths(expected.model).items():
        np.testing.assert_allclose(weights[path], weight, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_equals_that_of_one_device(accumulate):
    """Loss, metrics and weights; weights keep their layout, and moments are also split over data."""
    step, state, metrics = trained(accumulate, data=2, fsdp=2)
    assert step.by_device
    assert_equals_one_device(state, metrics)
    on = mesh(data=2, fsdp=2)
    for tree, over_data in ((state.model, False), (state.opt_state, True)):
        shardings = param_paths(param_shardings(tree, on, over_data=over_data))
        for path, leaf in param_paths(tree).items():
            assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path
            assert not over_data or "data" in leaf.sharding.spec, path


def test_collectives():
    """Each stack of weights is gathered once and its gradient reduced once, outside of the loops over layers.

    Along data, updated weights are gathered instead of gradients, which are scattered.
    """
    step, state, _ = trained(data=2, fsdp=2)
    [compiled] = step.compiled.values()
    hlo = compiled.as_text()
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(state.model)]
    over_fsdp = sum("fsdp" in spec for spec in specs)
    counts = Counter(re.findall(COLLECTIVES, hlo))
    assert counts.pop("all-gather") == counts.pop("reduce-scatter") == over_fsdp + len(specs)
    # of the small gradients over fsdp, the number of trained tokens, the metrics, and the gradient norm over each axis
    assert counts.pop("all-reduce") <= 6
    assert not counts
    entry = hlo[hlo.index("\nENTRY") :]
    assert len(re.findall(COLLECTIVES, entry)) == len(re.findall(COLLECTIVES, hlo))


def test_gradients_are_scattered_within_hosts_first():
    """Regression: whole gradients were reduced over `data`, whose devices are on different hosts, and then over `fsdp`."""
    step, state, _ = trained(data=2, fsdp=2)
    [compiled] = step.compiled.values()
    groups = {"fsdp": "{{0,1},{2,3}}", "data": "{{0,2},{1,3}}"}
    lines = re.findall(r"= f32\[([\d,]*)\]\S* reduce-scatter\(.*replica_groups=(\S+),", compiled.as_text())
    received = {
        axis: sum(math.prod(map(int, shape.split(","))) for shape, found in lines if found == group)
        for axis, group in groups.items()
    }
    leaves = jax.tree.leaves(state.model)
    over_fsdp = sum(leaf.size for leaf in leaves if "fsdp" in leaf.sharding.spec)
    assert received["fsdp"] == over_fsdp // 2
    assert received["data"] == over_fsdp // 4 + sum(
        leaf.size // 2 for leaf in leaves if "fsdp" not in leaf.sharding.spec
    )


def test_weights_are_gathered_by_layer_if_whole_ones_do_not_fit(monkeypatch):
    """Then the partitioner's program runs, which has the weights of one layer at a time."""
    monkeypatch.setattr(step_module, "_fits_memory", lambda compiled: False)
    step, on = make_train_step(remat="dots"), mesh(fsdp=4)
    after, metrics = step(state(on), batch())
    assert not step.by_device
    assert_equals_one_device(after, metrics)


def test_rows_that_the_mesh_does_not_divide(monkeypatch):
    """A batch that the user placed is not padded, so the partitioner splits it."""
    step, on = make_train_step(), mesh(data=4)
    placed = jax.device_put(batch(rows=6), NamedSharding(on, P()))
    chosen = []
    monkeypatch.setattr(step, "_compile_choice", lambda *args: chosen.append(args[-1]))
    monkeypatch.setattr(step_module, "_fits_memory", lambda compiled: True)
    step.compile(state(on), placed)
    assert chosen == [False]


def test_meshes_that_split_only_rows():
    assert splits_only_rows(make_mesh(data=2)) and splits_only_rows(make_mesh(data=2, fsdp=2))
    assert not any(map(splits_only_rows, (None, make_mesh(tensor=2), make_mesh(fsdp=2, sequence=2))))


def test_dimension_that_is_split_over_data():
    """The first that is whole and divides; an axis of one device leaves a dimension whole."""
    on = make_mesh(data=2, fsdp=2)
    for spec, shape, expected in (
        (P("fsdp", None), (8, 6), P("fsdp", "data")),
        (P(None, "tensor", "fsdp"), (3, 4, 8), P(None, "data", "fsdp")),
        (P(), (4,), P("data")),
        (P(None, "data"), (4, 4), P(None, "data")),
        (P(None), (3,), P(None)),
    ):
        assert split_over_data(spec, shape, on) == expected
