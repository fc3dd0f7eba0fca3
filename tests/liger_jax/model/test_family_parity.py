"""Qwen2.5-VL and Qwen3-VL equal Hugging Face transformers: every layer, logits, loss, and the gradient of every parameter.

Expected values come from tests/references/make_family.py (torch, float32). Qwen2.5-VL: windows that the edge of an image
cuts off, and the time of videos. Qwen3-VL: the interpolated position table, deepstack next to padding and text-only rows,
norms of heads, interleaved M-RoPE and a head size other than width / heads.
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import from_hf, to_hf, to_hf_state
from liger_jax import QwenVLConfig, loss_fn, prepare
from liger_jax.model.params import param_paths
from tests._support import family_parity as parity
from tests._support.parity import REFERENCES, assert_near

FAMILIES = parity.FAMILIES
ALL = [(family, scenario) for family in FAMILIES for scenario in (*parity.SCENARIOS, "two_images")]
VISION = [(family, scenario) for family in FAMILIES for scenario in parity.VISION]
# scanned and unrolled layers, with and without recomputation
EXECUTION = {"batch": {"unroll": "none", "remat": "dots"}, "batch_text": {"unroll": "all", "remat": "none"}}

jitted_activations = jax.jit(lambda model, batch: model.activations(batch))


@functools.cache
def common_batch(family, scenario):
    return parity.common(parity.config(family), parity.inputs(family, scenario))


@functools.cache
def activations(family, scenario):
    return jitted_activations(parity.model(family), common_batch(family, scenario))


def own_tokens(array, mask):
    """Returns the entries [tokens, ...] for the scenario's own tokens from an array [B, T, ...] for the bucketed batch."""
    return np.asarray(array)[: mask.shape[0], : mask.shape[1]][mask]


def tokens(family, scenario):
    return parity.inputs(family, scenario)["attention_mask"] > 0


@pytest.mark.parametrize(("family", "scenario"), ALL)
def test_logits_and_text_layers(family, scenario):
    """The embeddings with the features in place, each layer (before deepstack is added), the head's input, and logits."""
    layers, mask = activations(family, scenario), tokens(family, scenario)
    outputs = {key: layers[key] for key in ("inputs_embeds", "final_hidden", "logits")}
    outputs |= {f"text_layer{i}": layer for i, layer in enumerate(np.asarray(layers["text_layers"]))}
    for key, value in outputs.items():
        assert_near(own_tokens(value, mask), parity.expected(family, scenario, key)[mask], name=key)


