"""The model equals Hugging Face transformers: every layer, logits, loss, and the gradient of every parameter.

Expected values come from tests/references/make_model.py (torch, float32). A wrong rotation, mask, order of patches or
merge shows up here long before it shows up in a trained model.
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

# Scenario and model. The gradient of a tied head adds to that of the embedding; two scenarios cover that.
ALL = [(scenario, "untied") for scenario in parity.SCENARIOS + parity.PACKED]
ALL += [("text_batch_left", "tied"), ("image_video", "tied")]

jitted_logits = jax.jit(lambda model, batch: model(batch))
jitted_activations = jax.jit(lambda model, batch: model.activations(batch))
jitted_loss = jax.jit(loss_fn)
jitted_gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def common_batch(scenario, rule="hf5"):
    """Returns the scenario's batch with two rows, of which one may be empty."""
    return parity.common(parity.batch(scenario, video_positions=rule).pad_rows(2))


@functools.cache
def activations(scenario, rule="hf5"):
    return jitted_activations(parity.model(), common_batch(scenario, rule))


@functools.cache
def trained(scenario, name="untied"):
    """Returns loss, metrics, and {hub name: gradient}."""
    (loss, metrics), grads = jitted_gradients(parity.model(name), common_batch(scenario))
    return loss, metrics, to_hf_state(grads)


def own_tokens(array, scenario):
    """Returns the entries [tokens, ...] for the scenario's own tokens from an array [B, T, ...] for the bucketed batch."""
    mask = parity.tokens(scenario)
    return np.asarray(array)[: mask.shape[0], : mask.shape[1]][mask]


def own_patches(batch, scenario, kind):
    """Returns the row and position in the batch of each patch in the scenario's inputs, identified by its random pixels."""
    key = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
    pixels = batch.vision.pixel_values
    index = {pixels[b, p].tobytes(): (b, p) for b in range(pixels.shape[0]) for p in range(pixels.shape[1])}
    return np.array([index[patch.tobytes()] for patch in parity.inputs(scenario)[key]]).T


@pytest.mark.parametrize("scenario", parity.SCENARIOS)
def test_logits(scenario):
    logits, reference = activations(scenario)["logits"], expected(scenario, "logits")
    assert_near(own_tokens(logits, scenario), reference[parity.tokens(scenario)], name="logits")


@pytest.mark.parametrize(
    ("scenario", "name"),
    [("text", "untied"), ("two_images", "untied"), ("packed_batch_left", "untied"), ("image_video", "tied")],
)
def test_logits_of_an_unpadded_batch(scenario, name):
    """A jitted forward pass on the output of `prepare`: the caller's rows and positions, and the exact vocabulary."""
    batch = parity.batch(scenario)
    logits = jitted_logits(parity.model(name), batch)
    assert logits.shape == (*batch.shape, parity.config().text.vocab_size)
    reference = expected(scenario, "logits", name=name)
    assert_near(own_tokens(logits, scenario), reference[parity.tokens(scenario)], name="logits")


@pytest.mark.parametrize(("scenario", "name"), ALL)
def test_loss(scenario, name):
    """The mean over the trained tokens, their number, and the accuracy of argmax."""
    loss, metrics, _ = trained(scenario, name)
    assert_near(loss, expected(scenario, "loss", name=name), name="loss")
    source = scenario.removeprefix("packed_")
    labels = parity.inputs(source)["labels"][:, 1:]
    logits = expected(source, "logits", name=name)[:, :-1]
    correct = logits.argmax(-1)[labels != -100] == labels[labels != -100]
    assert metrics["num_tokens"] == correct.size
    np.testing.assert_allclose(metrics["accuracy"], correct.mean(), rtol=1e-6)
    np.testing.assert_array_equal(metrics["loss"], loss)


@pytest.mark.parametrize("scenario", parity.SCENARIOS)
def test_loss_with_num_items(scenario):
    """A trainer passes num_items when it spreads a batch over several calls."""
    loss, _ = jitted_loss(parity.model(), common_batch(scenario), 100)
    assert_near(loss, expected(scenario, "loss_num_items_100"), name="loss")


