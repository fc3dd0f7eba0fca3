"""Logits that are NaN or infinite are an error that names row and token, and never become tokens."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liger_jax import Chat, GenerationOptions, Qwen2VL, generate, prepare, stream
from liger_jax.errors import UserError
from liger_jax.generation.answer import answer_conversations
from liger_jax.generation.answer_file import answer_file
from liger_jax.generation.sampling import History, Sampling, constrain_logits, next_token
from liger_jax.generation.session import NonFiniteLogitsError
from liger_jax.train.evaluation import compare_answers
from tests._support import parity
from tests._support.demo_model import model_and_processor

NEGATIVE_NAN = -np.float32(np.nan)
OPTIONS = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "bad_words_ids": [[9], [3, 4]]},
    {"do_sample": True, "temperature": 0.01},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_p": 0.5},
    {"do_sample": True, "min_p": 0.2},
    {"do_sample": True, "temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_logit_that_is_not_finite_is_chosen(options):
    """So that the logit of the chosen token tells whether a row is valid with any options; NaN has two signs."""
    sampling = Sampling.from_options(GenerationOptions(**options), parity.config(), 4, 4)
    logits = np.random.default_rng(0).normal(size=(5, 160)).astype(np.float32)[:4]
    logits[1, 40], logits[2, 50], logits[3, 60] = np.nan, NEGATIVE_NAN, np.inf
    ids = np.tile([5, 3, 4, 6], (4, 1))
    history = History.from_prompts(ids, np.ones_like(ids), 8) if sampling.needs_history else None

    def choose(logits):
        return next_token(constrain_logits(jnp.asarray(logits), sampling, history, 0), sampling, 0)

    first, *invalid = choose(logits).tolist()
    assert np.isfinite(logits[0, first])
    assert invalid == [40, 50, 60]
    everything = np.stack([np.full(160, value, np.float32) for value in (np.nan, NEGATIVE_NAN, -np.inf, np.inf)])
    chosen = np.take_along_axis(everything, np.asarray(choose(everything))[:, None], axis=1)
    assert not np.isfinite(chosen).any()


def make_broken(trigger):
    """Returns the model whose logits are NaN after the token `trigger`."""
    model = jax.tree.map(lambda weight: weight, parity.model())
    embedding = model.language_model.embed_tokens.weight
    model.language_model.embed_tokens.weight = type(embedding)(embedding[...].at[trigger].set(jnp.nan))
    return model


SCENARIO = "batch_left"
EXPECTED = parity.expected(SCENARIO, "greedy")
TRIGGER = int(EXPECTED[0, 2])  # occurs nowhere else


def prompts():
    return parity.common(parity.batch(SCENARIO, prompt=True))


def test_the_trigger_occurs_once():
    assert TRIGGER not in parity.inputs(SCENARIO, prompt=True)["input_ids"]
    assert (EXPECTED == TRIGGER).sum() == 1


@pytest.mark.parametrize("options", [{}, {"logprobs": 1}], ids=str)
def test_generate_names_row_and_token_and_keeps_the_other_rows(options):
    with pytest.raises(NonFiniteLogitsError, match="Row 0: The logits of new token 4 are NaN or infinite") as caught:
        generate(make_broken(TRIGGER), prompts(), max_new_tokens=8, eos_token_id=(), **options)
    assert caught.value.new_tokens == {0: 4}
    tokens = caught.value.generated.tokens
    np.testing.assert_array_equal(tokens[0], [*EXPECTED[0, :3], *[parity.config().pad_token_id] * 5])
    np.testing.assert_array_equal(tokens[1], EXPECTED[1])


def test_the_row_ends_inside_jit():
    run = jax.jit(lambda model, batch: generate(model, batch, max_new_tokens=8, eos_token_id=()))
    tokens = run(make_broken(TRIGGER), prompts())
    np.testing.assert_array_equal(tokens[0], [*EXPECTED[0, :3], *[parity.config().pad_token_id] * 5])
    np.testing.assert_array_equal(tokens[1], EXPECTED[1])


def test_a_row_that_ended_before_is_no_error():
    """Its later logits are computed and ignored."""
    end = int(EXPECTED[0, 1])
    tokens = generate(make_broken(TRIGGER), prompts(), max_new_tokens=8, eos_token_id=end)
    assert tokens[0, :3].tolist() == [int(EXPECTED[0, 0]), end, parity.config().pad_token_id]


# ---- text: a question with a 7 has no finite logits


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def broken_at_seven():
    """Returns a model whose logits are NaN after a 7, and its processor."""
    tied, processor = model_and_processor()
    # untied: the token's own logit would otherwise be NaN after every prompt
    model = Qwen2VL.init(dataclasses.replace(tied.config, tie_word_embeddings=False), seed=1, dtype="float32")
    seven, six = (set(processor(ask(text))["input_ids"].ravel().tolist()) for text in ("7", "6"))
    embedding = model.language_model.embed_tokens
    embedding.weight = type(embedding.weight)(embedding.weight[...].at[np.array(list(seven - six))].set(jnp.nan))
    return model, processor


LIMIT = {"max_new_tokens": 4}
MESSAGE = "The logits of new token 1 are NaN or infinite"


def test_stream(broken_at_seven):
    model, processor = broken_at_seven
    batch = prepare(model.config, **processor(ask("7"), add_generation_prompt=True))
    with pytest.raises(NonFiniteLogitsError, match=MESSAGE):
        list(stream(model, batch, processor, **LIMIT))
    with pytest.raises(NonFiniteLogitsError, match=MESSAGE):
        generate(model, batch, **LIMIT, stop_strings="never", tokenizer=processor)


def test_chat_is_as_before_the_question(broken_at_seven):
    chat = Chat(*broken_at_seven, **LIMIT)
    answer = chat.ask("1")
    messages = list(chat.messages)
    with pytest.raises(NonFiniteLogitsError, match=MESSAGE):
        chat.ask("7")
    assert chat.messages == messages
    chat.reset()
    assert chat.ask("1") == answer


def test_answers_to_a_file(broken_at_seven, tmp_path):
    """The error names the record; skipped on request, it is a line of the output. The other records are answered."""
    data, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps({"messages": ask(text)}) + "\n" for text in ("1", "7", "2")))
    options = {"options": GenerationOptions(**LIMIT), "batch_size": 3, "progress": False}
    with pytest.raises(UserError, match=f"in.jsonl, line 2: {MESSAGE}"):
        answer_file(*broken_at_seven, data, output, **options)
    assert [json.loads(line)["record"] for line in output.read_text().splitlines()] == [1, 3]
    with pytest.warns(UserWarning, match="skipped 1 of 3"):
        assert answer_file(*broken_at_seven, data, output, **options, skip_broken=True) == 2
    assert MESSAGE in json.loads(output.read_text().splitlines()[-1])["error"]


def test_evaluation_counts_the_answer_as_wrong(broken_at_seven):
    """An evaluation during a training run continues, with a warning."""
    model, processor = broken_at_seven
    questions = [ask("1"), ask("7")]
    answer, error = answer_conversations(model, processor, questions, GenerationOptions(**LIMIT), batch_size=2)
    assert isinstance(answer, str) and isinstance(error, UserError) and re.match(MESSAGE, str(error))
    conversations = [[*question, {"role": "assistant", "content": ""}] for question in questions]
    with pytest.warns(UserWarning, match=f"1 of 2 answers count as wrong: conversation 1: {MESSAGE}"):
        answers = compare_answers(model, processor, conversations, **LIMIT, batch_size=2)
    assert [answers[1][key] for key in ("answer", "exact")] == ["", False]
