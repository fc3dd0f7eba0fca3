"""All layouts of config.json on the hub give the same configuration; unsupported ones are refused."""

import copy
import dataclasses
import json

import pytest

from liger_jax import Qwen2VLConfig, QwenVLConfig
from liger_jax.config.families import FAMILIES
from liger_jax.errors import UserError
from tests._support.parity import REFERENCES

LAYOUTS = json.loads((REFERENCES / "configs.json").read_text())
PRESETS = {
    "2b": QwenVLConfig.qwen2_vl_2b(),
    "7b": QwenVLConfig.qwen2_vl_7b(),
    "2.5-3b": QwenVLConfig.qwen2_5_vl_3b(),
    "2.5-32b": QwenVLConfig.qwen2_5_vl_32b(),
    "3-4b": QwenVLConfig.qwen3_vl_4b(),
    "3-32b": QwenVLConfig.qwen3_vl_32b(),
}
OTHER_PRESETS = ("qwen2_vl_72b", "qwen2_5_vl_7b", "qwen2_5_vl_72b", "qwen3_vl_2b", "qwen3_vl_8b")


@pytest.mark.parametrize(("layout", "size"), [(layout, size) for layout, sizes in LAYOUTS.items() for size in sizes])
def test_layouts(layout, size):
    """The files were written by transformers 4.41 (hub), 4.49 (defaults omitted), 4.57 (nested), 5.x (rope_parameters)."""
    expected = dataclasses.replace(PRESETS[size], eos_token_ids=(151645,))
    assert Qwen2VLConfig.from_hf(LAYOUTS[layout][size]) == expected


def test_all_layouts_are_recorded():
    assert set(LAYOUTS) == {"hub", "4.49.0", "4.57.6", "5.17.0", "5.24.0"}
    assert {size for sizes in LAYOUTS.values() for size in sizes} == set(PRESETS)


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
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": None}, False),
        ({"tie_word_embeddings": None}, {"tie_word_embeddings": None}, False),
        ({}, {}, False),
    ],
)
def test_null_and_contradictions_for_tie_word_embeddings_counted_as_false(root, text, expected):
    """Either level ties, as in transformers 5.24. A checkpoint that is tied by mistake is refused: its head differs."""
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


ROUND_TRIPS = [*PRESETS.values(), *(getattr(QwenVLConfig, name)() for name in OTHER_PRESETS)]
ROUND_TRIPS += [QwenVLConfig.tiny(family=family) for family in FAMILIES]


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_round_trip(config):
    """from_hf reads the output of to_hf as the same configuration, also after a round trip through JSON."""
    assert QwenVLConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_configuration(family):
    """transformers understands the output of to_hf, and from_hf what transformers makes of it."""
    from transformers import AutoConfig

    config = QwenVLConfig.tiny(family=family)
    theirs = AutoConfig.for_model(**config.to_hf())
    assert QwenVLConfig.from_hf(theirs.to_dict()) == config


def test_frequencies_follow_blocks_or_interleave():
    """The axis of each of the 64 frequencies of the published models: T 16, H 24, W 24; and T H W T H W ... T T T T."""
    assert QwenVLConfig.qwen2_5_vl_7b().text.rotary_axes == (0,) * 16 + (1,) * 24 + (2,) * 24
    assert QwenVLConfig.qwen3_vl_8b().text.rotary_axes == (0, 1, 2) * 20 + (0,) * 4


