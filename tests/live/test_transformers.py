"""The model equals the installed transformers' (needs torch), with weights and inputs that are not the stored ones."""

import functools

import jax
import numpy as np
import pytest

from convert import from_hf, to_hf, to_hf_state
from liger_jax import generate, loss_fn, prepare
from tests._support import parity
from tests._support.parity import assert_near

pytest.importorskip("torch", reason="needs torch, see the extra `parity`")

from tests.references import make_model as reference

pytestmark = pytest.mark.live

# Three query heads per key head, and sizes that all differ from those of the stored models.
WIDER = {
    "text": reference.TEXT
    | {"hidden_size": 96, "intermediate_size": 80, "num_attention_heads": 6, "num_hidden_layers": 3}
    | {"rope_parameters": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
    "vision": reference.VISION | {"depth": 1, "embed_dim": 32, "hidden_size": 96},
}
MODELS = {"untied": {}, "tied": {}, "untied wider": WIDER}
SCENARIOS = ("batch_left", "batch_mixed_text", "image_video")


@functools.cache
def make_hf_model(name):
    model = reference.make_model(name.split()[0], seed=1234, **MODELS[name])
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=MODELS)
def models(request, tmp_path_factory):
    """Returns a transformers model and ours with the same weights, transferred through a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_hf_model(request.param).save_pretrained(folder)
    return make_hf_model(request.param), from_hf(folder, dtype="float32")


@functools.cache
def scenarios():
    return reference.make_scenarios(np.random.default_rng(4321))


def make_batch(model, inputs):
    arrays = {key: value.numpy() for key, value in inputs.items()}
    return parity.common(prepare(model.config, **arrays, video_positions="hf5"))


loss_and_gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
compute_logits = jax.jit(lambda model, batch: model(batch))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_loss_and_gradients(models, scenario):
    hf, model = models
    inputs = scenarios()[0][scenario]
    recorder = reference.Recorder(hf)
    recorder.training(scenario, inputs)
    expected = {key.removeprefix(f"{scenario}/"): value for key, value in recorder.arrays.items()}
    batch = make_batch(model, inputs).pad_rows(2)
    mask = inputs["attention_mask"].numpy() > 0
    logits = np.asarray(compute_logits(model, batch))[: mask.shape[0], : mask.shape[1]]
    assert_near(logits[mask], expected["logits"][mask], name="logits")
    (loss, _), grads = loss_and_gradients(model, batch)
    assert_near(loss, expected["loss"], name="loss")
    grads = to_hf_state(grads)
    assert grads.keys() == {key.removeprefix("grad/") for key in expected if key.startswith("grad/")}
    for key, value in grads.items():
        assert_near(value, expected[f"grad/{key}"], name=key)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_greedy_tokens(models, scenario):
    hf, model = models
    prompt = scenarios()[1][scenario]
    recorder = reference.Recorder(hf)
    recorder.generation(scenario, prompt)
    tokens = generate(model, make_batch(model, prompt), max_new_tokens=reference.NEW_TOKENS, eos_token_id=())
    assert min(recorder.margins) > 1e-3, "too close a choice for float32: take another seed"
    np.testing.assert_array_equal(tokens, recorder.arrays[f"{scenario}/greedy"])


def test_written_checkpoints_load_in_transformers(models, tmp_path):
    """transformers reports no missing or unexpected name, and the logits are equal."""
    hf, model = models
    to_hf(model, tmp_path)
    loaded, report = type(hf).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    ids = scenarios()[0]["text"]["input_ids"]
    with reference.torch.no_grad():
        np.testing.assert_array_equal(loaded.eval()(ids).logits.numpy(), hf(ids).logits.numpy())
    for key, value in hf.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[key].numpy(), value.numpy(), err_msg=key)


def test_names_of_newer_transformers(models, tmp_path):
    """Shards with the names `model.visual.*` and `model.language_model.*` (4.52 and later) give the same weights."""
    hf, model = models
    hf.save_pretrained(tmp_path, save_original_format=False, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, from_hf(tmp_path, dtype="float32"), model)
