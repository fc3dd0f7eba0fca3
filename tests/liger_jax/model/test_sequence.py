"""Rows whose positions are split over (simulated) devices train as on one device, and only heads are exchanged."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from convert import from_hf, to_hf_state
from liger_jax import TrainState, make_train_step
from liger_jax.model.params import param_paths
from liger_jax.model.sequence import attend_by_heads, plan_heads, set_features
from liger_jax.model.sharding import (
    batch_shardings,
    get_mesh,
    make_mesh,
    mesh_context,
    param_shardings,
    shard_batch,
)
from tests._support import family_parity, parity
from tests._support.parity import REFERENCES, assert_near
from tests.liger_jax.model.test_sharding import gathered_shapes, sorted_sizes

# Each family on another mesh: packed sequences in a single row, and frames that are exchanged; windows, with two rows per
# device; deepstack. The last two have whole frames on each device.
MESHES = {
    "qwen2_vl": {"sequence": 4},
    "qwen2_5_vl": {"sequence": 2, "tensor": 2},
    "qwen3_vl": {"fsdp": 2, "sequence": 2},
}
REMAT = {"qwen2_vl": "dots", "qwen2_5_vl": "full", "qwen3_vl": "attention"}


@functools.cache
def model(family, on_mesh):
    folder = REFERENCES / ("model_untied" if family == "qwen2_vl" else f"model_{family}")
    return from_hf(folder, dtype="float32", mesh=make_mesh(**MESHES[family]) if on_mesh else None)


@functools.cache
def batch(family):
    if family == "qwen2_vl":
        return parity.common(parity.batch("packed_batch_left"))
    return family_parity.common(family_parity.config(family), family_parity.inputs(family, "batch"))


def divided_frames():
    """Returns a batch on the devices whose patches are split anywhere, as if frames did not fit on one device."""
    mesh = get_mesh(model("qwen2_vl", True))
    divided = batch("qwen2_vl").split_positions(mesh.shape["sequence"], whole_frames=False)
    return jax.device_put(divided, batch_shardings(divided, mesh))


@functools.cache
def trained(family, on_mesh):
    """Returns the state after one step, its metrics, and the compiled step."""
    step = make_train_step(remat=REMAT[family], unroll="none")
    state = TrainState.create(jax.tree.map(jax.numpy.copy, model(family, on_mesh)), optax.sgd(0.25))
    state, metrics = step(state, divided_frames() if on_mesh and family == "qwen2_vl" else batch(family))
    [compiled] = step.compiled.values()
    return state, metrics, compiled


@pytest.mark.parametrize("family", MESHES)
def test_training_step(family):
    """Metrics and updated weights equal those of one device to 1e-5; the state keeps its sharding."""
    (state, metrics, _), (one_state, one_metrics, _) = trained(family, True), trained(family, False)
    for key, value in one_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
    weights, expected = to_hf_state(state.model), to_hf_state(one_state.model)
    for key, value in expected.items():
        assert_near(weights[key], value, tolerance=1e-5, name=key)
    shardings = param_paths(param_shardings(state.model, get_mesh(state.model)))
    for path, leaf in param_paths(state.model).items():
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path


def test_only_heads_are_exchanged():
    """A layer exchanges q, k, v and the output, and in the backward pass these and their gradients, nothing else.

    Weights are gathered as with fsdp, and the features of images once.
    """
    state, _, compiled = trained("qwen2_vl", True)
    hlo = compiled.as_text()
    exchanged = re.findall(r"= \((.*)\) all-to-all(?:-start)?\(", hlo)
    towers = state.model.config.text, state.model.config.vision
    dims = {config.head_dim for config in towers}
    assert len(exchanged) == 2 * (4 + 8)
    assert {int(re.search(r"f32\[[\d,]*?(\d+)\]", operands)[1]) for operands in exchanged} == dims
    allowed = set()
    for path, leaf in param_paths(state.model).items():
        allowed.add(sorted_sizes(leaf.shape[1:] if "/layers/" in path or "/blocks/" in path else leaf.shape))
    gathered = gathered_shapes("\n".join(line for line in hlo.splitlines() if " all-to-all" not in line))
    exceptions = [shape for shape in gathered if sorted_sizes(shape) not in allowed]
    features = 64  # per row: a block of 64 patches for each of four devices, merged by four
    assert exceptions == [(1, features, state.model.config.text.hidden_size)]


def test_whole_frames_exchange_nothing():
    """The only all-to-alls are those of the language model, whose heads have another size."""
    state, _, compiled = trained("qwen3_vl", True)
    exchanged = re.findall(r"= \((.*)\) all-to-all(?:-start)?\(", compiled.as_text())
    assert exchanged
    assert {int(re.search(r"f32\[[\d,]*?(\d+)\]", operands)[1]) for operands in exchanged} == {
        state.model.config.text.head_dim
    }


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_users_program(axes, family="qwen3_vl"):
    """A user's own jit of a model on either type of axes gives the logits of transformers, split by positions."""
    placed = model(family, True)
    if axes == "explicit":
        mesh = jax.make_mesh(get_mesh(placed).devices.shape, get_mesh(placed).axis_names)
        placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), placed)
    logits = jax.jit(lambda model, batch: model(batch))(placed, shard_batch(batch(family), get_mesh(placed)))
    mask = family_parity.inputs(family, "batch")["attention_mask"] > 0
    expected = family_parity.expected(family, "batch", "logits")[mask]
    assert_near(np.asarray(logits)[:, : mask.shape[1]][mask], expected, name="logits")


