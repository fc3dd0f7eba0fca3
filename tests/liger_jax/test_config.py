"""All layouts of config.json on the hub give the same configuration; unsupported ones are refused."""

import copy
import dataclasses
import json

import pytest

from liger_jax import Qwen2VLConfig
from liger_jax.errors import UserError
from tests._support.parity import REFERENCES

LAYOUTS = json.loads((REFERENCES / "configs.json").read_text())
PRESETS = {"2b": Qwen2VLConfig.qwen2_vl_2b(), "7b": Qwen2VLConfig.qwen2_vl_7b()}


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, size):
    """The files were written by transformers 4.41 (hub), 4.49 (defaults omitted), 4.57 (nested), 5.17 (rope_parameters)."""
    expected = dataclasses.replace(PRESETS[size], eos_token_ids=(151645,))
    assert Qwen2VLConfig.from_hf(LAYOUTS[layout][size]) == expected


def test_all_four_layouts_are_recorded():
    assert set(LAYOUTS) == {"hub", "4.49.0", "4.57.6", "5.17.0"}


def test_tie_word_embeddings_in_text_config():
    """transformers 4.57 writes the 2B's tie_word_embeddings to text_config only."""
    saved = LAYOUTS["4.57.6"]["2b"]
    assert "tie_word_embeddings" not in saved
    assert Qwen2VLConfig.from_hf(saved).tie_word_embeddings


@pytest.mark.parametrize(
    ("root", "text", "expected"),
    [
        ({"tie_word_embeddings": None}, {"tie_word_embeddings": True}, True),
        ({}, {"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, False),
        ({"tie_word_embeddings": None}, {"tie_word_embeddings": None}, False),
        ({}, {}, False),
    ],
)
def test_null_for_tie_word_embeddings_counted_as_false(root, text, expected):
    """text_config's value decides if the root has none."""
    hub = Qwen2VLConfig.tiny().to_hf()
    del hub["tie_word_embeddings"], hub["text_config"]["tie_word_embeddings"]
    hub["text_config"] |= text
    assert Qwen2VLConfig.from_hf(hub | root).tie_word_embeddings == expected
    with pytest.raises(UserError, match="tie_word_embeddings is 'yes'; expected true or false"):
        Qwen2VLConfig.from_hf(hub | {"tie_word_embeddings": "yes"})


@pytest.mark.parametrize(
    ("preset", "layers", "heads", "kv_heads", "hidden"),
    [("qwen2_vl_2b", 28, 12, 2, 1536), ("qwen2_vl_7b", 28, 28, 4, 3584), ("qwen2_vl_72b", 80, 64, 8, 8192)],
)
def test_presets(preset, layers, heads, kv_heads, hidden):
    config = getattr(Qwen2VLConfig, preset)()
    text, vision = config.text, config.vision
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (layers, heads, kv_heads)
    assert (text.hidden_size, vision.hidden_size) == (hidden, hidden)
    assert (text.head_dim, vision.head_dim, vision.intermediate_size, vision.patch_values) == (128, 80, 5120, 1176)
    assert config.tie_word_embeddings == (preset == "qwen2_vl_2b")
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)


@pytest.mark.parametrize("config", [*PRESETS.values(), Qwen2VLConfig.qwen2_vl_72b(), Qwen2VLConfig.tiny()])
def test_round_trip(config):
    """from_hf reads the output of to_hf as the same configuration, also after a round trip through JSON."""
    assert Qwen2VLConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_reads_a_folder(tmp_path):
    """A folder or its config.json may be passed; EOS and padding tokens come from generation_config.json."""
    folder = REFERENCES / "model_untied"
    config = Qwen2VLConfig.from_hf(folder)
    assert config == Qwen2VLConfig.from_hf(str(folder / "config.json"))
    assert (config.eos_token_ids, config.pad_token_id) == ((152, 150), 150)
    assert config.text.mrope_section == (1, 1, 2)
    (tmp_path / "config.json").write_text(json.dumps(LAYOUTS["hub"]["2b"]))
    assert Qwen2VLConfig.from_hf(tmp_path) == dataclasses.replace(PRESETS["2b"], eos_token_ids=(151645,))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert Qwen2VLConfig.from_hf(tmp_path).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("root", "text", "generation", "expected"),
    [
        ({}, {}, {}, ()),
        ({}, {"eos_token_id": 5}, {}, (5,)),
        ({"eos_token_id": [6, 7]}, {"eos_token_id": 5}, {}, (6, 7)),
        ({"eos_token_id": None}, {"eos_token_id": 5}, {"eos_token_id": None}, (5,)),
        ({"eos_token_id": 6}, {"eos_token_id": 5}, {"eos_token_id": [8]}, (8,)),
    ],
)
def test_end_token_of_config_json_was_ignored(root, text, generation, expected, tmp_path):
    """Without generation_config.json, answers ran to max_new_tokens. transformers reads the same tokens."""
    from transformers import GenerationConfig

    hub = Qwen2VLConfig.tiny().to_hf()
    hub["text_config"].pop("eos_token_id")
    hub["text_config"] |= text
    hub |= root
    (tmp_path / "config.json").write_text(json.dumps(hub))
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = Qwen2VLConfig.from_hf(tmp_path)
    assert config.eos_token_ids == expected
    assert Qwen2VLConfig.from_hf(config.to_hf()).eos_token_ids == expected  # survives config.json alone
    if not generation:
        tokens = GenerationConfig.from_model_config(copy.deepcopy(hub)).eos_token_id
        assert expected == (tuple(tokens) if isinstance(tokens, list) else () if tokens is None else (tokens,))


