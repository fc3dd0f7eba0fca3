"""Four (simulated) devices give the losses, weights and tokens of one device, and gather nothing but weights."""

import functools
import importlib
import math
import re
from collections import Counter

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding

from convert import from_hf, to_hf_state
from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState, generate, loss_fn, make_train_step, prepare
from liger_jax.model.lora import add_lora
from liger_jax.model.params import find_row, param_paths
from liger_jax.model.sharding import get_mesh, mesh_context, param_shardings, partition_spec, shard_batch
from tests._support import parity

linear_cross_entropy = importlib.import_module("pallas_kernels.linear_cross_entropy")  # not the function of this name
MESHES = {
    "data": {"data": 4},
    "fsdp": {"fsdp": 4},
    "tensor": {"tensor": 4},  # more than there are key heads
    "data-tensor": {"data": 2, "tensor": 2},
    "data-fsdp-tensor": {"data": 1, "fsdp": 2, "tensor": 2},
}
TRAINED = ("fsdp", "data-fsdp-tensor")
OPTIMIZER = optax.sgd(0.25, momentum=0.5)
SCENARIOS = ("batch_left", "image_video")  # two rows and one row: four devices need a fourth, empty one
NEW = 8


def mesh(name):
    return jax.make_mesh(tuple(MESHES[name].values()), tuple(MESHES[name]))


@functools.cache
def model(name):
    """Returns a model on the mesh, or on one device if `name` is None."""
    return (
        parity.model()
        if name is None
        else from_hf(parity.REFERENCES / "model_untied", dtype="float32", mesh=mesh(name))
    )


@functools.cache
def batch(*, prompt=False):
    """Returns the rows of several scenarios in one batch, padded on the left."""
    parts = [parity.inputs(scenario, prompt=prompt) for scenario in SCENARIOS]
    length = max(part["input_ids"].shape[1] for part in parts)
    fillers = {"input_ids": 150, "labels": -100, "attention_mask": 0}
    arrays = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        rows = [part[key] for part in parts if key in part]
        if key in fillers:
            pad = [((0, 0), (length - row.shape[1], 0)) for row in rows]
            rows = [np.pad(row, width, constant_values=fillers[key]) for row, width in zip(rows, pad, strict=True)]
        arrays[key] = np.concatenate(rows)
    return prepare(parity.config(), **arrays, video_positions="hf5")


step = functools.cache(lambda name: make_train_step(remat="dots"))


@functools.cache
def trained(name):
    """Returns the state after one step, and its metrics."""
    state = TrainState.create(jax.tree.map(jax.numpy.copy, model(name)), OPTIMIZER)
    return step(name)(state, batch())


@pytest.mark.parametrize("name", TRAINED)
def test_training_step(name):
    """Metrics and updated weights equal those of one device to 1e-5; the state keeps its sharding."""
    (state, metrics), (one_state, one_metrics) = trained(name), trained(None)
    for key, value in one_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
    weights, expected = to_hf_state(state.model), to_hf_state(one_state.model)
    for key, value in expected.items():
        parity.assert_near(weights[key], value, tolerance=1e-5, name=key)
    for tree in (state.model, state.opt_state):
        shardings = param_paths(param_shardings(tree, mesh(name)))
        for path, leaf in param_paths(tree).items():
            assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path


def test_one_step_function_serves_several_meshes(monkeypatch):
    """Each mesh gets its own compiled program."""
    step, meshes = make_train_step(), []
    monkeypatch.setattr(step, "_compile", lambda *args: meshes.append(args[2]) or (lambda leaves, batch: (leaves, {})))
    for name in (None, "fsdp", None):
        step(TrainState.create(model(name), OPTIMIZER), batch())
    assert [mesh and mesh.axis_names for mesh in meshes] == [None, ("fsdp",)]


def test_one_device_agrees_with_transformers():
    """The reference loss for the meshes is the mean over the scenarios' tokens, seven in each row."""
    losses = [parity.expected(scenario, "loss") for scenario in SCENARIOS]
    parity.assert_near(trained(None)[1]["loss"], np.average(losses, weights=[2, 1]))


@pytest.mark.parametrize("name", ["data", "tensor", "data-tensor"])
def test_logits(name):
    """A jitted forward pass of a model on a mesh, with a batch as `prepare` returns it."""
    logits = jax.jit(lambda m, b: m(b))(model(name), batch())
    logits = np.asarray(logits)[batch().segment_ids > 0]
    expected = [parity.expected(scenario, "logits")[parity.tokens(scenario)] for scenario in SCENARIOS]
    parity.assert_near(logits, np.concatenate(expected))


@pytest.mark.parametrize("name", ["data", "fsdp", "data-tensor"])
def test_tokens(name):
    """Greedy tokens equal those of transformers, for the caller's rows only."""
    tokens = generate(model(name), batch(prompt=True), max_new_tokens=NEW, eos_token_id=())
    expected = np.concatenate([parity.expected(scenario, "greedy") for scenario in SCENARIOS])
    np.testing.assert_array_equal(tokens, expected)