def test_placement():
    """Pixels, the only large arrays of a batch, are split by patches; each device holds a part of each weight."""
    placed = shard_batch(batch("qwen2_vl"), get_mesh(model("qwen2_vl", True)))
    assert placed.shape == (1, 64)
    assert placed.vision.pixel_values.shape[:2] == (1, 256)
    assert placed.vision.pixel_values.addressable_shards[0].data.shape[:2] == (1, 64)
    weight = model("qwen3_vl", True).language_model.layers.mlp.up_proj.kernel[...]
    assert weight.addressable_shards[0].data.size * 4 == weight.size


# ---- heads


def test_head_plans():
    """Every plan has room for all heads and divides evenly; where sizes divide, nothing is added."""
    for key_heads, group, devices in itertools.product((1, 2, 3, 4, 8, 16), (1, 2, 5, 6, 7, 8), range(1, 9)):
        plan = plan_heads(key_heads * group, key_heads, devices)
        assert plan.key_heads >= key_heads
        assert plan.copies * plan.group >= group
        assert plan.key_heads * plan.copies % devices == 0
        if key_heads % devices == 0 or (devices % key_heads == 0 and group % (devices // key_heads) == 0):
            assert math.prod(plan) == key_heads * group, (key_heads, group, devices)


@pytest.mark.parametrize(
    ("heads", "key_heads", "sizes"),
    [
        (12, 2, {"tensor": 4}),
        (6, 2, {"sequence": 2, "tensor": 2}),  # copies of key heads, and query heads of padding
        (5, 5, {"data": 2, "sequence": 2}),  # key heads of padding
        (4, 2, {"sequence": 3}),
    ],
)
def test_heads_that_do_not_divide(heads, key_heads, sizes):
    """The output and all gradients equal those of one device."""
    rng = np.random.default_rng(0)
    shapes = [(2, 12, count, 4) for count in (heads, key_heads, key_heads, heads)]
    q, k, v, weights = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    ids = np.array([[1] * 5 + [2] * 6 + [0], [0] * 3 + [1] * 9])

    def attend(q, k, v, ids):
        return pk.attention(q, k, v, causal=True, segment_ids=ids)

    def loss(attend, q, k, v):
        out = attend(q, k, v, ids)
        return (out * weights).sum(), out

    def run(attend):
        (_, out), grads = jax.jit(jax.value_and_grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    expected = run(attend)
    with mesh_context(make_mesh(**sizes)):
        results = run(functools.partial(attend_by_heads, attend))
    for name, actual, value in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        assert_near(actual, value, tolerance=1e-5, name=name)


@pytest.mark.parametrize("sizes", [{"sequence": 2}, {"tensor": 2}])  # the second has fewer key heads than devices
def test_gradients_inside_a_shard_map_over_other_axes(sizes):
    """Regression: attention and features ran in a second shard_map, whose gradients JAX refused or did not sum over data."""
    x, weight = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((2, 8, 2, 4), (4,)))
    positions = np.array([[3, 1], [7, 2]])

    def attend(q, k, v, ids):
        return pk.attention(q, k, v, causal=True, segment_ids=ids)

    def loss(weight, x, positions):
        operand = x * weight
        out = attend_by_heads(attend, operand, operand[:, :, :1], operand[:, :, :1], jnp.ones(x.shape[:2], jnp.int32))
        out = set_features(out[:, :, 0], positions, operand[:, :2, 1])
        return jnp.sum(jnp.sin(out * weight))

    def local_loss(*operands):
        return jax.lax.psum(loss(*operands), "data")

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P(), "axis_names": {"data"}}
    split_loss = jax.shard_map(local_loss, mesh=make_mesh(data=2, **sizes), **specs)
    expected, actual = (jax.jit(jax.value_and_grad(f))(weight, x, positions) for f in (loss, split_loss))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected)