def test_alias_and_derived_sizes():
    assert Qwen2VLConfig is QwenVLConfig
    vision = QwenVLConfig.qwen2_5_vl_3b().vision
    assert (vision.window_patches, vision.head_dim, QwenVLConfig.qwen2_vl_2b().vision.window_patches) == (64, 80, 0)
    assert QwenVLConfig.qwen3_vl_32b().vision.head_dim == 72 and QwenVLConfig.qwen3_vl_2b().vision.patch_values == 1536


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2_5_vl", {"window_size": 100}, "vision.window_size is 100; expected a multiple of 28"),
        ("qwen2_5_vl", {"window_size": 0, "full_attention_layers": ()}, "vision.window_size is 0; expected at least 1"),
        (
            "qwen2_5_vl",
            {"full_attention_layers": (3, 1)},
            r"full_attention_layers is \(3, 1\); expected increasing numbers",
        ),
        ("qwen2_5_vl", {"full_attention_layers": (1, 4)}, "full_attention_layers .* from 0 to 3"),
        ("qwen2_5_vl", {"norm": "batch_norm"}, "vision.norm is 'batch_norm'; expected one of"),
        ("qwen2_5_vl", {"norm": "layer_norm"}, "Not a Qwen2.5-VL .*vision.norm is 'layer_norm'; expected 'rms_norm'"),
        ("qwen2_5_vl", {"position_table_side": 4}, "vision.position_table_side is 4; expected 0"),
        ("qwen2_5_vl", {"tokens_per_second": -1}, "vision.tokens_per_second is -1; expected an integer from 0"),
        (
            "qwen2_vl",
            {"intermediate_size": 100},
            "vision.intermediate_size is 100; expected a multiple of embed_dim 32",
        ),
        ("qwen2_vl", {"full_attention_layers": (1,)}, "expected none without windows"),
        ("qwen3_vl", {"deepstack_layers": (0, 1, 2, 3)}, "deepstack_layers .* no more than there are text layers, 3"),
        ("qwen3_vl", {"position_table_side": 0}, "vision.position_table_side is 0; expected at least 1"),
        ("qwen3_vl", {"patch_bias": False}, "vision.patch_bias is False; expected True"),
        ("qwen3_vl", {"patch_bias": 1}, "vision.patch_bias is 1; expected True or False"),
    ],
)
def test_switches_that_contradict_each_other_are_refused(family, changes, message):
    """The error names the field. A model that the family's config.json could not describe is refused, too."""
    config = QwenVLConfig.tiny(family=family)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_head_size_that_transformers_ignores_is_refused(family):
    """Qwen2-VL and Qwen2.5-VL were written with it; transformers read their weights in other shapes and failed."""
    config = QwenVLConfig.tiny(family=family)
    text = dataclasses.replace(config.text, head_dim=24, mrope_section=(4, 4, 4))
    if FAMILIES[family].free_head_dim:
        assert dataclasses.replace(config, text=text).to_hf()["text_config"]["head_dim"] == 24
        return
    with pytest.raises(UserError, match=r"text.head_dim is 24; expected hidden_size / num_attention_heads, 64 / 4"):
        dataclasses.replace(config, text=text)


def test_unknown_family_is_refused():
    for build in (lambda: QwenVLConfig.tiny(family="qwen4_vl"), lambda: QwenVLConfig(*parts, family="qwen4_vl")):
        parts = QwenVLConfig.tiny().text, QwenVLConfig.tiny().vision
        with pytest.raises(
            UserError, match=r"family is 'qwen4_vl'; expected one of \['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl'\]"
        ):
            build()


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


def hub_config(size="2b", **values):
    """Returns a hub configuration with some values changed, or removed (None)."""
    hub = copy.deepcopy(LAYOUTS["hub"][size])
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


@pytest.mark.parametrize(
    ("size", "values", "message"),
    [
        ("2.5-3b", {"vision_config__hidden_act": "quick_gelu"}, "vision hidden_act is 'quick_gelu'; expected 'silu'"),
        ("2.5-3b", {"vision_config__fullatt_block_indexes": 7}, "vision.full_attention_layers is 7; expected a tuple"),
        ("2.5-3b", {"vision_config__window_size": 8}, "vision.window_size is 8; expected a multiple of 28"),
        ("2.5-3b", {"vision_config__tokens_per_second": "2"}, "vision.tokens_per_second is '2'; expected an integer"),
        ("2.5-3b", {"vision_config__tokens_per_second": 2.5}, "vision.tokens_per_second is 2.5; expected an integer"),
        (
            "3-4b",
            {"vision_config__num_position_embeddings": 2305},
            "num_position_embeddings is 2305; expected a square",
        ),
        ("3-4b", {"text_config__attention_bias": True}, "text attention_bias is True; expected False"),
        ("3-4b", {"text_config__rope_scaling__mrope_interleaved": False}, "mrope_interleaved is False; expected True"),
        ("3-4b", {"text_config__rope_scaling__rope_type": "yarn"}, "YaRN"),
        ("3-4b", {"vision_config__deepstack_visual_indexes": [5, 30]}, "deepstack_layers .* from 0 to 23"),
        ("3-4b", {"vision_config": None}, "vision.hidden_size is 3584; expected text.hidden_size 2560"),
        ("3-4b", {"model_type": "qwen3_vl_moe"}, "model_type is 'qwen3_vl_moe'"),
    ],
)
def test_unsupported_values_of_newer_families_are_refused(size, values, message):
    with pytest.raises(UserError, match=message):
        QwenVLConfig.from_hf(hub_config(size, **values))


