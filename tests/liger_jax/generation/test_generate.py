"""`generate` returns the same tokens as transformers, and as full forward passes without a cache."""

import dataclasses

import jax
import numpy as np
import pytest

from liger_jax import generate, prepare
from liger_jax.errors import UserError
from tests._support import parity

NEW = 8
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
PENALIZED = SAMPLING | {"repetition_penalty": 1.2}


def make_prompt(scenario):
    return parity.common(parity.batch(scenario, prompt=True))


def generate_tokens(scenario, name="untied", **options):
    """Returns the tokens for a scenario's prompts; without end tokens by default."""
    options = {"eos_token_id": (), "max_new_tokens": NEW} | options
    return np.asarray(generate(parity.model(name), make_prompt(scenario), **options))


# ---- greedy, against transformers


@pytest.mark.parametrize("scenario", parity.PROMPTS)
def test_greedy(scenario):
    tokens = generate_tokens(scenario)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, parity.expected(scenario, "greedy"))


@pytest.mark.parametrize("scenario", ["text_batch_left", "image_video"])
def test_greedy_tied(scenario):
    np.testing.assert_array_equal(generate_tokens(scenario, "tied"), parity.expected(scenario, "greedy", name="tied"))


@pytest.mark.parametrize("scenario", parity.PROMPTS)
def test_end_tokens(scenario):
    """With one or several end tokens, a finished row is filled with the checkpoint's padding token."""
    eos, second = int(parity.expected(scenario, "eos_id")), int(parity.expected(scenario, "second_eos_id"))
    for key, ids in (("greedy_eos", eos), ("greedy_two_eos", [eos, second])):
        expected = parity.expected(scenario, key)  # transformers stops when all rows are done; here the shape is fixed
        filled = np.pad(expected, ((0, 0), (0, NEW - expected.shape[1])), constant_values=150)
        np.testing.assert_array_equal(generate_tokens(scenario, eos_token_id=ids), filled)


@pytest.mark.parametrize("scenario", parity.PROMPTS)
def test_repetition_penalty(scenario):
    """The penalty applies to the tokens of the prompt, but not to its padding."""
    tokens = generate_tokens(scenario, repetition_penalty=1.3)
    np.testing.assert_array_equal(tokens, parity.expected(scenario, "greedy_repetition1.3"))


# ---- the cache


@pytest.mark.parametrize("scenario", ["batch_left", "batch_mixed_text", "image_video"])
def test_cache_matches_full_forward(scenario):
    """Each token is the argmax of a forward pass over the whole row, with positions computed from scratch."""
    forward = jax.jit(lambda model, batch: model(batch))
    arrays = parity.inputs(scenario, prompt=True)
    tokens = generate_tokens(scenario)
    for step in range(NEW):
        ids = np.concatenate([arrays["input_ids"], tokens[:, :step]], axis=1)
        mask = np.pad(arrays["attention_mask"], ((0, 0), (0, step)), constant_values=1)
        batch = prepare(parity.config(), **arrays | {"input_ids": ids, "attention_mask": mask}, length=64)
        logits = forward(parity.model(), parity.common(batch))[:, ids.shape[1] - 1]
        np.testing.assert_array_equal(tokens[:, step], logits.argmax(-1))


@pytest.mark.parametrize("scenario", ["text_batch_left", "batch_left", "batch_image_video"])
def test_any_side_of_padding(scenario):
    """Prompts padded on the right or on both sides give the tokens of those padded on the left."""
    arrays = parity.inputs(scenario, prompt=True)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    tokens_first = np.argsort(1 - mask, axis=1, kind="stable")
    right = {
        "input_ids": np.take_along_axis(ids, tokens_first, 1),
        "attention_mask": np.take_along_axis(mask, tokens_first, 1),
    }
    both = {
        "input_ids": np.pad(right["input_ids"], ((0, 0), (2, 0)), constant_values=150),
        "attention_mask": np.pad(right["attention_mask"], ((0, 0), (2, 0))),
    }
    for padded in (right, both):
        batch = parity.common(prepare(parity.config(), **arrays | padded, video_positions="hf5"))
        tokens = generate(parity.model(), batch, max_new_tokens=NEW, eos_token_id=())
        np.testing.assert_array_equal(tokens, parity.expected(scenario, "greedy"))


def test_rows_are_independent():
    """A row alone gives the same tokens as in a batch."""
    arrays = parity.inputs("text_batch_left", prompt=True)
    for row in range(2):
        batch = parity.common(prepare(parity.config(), **{key: value[row : row + 1] for key, value in arrays.items()}))
        tokens = generate(parity.model(), batch, max_new_tokens=NEW, eos_token_id=())
        np.testing.assert_array_equal(tokens[0], parity.expected("text_batch_left", "greedy")[row])


