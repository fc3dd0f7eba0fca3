"""`generate` writes the tokens that transformers writes, and its cache changes nothing but the time it takes."""

import dataclasses

import jax
import numpy as np
import pytest

from liger_jax import generate, prepare
from tests._support import parity

NEW = 8
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
PENALISED = SAMPLING | {"repetition_penalty": 1.2}


def prompt(scenario):
    return parity.common(parity.batch(scenario, prompt=True))


def tokens_of(scenario, name="untied", **options):
    """Without end tokens, unless some are given."""
    options = {"eos_token_id": (), "max_new_tokens": NEW} | options
    return np.asarray(generate(parity.model(name), prompt(scenario), **options))


# ---- greedy, against transformers


@pytest.mark.parametrize("scenario", parity.PROMPTS)
def test_greedy(scenario):
    tokens = tokens_of(scenario)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, parity.expected(scenario, "greedy"))


@pytest.mark.parametrize("scenario", ["text_batch_left", "image_video"])
def test_greedy_tied(scenario):
    np.testing.assert_array_equal(tokens_of(scenario, "tied"), parity.expected(scenario, "greedy", name="tied"))


@pytest.mark.parametrize("scenario", parity.PROMPTS)
def test_end_tokens(scenario):
    """One end token, then several: a finished row is filled with the padding token of the checkpoint."""
    eos, second = int(parity.expected(scenario, "eos_id")), int(parity.expected(scenario, "second_eos_id"))
    for key, ids in (("greedy_eos", eos), ("greedy_two_eos", [eos, second])):
        wanted = parity.expected(scenario, key)  # transformers stops when all rows are done; here the shape is fixed
        filled = np.pad(wanted, ((0, 0), (0, NEW - wanted.shape[1])), constant_values=150)
        np.testing.assert_array_equal(tokens_of(scenario, eos_token_id=ids), filled)


@pytest.mark.parametrize("scenario", parity.PROMPTS)
def test_repetition_penalty(scenario):
    """Tokens of the prompt count, those of its padding do not."""
    found = tokens_of(scenario, repetition_penalty=1.3)
    np.testing.assert_array_equal(found, parity.expected(scenario, "greedy_repetition1.3"))


# ---- the cache


@pytest.mark.parametrize("scenario", ["batch_left", "batch_mixed_text", "image_video"])
def test_cache_changes_nothing(scenario):
    """Each token is the argmax of a pass over the whole row, with positions computed anew."""
    forward = jax.jit(lambda model, batch: model(batch))
    arrays = parity.inputs(scenario, prompt=True)
    tokens = tokens_of(scenario)
    for step in range(NEW):
        ids = np.concatenate([arrays["input_ids"], tokens[:, :step]], axis=1)
        mask = np.pad(arrays["attention_mask"], ((0, 0), (0, step)), constant_values=1)
        batch = prepare(parity.config(), **arrays | {"input_ids": ids, "attention_mask": mask}, length=64)
        logits = forward(parity.model(), parity.common(batch))[:, ids.shape[1] - 1]
        np.testing.assert_array_equal(tokens[:, step], logits.argmax(-1))


@pytest.mark.parametrize("scenario", ["text_batch_left", "batch_left", "batch_image_video"])
def test_any_side_of_padding(scenario):
    """Prompts padded on the right, or on both sides, continue like those padded on the left."""
    arrays = parity.inputs(scenario, prompt=True)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    right = np.argsort(1 - mask, axis=1, kind="stable")  # the columns of tokens first
    moved = {"input_ids": np.take_along_axis(ids, right, 1), "attention_mask": np.take_along_axis(mask, right, 1)}
    both = {
        "input_ids": np.pad(moved["input_ids"], ((0, 0), (2, 0)), constant_values=150),
        "attention_mask": np.pad(moved["attention_mask"], ((0, 0), (2, 0))),
    }
    for padded in (moved, both):
        batch = parity.common(prepare(parity.config(), **arrays | padded, video_positions="hf5"))
        found = generate(parity.model(), batch, max_new_tokens=NEW, eos_token_id=())
        np.testing.assert_array_equal(found, parity.expected(scenario, "greedy"))