@pytest.mark.parametrize(("family", "scenario"), VISION)
def test_vision_layers(family, scenario):
    """Each block, the merged features and those of the deepstack layers, patch by patch."""
    layers, pixels = activations(family, scenario), common_batch(family, scenario).vision.pixel_values
    slots = {pixels[b, p].tobytes(): (b, p) for b in range(pixels.shape[0]) for p in range(pixels.shape[1])}
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        patches = parity.inputs(family, scenario).get(key)
        if patches is None:
            continue
        row, slot = np.array([slots[patch.tobytes()] for patch in patches]).T
        assert (slot[::4] % 4 == 0).all() and (slot.reshape(-1, 4) - slot[::4, None] == np.arange(4)).all()
        for i, block in enumerate(np.asarray(layers["vision_blocks"])):
            reference = parity.expected(family, scenario, f"{kind}_vision_block{i}")
            assert_near(block[row, slot], reference, name=f"{kind} block {i}")
        merged = {"features": layers["features"]}
        merged |= {f"deepstack{i}": x for i, x in enumerate(layers.get("deepstack", ()))}
        for name, value in merged.items():
            reference = parity.expected(family, scenario, f"{kind}_{name}")
            assert_near(np.asarray(value)[row[::4], slot[::4] // 4], reference, name=f"{kind} {name}")


@pytest.mark.parametrize(("family", "scenario"), [(f, s) for f in FAMILIES for s in parity.GRADIENTS])
def test_loss_and_gradient_of_every_parameter(family, scenario):
    compute = jax.jit(jax.value_and_grad(functools.partial(loss_fn, **EXECUTION[scenario]), has_aux=True))
    (loss, _), grads = compute(parity.model(family), common_batch(family, scenario))
    assert_near(loss, parity.expected(family, scenario, "loss"), name="loss")
    grads, reference = to_hf_state(grads), parity.expected_gradients(family, scenario)
    assert grads.keys() == reference.keys()
    for key, value in reference.items():
        assert_near(grads[key], value, name=key)


@pytest.mark.parametrize("family", FAMILIES)
def test_video_positions_max(family):
    """Text after a video starts above all of its positions: the logits of transformers with such positions."""
    arrays = parity.inputs(family, "videos")
    batch, mask = parity.common(parity.config(family), arrays, video_positions="max"), tokens(family, "videos")
    logits = own_tokens(jitted_activations(parity.model(family), batch)["logits"], mask)
    reference, other_rule = (parity.expected(family, "videos", key)[mask] for key in ("logits_max", "logits"))
    assert_near(logits, reference, name="logits")
    difference = np.abs(reference - other_rule).max() / np.abs(reference).max()
    assert difference > 0.01 if family == "qwen2_5_vl" else difference == 0  # Qwen3-VL's frames are one grid row each


@pytest.mark.parametrize("family", FAMILIES)
def test_back_to_back_images(family):
    """Two images with no token between them, which transformers 5.x cannot index."""
    keys = ("input_ids", "labels", "attention_mask")
    arrays = parity.inputs(family, "two_images") | {key: parity.expected(family, "back_to_back", key) for key in keys}
    batch = parity.common(parity.config(family), arrays)
    logits = own_tokens(jitted_activations(parity.model(family), batch)["logits"], arrays["attention_mask"] > 0)
    assert_near(logits, parity.expected(family, "back_to_back", "logits")[0], name="logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_and_padding_sides(family):
    """Packed in one row or padded on the right, sequences have the logits of left-padded rows."""
    arrays = parity.inputs(family, "batch")
    mask, lengths = tokens(family, "batch"), tokens(family, "batch").sum(1)
    reference = parity.expected(family, "batch", "logits")[mask]
    rows = {key: arrays.pop(key) for key in ("input_ids", "labels", "attention_mask")}
    ids = rows["input_ids"]
    packed = {"input_ids": ids[mask][None], "segment_ids": np.repeat([1, 2], lengths)[None]}
    right = np.arange(ids.shape[1]) < lengths[:, None]
    moved = np.zeros_like(ids)
    moved[right] = ids[mask]
    for layout, own in ((packed, packed["segment_ids"] > 0), ({"input_ids": moved, "attention_mask": right}, right)):
        labels = {"labels": np.full(layout["input_ids"].shape, -100)}
        logits = jitted_activations(
            parity.model(family), parity.common(parity.config(family), arrays | layout | labels)
        )["logits"]
        assert_near(own_tokens(logits, own), reference, name="logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_have_the_hubs_spelling(family):
    """The reference was written by transformers' save_pretrained; from_hf and to_hf_state keep every name and bit."""
    stored = load_file(REFERENCES / f"model_{family}" / "model.safetensors")
    state = to_hf_state(parity.model(family))
    assert state.keys() == stored.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(state[key], value, err_msg=key)
    hub = json.loads((REFERENCES / f"model_{family}" / "config.json").read_text())
    assert QwenVLConfig.from_hf(hub).to_hf()["architectures"] == hub["architectures"]


def test_vision_tower_without_deepstack(tmp_path):
    """As that of Qwen3.5. Logits equal those of deepstack mergers whose outputs are zero; checkpoints have no mergers."""
    stored = load_file(REFERENCES / "model_qwen3_vl" / "model.safetensors")
    hub = json.loads((REFERENCES / "model_qwen3_vl" / "config.json").read_text())
    bare_hub = hub | {"vision_config": hub["vision_config"] | {"deepstack_visual_indexes": []}}
    bare = {name: value for name, value in stored.items() if "deepstack" not in name}
    zeros = {
        name: 0 * value if "deepstack" in name and "linear_fc2" in name else value for name, value in stored.items()
    }
    models = {}
    for name, config, tensors in (("bare", bare_hub, bare), ("zeros", hub, zeros)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / name / "model.safetensors")
        models[name] = from_hf(tmp_path / name, dtype="float32")
    assert models["bare"].config.vision.deepstack_layers == () and len(bare) < len(stored)

    batch = parity.batch("qwen3_vl", "image")
    logits, expected = (jax.jit(lambda model, batch: model(batch))(model, batch) for model in models.values())
    assert_near(np.asarray(logits), np.asarray(expected), tolerance=1e-6, name="logits")

    to_hf(models["bare"], tmp_path / "written")
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert written.keys() == bare.keys()
    for key, value in bare.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    assert from_hf(tmp_path / "written", dtype="float32").config == models["bare"].config


@pytest.mark.parametrize(("family", "grid"), [("qwen2_5_vl", [1, 10, 18]), ("qwen3_vl", [1, 6, 10])])
def test_another_grid_in_the_same_bucket_compiles_nothing(family, grid):
    """The device sees the same shapes and static fields for a transposed image: windows and table indices are data."""
    arrays, batches = parity.inputs(family, "image"), []
    for height, width in (grid[1:], grid[:0:-1]):
        batches.append(prepare(parity.config(family), **arrays | {"image_grid_thw": np.array([[1, height, width]])}))
    assert np.any(batches[0].vision.position_ids != batches[1].vision.position_ids)
    first, second = (jax.tree.map(lambda x: (x.shape, x.dtype), batch) for batch in batches)
    assert first == second


@pytest.mark.parametrize("family", FAMILIES)
def test_summary(family):
    """The table lists every parameter with its axes, the total, and the shapes of all activations."""
    summary = parity.model(family).summary(common_batch(family, "batch"))
    leaves = param_paths(parity.model(family))
    assert all(any(line.startswith(f"{path} ") for line in summary.splitlines()) for path in leaves)
    assert f"{sum(leaf.size for leaf in leaves.values()):,}" in summary
    rows = {line.split()[0]: line.split()[1:] for line in summary.splitlines() if line}
    assert rows["features"] == ["2", str(parity.SLOTS // 4), "32", "float32"]
    assert (rows.get("deepstack") == ["2", "2", str(parity.SLOTS // 4), "32", "float32"]) == (family == "qwen3_vl")
