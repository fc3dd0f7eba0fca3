"""Settings files of a checkpoint: config.json, image settings, generation settings, tokenizer and chat template."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import strategies as st

from liger_jax import GenerationOptions, Processor, QwenVL, QwenVLConfig
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.generation.options import UNSUPPORTED
from liger_jax.inputs.families import FAMILIES
from liger_jax.inputs.images import VisionSettings
from liger_jax.inputs.video import ClipSettings
from tests._support import hub_layout
from tests._support.fuzzing import ODD_TEXTS, damaged, damaged_bytes, fuzz, json_values, only_user_errors, pick
from tests._support.parity import REFERENCES

LAYOUTS = json.loads((REFERENCES / "configs.json").read_text())
HUB_CONFIGS = [
    *(config for layout in LAYOUTS.values() for config in layout.values()),
    *(QwenVLConfig.tiny(family=family).to_hf() for family in FAMILIES),
    hub_layout.CONFIG,
]


def keys_of(*trees) -> st.SearchStrategy:
    """Returns a strategy of all keys in these JSON values."""
    keys: dict[str, None] = dict.fromkeys(ODD_TEXTS)

    def collect(tree):
        if isinstance(tree, dict):
            keys.update(dict.fromkeys(tree))
        for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            collect(value)

    for tree in trees:
        collect(tree)
    return pick(list(keys))


@fuzz(hub=damaged(pick(HUB_CONFIGS), keys_of(*HUB_CONFIGS)))
def test_model_configs(hub, tmp_path_factory):
    """A config.json that is accepted survives writing and reading, and describes a model that can be built."""
    source = tmp_path_factory.getbasetemp() / "config.json"
    source.write_text(json.dumps(hub))
    with only_user_errors():
        config = QwenVLConfig.from_hf(hub if isinstance(hub, dict) else source)
        assert QwenVLConfig.from_hf(config.to_hf()) == config
        hash(config)
        json.dumps(config.to_hf())
        sizes = [value for part in (config.text, config.vision) for value in vars(part).values()]
        if all(value < 2**24 for value in sizes if isinstance(value, int)):
            QwenVL.abstract(config, dtype="bfloat16")


IMAGE_SETTINGS = [
    VisionSettings().to_hf(),
    {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "image_processor_type": "Qwen2VLImageProcessor"},
    {"size": {"shortest_edge": 3136, "longest_edge": 1003520.0}, "image_mean": [0.5, 0.5, 0.5], "image_std": 0.5},
]
VIDEO = st.sampled_from([{}, {"min_pixels": 100352, "max_pixels": 602112}])


@fuzz(
    settings=damaged(pick(IMAGE_SETTINGS), keys_of(*IMAGE_SETTINGS)),
    defaults=VIDEO,
    kind=st.sampled_from([VisionSettings, ClipSettings]),
)
def test_image_settings(settings, defaults, kind):
    """Image and clip settings that are accepted survive writing and reading, and have room for a token."""
    with only_user_errors():
        values = kind.from_hf(settings, **defaults)
        assert kind.from_hf(json.loads(json.dumps(values.to_hf()))) == values
        assert 1 <= values.min_pixels <= values.max_pixels and values.factor**2 <= values.max_pixels
        assert np.isfinite([*values.image_mean, *values.image_std]).all() and np.all(values.image_std)


GENERATION = [
    {
        "bos_token_id": 151643,
        "eos_token_id": [151645, 151643],
        "pad_token_id": 151643,
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "top_p": 0.001,
        "repetition_penalty": 1.05,
        "transformers_version": "4.41.2",
    },
    {"max_new_tokens": 64, "min_new_tokens": 2, "min_p": 0.1, "no_repeat_ngram_size": 3, "bad_words_ids": [[1], [2, 3]]}
    | {"stop_strings": ["\n", "."], "num_return_sequences": 1, "do_sample": False},
]


@fuzz(
    stored=damaged(pick(GENERATION), keys_of(*GENERATION, UNSUPPORTED)),
    overrides=st.fixed_dictionaries({}, optional={"top_p": json_values(), "max_new_tokens": json_values()}),
)
def test_generation_configs(stored, overrides, tmp_path_factory):
    """Generation settings that are accepted have tokens and numbers of the right types."""
    folder = tmp_path_factory.getbasetemp() / "generation"
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(stored))
    with only_user_errors():
        options = GenerationOptions.from_hf(folder, **overrides)
        config = QwenVLConfig.qwen2_vl_2b()
        options.check_against(config, prompts=1)
        assert all(isinstance(token, int) for token in options.resolve_end_tokens(config))
        assert isinstance(options.resolve_pad_token(config), int)
        assert all(isinstance(text, str) for text in options.all_stop_strings)
        assert options.temperature > 0 and options.max_new_tokens >= 1
        assert isinstance(options.do_sample, bool)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns the files of a processor's folder by family."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        Processor(train_tokenizer([]), family=family).save_pretrained(folder)
    return {family: {path.name: path.read_bytes() for path in folder.iterdir()} for family, folder in folders.items()}


NAMES = (
    *("tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
)
CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]


@fuzz(name=pick(NAMES), family=pick(list(FAMILIES)), data=st.data(), as_json=st.booleans())
def test_processor_folders(name, family, data, as_json, files, tmp_path_factory):
    """A folder with one damaged file is refused by name, or gives a processor that works."""
    folder = tmp_path_factory.getbasetemp() / "processor"
    folder.mkdir(exist_ok=True)
    for other, content in files[family].items():
        (folder / other).write_bytes(content)
    content = files[family].get(name, b'{"chat_template": "{{ messages }}"}')
    if as_json and name.endswith(".json"):
        tree = json.loads(content)
        content = json.dumps(data.draw(damaged(st.just(tree), keys_of(tree)))).encode()
    else:
        content = data.draw(damaged_bytes(st.just(content)))
    (folder / name).write_bytes(content)
    try:
        with only_user_errors():
            processor = Processor.from_pretrained(folder)
            arrays = processor([CONVERSATION], labels=True)
            assert arrays["input_ids"].shape == arrays["labels"].shape
            dataclasses.asdict(processor.image)
    finally:
        (folder / name).unlink()