def test_rows_do_not_see_each_other():
    """A row alone continues as it does beside others."""
    arrays = parity.inputs("text_batch_left", prompt=True)
    for row in range(2):
        batch = parity.common(prepare(parity.config(), **{key: value[row : row + 1] for key, value in arrays.items()}))
        found = generate(parity.model(), batch, max_new_tokens=NEW, eos_token_id=())
        np.testing.assert_array_equal(found[0], parity.expected("text_batch_left", "greedy")[row])


# ---- end and padding tokens


def test_end_tokens_of_the_checkpoint():
    """None means generation_config.json: here 152 and 150, and 150 as padding."""
    assert parity.config().eos_token_ids == (152, 150)
    first = int(parity.expected("text_batch_left", "greedy")[0, 0])
    model = jax.tree.map(lambda weight: weight, parity.model())  # a copy, to be given another configuration
    model.config = dataclasses.replace(model.config, eos_token_ids=(first,), pad_token_id=7)
    found = np.asarray(generate(model, prompt("text_batch_left"), max_new_tokens=NEW))
    assert found[0].tolist() == [first] + [7] * (NEW - 1)


def test_own_padding_token():
    first = int(parity.expected("text_batch_left", "greedy")[0, 0])
    found = tokens_of("text_batch_left", eos_token_id=first, pad_token_id=3)
    assert found[0].tolist() == [first] + [3] * (NEW - 1)


def test_fewer_tokens_are_a_prefix():
    found = tokens_of("text_batch_left", max_new_tokens=3)
    np.testing.assert_array_equal(found, parity.expected("text_batch_left", "greedy")[:, :3])


# ---- sampling


@pytest.mark.parametrize("scenario", ["text_batch_left", "batch_left"])
@pytest.mark.parametrize(
    "name", ["no_repeat_ngram_size=1", "no_repeat_ngram_size=2", "min_new_tokens=6", "bad_words_ids"]
)
def test_options(scenario, name):
    """Greedy with each option: the tokens of transformers."""
    np.testing.assert_array_equal(tokens_with(scenario, **option(scenario, name)), stored(scenario, name))


@pytest.mark.parametrize("scenario", ["text_batch_left", "batch_left"])
def test_all_options_together(scenario):
    options = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "bad_words_ids": words(scenario)}
    found = tokens_with(scenario, **options, min_new_tokens=6, eos_token_id=stored(scenario, "ends"))
    np.testing.assert_array_equal(found, stored(scenario, "all"))


def stored(scenario, key):
    return parity.stored("generation")[f"{scenario}/{key}"]


def words(scenario):
    first, *second = stored(scenario, "words").tolist()
    return [[first], second]


def tokens_with(scenario, **options):
    return tokens_of(scenario, **{"max_new_tokens": 12} | options)


def option(scenario, name):
    if name == "bad_words_ids":
        return {name: words(scenario)}
    name, value = name.split("=")
    return {name: int(value)} | ({"eos_token_id": stored(scenario, "ends")} if name == "min_new_tokens" else {})


def test_logprobs():
    """Of the tokens, and of the most likely ones at each place: log-softmax of transformers' logits; 0 behind the end."""
    wanted = stored("batch_left", "logprobs")
    found = generate(parity.model(), prompt("batch_left"), max_new_tokens=12, eos_token_id=(), logprobs=3)
    np.testing.assert_array_equal(found.tokens, wanted.argmax(-1))
    np.testing.assert_allclose(found.logprobs, wanted.max(-1), atol=1e-4)
    np.testing.assert_array_equal(found.top_tokens, np.argsort(-wanted, axis=-1)[..., :3])
    np.testing.assert_allclose(found.top_logprobs, -np.sort(-wanted, axis=-1)[..., :3], atol=1e-4)
    end = int(found.tokens[0, 2])
    ended = generate(parity.model(), prompt("batch_left"), max_new_tokens=12, eos_token_id=end, logprobs=3)
    np.testing.assert_array_equal(ended.logprobs[0, :3], found.logprobs[0, :3])
    assert not ended.logprobs[0, 3:].any() and not ended.top_tokens[0, 3:].any()