@pytest.mark.parametrize("scenario", parity.VISION)
def test_vision_layers(scenario):
    """Patch embedding, each block and the merged features, patch by patch."""
    batch, layers = common_batch(scenario), activations(scenario)
    for kind in ("image", "video"):
        if f"{kind}_grid_thw" not in parity.inputs(scenario):
            continue
        row, position = own_patches(batch, scenario, kind)
        blocks = np.asarray(layers["vision_blocks"])
        outputs = {"patch_embed": layers["patch_embed"]} | {f"vision_block{i}": b for i, b in enumerate(blocks)}
        for key, value in outputs.items():
            assert_near(np.asarray(value)[row, position], expected(scenario, f"{kind}_{key}"), name=f"{kind} {key}")
        features = np.asarray(layers["features"])[row[::4], position[::4] // 4]
        assert_near(features, expected(scenario, f"{kind}_features"), name=f"{kind} features")


@pytest.mark.parametrize("scenario", parity.SCENARIOS)
def test_text_layers(scenario):
    """The embeddings with the image features in place, each layer, and the input of the head."""
    layers = activations(scenario)
    outputs = {key: layers[key] for key in ("inputs_embeds", "final_hidden")}
    outputs |= {f"text_layer{i}": layer for i, layer in enumerate(np.asarray(layers["text_layers"]))}
    for key, value in outputs.items():
        reference = expected(scenario, key)[parity.tokens(scenario)]
        assert_near(own_tokens(value, scenario), reference, name=key)


@pytest.mark.parametrize(("scenario", "name"), ALL)
def test_gradient_of_every_parameter(scenario, name):
    """Gradients are the same for padding on either side and for packed rows."""
    source = scenario.removeprefix("packed_").replace("_right", "_left")
    reference = parity.expected_gradients(source, name=name)
    grads = trained(scenario, name)[-1]
    assert grads.keys() == reference.keys()
    for key, value in reference.items():
        assert_near(grads[key], value, name=key)


def test_vision_tower_has_no_gradient_for_text():
    grads = trained("text")[-1]
    assert not any(grads[key].any() for key in grads if key.startswith("visual."))


@pytest.mark.parametrize("scenario", parity.PACKED)
def test_packed_rows(scenario):
    """Several sequences in a row have the logits of separate rows, and of transformers' packed forward pass."""
    packed = own_tokens(activations(scenario)["logits"], scenario)
    unpacked = scenario.removeprefix("packed_")
    separate = own_tokens(activations(unpacked)["logits"], unpacked)
    assert_near(packed, expected(scenario, "logits")[0], name="logits")
    assert_near(packed, separate, tolerance=1e-5, name="against padded rows")
    assert_near(trained(scenario)[0], trained(unpacked)[0], tolerance=1e-6, name="loss")


def test_last_token_of_a_packed_sequence_has_no_label():
    """No sequence predicts the first token of the next, even if that token is trained."""
    batch = common_batch("packed_text_batch_left")
    _, metrics = jitted_loss(parity.model(), dataclasses.replace(batch, labels=batch.input_ids), 100)
    segment_ids = parity.inputs("packed_text_batch_left")["segment_ids"]
    assert metrics["num_tokens"] == segment_ids.size - segment_ids.max()


@pytest.mark.parametrize("scenario", ["text_batch", "batch"])
def test_padding_side_does_not_matter(scenario):
    """Left and right padding give the same logits for each token, and the same loss."""
    left, right = f"{scenario}_left", f"{scenario}_right"
    logits = [own_tokens(activations(side)["logits"], side) for side in (left, right)]
    assert_near(*logits, tolerance=1e-5, name="logits")
    assert_near(trained(left)[0], trained(right)[0], tolerance=1e-6, name="loss")


def test_video_positions_max():
    """Rule "max" for a video with more frames than it is wide: the logits of transformers with those positions."""
    logits = own_tokens(activations("video", rule="max")["logits"], "video")
    reference = expected("video", "logits_max")[parity.tokens("video")]
    assert_near(logits, reference, name="logits")
    other_rule = expected("video", "logits")[parity.tokens("video")]
    assert np.abs(reference - other_rule).max() > 100 * parity.TOLERANCE * np.abs(reference).max()


def test_back_to_back_images():
    """Two images with no token between them, which transformers 5.x cannot index."""
    logits = own_tokens(activations("back_to_back")["logits"], "back_to_back")
    assert_near(logits, expected("back_to_back", "logits")[0], name="logits")
    assert_near(trained("back_to_back")[0], expected("back_to_back", "loss"), name="loss")
