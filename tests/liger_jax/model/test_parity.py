"""The model computes what Hugging Face transformers computes: every layer, logits, loss, gradient of every parameter.

Expected values come from tests/references/make_model.py (torch, float32). A wrong rotation, mask, order of patches or
merge shows in one of these long before it shows in a trained model.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from convert import to_hf_state
from liger_jax import loss_fn
from tests._support import parity
from tests._support.parity import assert_near, expected

# Scenario and model. A tied head's gradient adds to the embedding's: two scenarios show it.
ALL = [(scenario, "untied") for scenario in parity.SCENARIOS + parity.PACKED]
ALL += [("text_batch_left", "tied"), ("image_video", "tied")]

logits_of = jax.jit(lambda model, batch: model(batch))
activations_of = jax.jit(lambda model, batch: model.activations(batch))
loss_of = jax.jit(loss_fn)
gradients_of = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def common_batch(scenario, rule="hf5"):
    """Two rows, one of them empty perhaps."""
    return parity.common(parity.batch(scenario, video_positions=rule).pad_rows(2))


@functools.cache
def activations(scenario, rule="hf5"):
    return activations_of(parity.model(), common_batch(scenario, rule))


@functools.cache
def trained(scenario, name="untied"):
    """-> loss, metrics, {hub name: gradient}"""
    (loss, metrics), grads = gradients_of(parity.model(name), common_batch(scenario))
    return loss, metrics, to_hf_state(grads)


def own_tokens(array, scenario):
    """[B', L', ...] of the bucketed batch -> [tokens, ...], those that transformers was given and that are no padding."""
    mask = parity.tokens(scenario)
    return np.asarray(array)[: mask.shape[0], : mask.shape[1]][mask]


def own_patches(batch, scenario, kind):
    """Row and column in the batch of each patch that transformers was given, found by its (random) pixels."""
    key = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
    pixels = batch.vision.pixel_values
    where = {pixels[b, p].tobytes(): (b, p) for b in range(pixels.shape[0]) for p in range(pixels.shape[1])}
    return np.array([where[patch.tobytes()] for patch in parity.inputs(scenario)[key]]).T


@pytest.mark.parametrize("scenario", parity.SCENARIOS)
def test_logits(scenario):
    found, wanted = activations(scenario)["logits"], expected(scenario, "logits")
    assert_near(own_tokens(found, scenario), wanted[parity.tokens(scenario)], what="logits")


@pytest.mark.parametrize(
    ("scenario", "name"),
    [("text", "untied"), ("two_images", "untied"), ("packed_batch_left", "untied"), ("image_video", "tied")],
)
def test_logits_of_a_batch_as_it_is(scenario, name):
    """`jax.jit(lambda m, b: m(b))` of what `prepare` returns: the caller's rows and columns, the exact vocabulary."""
    batch = parity.batch(scenario)
    logits = logits_of(parity.model(name), batch)
    assert logits.shape == (*batch.shape, parity.config().text.vocab_size)
    wanted = expected(scenario, "logits", name=name)
    assert_near(own_tokens(logits, scenario), wanted[parity.tokens(scenario)], what="logits")


@pytest.mark.parametrize(("scenario", "name"), ALL)
def test_loss(scenario, name):
    """The mean over the trained tokens; their number, and the share of them that argmax gets right."""
    loss, metrics, _ = trained(scenario, name)
    assert_near(loss, expected(scenario, "loss", name=name), what="loss")
    source = scenario.removeprefix("packed_")
    labels = parity.inputs(source)["labels"][:, 1:]
    logits = expected(source, "logits", name=name)[:, :-1]
    correct = logits.argmax(-1)[labels != -100] == labels[labels != -100]
    assert metrics["num_tokens"] == correct.size
    np.testing.assert_allclose(metrics["accuracy"], correct.mean(), rtol=1e-6)
    np.testing.assert_array_equal(metrics["loss"], loss)


@pytest.mark.parametrize("scenario", parity.SCENARIOS)
def test_loss_for_a_given_number_of_items(scenario):
    """What a trainer asks for that spreads a batch over several calls."""
    loss, _ = loss_of(parity.model(), common_batch(scenario), 100)
    assert_near(loss, expected(scenario, "loss_num_items_100"), what="loss")


