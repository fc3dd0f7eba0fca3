"""The fused decoding step, with packed weights and its own kernels, equals the model's layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liger_jax import Qwen2VLConfig
from liger_jax.model.fused_decode import PackedModel, decode_step
from liger_jax.model.kv_cache import KVCache
from liger_jax.model.layers import Initializer
from liger_jax.model.text import LanguageModel

STEPS = 3
SLOTS = 7  # filled by the prompt


@pytest.fixture(scope="module")
def model(request):
    """Returns a tiny model, with random norms and biases instead of ones and zeros; Qwen3-VL normalizes its heads."""
    model = LanguageModel(Initializer(0, "float32", 0.1), Qwen2VLConfig.tiny(family=request.param).text)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape, w.dtype), model)


def prompt_cache(config, batch, length):
    """Returns random keys and values, with padding on the left of one row and on the right of another."""
    rng = np.random.default_rng(0)
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    keys, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    segments = np.ones((batch, length), np.int32)
    segments[0, :2], segments[-1, -1] = 0, 0
    return KVCache.from_prompt(keys, values, jnp.asarray(segments), room=STEPS)


def by_layers(model, head, xs, positions, cache):
    """Runs the layers of prefill and training on single tokens, attending to the cache."""
    layers = [jax.tree.map(lambda w, i=i: w[i], model.layers) for i in range(model.config.num_hidden_layers)]
    logits = []
    for step, x in enumerate(xs):
        slot, x, is_valid = SLOTS + step, x[:, None], jnp.ones((len(x), 1), jnp.int32)
        cos, sin = model.rotary(positions[..., None] + step)
        written = []
        for i, layer in enumerate(layers):
            x, keys_values = layer(x, cos, sin, functools.partial(cache.attend_chunk, i, slot, is_valid))
            written.append(keys_values)
        keys, values = zip(*written, strict=True)
        cache = dataclasses.replace(cache, keys=keys, values=values).mark_valid(slot, is_valid)
        logits.append(model.norm(x)[:, 0] @ head.T)
    return jnp.stack(logits), cache


def by_steps(implementation, model, head, xs, positions, cache):
    """Runs `decode_step` on the same tokens."""
    packed = PackedModel.from_model(model, head)

    def step(cache, step_and_x):
        step, x = step_and_x
        cos, sin = model.rotary(positions[..., None] + step)
        logits, cache = decode_step(packed, x, cos[:, 0], sin[:, 0], cache, SLOTS + step, implementation=implementation)
        return cache, logits

    cache, logits = jax.lax.scan(step, cache, (jnp.arange(STEPS), xs))
    return logits, cache


@pytest.mark.parametrize(
    "model, implementation, batch",
    [
        ("qwen2_vl", None, 1),
        ("qwen2_vl", "xla", 3),
        ("qwen2_vl", "interpret", 1),
        ("qwen2_vl", "interpret", 5),
        ("qwen3_vl", "xla", 3),
        ("qwen3_vl", "interpret", 2),
    ],
    indirect=["model"],
)
def test_decode_step_matches_layers(model, implementation, batch):
    """Logits and the whole cache are equal over several steps, for one row and for several."""
    rng = np.random.default_rng(2)
    xs = jnp.asarray(rng.normal(size=(STEPS, batch, model.config.hidden_size)), jnp.float32)
    head = jnp.asarray(0.1 * rng.normal(size=(20, model.config.hidden_size)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 30, (batch, 3)))
    cache = prompt_cache(model.config, batch, SLOTS)
    expected = jax.jit(by_layers)(model, head, xs, positions, cache)
    actual = jax.jit(functools.partial(by_steps, implementation))(model, head, xs, positions, cache)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=2e-5)