# ---- end and padding tokens


def test_end_tokens_of_the_checkpoint():
    """None uses those of generation_config.json: 152 and 150 end a row, 150 pads it."""
    assert parity.config().eos_token_ids == (152, 150)
    first = int(parity.expected("text_batch_left", "greedy")[0, 0])
    model = jax.tree.map(lambda weight: weight, parity.model())  # a copy whose configuration can be replaced
    model.config = dataclasses.replace(model.config, eos_token_ids=(first,), pad_token_id=7)
    tokens = np.asarray(generate(model, make_prompt("text_batch_left"), max_new_tokens=NEW))
    assert tokens[0].tolist() == [first] + [7] * (NEW - 1)


def test_pad_token_id():
    first = int(parity.expected("text_batch_left", "greedy")[0, 0])
    tokens = generate_tokens("text_batch_left", eos_token_id=first, pad_token_id=3)
    assert tokens[0].tolist() == [first] + [3] * (NEW - 1)


def test_fewer_tokens_are_a_prefix():
    tokens = generate_tokens("text_batch_left", max_new_tokens=3)
    np.testing.assert_array_equal(tokens, parity.expected("text_batch_left", "greedy")[:, :3])


# ---- sampling


@pytest.mark.parametrize("scenario", ["text_batch_left", "batch_left"])
@pytest.mark.parametrize(
    "name", ["no_repeat_ngram_size=1", "no_repeat_ngram_size=2", "min_new_tokens=6", "bad_words_ids"]
)
def test_options(scenario, name):
    """Greedy decoding with each option gives the tokens of transformers."""
    np.testing.assert_array_equal(generate_twelve(scenario, **option(scenario, name)), stored(scenario, name))


@pytest.mark.parametrize("scenario", ["text_batch_left", "batch_left"])
def test_all_options_together(scenario):
    options = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "bad_words_ids": words(scenario)}
    tokens = generate_twelve(scenario, **options, min_new_tokens=6, eos_token_id=stored(scenario, "ends"))
    np.testing.assert_array_equal(tokens, stored(scenario, "all"))


def stored(scenario, key):
    return parity.stored("generation")[f"{scenario}/{key}"]


def words(scenario):
    first, *second = stored(scenario, "words").tolist()
    return [[first], second]


def generate_twelve(scenario, **options):
    return generate_tokens(scenario, **{"max_new_tokens": 12} | options)


def option(scenario, name):
    if name == "bad_words_ids":
        return {name: words(scenario)}
    name, value = name.split("=")
    return {name: int(value)} | ({"eos_token_id": stored(scenario, "ends")} if name == "min_new_tokens" else {})


def test_logprobs():
    """Chosen and most likely tokens have the log-softmax of transformers' logits; after a row's end all are 0."""
    expected = stored("batch_left", "logprobs")
    generated = generate(parity.model(), make_prompt("batch_left"), max_new_tokens=12, eos_token_id=(), logprobs=3)
    np.testing.assert_array_equal(generated.tokens, expected.argmax(-1))
    np.testing.assert_allclose(generated.logprobs, expected.max(-1), atol=1e-4)
    np.testing.assert_array_equal(generated.top_tokens, np.argsort(-expected, axis=-1)[..., :3])
    np.testing.assert_allclose(generated.top_logprobs, -np.sort(-expected, axis=-1)[..., :3], atol=1e-4)
    end = int(generated.tokens[0, 2])
    ended = generate(parity.model(), make_prompt("batch_left"), max_new_tokens=12, eos_token_id=end, logprobs=3)
    np.testing.assert_array_equal(ended.logprobs[0, :3], generated.logprobs[0, :3])
    assert not ended.logprobs[0, 3:].any() and not ended.top_tokens[0, 3:].any()


def test_logprobs_of_sampled_tokens_are_the_models_own():
    """Temperature, filters and penalties do not affect them; logprobs=0 returns no top tokens."""
    options = {
        "max_new_tokens": 1,
        "eos_token_id": (),
        "do_sample": True,
        "temperature": 3.0,
        "repetition_penalty": 1.5,
    }
    generated = generate(parity.model(), make_prompt("batch_left"), **options, logprobs=0)
    expected = np.take_along_axis(stored("batch_left", "logprobs")[:, 0], generated.tokens, axis=1)
    np.testing.assert_allclose(generated.logprobs, expected, atol=1e-4)
    assert generated.top_tokens.shape == (2, 1, 0)