def test_rope_scaling_next_to_rope_parameters_was_ignored():
    """As a user adds it to a file of transformers 5, which prefers it."""
    hub = QwenVLConfig.tiny().to_hf()
    rope = hub["text_config"]["rope_parameters"]
    for scaling, message in (
        ({"rope_type": "yarn", "factor": 4.0}, "YaRN"),
        ({"rope_type": "linear", "factor": 4.0} | rope | {"rope_type": "linear"}, "rope_scaling / rope_parameters is"),
        (
            {"type": "mrope", "mrope_section": [3, 3, 2]},
            "rope_scaling is .* and rope_parameters is .*; expected one of them",
        ),
    ):
        with pytest.raises(UserError, match=message):
            QwenVLConfig.from_hf(hub | {"text_config": hub["text_config"] | {"rope_scaling": scaling}})
    same = {"type": "mrope", "rope_type": "mrope", "mrope_section": rope["mrope_section"]}
    equal = QwenVLConfig.from_hf(hub | {"text_config": hub["text_config"] | {"rope_scaling": same}})
    assert equal == QwenVLConfig.from_hf(hub)


def test_rotation_of_the_tower_was_ignored():
    """A type that is not implemented, and rope_theta outside rope_parameters."""
    hub = QwenVLConfig.tiny().to_hf()
    vision = hub["vision_config"]
    with pytest.raises(UserError, match="vision rope_type is 'yarn'; expected 'axial'"):
        QwenVLConfig.from_hf(
            hub | {"vision_config": vision | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}}
        )
    del vision["rope_parameters"]
    assert QwenVLConfig.from_hf(hub | {"vision_config": vision | {"rope_theta": 7}}).vision.rope_theta == 7.0


def test_omitted_values_are_those_of_transformers():
    """Files without a key that equals its default. transformers' default width of Qwen2.5-VL's tower fits no checkpoint."""
    seconds, width = (hub_config("2.5-3b") for _ in range(2))
    del seconds["vision_config"]["tokens_per_second"], width["vision_config"]["hidden_size"]
    assert QwenVLConfig.from_hf(seconds).vision.tokens_per_second == 4.0
    assert QwenVLConfig.from_hf(width).vision.embed_dim == 1280
    bare = hub_config("3-4b")
    for name in ("head_dim", "rope_theta", "max_position_embeddings"):
        del bare["text_config"][name]
    text = QwenVLConfig.from_hf(bare).text
    assert (text.head_dim, text.rope_theta, text.max_position_embeddings) == (128, 500_000.0, 128_000)
    for size in ("2b", "2.5-3b"):  # that of Qwen2-VL was 1e-6
        hub = hub_config(size)
        assert "rms_norm_eps" in hub and QwenVLConfig.from_hf(hub | {"rms_norm_eps": None}).text.rms_norm_eps == 1e-5


def test_full_attention_layers_in_any_order():
    """transformers ignores the order, and numbers of layers that do not exist."""
    shallow = hub_config("2.5-3b", vision_config__depth=10, vision_config__fullatt_block_indexes=[9, 3, 3, 31])
    assert QwenVLConfig.from_hf(shallow).vision.full_attention_layers == (3, 9)


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
