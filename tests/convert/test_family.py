"""Checkpoints of Qwen2.5-VL and Qwen3-VL: every mismatch is named, and all formats keep every bit."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import from_hf, open_model, to_hf, to_hf_state
from convert.table import current_name
from liger_jax import load_model, save_model
from liger_jax.errors import UserError
from liger_jax.model.params import param_paths
from tests._support import family_parity as parity
from tests._support.parity import REFERENCES

FAMILIES = parity.FAMILIES
SAFETENSORS = "model.safetensors"


def checkpoint(family, folder, **tensors):
    """Copies a checkpoint with some tensors added, replaced, or removed (None)."""
    shutil.copytree(REFERENCES / f"model_{family}", folder, dirs_exist_ok=True)
    state = load_file(folder / SAFETENSORS) | tensors
    save_file({name: value for name, value in state.items() if value is not None}, folder / SAFETENSORS)
    return folder


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = param_paths(actual)
    for path, leaf in param_paths(expected).items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_are_read(family, tmp_path):
    """Names of transformers 4.52 and later (model.visual.*), and those of older ones (visual.*)."""
    state = load_file(REFERENCES / f"model_{family}" / SAFETENSORS)
    for spell in (current_name, lambda name: name.replace("model.visual.", "visual.").replace("language_model.", "")):
        shutil.copytree(REFERENCES / f"model_{family}", tmp_path, dirs_exist_ok=True)
        save_file({spell(name): value for name, value in state.items()}, tmp_path / SAFETENSORS)
        assert_same_bits(from_hf(tmp_path, dtype="float32"), parity.model(family))


@pytest.mark.parametrize(
    ("family", "tensors", "message"),
    [
        (
            "qwen2_5_vl",
            {"visual.blocks.2.mlp.gate_proj.bias": None},
            r"missing: .*visual\.blocks\.2\.mlp\.gate_proj\.bias",
        ),
        ("qwen2_5_vl", {"visual.merger.ln_q.bias": np.ones(24)}, r"unexpected: .*visual\.merger\.ln_q\.bias"),
        ("qwen2_5_vl", {"lm_head.weight": None}, "there is no lm_head.weight; if the head is the embedding"),
        (
            "qwen3_vl",
            {"model.visual.deepstack_merger_list.1.norm.weight": np.ones(24, np.float32)},
            r"wrong shape: .*deepstack_merger_list\.1\.norm\.weight \[24\], expected \[96\]",
        ),
        (
            "qwen3_vl",
            {"model.visual.deepstack_merger_list.2.linear_fc1.bias": np.ones(96, np.float32)},
            r"unexpected: .*deepstack_merger_list\.2\.linear_fc1\.bias",
        ),
        ("qwen3_vl", {"model.visual.pos_embed.weight": None}, r"missing: .*model\.visual\.pos_embed\.weight"),
        (
            "qwen3_vl",
            {"model.language_model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)},
            r"unexpected: .*layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            "qwen3_vl",
            {"lm_head.weight": np.ones((160, 32), np.float32)},
            "lm_head.weight differs from model.language_model",
        ),
    ],
)
def test_mismatches_are_named(family, tensors, message, tmp_path):
    with pytest.raises(UserError, match=message):
        from_hf(checkpoint(family, tmp_path, **tensors))


def test_tied_checkpoint_may_hold_an_equal_head(tmp_path):
    embedding = load_file(REFERENCES / "model_qwen3_vl" / SAFETENSORS)["model.language_model.embed_tokens.weight"]
    model = from_hf(checkpoint("qwen3_vl", tmp_path, **{"lm_head.weight": embedding}), dtype="float32")
    assert_same_bits(model, parity.model("qwen3_vl"))


def test_weights_of_another_member_are_refused(tmp_path):
    """The weights of Qwen2-VL under a config.json of Qwen2.5-VL."""
    shutil.copytree(REFERENCES / "model_qwen2_5_vl", tmp_path, dirs_exist_ok=True)
    shutil.copy(REFERENCES / "model_untied" / SAFETENSORS, tmp_path)
    with pytest.raises(UserError, match=r"(?s)missing: .*mlp\.down_proj.*unexpected: .*mlp\.fc1"):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_vl_moe", "Qwen3-VL with a mixture of experts"),
        ("qwen3_vl_moe_text", "Qwen3-VL with a mixture of experts"),
        ("qwen3_5", "Qwen3.5"),
        ("qwen3_5_text", "Qwen3.5"),
        ("qwen3_5_moe", "Qwen3.5 with a mixture of experts"),
        ("qwen3_5_moe_text", "Qwen3.5 with a mixture of experts"),
        ("qwen2_5_omni", "Qwen2.5-Omni"),
        ("qwen2_5_omni_thinker", "Qwen2.5-Omni"),
        ("qwen3_omni", "Qwen3-Omni"),
        ("qwen3_omni_moe", "Qwen3-Omni"),
        ("qwen3_omni_moe_thinker", "Qwen3-Omni"),
        ("qwen", "the first Qwen-VL"),
        ("qwen3_next", None),  # no member of the family
    ],
)
def test_unsupported_members_are_named(model_type, name, tmp_path):
    """Those of a part, and the first Qwen-VL, whose model_type is "qwen", were not."""
    hub = json.loads((REFERENCES / "model_qwen3_vl" / "config.json").read_text()) | {"model_type": model_type}
    hub |= {"visual": hub["vision_config"]} if model_type == "qwen" else {}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    with pytest.raises(UserError, match=rf"config\.json: model_type is '{model_type}'; expected 'qwen2_vl'") as error:
        from_hf(tmp_path)
    assert str(error.value).endswith(f" ({name} is not supported)" if name else "or 'qwen3_vl'")


@pytest.mark.parametrize("family", FAMILIES)
def test_formats_keep_every_bit(family, tmp_path):
    """Written as a Hugging Face folder and as an Orbax checkpoint; `open_model` reads both."""
    model = parity.model(family)
    to_hf(model, tmp_path / "hub", max_shard_size="100KB")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1
    save_model(model, tmp_path / "orbax")
    assert_same_bits(load_model(tmp_path / "orbax"), model)
    for folder in ("hub", "orbax"):
        opened = open_model(tmp_path / folder, dtype="float32")
        assert opened.config == model.config
        assert_same_bits(opened, model)


def test_state_without_a_configuration():
    """Some parameters in nested dicts: names that only Qwen3-VL has decide the spelling."""
    norms = {"layers": {"self_attn": {"q_norm": {"weight": np.ones((3, 16))}}}, "norm": {"weight": np.ones(32)}}
    assert list(to_hf_state({"language_model": norms})) == [
        "model.language_model.norm.weight",
        *(f"model.language_model.layers.{i}.self_attn.q_norm.weight" for i in range(3)),
    ]
    gates = {"blocks": {"mlp": {"gate_proj": {"bias": np.ones((1, 8))}}}}
    assert list(to_hf_state({"visual": gates})) == ["visual.blocks.0.mlp.gate_proj.bias"]
