"""On a mesh of (simulated) devices, generation gives the tokens of one device, and communicates as little as it can."""

import functools
import re

import jax
import numpy as np
import pytest

from liger_jax import QwenVL, QwenVLConfig, add_lora, generate, prepare
from liger_jax.errors import LigerWarning
from liger_jax.generation.loop import decode_loop
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.session import DecodeSession
from liger_jax.model import decode_layout
from liger_jax.model.decode_layout import DecodeLayout
from liger_jax.model.sharding import get_mesh, make_mesh, mesh_context, param_shardings, with_auto_axes

COMMON = {"max_new_tokens": 6, "eos_token_id": (), "pad_token_id": 0}
GREEDY = {}
SAMPLED = {"do_sample": True, "temperature": 1.5, "seed": 3}
FILTERED = SAMPLED | {"top_k": 40, "top_p": 0.95, "repetition_penalty": 1.3, "num_return_sequences": 2, "logprobs": 2}


@functools.cache
def model(lora=False):
    """Returns a model with random weights, biases, norms and LoRA; with 4 query heads and 2 key heads."""
    model = QwenVL.init(QwenVLConfig.tiny(), dtype="float32")
    model = add_lora(model, rank=4) if lora else model
    keys = iter(jax.random.split(jax.random.key(1), 300))
    return jax.tree.map(lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape), model)


def on_mesh(model, **axes):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[: np.prod(list(axes.values()))])
    return jax.device_put(model, param_shardings(model, mesh))


@functools.cache
def prompts():
    """Returns three rows, so that meshes pad them, of different lengths."""
    ids = 5 + np.arange(27).reshape(3, 9)
    return prepare(QwenVLConfig.tiny(), input_ids=ids, attention_mask=np.arange(9) >= np.array([[0], [3], [5]]))


def assert_equals_one_device(model, axes, options):
    """Asserts that tokens are equal, and log-probabilities nearly so, where they are requested."""
    actual, expected = (
        jax.tree.leaves(generate(m, prompts(), **COMMON | options)) for m in (on_mesh(model, **axes), model)
    )
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=2e-5 if e.dtype == np.float32 else 0)
    assert len(np.unique(expected[0], axis=0)) == len(expected[0])


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        ({"tensor": 4}, GREEDY),  # twice as many devices as key heads
        ({"tensor": 4}, SAMPLED),
        ({"data": 2, "tensor": 2}, FILTERED),
        ({"data": 3}, SAMPLED),
        ({"tensor": 2, "fsdp": 1, "sequence": 2}, GREEDY),
    ],
)
def test_tokens(axes, options):
    """Rows, heads and the vocabulary are split."""
    assert_equals_one_device(model(), axes, options)


def test_vmap_over_seeds():
    """In the caller's program, which has a model on a mesh as a constant, and rows that the mesh does not divide."""
    sharded, options = with_auto_axes(on_mesh(model(), data=2, tensor=2)), COMMON | SAMPLED
    sample = jax.jit(jax.vmap(lambda seed: generate(sharded, prompts(), **options | {"seed": seed})))
    np.testing.assert_array_equal(sample(np.array([2, 3]))[1], generate(model(), prompts(), **options))


def test_users_program_with_more_devices_than_key_heads():
    """Regression: in one program, the partitioner carried the split of the cache's copied heads back to RoPE, and failed."""
    sharded = on_mesh(model(), tensor=4)
    tokens = jax.jit(lambda m, batch: generate(m, batch, **COMMON))(sharded, prompts())
    np.testing.assert_array_equal(tokens, generate(model(), prompts(), **COMMON))


@pytest.mark.filterwarnings("ignore:.*does not divide")
def test_sizes_that_do_not_divide():
    """Three devices each have all 4 heads, 160 MLP columns and 320 tokens of the vocabulary."""
    assert_equals_one_device(model(), {"tensor": 3}, GREEDY)


def test_lora_is_merged():
    """The mesh splits its matrices, too."""
    assert_equals_one_device(model(lora=True), {"fsdp": 2, "tensor": 2}, SAMPLED)


def test_fsdp_splits_heads_if_its_weights_do_not_fit(monkeypatch):
    monkeypatch.setattr(decode_layout, "_free_memory", lambda array: 2**16)
    with pytest.warns(LigerWarning, match="GiB are free"):
        assert_equals_one_device(model(), {"fsdp": 2, "tensor": 2}, GREEDY)


def test_only_large_parts_are_split(monkeypatch):
    """Here the MLP, 123 kB in each layer, and neither attention (115 kB with its cache) nor the output head (82 kB)."""
    monkeypatch.setattr(decode_layout, "SMALLEST_SAVING", 60_000)
    axes = {"data": 2, "tensor": 2}
    assert_equals_one_device(model(), axes, GREEDY)
    session = DecodeSession.start(on_mesh(model(), **axes), prompts(), GenerationOptions(**COMMON))
    assert session.cache.layout.split == "F"


@pytest.mark.parametrize(
    ("preset", "tensor", "cache_shape", "split"),
    [
        ("qwen2_vl_2b", 2, (1, 2048), "FV"),
        ("qwen2_vl_7b", 2, (1, 2048), "FV"),
        ("qwen2_vl_7b", 2, (16, 8192), "FVNK"),
        ("qwen2_vl_72b", 4, (1, 2048), "FVNK"),
    ],
)
def test_parts_of_real_models_that_are_split(monkeypatch, preset, tensor, cache_shape, split):
    monkeypatch.undo()
    config = getattr(QwenVLConfig, preset)().text
    with jax.set_mesh(make_mesh(tensor=tensor)):
        layout = DecodeLayout.on_current_mesh(config, cache_shape, "bfloat16")
    assert (layout.split, layout.shards, layout.row_axes) == (split, tensor, ("data", "fsdp"))


def collectives(hlo):
    """Returns (name, shape) of each collective."""
    names = r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    return sorted((name, shape) for shape, name in re.findall(rf"= \(?(\w+\[[\d,]*\]).*? {names}(?:-start)?\(", hlo))


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 2}])
def test_loop_communicates_twice_per_layer_and_once_per_token(axes):
    """It sums the outputs of o and down, and gathers the best token of each device. Rows need no communication."""
    session = DecodeSession.start(on_mesh(model(), **axes), prompts(), GenerationOptions(**COMMON))
    with mesh_context(get_mesh(session.cache)):
        arrays = session._weights, session.cache, session._state, session.sampling
        loop = decode_loop.lower(*arrays, stopped=np.zeros(4, bool), until=np.int32(6)).compile().as_text()
    body_name = re.search(r"while\(.*body=(%[\w.\-]+)", loop).group(1)
    body = loop.split(f"\n{body_name} ")[1].split("\n}")[0]
    if "tensor" in axes:
        layers, width = len(session.cache.keys), session.model.config.text.hidden_size
        best = "all-gather", "s32[2,3,2]"  # devices x (score, logit, token) x rows
        assert collectives(body) == [best, *[("all-reduce", f"f32[2,{width}]")] * 2 * layers]
    else:
        assert not collectives(body)
    gathered = {shape for name, shape in collectives(loop.replace(body, "")) if name == "all-gather"}
    assert gathered == {"s32[4,64]", "pred[4]"}  # the tokens, and which rows have ended, for the host
