"""Live, against the transformers and torch that are installed: options of generation on random logits and a model."""

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

from tests.live.test_transformers import ours, scenarios
from tests.live.test_transformers import theirs as model_of
from tests.references import make_model as reference

pytestmark = pytest.mark.live
ROWS, VOCAB, LENGTH = 4, 1000, 60


@pytest.mark.parametrize("seed", range(20))
def test_logits_processors(seed):
    """All of them in a row, with other values each time."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(ROWS, VOCAB)) * rng.choice([1, 3, 30])).astype(np.float32)
    history = rng.integers(0, rng.choice([4, 50]), size=(ROWS, LENGTH))
    penalty, size, least = rng.uniform(0.8, 1.5), int(rng.integers(1, 5)), int(rng.integers(0, 6))
    words = [rng.integers(0, 6, rng.integers(1, 5)).tolist() for _ in range(3)]
    temperature, top_k, top_p, min_p = (
        rng.uniform(0.3, 2),
        int(rng.integers(2, 500)),
        rng.uniform(0.1, 1),
        rng.uniform(0, 0.2),
    )
    ends, step = [7, 9], 3

    wanted, ids = torch.from_numpy(logits), torch.from_numpy(history)
    for processor in (
        p.RepetitionPenaltyLogitsProcessor(penalty),
        p.NoRepeatNGramLogitsProcessor(size),
        p.NoBadWordsLogitsProcessor(words, ends),
        p.MinNewTokensLengthLogitsProcessor(LENGTH - step, least, torch.tensor(ends)),
        p.TemperatureLogitsWarper(temperature),
        p.TopKLogitsWarper(top_k),
        p.TopPLogitsWarper(top_p),
        p.MinPLogitsWarper(min_p),
    ):
        wanted = processor(ids, wanted)

    options = GenerationOptions(
        do_sample=True,
        min_new_tokens=least,
        eos_token_id=ends,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        no_repeat_ngram_size=size,
        bad_words_ids=words,
    )
    sampling = Sampling.from_options(options, parity.config(), ROWS, ROWS)
    found = constrain_logits(
        jnp.asarray(logits), sampling, History(history.astype(np.int32), np.full(ROWS, LENGTH)), step
    )
    found = filter_logits(found, sampling)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(wanted.numpy()))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5)


@pytest.mark.parametrize("scenario", ["batch_left", "image_video"])
@pytest.mark.parametrize(
    "options", [{"no_repeat_ngram_size": 2}, {"min_new_tokens": 5}, {"bad_words_ids": [[3, 4], [5]]}]
)
def test_generate(scenario, options, tmp_path):
    """The tokens of transformers' generate(), greedy, on a model and prompts of other seeds than the stored ones."""
    hf, prompt = model_of("untied"), scenarios()[1][scenario]
    columns, greedy = prompt["input_ids"].shape[1], {"max_new_tokens": 8, "pad_token_id": reference.PAD}

    def run(**settings):
        hf.model.rope_deltas = None
        types = reference.token_types(prompt["input_ids"])
        with torch.no_grad():
            return hf.generate(**prompt, mm_token_type_ids=types, do_sample=False, **settings)[:, columns:].numpy()

    greedy["eos_token_id"] = int(run(**greedy)[0, 2])
    wanted = run(**greedy, **options)
    hf.save_pretrained(tmp_path)
    model = from_hf(tmp_path, dtype="float32")
    found = generate(model, ours(model, prompt), **greedy, **options)
    np.testing.assert_array_equal(found[:, : wanted.shape[1]], wanted)
    assert (found[:, wanted.shape[1] :] == reference.PAD).all()