def test_num_return_sequences():
    """Continuations of a prompt are adjacent and differ; a penalty sees each row's own prompt."""
    options = PENALIZED | {"num_return_sequences": 2, "seed": 4}
    tokens = generate_tokens("text_batch_left", **options)
    assert tokens.shape == (4, NEW)
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    narrow = generate_tokens("text_batch_left", **options | {"temperature": 1e-4})
    np.testing.assert_array_equal(
        narrow, np.repeat(generate_tokens("text_batch_left", repetition_penalty=1.2), 2, axis=0)
    )


def test_samples_of_a_seed_per_prompt_do_not_depend_on_the_batch():
    """Alone, in a batch, in another order, padded on the other side, and with more samples."""
    arrays = parity.inputs("text_batch_left", prompt=True)
    together = generate_tokens("text_batch_left", **PENALIZED, seed=[11, 12])

    def sample(order, seed, shift=0, **options):
        positions = np.roll(np.arange(arrays["input_ids"].shape[1]), shift)
        rows = {key: value[order][:, positions] for key, value in arrays.items()}
        batch = parity.common(prepare(parity.config(), **rows))
        return generate(parity.model(), batch, max_new_tokens=NEW, eos_token_id=(), **PENALIZED | options, seed=seed)

    np.testing.assert_array_equal(sample([1, 0], [12, 11]), together[::-1])
    np.testing.assert_array_equal(sample([0], [11]), together[:1])
    np.testing.assert_array_equal(sample([0], 11), together[:1])
    padding = int((arrays["attention_mask"][1] == 0).sum())
    np.testing.assert_array_equal(sample([1], [12], shift=-padding), together[1:])
    np.testing.assert_array_equal(sample([0, 1], [11, 12], num_return_sequences=2)[::2], together)


def test_seeds():
    """Equal seeds give equal tokens, different seeds different ones, and rows differ."""
    first, again, other = (generate_tokens("text_batch_left", **SAMPLING, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


def test_filter_that_keeps_one_token_is_greedy():
    """Holds for each filter, with any seed."""
    wide = SAMPLING | {"temperature": 1.0, "top_k": 160, "top_p": 1.0, "min_p": 0.0}
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        tokens = generate_tokens("text_batch_left", **wide | narrow, seed=5)
        np.testing.assert_array_equal(tokens, parity.expected("text_batch_left", "greedy"))


def test_greedy_ignores_filters():
    tokens = generate_tokens("text_batch_left", temperature=0.3, top_k=3, top_p=0.5, min_p=0.2)
    np.testing.assert_array_equal(tokens, parity.expected("text_batch_left", "greedy"))


# ---- errors, raised before any computation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0, "do_sample": True}, "temperature is 0"),
        ({"temperature": -1.0, "do_sample": True}, "temperature is -1"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature is nan"),
        ({"top_k": -1, "do_sample": True}, "top_k is -1"),
        ({"top_p": 0.0, "do_sample": True}, "top_p is 0"),
        ({"top_p": 1.5, "do_sample": True}, r"top_p is 1\.5"),
        ({"min_p": 2.0, "do_sample": True}, "min_p is 2"),
        ({"min_p": -0.1, "do_sample": True}, r"min_p is -0\.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"repetition_penalty": -2.0}, "repetition_penalty is -2"),
        ({"eos_token_id": 160}, "160"),
        ({"eos_token_id": [5, -1]}, "-1"),
        ({"pad_token_id": 1000}, "1000"),
        ({"min_new_tokens": 9}, "min_new_tokens is 9"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"bad_words_ids": [[]]}, "bad_words_ids is"),
        ({"bad_words_ids": [[5, 400]]}, "400"),
        ({"stop_strings": ["a", ""]}, "stop_strings is"),
        ({"stop_strings": "stop"}, "tokenizer is None"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": 161}, "logprobs is 161"),
        ({"seed": [1, 2]}, "seed has shape"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        generate_tokens("text", **options)


def test_unknown_option():
    with pytest.raises(TypeError, match="num_beam_groups"):
        generate_tokens("text", num_beam_groups=2)


def test_packed_rows_are_rejected():
    with pytest.raises(UserError, match="Row 0 holds 2 packed sequences"):
        generate(parity.model(), parity.batch("packed_text_batch_left"), max_new_tokens=2)


def test_row_without_tokens_is_rejected():
    batch = prepare(parity.config(), input_ids=np.array([[5, 6], [5, 6]]), attention_mask=np.array([[1, 1], [0, 0]]))
    with pytest.raises(UserError, match="Row 1 has no tokens"):
        generate(parity.model(), batch, max_new_tokens=2)


def test_too_many_positions():
    """The model's last position is 511, even though the cache would have room for more."""
    batch = prepare(parity.config(), input_ids=np.full((1, 505), 5))
    with pytest.raises(UserError, match="512"):
        generate(parity.model(), batch, max_new_tokens=100)