@pytest.mark.parametrize("scenario", parity.VISION)
def test_vision_layers(scenario):
    """Patch embedding, each block and the merged features, patch by patch."""
    batch, layers = common_batch(scenario), activations(scenario)
    for kind in ("image", "video"):
        if f"{kind}_grid_thw" not in parity.inputs(scenario):
            continue
        row, column = own_patches(batch, scenario, kind)
        blocks = np.asarray(layers["vision_blocks"])
        found = {"patch_embed": layers["patch_embed"]} | {f"vision_block{i}": b for i, b in enumerate(blocks)}
        for key, value in found.items():
            assert_near(np.asarray(value)[row, column], expected(scenario, f"{kind}_{key}"), what=f"{kind} {key}")
        features = np.asarray(layers["features"])[row[::4], column[::4] // 4]
        assert_near(features, expected(scenario, f"{kind}_features"), what=f"{kind} features")


@pytest.mark.parametrize("scenario", parity.SCENARIOS)
def test_text_layers(scenario):
    """What goes into the language model (features in their places), each layer, and what the head reads."""
    layers = activations(scenario)
    found = {key: layers[key] for key in ("inputs_embeds", "final_hidden")}
    found |= {f"text_layer{i}": layer for i, layer in enumerate(np.asarray(layers["text_layers"]))}
    for key, value in found.items():
        wanted = expected(scenario, key)[parity.tokens(scenario)]
        assert_near(own_tokens(value, scenario), wanted, what=key)


@pytest.mark.parametrize(("scenario", "name"), ALL)
def test_gradient_of_every_parameter(scenario, name):
    """Padding on the right and packing change nothing: the same gradients as with padding on the left."""
    source = scenario.removeprefix("packed_").replace("_right", "_left")
    wanted = parity.expected_gradients(source, name=name)
    found = trained(scenario, name)[-1]
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_near(found[key], value, what=key)


def test_rows_without_pictures_leave_the_vision_tower_alone():
    grads = trained("text")[-1]
    assert not any(grads[key].any() for key in grads if key.startswith("visual."))


@pytest.mark.parametrize("scenario", parity.PACKED)
def test_packed_rows(scenario):
    """Several sequences in a row: the same logits as in rows of their own, and as transformers' packed forward."""
    found = own_tokens(activations(scenario)["logits"], scenario)
    unpacked = scenario.removeprefix("packed_")
    alone = own_tokens(activations(unpacked)["logits"], unpacked)
    assert_near(found, expected(scenario, "logits")[0], what="logits")
    assert_near(found, alone, tolerance=1e-5, what="against padded rows")
    assert_near(trained(scenario)[0], trained(unpacked)[0], tolerance=1e-6, what="loss")


def test_no_sequence_predicts_the_next():
    """A packed row whose first tokens are trained as well: the last token of a sequence still predicts nothing."""
    batch = common_batch("packed_text_batch_left")
    _, metrics = loss_of(parity.model(), dataclasses.replace(batch, labels=batch.input_ids), 100)
    segment_ids = parity.inputs("packed_text_batch_left")["segment_ids"]
    assert metrics["num_tokens"] == segment_ids.size - segment_ids.max()


@pytest.mark.parametrize("scenario", ["text_batch", "batch"])
def test_side_of_padding(scenario):
    """Left and right padding give each token the same logits, and the batch the same loss."""
    left, right = f"{scenario}_left", f"{scenario}_right"
    logits = [own_tokens(activations(side)["logits"], side) for side in (left, right)]
    assert_near(*logits, tolerance=1e-5, what="logits")
    assert_near(trained(left)[0], trained(right)[0], tolerance=1e-6, what="loss")


def test_video_rule_of_the_paper():
    """Rule "max" for a video with more frames than it is wide: the logits of transformers with those positions."""
    found = own_tokens(activations("video", rule="max")["logits"], "video")
    wanted = expected("video", "logits_max")[parity.tokens("video")]
    assert_near(found, wanted, what="logits")
    other_rule = expected("video", "logits")[parity.tokens("video")]
    assert np.abs(wanted - other_rule).max() > 100 * parity.TOLERANCE * np.abs(wanted).max()


def test_back_to_back_images():
    """Two images with no token between them, which transformers 5.x cannot index."""
    found = own_tokens(activations("back_to_back")["logits"], "back_to_back")
    assert_near(found, expected("back_to_back", "logits")[0], what="logits")
    assert_near(trained("back_to_back")[0], expected("back_to_back", "loss"), what="loss")
