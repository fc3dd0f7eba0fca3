"""Inside a caller's `jax.jit`, `jax.vmap` and `jax.shard_map`, `generate` returns the tokens that it returns outside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from liger_jax import Chat, generate, prepare, stream
from liger_jax.errors import UserError
from tests._support import parity

GREEDY = {"max_new_tokens": 8, "eos_token_id": ()}
SAMPLING = GREEDY | {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}


@functools.cache
def prompts(scenario="batch_left"):
    return parity.common(parity.batch(scenario, prompt=True))


@functools.cache
def greedy(scenario="batch_left"):
    return parity.expected(scenario, "greedy")


def generate_greedy(model, batch):
    return generate(model, batch, **GREEDY)


def test_jit_traces_once():
    """With images and padding on the left. A second batch of the same bucket neither traces nor compiles."""
    traces = []

    @jax.jit
    def run(model, batch):
        traces.append(batch.shape)
        return generate_greedy(model, batch)

    tokens = run(parity.model(), prompts())
    assert isinstance(tokens, jax.Array)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, greedy())
    swapped = jax.tree.map(lambda x: x[::-1], prompts())
    np.testing.assert_array_equal(run(parity.model(), swapped), greedy()[::-1])
    assert len(traces) == run._cache_size() == 1


@pytest.mark.parametrize("traced", ["model", "batch", "neither"])
def test_the_other_arguments_may_be_constants(traced):
    model, batch = parity.model(), prompts()
    tokens = {
        "model": lambda: jax.jit(lambda model: generate_greedy(model, batch))(model),
        "batch": lambda: jax.jit(lambda batch: generate_greedy(model, batch))(batch),
        "neither": jax.jit(lambda: generate_greedy(model, batch)),
    }[traced]()
    np.testing.assert_array_equal(tokens, greedy())


def test_end_tokens():
    """A row ends at an end token, and the rest is padding."""
    end = int(parity.expected("batch_left", "eos_id"))
    run = jax.jit(lambda model, batch: generate(model, batch, max_new_tokens=8, eos_token_id=end))
    expected = parity.expected("batch_left", "greedy_eos")
    padded = np.pad(expected, ((0, 0), (0, 8 - expected.shape[1])), constant_values=150)
    np.testing.assert_array_equal(run(parity.model(), prompts()), padded)


@pytest.mark.parametrize("seed", [7, -3, [3, 2**31 - 1]])
def test_traced_seed(seed):
    """The seed, one or one per prompt, may be traced. The repetition penalty needs the prompt's tokens."""
    run = jax.jit(lambda seed: generate(parity.model(), prompts(), **SAMPLING, seed=seed))
    expected = generate(parity.model(), prompts(), **SAMPLING, seed=seed)
    np.testing.assert_array_equal(run(jnp.asarray(seed)), expected)


def test_samples_and_logprobs():
    options = SAMPLING | {"num_return_sequences": 2, "logprobs": 3, "seed": [5, 2**40], "no_repeat_ngram_size": 2}
    expected = generate(parity.model(), prompts(), **options)
    generated = jax.jit(lambda model, batch: generate(model, batch, **options))(parity.model(), prompts())
    np.testing.assert_array_equal(generated.tokens, expected.tokens)
    np.testing.assert_array_equal(generated.top_tokens, expected.top_tokens)
    np.testing.assert_allclose(generated.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_allclose(generated.top_logprobs, expected.top_logprobs, atol=1e-4)


def test_vmap():
    """Over batches, over models, and over seeds."""
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1]]), prompts())
    over_batches = jax.vmap(functools.partial(generate_greedy, parity.model()))(batches)
    np.testing.assert_array_equal(over_batches, [greedy(), greedy()[::-1]])

    other = jax.tree.map(lambda x: x[..., ::-1], parity.model())
    models = jax.tree.map(lambda *weights: jnp.stack(weights), parity.model(), other)
    over_models = jax.vmap(lambda model: generate_greedy(model, prompts()))(models)
    np.testing.assert_array_equal(over_models, [greedy(), generate_greedy(other, prompts())])

    over_seeds = jax.vmap(lambda seed: generate(parity.model(), prompts(), **SAMPLING, seed=seed))(jnp.arange(2))
    np.testing.assert_array_equal(
        over_seeds, [generate(parity.model(), prompts(), **SAMPLING, seed=seed) for seed in range(2)]
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shard_map(kind):
    """Each device generates for its own rows, for as long as they need."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(kind,))
    run = jax.shard_map(generate_greedy, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    placed = jax.device_put(prompts(), NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(jax.jit(run)(parity.model(), placed), greedy())


# ---- errors


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m, b, x: generate(m, b, **SAMPLING | {"temperature": x}), "temperature is traced"),
        (lambda m, b, x: generate(m, b, **GREEDY | {"eos_token_id": [x]}), "eos_token_id is traced"),
        (lambda m, b, x: generate(m, b, **SAMPLING, seed=x), "seed is float32"),
        (
            lambda m, b, x: generate(m, b, **SAMPLING, seed=jnp.arange(3) + x.astype(int)),
            r"seed is int32 with shape \(3,\)",
        ),
        (
            lambda m, b, x: generate(m, b, **GREEDY, stop_strings=["a"]),
            "call generate outside of it, or use eos_token_id",
        ),
        (lambda m, b, x: generate(m, b, **GREEDY | {"eos_token_id": 160}), "Token id 160"),
        (lambda m, b, x: list(stream(m, b, None, max_new_tokens=8)), "expected a call outside"),
        (lambda m, b, x: Chat(m, None), "Chat is created inside a function that JAX traces"),
    ],
)
def test_errors(run, message):
    """Errors are raised while tracing, before anything compiles."""
    with pytest.raises(UserError, match=message):
        jax.eval_shape(run, parity.model(), prompts(), jnp.float32(1))


def test_values_of_a_constant_batch_are_checked():
    packed = parity.batch("packed_text_batch_left")
    with pytest.raises(UserError, match="Row 0 holds 2 packed sequences"):
        jax.eval_shape(lambda model: generate_greedy(model, packed), parity.model())
    batch = prepare(parity.config(), input_ids=np.full((1, 505), 5))
    with pytest.raises(UserError, match="512"):
        jax.eval_shape(lambda model: generate(model, batch, max_new_tokens=100), parity.model())


def test_traced_row_without_tokens_is_padding():
    batch = prompts("text_batch_left")
    empty = jax.tree.map(np.copy, batch)
    empty.segment_ids[1] = 0
    tokens = jax.jit(generate_greedy)(parity.model(), empty)
    np.testing.assert_array_equal(tokens[0], greedy("text_batch_left")[0])
    assert set(np.asarray(tokens[1]).tolist()) == {parity.config().pad_token_id}