def test_logprobs_of_drawn_tokens_are_the_models_own():
    """Neither temperature nor filters nor penalties enter; none of the most likely may be asked for."""
    options = {
        "max_new_tokens": 1,
        "eos_token_id": (),
        "do_sample": True,
        "temperature": 3.0,
        "repetition_penalty": 1.5,
    }
    found = generate(parity.model(), prompt("batch_left"), **options, logprobs=0)
    wanted = np.take_along_axis(stored("batch_left", "logprobs")[:, 0], found.tokens, axis=1)
    np.testing.assert_allclose(found.logprobs, wanted, atol=1e-4)
    assert found.top_tokens.shape == (2, 1, 0)


def test_samples_of_a_prompt():
    """Rows of a prompt stand together; they differ; a penalty sees each row's own prompt."""
    options = PENALISED | {"num_return_sequences": 2, "seed": 4}
    found = tokens_of("text_batch_left", **options)
    assert found.shape == (4, NEW)
    assert len({tuple(row) for row in found.tolist()}) == 4
    narrow = tokens_of("text_batch_left", **options | {"temperature": 1e-4})
    np.testing.assert_array_equal(narrow, np.repeat(tokens_of("text_batch_left", repetition_penalty=1.2), 2, axis=0))


def test_a_seed_of_its_own_draws_the_same_whatever_stands_beside():
    """Alone, beside other rows, in another order, padded on the other side, with more samples."""
    arrays = parity.inputs("text_batch_left", prompt=True)
    together = tokens_of("text_batch_left", **PENALISED, seed=[11, 12])

    def draw(order, seed, padding=0, **more):
        columns = np.roll(np.arange(arrays["input_ids"].shape[1]), padding)
        rows = {key: value[order][:, columns] for key, value in arrays.items()}
        batch = parity.common(prepare(parity.config(), **rows))
        return generate(parity.model(), batch, max_new_tokens=NEW, eos_token_id=(), **PENALISED | more, seed=seed)

    np.testing.assert_array_equal(draw([1, 0], [12, 11]), together[::-1])
    np.testing.assert_array_equal(draw([0], [11]), together[:1])
    np.testing.assert_array_equal(draw([0], 11), together[:1])
    padding = int((arrays["attention_mask"][1] == 0).sum())
    np.testing.assert_array_equal(draw([1], [12], padding=-padding), together[1:])
    np.testing.assert_array_equal(draw([0, 1], [11, 12], num_return_sequences=2)[::2], together)


def test_seeds():
    """Equal seeds give equal tokens, other seeds others; each token is one that the filters leave."""
    first, again, other = (tokens_of("text_batch_left", **SAMPLING, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


def test_sampling_of_one_token_is_greedy():
    """A filter that leaves a single token decides alone, whichever it is and whatever the seed."""
    open_options = SAMPLING | {"temperature": 1.0, "top_k": 160, "top_p": 1.0, "min_p": 0.0}
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        found = tokens_of("text_batch_left", **open_options | narrow, seed=5)
        np.testing.assert_array_equal(found, parity.expected("text_batch_left", "greedy"))


def test_filters_mean_nothing_to_greedy():
    found = tokens_of("text_batch_left", temperature=0.3, top_k=3, top_p=0.5, min_p=0.2)
    np.testing.assert_array_equal(found, parity.expected("text_batch_left", "greedy"))


# ---- refused, before anything is computed


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
        ({"stop_strings": "stop"}, "without a tokenizer"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": 161}, "logprobs is 161"),
        ({"seed": [1, 2]}, "seed has shape"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tokens_of("text", **options)


def test_unknown_option():
    with pytest.raises(TypeError, match="num_beam_groups"):
        tokens_of("text", num_beam_groups=2)


def test_packed_rows_are_refused():
    with pytest.raises(ValueError, match="Row 0 holds 2 packed sequences"):
        generate(parity.model(), parity.batch("packed_text_batch_left"), max_new_tokens=2)


def test_a_row_without_tokens_is_refused():
    batch = prepare(parity.config(), input_ids=np.array([[5, 6], [5, 6]]), attention_mask=np.array([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="Row 1 has no tokens"):
        generate(parity.model(), batch, max_new_tokens=2)


def test_longer_than_the_model():
    """The last position is 511: the cache would have room, the model has no such position."""
    batch = prepare(parity.config(), input_ids=np.full((1, 505), 5))
    with pytest.raises(ValueError, match="512"):
        generate(parity.model(), batch, max_new_tokens=100)
