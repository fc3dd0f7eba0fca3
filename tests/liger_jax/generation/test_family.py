"""Generation, streaming and chat for Qwen2.5-VL and Qwen3-VL: windows, deepstack, norms of heads, and the time of videos."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from liger_jax import Chat, Processor, QwenVL, QwenVLConfig, generate, prepare, stream
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.generation import chat as chat_module
from liger_jax.generation import session
from liger_jax.inputs.families import FAMILIES
from liger_jax.model.sharding import param_shardings
from tests._support import family_parity as parity

MEMBERS = parity.FAMILIES
NEW = 6  # tokens
SHAPE = {"length": 192, "patches": 256}  # of every batch, so that they share compiled programs


@functools.cache
def model_and_processor(family):
    """Returns a tiny model with random weights, biases and norms, and a processor with limits for small images."""
    tokenizer = train_tokenizer([])
    member, size = FAMILIES[family], {"min_pixels": 32 * 32, "max_pixels": 20 * 32 * 32}
    processor = Processor(
        tokenizer, dataclasses.replace(member.image, **size), dataclasses.replace(member.video, **size), family=family
    )
    model = QwenVL.init(QwenVLConfig.tiny(len(tokenizer), family=family), dtype="float32")
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape), model), processor


def image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def question(text, *media):
    parts = [{"type": kind, kind: item} for item in media for kind in ["video" if isinstance(item, list) else "image"]]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def frames(height, width):
    return [image(height, width, seed) for seed in range(4)]


IMAGES = question("These?", image(150, 200), image(64, 90, 1))
VIDEO = question("And this?", frames(90, 120))
TEXT = question("Only text, of some length.")


@pytest.mark.parametrize("scenario", parity.SCENARIOS)
@pytest.mark.parametrize("family", MEMBERS)
def test_greedy_tokens_equal_those_of_transformers(family, scenario):
    """Without end tokens, with two of them, and with a repetition penalty; for text, images, videos and padding."""
    model, arrays = parity.model(family), parity.inputs(family, scenario, prompt=True)
    rows = len(arrays["input_ids"])
    repeated = np.arange(parity.ROWS) % rows  # in place of rows that pad the batch, which have no prompt
    batch = jax.tree.map(lambda x: x[repeated], parity.common(model.config, arrays))
    ends = [int(parity.expected(family, scenario, key)) for key in ("eos_id", "second_eos_id")]
    for key, options in {
        "greedy": {"eos_token_id": ()},
        "greedy_two_eos": {"eos_token_id": ends},
        "greedy_repetition1.3": {"eos_token_id": (), "repetition_penalty": 1.3},
    }.items():
        tokens = generate(model, batch, max_new_tokens=8, pad_token_id=150, **options)[:rows]
        expected = parity.expected(family, scenario, key)
        filled = np.pad(expected, ((0, 0), (0, 8 - expected.shape[1])), constant_values=150)
        np.testing.assert_array_equal(tokens, filled, err_msg=key)


@pytest.mark.parametrize("family", MEMBERS)
def test_cache_matches_full_forward(family):
    """Each token is the argmax of one forward pass over prompt and answer, for rows with images, a video and text alone.

    The log-probabilities are equal, too: they depend on everything in the prompt.
    """
    model, processor = model_and_processor(family)
    arrays = processor([[IMAGES], [VIDEO], [TEXT]], add_generation_prompt=True)
    batch = prepare(model.config, **arrays, **SHAPE)
    tokens, logprobs, *_ = generate(model, batch, max_new_tokens=NEW, eos_token_id=(), pad_token_id=0, logprobs=0)

    ids, mask = np.concatenate([arrays["input_ids"], tokens], axis=1), arrays["attention_mask"]
    arrays |= {"input_ids": ids, "attention_mask": np.pad(mask, [(0, 0), (0, NEW)], constant_values=1)}
    del arrays["mm_token_type_ids"]
    logits = jax.jit(lambda model, batch: model(batch))(model, prepare(model.config, **arrays, **SHAPE))
    logits = logits[:, ids.shape[1] - NEW - 1 : ids.shape[1] - 1]
    np.testing.assert_array_equal(logits.argmax(-1), tokens)
    expected = np.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(logprobs, expected, atol=2e-5)
    assert np.abs(expected[0] - expected[1]).min() > 1e-3


@pytest.mark.parametrize("family", MEMBERS)
def test_model_on_a_mesh_generates_the_same_tokens(family):
    """Rows, heads and windows are sharded, in the prefill as in decoding."""
    model, processor = model_and_processor(family)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices("cpu")[:4])
    batch = prepare(model.config, **processor([[IMAGES], [VIDEO], [TEXT]], add_generation_prompt=True), **SHAPE)
    options = {"max_new_tokens": NEW, "eos_token_id": (), "pad_token_id": 0, "logprobs": 0}
    sharded = jax.device_put(model, param_shardings(model, mesh))
    (tokens, logprobs, *_), expected = (generate(m, batch, **options) for m in (sharded, model))
    np.testing.assert_array_equal(tokens, expected.tokens)
    np.testing.assert_allclose(logprobs, expected.logprobs, atol=2e-5)


@pytest.fixture
def first_logits(monkeypatch):
    """Returns a list that receives the logits of each answer's first token."""
    logits = []

    def record(*arguments):
        first_step = session_function(*arguments)
        logits.append(np.asarray(first_step.logits))
        return first_step

    session_function = session.first_token_logits
    for module in (session, chat_module):
        monkeypatch.setattr(module, "first_token_logits", record)
    return logits


@pytest.mark.parametrize("family", MEMBERS)
def test_chat_and_stream_match_fresh_prompts(family, first_logits):
    """A chat's turns, of which the second extends the cache by an image and a video, give the answers of whole prompts."""
    model, processor = model_and_processor(family)
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.5, "eos_token_id": (), "pad_token_id": 0}
    chat, messages = Chat(model, processor, **options), []
    turns = {"This?": {"images": [image(150, 200)]}, "And?": {"images": [image(64, 90)], "videos": [frames(90, 120)]}}
    for text, media in turns.items():
        messages.append(question(text, *(item for items in media.values() for item in items)))
        batch = prepare(model.config, **processor([messages], add_generation_prompt=True), **SHAPE)
        answer = processor.decode(generate(model, batch, **options)[0])
        assert chat.ask(text, **media) == answer
        messages.append({"role": "assistant", "content": answer})
        fresh, extended = first_logits[-2:]
        np.testing.assert_allclose(extended, fresh, atol=2e-5 * np.abs(fresh).max())
    assert "".join(stream(model, batch, processor, **options)) == answer