def gathered_shapes(hlo):
    """Returns the shapes of the float arrays that collectives gather from several devices: [(4, 64, 32), ...]."""
    results = re.findall(r"= (.*) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", hlo)
    shapes = [shape for result in results for shape in re.findall(r"\bb?f\d+\[([\d,]*)\]", result)]
    return [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


def sorted_sizes(shape):
    return tuple(sorted(n for n in shape if n > 1))


def test_only_weights_and_inputs_of_matmuls_are_gathered():
    """On a mesh with a `tensor` axis, the language model gathers weights of single layers, and inputs of matmuls.

    Between matmuls, each device along `tensor` has a part of the rows. So each layer gathers its input and that of its MLP
    once, and the gradients of its two results. The vision tower runs by rows: it gathers its weights, and no activations.
    """
    state, _ = trained("data-fsdp-tensor")
    [compiled] = step("data-fsdp-tensor").compiled.values()
    allowed, config = set(), state.model.config
    for path, leaf in param_paths(state.model).items():
        shape = leaf.shape[1:] if "/layers/" in path else leaf.shape
        allowed.add(sorted_sizes(shape))
        # a weight that is split over `tensor` as well is gathered in part
        halves = [(*shape[:i], n // 2, *shape[i + 1 :]) for i, n in enumerate(shape)]
        allowed |= {sorted_sizes(half) for half in halves}
        if path.startswith("visual/"):  # the shards become a new axis
            quarters = [(*half[:i], n // 2, *half[i + 1 :]) for half in halves for i, n in enumerate(half)]
            allowed |= {sorted_sizes((2, *part)) for part in (*halves, *quarters)}
    shapes = gathered_shapes(compiled.as_text())
    activations = Counter(sorted_sizes(shape) for shape in shapes if sorted_sizes(shape) not in allowed)
    rows, tokens = 2, batch().shape[1]  # of a device
    # The layers of the language model are scanned and so appear once. Their first gradient is also gathered, and the head's
    # input.
    assert activations == {sorted_sizes((rows, tokens, config.text.hidden_size)): 4 + 2}


def test_loss_is_split_over_all_devices(monkeypatch):
    """Regression test: the devices along `tensor` all computed the loss for the same tokens."""
    shapes, over_chunks = [], linear_cross_entropy._over_chunks

    def record_shape(static, process_chunk, weight, x, *row_arrays):
        shapes.append(x.shape)
        return over_chunks(static, process_chunk, weight, x, *row_arrays)

    monkeypatch.setattr(linear_cross_entropy, "_over_chunks", record_shape)
    sharded_model = model("data-fsdp-tensor")
    placed = shard_batch(batch(), get_mesh(sharded_model))
    with mesh_context(get_mesh(sharded_model)):
        jax.jit(jax.grad(lambda m, b: loss_fn(m, b)[0])).lower(sharded_model, placed).compile()
    assert math.prod(shapes[-1][:2]) == math.prod(placed.shape) / 4  # the last shape is that of one device


def test_data_parallel_gathers_nothing():
    """With replicated weights, a forward pass communicates nothing."""
    placed = shard_batch(batch(), get_mesh(model("data")))
    compiled = jax.jit(lambda m, b: m(b)).lower(model("data"), placed).compile()
    assert not re.findall(r"\b(all-\w+|collective-permute|reduce-scatter)\(", compiled.as_text())


@pytest.mark.parametrize("name", MESHES)
def test_weights_are_split(name):
    """Every dimension with a mesh axis in the table is split by it; sizes that do not divide evenly stay whole."""
    shape = MESHES[name]
    config = Qwen2VLConfig.qwen2_vl_7b()
    model = jax.eval_shape(functools.partial(add_lora, targets="all-linear"), Qwen2VL.abstract(config))
    weights, shardings = param_paths(model), param_paths(param_shardings(model, mesh(name)))
    for path, weight in weights.items():
        shards = math.prod(shape.get(axis, 1) for axis in partition_spec(find_row(path)) if axis)
        assert math.prod(shardings[path].shard_shape(weight.shape)) * shards == weight.size, path
    # two key heads cannot be split over four devices
    tiny = param_paths(param_shardings(Qwen2VL.abstract(parity.config()), mesh(name)))
    spec = tiny["language_model/layers/self_attn/k_proj/bias"].spec
    assert spec[1] == ("tensor" if shape.get("tensor") == 2 else None)


def test_init_gives_the_same_weights():
    config = parity.config()
    weights = param_paths(Qwen2VL.init(config, dtype="float32", mesh=mesh("data-fsdp-tensor"), seed=2**32 - 1))
    for path, weight in param_paths(Qwen2VL.init(config, dtype="float32", seed=2**32 - 1)).items():
        np.testing.assert_array_equal(weights[path], weight, err_msg=path)


def test_checkpoint_loads_onto_a_mesh():
    weight = model("fsdp").language_model.layers.mlp.up_proj.kernel[...]
    assert isinstance(weight.sharding, NamedSharding)
    assert weight.addressable_shards[0].data.shape == (2, 8, 48)


def test_unknown_mesh_axes_are_rejected():
    with pytest.raises(ValueError, match="expert"):
        Qwen2VL.init(parity.config(), mesh=Mesh(np.array(jax.devices()[:2]), ("expert",)))
