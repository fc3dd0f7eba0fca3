"""The table of parameters covers the model, and everything derived from it equals the recorded rules that it replaced."""

import functools
import json
import math
from typing import get_args

import jax
import numpy as np
import pytest

from liger_jax import Qwen2VL, Qwen2VLConfig, QwenVL, QwenVLConfig, prepare
from liger_jax.model.lora import TEXT_TARGETS, add_lora, find_targets
from liger_jax.model.params import PARTS, TABLE, axis_sizes, find_row, param_group, param_paths
from liger_jax.model.sharding import param_shardings, partition_spec
from liger_jax.options import Optimization
from liger_jax.train.flops import step_flops
from liger_jax.train.optimizer import make_optimizer
from tests._support.parity import REFERENCES

RECORDED = json.loads((REFERENCES / "parameters.json").read_text())
PRESETS = ("qwen2_vl_2b", "qwen2_vl_7b", "qwen2_vl_72b", "tiny")
NEWER = ("qwen2_5_vl", "qwen3_vl")


@functools.cache
def parameters(preset):
    """Returns {path: shape} for a model with LoRA of rank 8 in all layers that can have it."""
    model = Qwen2VL.abstract(getattr(Qwen2VLConfig, preset)())
    model = jax.eval_shape(functools.partial(add_lora, rank=8, targets="all-linear"), model)
    return param_paths(model)


def trimmed(spec):
    """Returns a PartitionSpec as a list, without trailing None."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return entries


@pytest.mark.parametrize("preset", PRESETS)
def test_axes_match_every_shape(preset):
    """Each parameter has one row, whose axes give its shape."""
    config = getattr(Qwen2VLConfig, preset)()
    sizes = axis_sizes(config) | {"r": 8}
    shapes = {path: leaf.shape for path, leaf in parameters(preset).items()}
    assert {path: list(shape) for path, shape in shapes.items()} == RECORDED["shapes"][preset]
    for path, shape in shapes.items():
        dimensions = find_row(path).dimensions
        assert tuple(math.prod(sizes[axis] for axis in axes) for axes in dimensions) == shape, path
    assert len({row.path for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("family", NEWER)
def test_axes_match_every_shape_of_newer_families(family):
    config = QwenVLConfig.tiny(family=family)
    sizes = axis_sizes(config) | {"r": 8}
    model = jax.eval_shape(functools.partial(add_lora, rank=8, targets="all-linear"), QwenVL.abstract(config))
    for path, leaf in param_paths(model).items():
        assert tuple(math.prod(sizes[axis] for axis in axes) for axes in find_row(path).dimensions) == leaf.shape, path


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("language_model/layers/self_attn/q_norm/weight", []),
        ("visual/patch_embed/bias", []),
        ("visual/position_table/weight", [None, "fsdp"]),
        ("visual/blocks/mlp/gate_proj/kernel", [None, "fsdp", "tensor"]),
        ("visual/blocks/mlp/gate_proj/bias", [None, "tensor"]),
        ("visual/blocks/mlp/down_proj/kernel", [None, "tensor", "fsdp"]),
        ("visual/blocks/mlp/down_proj/bias", []),
        ("visual/deepstack/norm/weight", []),
        ("visual/deepstack/fc1/kernel", [None, "fsdp", "tensor"]),
        ("visual/deepstack/fc2/kernel", [None, "tensor", "fsdp"]),
        ("visual/deepstack/fc2/lora/a", [None, "tensor"]),
    ],
)
def test_shardings_of_newer_families(path, spec):
    """Widths are split over fsdp, heads and MLPs over tensor, and vectors and stacks of layers not at all."""
    assert trimmed(partition_spec(find_row(path))) == spec


def test_every_row_belongs_to_some_member_of_the_family():
    models = [QwenVL.abstract(QwenVLConfig.tiny(family=family)) for family in ("qwen2_vl", *NEWER)]
    assert {row.path for row in TABLE} == {path for model in models for path in param_paths(model)}


@pytest.mark.parametrize("preset", PRESETS)
def test_shardings_match_the_recording(preset):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    shardings = param_shardings(parameters(preset), mesh)
    for path, sharding in shardings.items():
        recorded = RECORDED["parameters"][path]["spec"]
        assert trimmed(partition_spec(find_row(path))) == recorded, path
        assert trimmed(sharding.spec) == recorded, path


def test_parts_and_decay_match_the_recording():
    for path, recorded in RECORDED["parameters"].items():
        assert (param_group(path), find_row(path).decays) == (recorded["part"], recorded["decays"]), path
    assert {row.part for row in TABLE} == set(PARTS)
    (freezable,) = {choice for choice in get_args(Optimization.__annotations__["freeze"]) if choice is not ...}
    assert get_args(freezable) == PARTS


def test_lora_targets_match_the_recording():
    """PEFT's names and paths are in the same order, which determines A's random numbers."""
    targets = find_targets(Qwen2VL.abstract(Qwen2VLConfig.tiny()))
    assert list(targets.items()) == list(RECORDED["lora_targets"].items())
    assert list(TEXT_TARGETS) == list(targets)[:7]


def recorded_batches(config):
    """Returns the batches of the recording: text alone, and two images in padded rows."""
    text = np.random.default_rng(0).integers(0, 200, (2, 64))
    ids = np.full((2, 80), 5)
    ids[0, 0], ids[0, 1:17] = config.vision_start_token_id, config.image_token_id
    ids[1, 3], ids[1, 4:12] = config.vision_start_token_id, config.image_token_id
    pixels = np.zeros((96, config.vision.patch_values), np.float32)
    grid = np.array([[1, 8, 8], [1, 4, 8]])
    labels = np.where(np.arange(80) > 40, ids, -100)
    return {
        "text": prepare(config, input_ids=text, labels=text),
        "images": prepare(config, input_ids=ids, labels=labels, pixel_values=pixels, image_grid_thw=grid),
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_match_the_recording(preset):
    """Equal to the last bit, for all frozen and adapted parts."""
    config = getattr(Qwen2VLConfig, preset)()
    batches = recorded_batches(config)
    for case, flops in RECORDED["flops"][preset].items():
        batch, *parts = case.split("|")
        frozen, adapted = (names.split(",") if names else () for names in parts)
        assert step_flops(config, batches[batch], frozen=frozen, adapted=adapted) == flops, case


@pytest.mark.parametrize("path", ["language_model/layers/self_attn/v_norm/weight", "audio/blocks/fc1/kernel"])
def test_parameter_without_a_row_raises(path):
    """Sharding, the optimizer and look-ups raise: the parameter is never silently replicated or decayed."""
    tree = {path: jax.ShapeDtypeStruct((4, 8), "float32")}
    for use in (
        lambda: find_row(path),
        lambda: param_group(path),
        lambda: param_shardings(tree, jax.make_mesh((2,), ("fsdp",))),
        lambda: jax.eval_shape(make_optimizer(1e-3).init, tree),
    ):
        with pytest.raises(LookupError, match=rf"{path} has no row in the table of parameters"):
            use()


def test_optimizer_state_may_hold_other_arrays():
    """A random key or a scalar is replicated. An array whose path leads into the model still needs a row."""
    mesh = jax.make_mesh((2,), ("fsdp",))
    array = jax.ShapeDtypeStruct((4, 8), "float32")
    shardings = param_shardings({"rng_key": array, "count": jax.ShapeDtypeStruct((), "int32")}, mesh, strict=False)
    assert all(sharding.is_fully_replicated for sharding in shardings.values())
    with pytest.raises(LookupError, match="has no row"):
        param_shardings({"mu": {"visual/extra/kernel": array}}, mesh, strict=False)
