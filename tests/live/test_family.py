"""Qwen2.5-VL and Qwen3-VL equal the installed transformers' (needs torch), with other weights, sizes and inputs."""

import functools

import jax
import numpy as np
import pytest
import transformers

from convert import from_hf, to_hf, to_hf_state
from liger_jax import QwenVLConfig, generate, loss_fn
from liger_jax.model.params import param_paths
from tests._support import family_parity as parity
from tests._support.parity import assert_near

pytest.importorskip("torch", reason="needs torch, see the extra `parity`")
from tests.references import make_family as reference

pytestmark = pytest.mark.live

# Not the stored models: the other family is tied, three query heads share a key head, and layers repeat in other patterns.
TIED = {"qwen2_5_vl": True, "qwen3_vl": False}
WIDER = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}
CHANGES = {
    "qwen2_5_vl": {
        "text_config": WIDER,
        "vision_config": {"out_hidden_size": 48, "hidden_size": 32, "depth": 3, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": WIDER | {"head_dim": 16},
        "vision_config": {"out_hidden_size": 48, "hidden_size": 32, "depth": 3, "deepstack_visual_indexes": [1]},
    },
}


@pytest.fixture(scope="module", params=parity.FAMILIES)
def models(request, tmp_path_factory):
    """Returns the family, and a transformers model and ours with the same weights, transferred through a checkpoint."""
    family, folder = request.param, tmp_path_factory.mktemp("checkpoint")
    changes = {part: reference.CONFIGS[family][part] | values for part, values in CHANGES[family].items()}
    hf = reference.make_model(family, 1234, tie_word_embeddings=TIED[family], **changes)
    hf.generation_config.eos_token_id = None
    hf.save_pretrained(folder)
    return family, hf, from_hf(folder, dtype="float32")


@functools.cache
def scenarios(family):
    """Returns the inputs of each scenario, and its prompts."""
    inputs, prompts = reference.make_scenarios(family, np.random.default_rng(4321))
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):  # cuts the seconds to integers
        for values in (*inputs.values(), *prompts.values()):
            if "second_per_grid_ts" in values:
                values["second_per_grid_ts"] = reference.torch.ones_like(values["second_per_grid_ts"])
    return inputs, prompts


loss_and_gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
compute_logits = jax.jit(lambda model, batch: model(batch))


@pytest.mark.parametrize("scenario", ["batch", "videos"])
def test_logits_loss_and_gradients(models, scenario):
    family, hf, model = models
    inputs = scenarios(family)[0][scenario]
    recorder = reference.FamilyRecorder(hf, reference.hub_name(family))
    recorder.training(scenario, inputs, layers=False)
    expected = {key.removeprefix(f"{scenario}/"): value for key, value in recorder.arrays.items()}
    batch = parity.common(model.config, {key: value.numpy() for key, value in inputs.items()})
    mask = inputs["attention_mask"].numpy() > 0
    logits = np.asarray(compute_logits(model, batch))[: mask.shape[0], : mask.shape[1]]
    assert_near(logits[mask], expected["logits"][mask], name="logits")
    (loss, _), grads = loss_and_gradients(model, batch)
    assert_near(loss, expected["loss"], name="loss")
    grads = to_hf_state(grads)
    assert grads.keys() == {key.removeprefix("grad/") for key in expected if key.startswith("grad/")}
    for key, value in grads.items():
        assert_near(value, expected[f"grad/{key}"], name=key)


def test_greedy_tokens(models):
    family, hf, model = models
    scenario = "batch"
    prompt = scenarios(family)[1][scenario]
    recorder = reference.FamilyRecorder(hf, reference.hub_name(family))
    recorder.generation(scenario, prompt)
    assert min(recorder.margins) > 1e-3
    batch = parity.common(model.config, {key: value.numpy() for key, value in prompt.items()})
    rows = np.arange(parity.ROWS) % len(prompt["input_ids"])  # in place of rows that pad the batch
    batch = jax.tree.map(lambda x: x[rows], batch)
    expected = recorder.arrays[f"{scenario}/greedy"]
    tokens = generate(model, batch, max_new_tokens=expected.shape[1], eos_token_id=(), pad_token_id=0)
    np.testing.assert_array_equal(tokens[: len(expected)], expected)


def test_written_checkpoints_load_in_transformers(models, tmp_path):
    """transformers reports no missing or unexpected name, every weight is equal, and so is the configuration."""
    _, hf, model = models
    to_hf(model, tmp_path)
    loaded, report = type(hf).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    for key, value in hf.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[key].numpy(), value.numpy(), err_msg=key)
    for part in ("text_config", "vision_config"):
        ours, theirs = (getattr(config, part).to_dict() for config in (loaded.config, hf.config))
        defaults = {"dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
        assert {key: ours.get(key) for key in theirs if key not in defaults} == {
            key: value for key, value in theirs.items() if key not in defaults
        }
    assert QwenVLConfig.from_hf(loaded.config.to_dict()) == model.config


def test_names_of_newer_transformers(models, tmp_path):
    """Shards with the names `model.visual.*` and `model.language_model.*` give the same weights."""
    _, hf, model = models
    hf.save_pretrained(tmp_path, save_original_format=False, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = param_paths(from_hf(tmp_path, dtype="float32"))
    for path, value in param_paths(model).items():
        np.testing.assert_array_equal(loaded[path], value, err_msg=path)
