"""A checkpoint's own options of generation, as transformers reads them."""

import json

import pytest

from liger_jax import Qwen2VLConfig
from liger_jax.generation.options import GenerationOptions
from tests._support import parity

STORED = json.loads((parity.REFERENCES / "generation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", STORED["defaults"], ids=lambda case: ",".join(case["file"]))
def test_defaults_of_a_checkpoint(case, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(case["file"]))
    found, wanted = GenerationOptions.from_hf(tmp_path), case["options"]
    off = {"top_p": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": None, "top_k": found.top_k}
    for name, value in wanted.items():
        got = getattr(found, name)
        if name == "top_k" and wanted["do_sample"]:  # it means nothing otherwise
            assert got == value
        elif name in off and value == off[name]:
            assert not got or got == value
        elif name != "top_k":
            assert got == value, name
    assert found.max_new_tokens == case["file"].get("max_new_tokens", GenerationOptions.max_new_tokens)


def test_without_a_file_and_with_values_of_ones_own(tmp_path):
    assert GenerationOptions.from_hf(tmp_path, seed=3) == GenerationOptions(seed=3)
    with pytest.raises(FileNotFoundError, match="no such folder"):  # and no hub id either
        GenerationOptions.from_hf(tmp_path / "no such folder")


def test_what_is_not_implemented_is_told(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 4, "typical_p": 1.0}))
    with pytest.warns(UserWarning, match=r"num_beams.*is not implemented"):
        GenerationOptions.from_hf(tmp_path)


def test_options_of_draws_that_are_not_made_mean_nothing(tmp_path):
    """As in transformers; drawn from by a command line's options, they have transformers' defaults."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.0, "top_p": 0.0}))
    assert GenerationOptions.from_hf(tmp_path) == GenerationOptions()
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        GenerationOptions.from_hf(tmp_path, do_sample=True)
    for text in ("{", "[]"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"generation_config\.json is no JSON object"):
            GenerationOptions.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5; expected an integer"),
        ({"temperature": None}, "temperature is None"),
        ({"bad_words_ids": [5]}, "expected sequences of tokens each"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"seed": 2**70}, "expected an integer of 64 bits"),
    ],
)
def test_values_without_a_meaning(options, told):
    with pytest.raises(ValueError, match=told):
        GenerationOptions(**options)


def test_the_published_checkpoints_are_greedy(tmp_path):
    """Their top_k is 1: nothing needs to be drawn, and nothing is."""
    (tmp_path / "generation_config.json").write_text(json.dumps(STORED["defaults"][1]["file"]))
    options = GenerationOptions.from_hf(tmp_path)
    assert options.do_sample and not options.sampling(Qwen2VLConfig.qwen2_vl_2b(), 1, 1).do_sample


def test_all_of_a_seed_counts():
    """The upper 32 bits and the sign of a seed make a difference; a small one is passed on as it is."""
    config, seeds = Qwen2VLConfig.tiny(), [0, 7, 2**32, -1, 2**32 - 1, 2**63 - 1, -(2**63)]
    alone = [GenerationOptions(seed=seed).sampling(config, 1, 1).seeds.item() for seed in seeds]
    assert len(set(alone)) == len(seeds) and alone[:2] == seeds[:2]
    assert GenerationOptions(seed=seeds).sampling(config, len(seeds), len(seeds)).seeds.tolist() == alone
