"""Generation options: validation, and a checkpoint's defaults, which are read as in transformers."""

import dataclasses
import inspect
import json

import pytest

from liger_jax import Qwen2VLConfig, generate
from liger_jax.errors import NotFoundError, UserError
from liger_jax.generation.options import AnswerOptions, GenerationOptions
from liger_jax.generation.sampling import Sampling
from tests._support import parity

STORED = json.loads((parity.REFERENCES / "generation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", STORED["defaults"], ids=lambda case: ",".join(case["file"]))
def test_checkpoint_defaults(case, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(case["file"]))
    options, expected = GenerationOptions.from_hf(tmp_path), case["options"]
    disabled = {"top_p": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": None, "top_k": options.top_k}
    for name, expected_value in expected.items():
        value = getattr(options, name)
        if name == "top_k" and expected["do_sample"]:  # it has no effect otherwise
            assert value == expected_value
        elif name in disabled and expected_value == disabled[name]:
            assert not value or value == expected_value
        elif name != "top_k":
            assert value == expected_value, name
    assert options.max_new_tokens == case["file"].get("max_new_tokens", GenerationOptions.max_new_tokens)


def test_generate_takes_all_options_with_their_defaults():
    parameters = inspect.signature(generate).parameters
    fields = {field.name: field.default for field in dataclasses.fields(GenerationOptions)}
    assert parameters.keys() - fields.keys() == {"model", "batch", "tokenizer"}
    del fields["max_new_tokens"]  # generate requires it
    assert {name: parameters[name].default for name in fields} == fields


def test_missing_file_and_overrides(tmp_path):
    assert GenerationOptions.from_hf(tmp_path, seed=3) == GenerationOptions(seed=3)
    with pytest.raises(NotFoundError, match="neither a folder nor a hub id"):
        GenerationOptions.from_hf(tmp_path / "no such folder")


def test_checkpoint_without_an_end_token_warns(tmp_path):
    """Answers ran to max_new_tokens, and nothing said why."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="has no eos_token_id in generation_config.json or config.json") as caught:
        GenerationOptions.from_hf(tmp_path)
    assert len(caught) == 1
    GenerationOptions.from_hf(tmp_path, eos_token_id=3)  # no warning: pytest turns warnings into errors
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_text('{"eos_token_id": 7}')
        GenerationOptions.from_hf(tmp_path)
        (tmp_path / file).write_text("{}")


def test_answer_options_enable_and_disable_sampling(tmp_path):
    """Any sampling filter enables sampling without the checkpoint's other filters; temperature 0 disables it."""
    stored = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    for answer_options, expected in (
        (AnswerOptions(), stored),
        (AnswerOptions(top_p=0.5), {"do_sample": True, "top_p": 0.5, "repetition_penalty": 1.1}),
        (AnswerOptions(temperature=0.0, top_k=3), {"repetition_penalty": 1.1}),
        (AnswerOptions(stop=("a", "b"), seed=7), stored | {"stop_strings": ("a", "b"), "seed": 7}),
    ):
        assert answer_options.resolve(tmp_path) == GenerationOptions(**expected)


def test_unsupported_entries_warn(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 4, "typical_p": 1.0}))
    with pytest.warns(UserWarning, match=r"num_beams.*is not implemented"):
        GenerationOptions.from_hf(tmp_path)


def test_sampling_filters_are_ignored_without_do_sample(tmp_path):
    """Their values are not even checked, as in transformers; with do_sample they are."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.0, "top_p": 0.0}))
    assert GenerationOptions.from_hf(tmp_path) == GenerationOptions()
    with pytest.raises(UserError, match=r"temperature is 0\.0"):
        GenerationOptions.from_hf(tmp_path, do_sample=True)
    for text, message in (("{", r"is malformed .* expected valid JSON"), ("[]", r"holds \[\]; expected a JSON object")):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=rf"generation_config\.json {message}"):
            GenerationOptions.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5; expected an integer"),
        ({"temperature": None}, "temperature is None"),
        ({"bad_words_ids": [5]}, "expected a list of token sequences"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"seed": 2**70}, "expected a 64-bit integer"),
        ({"max_new_tokens": True}, "max_new_tokens is True; expected an integer"),
        ({"temperature": "0.7"}, "temperature is '0.7'; expected a number"),
        ({"temperature": 1e-300}, "temperature is 1e-300; expected 1e-30 to 1e30"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf; expected 1e-30 to 1e30"),
        ({"top_k": []}, r"top_k is \[\]; expected an integer, or None"),
        ({"top_p": {}}, r"top_p is {}; expected a number, or None"),
        ({"eos_token_id": [5, None]}, r"eos_token_id is \[5, None\]; expected an integer, a list"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; expected True or False"),
        ({"bad_words_ids": 148}, "bad_words_ids is 148; expected a list of token sequences"),
        ({"bad_words_ids": [[1], [2, []]]}, "expected a list of token sequences"),
        ({"bad_words_ids": [[]]}, "expected sequences of at least one token"),
        ({"stop_strings": [[]]}, r"stop_strings is \[\[\]\]; expected strings"),
    ],
)
def test_invalid_values(options, message):
    with pytest.raises(UserError, match=message):
        GenerationOptions(**options)


def test_published_checkpoints_are_greedy(tmp_path):
    """Their top_k is 1, so nothing is sampled."""
    (tmp_path / "generation_config.json").write_text(json.dumps(STORED["defaults"][1]["file"]))
    options = GenerationOptions.from_hf(tmp_path)
    assert options.do_sample and not Sampling.from_options(options, Qwen2VLConfig.qwen2_vl_2b(), 1, 1).do_sample


def test_all_bits_of_a_seed_count():
    """The upper 32 bits and the sign make a difference; a small seed stays the same."""
    config, seeds = Qwen2VLConfig.tiny(), [0, 7, 2**32, -1, 2**32 - 1, 2**63 - 1, -(2**63)]
    alone = [Sampling.from_options(GenerationOptions(seed=seed), config, 1, 1).seeds.item() for seed in seeds]
    assert len(set(alone)) == len(seeds) and alone[:2] == seeds[:2]
    together = Sampling.from_options(GenerationOptions(seed=seeds), config, len(seeds), len(seeds))
    assert together.seeds.tolist() == alone
