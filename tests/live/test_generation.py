"""Generation options act as in the installed transformers (needs torch), on random logits and on a model."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert import from_hf
from liger_jax import generate
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.sampling import History, Sampling, constrain_logits, filter_logits
from tests._support import parity

pytest.importorskip("torch", reason="needs torch, see the extra `parity`")

import torch
from transformers.generation import logits_process as p

from tests.live.test_transformers import make_batch, make_hf_model, scenarios
from tests.references import make_model as reference

pytestmark = pytest.mark.live
ROWS, VOCAB, LENGTH = 4, 1000, 60


@pytest.mark.parametrize("seed", range(20))
def test_logits_processors(seed):
    """All processors in sequence, with different values for each seed."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(ROWS, VOCAB)) * rng.choice([1, 3, 30])).astype(np.float32)
    history = rng.integers(0, rng.choice([4, 50]), size=(ROWS, LENGTH))
    penalty, ngram, min_new_tokens = rng.uniform(0.8, 1.5), int(rng.integers(1, 5)), int(rng.integers(0, 6))
    words = [rng.integers(0, 6, rng.integers(1, 5)).tolist() for _ in range(3)]
    temperature, top_k, top_p, min_p = (
        rng.uniform(0.3, 2),
        int(rng.integers(2, 500)),
        rng.uniform(0.1, 1),
        rng.uniform(0, 0.2),
    )
    eos, step = [7, 9], 3

    expected, ids = torch.from_numpy(logits), torch.from_numpy(history)
    for processor in (
        p.RepetitionPenaltyLogitsProcessor(penalty),
        p.NoRepeatNGramLogitsProcessor(ngram),
        p.NoBadWordsLogitsProcessor(words, eos),
        p.MinNewTokensLengthLogitsProcessor(LENGTH - step, min_new_tokens, torch.tensor(eos)),
        p.TemperatureLogitsWarper(temperature),
        p.TopKLogitsWarper(top_k),
        p.TopPLogitsWarper(top_p),
        p.MinPLogitsWarper(min_p),
    ):
        expected = processor(ids, expected)

    options = GenerationOptions(
        do_sample=True,
        min_new_tokens=min_new_tokens,
        eos_token_id=eos,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        no_repeat_ngram_size=ngram,
        bad_words_ids=words,
    )
    sampling = Sampling.from_options(options, parity.config(), ROWS, ROWS)
    actual = constrain_logits(
        jnp.asarray(logits), sampling, History(history.astype(np.int32), np.full(ROWS, LENGTH)), step
    )
    actual = filter_logits(actual, sampling)
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected.numpy()))
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("scenario", ["batch_left", "image_video"])
@pytest.mark.parametrize(
    "options", [{"no_repeat_ngram_size": 2}, {"min_new_tokens": 5}, {"bad_words_ids": [[3, 4], [5]]}]
)
def test_generate(scenario, options, tmp_path):
    """Greedy tokens equal those of transformers' generate(), with models and prompts that are not the stored ones."""
    hf, prompt = make_hf_model("untied"), scenarios()[1][scenario]
    length, greedy = prompt["input_ids"].shape[1], {"max_new_tokens": 8, "pad_token_id": reference.PAD}

    def run(**settings):
        hf.model.rope_deltas = None
        types = reference.token_types(prompt["input_ids"])
        with torch.no_grad():
            return hf.generate(**prompt, mm_token_type_ids=types, do_sample=False, **settings)[:, length:].numpy()

    greedy["eos_token_id"] = int(run(**greedy)[0, 2])
    expected = run(**greedy, **options)
    hf.save_pretrained(tmp_path)
    model = from_hf(tmp_path, dtype="float32")
    tokens = generate(model, make_batch(model, prompt), **greedy, **options)
    np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)
    assert (tokens[:, expected.shape[1] :] == reference.PAD).all()