@pytest.mark.parametrize(
    ("root", "text", "generation", "expected"),
    [
        ({}, {}, {}, None),
        ({}, {"pad_token_id": 5}, {}, 5),
        ({"pad_token_id": 6}, {"pad_token_id": 5}, {"pad_token_id": None}, 6),
        ({"pad_token_id": 6}, {}, {"pad_token_id": 0}, 0),
    ],
)
def test_padding_token_comes_from_the_same_places(root, text, generation, expected, tmp_path):
    hub = Qwen2VLConfig.tiny().to_hf()
    hub["text_config"] |= text
    (tmp_path / "config.json").write_text(json.dumps(hub | root))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = Qwen2VLConfig.from_hf(tmp_path)
    assert config.pad_token_id == expected
    assert Qwen2VLConfig.from_hf(config.to_hf()).pad_token_id == expected


@pytest.mark.parametrize("value", ["7", [7, "8"], True, 7.0])
def test_malformed_end_tokens_are_refused(value):
    with pytest.raises(UserError, match=r"eos_token_id is .*; expected an integer or a list of integers"):
        Qwen2VLConfig.from_hf(Qwen2VLConfig.tiny().to_hf() | {"eos_token_id": value})


def test_is_hashable():
    assert hash(Qwen2VLConfig.tiny()) == hash(Qwen2VLConfig.tiny())


def hub_config(**values):
    """Returns the 2B's hub configuration with some values changed, or removed (None)."""
    hub = copy.deepcopy(LAYOUTS["hub"]["2b"])
    for key, value in values.items():
        *path, last = key.split("__")
        parent = hub
        for step in path:
            parent = parent[step]
        parent[last] = value
    return {key: value for key, value in hub.items() if value is not None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "qwen3_vl_moe"},
            "model_type is 'qwen3_vl_moe'.*Qwen3-VL with a mixture of experts is not supported",
        ),
        ({"model_type": "qwen3_5"}, "model_type is 'qwen3_5'; .*Qwen3.5 is not supported"),
        ({"model_type": "qwen2_5_omni"}, "model_type is 'qwen2_5_omni'; .*Qwen2.5-Omni is not supported"),
        ({"model_type": None}, "model_type"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_attention_heads": 16}, "mrope_section"),
        ({"rope_scaling__mrope_section": [16, 24, 25]}, "mrope_section"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "mrope_section": [16, 24, 24]}}, "yarn"),
        ({"rope_scaling": None}, "mrope"),
        ({"hidden_act": "gelu"}, "hidden_act.*'gelu'"),
        ({"vision_config__hidden_act": "silu"}, "hidden_act.*'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"vision_config__hidden_size": 1000}, "hidden_size is 1000"),
        ({"vision_config__num_heads": 7}, "num_heads 7"),
        ({"vision_config__num_heads": 640}, "head size is 2"),
    ],
)
def test_unsupported_configurations_are_refused(values, message):
    """The error names the value."""
    with pytest.raises(ValueError, match=message):
        Qwen2VLConfig.from_hf(hub_config(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": 319}, "text_config is 319; expected a JSON object"),
        ({"vision_config": 4}, "vision_config is 4; expected a JSON object"),
        ({"rope_scaling": ["mrope"]}, r"rope_scaling is \['mrope'\]; expected a JSON object"),
        ({"rope_scaling__type": ["mrope"]}, "rope_scaling / rope_parameters is"),
        ({"rope_scaling__mrope_section": [None, 24, 24]}, r"text.mrope_section is \(None, 24, 24\); expected a tuple"),
        ({"rope_scaling__mrope_section": [64]}, "expected three numbers with a sum of 64"),
        ({"rope_scaling__rope_theta": []}, r"text.rope_theta is \[\]; expected a number"),
        ({"vision_config__rope_parameters": 3}, "rope_parameters of vision_config is 3; expected a JSON object"),
        ({"num_key_value_heads": []}, r"text.num_key_value_heads is \[\]; expected an integer"),
        ({"num_key_value_heads": 0}, "text.num_key_value_heads is 0; expected an integer from 1"),
        ({"intermediate_size": "default"}, "text.intermediate_size is 'default'; expected an integer"),
        ({"num_hidden_layers": 2**30}, "text.num_hidden_layers is 1073741824; expected an integer from 1 to 10000"),
        ({"vocab_size": 2**31}, "text.vocab_size is 2147483648; expected an integer from 1 to 2147483647"),
        ({"vision_config__depth": True}, "vision.depth is True; expected an integer"),
        ({"vision_config__mlp_ratio": "4"}, "vision.mlp_ratio is '4'; expected an integer"),
        ({"rms_norm_eps": float("nan")}, "text.rms_norm_eps is nan; expected a number"),
        ({"image_token_id": {}}, "image_token_id is {}; expected an integer from 0"),
    ],
)
def test_values_of_the_wrong_type_ended_in_a_type_error(values, message):
    """Found by fuzzing: each was an AttributeError, TypeError or ZeroDivisionError, or was accepted."""
    with pytest.raises(UserError, match=message):
        Qwen2VLConfig.from_hf(hub_config(**values))


def test_whole_floats_are_integers():
    config = Qwen2VLConfig.from_hf(hub_config(hidden_size=1536.0, vision_config__mlp_ratio=4.0))
    assert (repr(config.text.hidden_size), repr(config.vision.intermediate_size)) == ("1536", "5120")


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Qwen2VLConfig.from_hf(tmp_path)


def test_errors_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hub_config(model_type="bert")))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'bert'; expected 'qwen2_vl'"):
        Qwen2VLConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"config\.json"):
        Qwen2VLConfig.from_hf(tmp_path)


def test_presets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Qwen2VLConfig.tiny().tie_word_embeddings = True
