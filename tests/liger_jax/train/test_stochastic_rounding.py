"""Stochastic rounding: unbiased, from independent bits, the same on any mesh, and bfloat16 weights train as in float32."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState
from liger_jax.model.sharding import make_mesh, param_shardings
from liger_jax.train import stochastic_rounding
from liger_jax.train.master_weights import with_master_weights
from liger_jax.train.optimizer import make_optimizer, read_grad_stats
from liger_jax.train.stochastic_rounding import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    WEIGHT,
    StochasticState,
    rounding_bits,
    step_seeds,
    stochastic_adamw,
    stochastic_round,
)

STREAMS = (WEIGHT, FIRST_MOMENT, SECOND_MOMENT)


def bits(x):
    return np.asarray(x).view(np.uint16)


# ---- rounding --------------------------------------------------------------------------------------------------------


def test_rounding_is_unbiased():
    """Over all values of the random bits, the mean is exactly x: for both signs, any magnitude, and subnormal numbers."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 0x7F7F0000, 50, np.uint32)
    patterns[:10] = rng.integers(0, 0x00800000, 10)  # subnormal
    x = np.concatenate([patterns, patterns | 0x80000000]).astype(np.uint32).view(np.float32)
    draws = jnp.arange(2**16, dtype=jnp.uint32)
    rounded = np.asarray(jax.jit(stochastic_round)(x[:, None], draws[None])).astype(np.float64)
    np.testing.assert_array_equal(rounded.mean(1), x.astype(np.float64))
    assert (np.array([len(np.unique(row)) for row in rounded]) <= 2).all()


def test_exact_values_do_not_change():
    """Nor do infinities and NaN: all bfloat16 values, with the smallest and the largest random number."""
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    nan = np.isnan(every.astype(np.float32))
    for number in (0, 2**16 - 1):
        rounded = stochastic_round(jnp.asarray(every.astype(np.float32)), jnp.uint32(number))
        np.testing.assert_array_equal(bits(rounded)[~nan], bits(every)[~nan])
        assert np.isnan(np.asarray(rounded, np.float32)[nan]).all()
    payload = jnp.asarray(np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32))
    assert jnp.isnan(stochastic_round(payload, jnp.uint32(2**16 - 1))).all()


# ---- the random bits -------------------------------------------------------------------------------------------------

SHAPE = (64, 4096)
SIZE = 64 * 4096


@functools.cache
def drawn(step=7, path="layers/kernel", stream=WEIGHT, seed=0):
    """Returns the random bits of all elements in one step."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(count, path, stream):
        return rounding_bits(SHAPE, step_seeds([path], count, seed)[0], stream)

    return np.asarray(draw(jnp.int32(step), path, stream)).ravel()


def correlation(a, b):
    """Returns the largest correlation of any bit of a with any bit of b, in standard deviations of independent ones."""
    a, b = (((x[:, None] >> np.arange(16)) & 1).astype(np.float32) * 2 - 1 for x in (a, b))
    return np.abs(a.T @ b).max() / np.sqrt(len(a))


@pytest.mark.parametrize("stream", STREAMS)
def test_bits_are_uniform(stream):
    """Chi-square over the 256 values of each byte, and over pairs of neighbours, in a quarter of a million elements."""
    word = drawn(stream=stream)
    assert word.max() < 2**16
    for values in (word >> 8, word & 255, (word[::2] >> 12) * 16 + (word[1::2] >> 12)):
        counts, expected = np.bincount(values, minlength=256), len(values) / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
    assert abs(word.mean() / 2**16 - 0.5) < 5 * np.sqrt(1 / 12 / SIZE)


def test_bits_are_uncorrelated():
    """No bit predicts another: of the three roundings of an element, of other steps, parameters, seeds, and elements."""
    first = drawn()
    others = {f"streams {a} {b}": (drawn(stream=a), drawn(stream=b)) for a, b in itertools.combinations(STREAMS, 2)}
    others |= {f"step {step}": (first, drawn(step=step)) for step in (8, 9, 107, 1007)}
    others |= {f"step and stream {s}": (first, drawn(step=8, stream=s)) for s in STREAMS[1:]}
    others |= {f"parameter {p}": (first, drawn(path=p)) for p in ("layers/bias", "layers/kernek")}
    others |= {f"seed {seed}": (first, drawn(seed=seed)) for seed in (1, 2**31)}
    for stream, lag in itertools.product(STREAMS, (1, 2, 3, 64, 1024, 4096, 65536)):
        others[f"stream {stream}, lag {lag}"] = (drawn(stream=stream)[:-lag], drawn(stream=stream)[lag:])
    largest = {name: correlation(a, b) for name, (a, b) in others.items()}
    assert max(largest.values()) < 5.5, largest  # of 7000 to 8000 normal variables: above 5.5 once in 3000 times


def test_bits_of_an_element_are_uncorrelated_over_time():
    """Elements over 4096 consecutive steps: each stream with itself at other steps, and with the other streams."""

    @jax.jit
    def draw(counts):
        seeds = jax.vmap(lambda count: step_seeds(["layers/kernel"], count, 0)[0])(counts)
        return [jax.vmap(lambda seed: rounding_bits((16,), seed, stream))(seeds) for stream in STREAMS]

    history = [np.asarray(words) for words in draw(jnp.arange(2**12))]
    for element in range(0, 16, 5):
        words = [stream[:, element] for stream in history]
        pairs = [*itertools.combinations(words, 2)]
        pairs += [(stream[:-lag], stream[lag:]) for stream in words for lag in (1, 2, 10, 100)]
        assert max(correlation(a, b) for a, b in pairs) < 5.5


def test_large_arrays_do_not_repeat_bits(monkeypatch):
    """Where 32 bits cannot number all elements, the leading axes enter the hash separately."""
    seed = step_seeds(["layers/kernel"], jnp.int32(3), 0)[0]
    monkeypatch.setattr(stochastic_rounding, "WORDS", 2**14)
    words = np.asarray(rounding_bits((4, 2, 2**13), seed, WEIGHT)).reshape(4, 2**14)
    for a, b in itertools.combinations(words, 2):
        assert correlation(a, b) < 5.5
    assert [index.shape for index in stochastic_rounding.element_index((4, 2, 2**13))] == [(4, 2, 2**13)] * 2
    assert len(stochastic_rounding.element_index((2, 2**13))) == len(stochastic_rounding.element_index(())) == 1


# ---- AdamW -----------------------------------------------------------------------------------------------------------


def train(optimizer, weights, gradient, steps):
    """Returns weights and state after some steps in one compiled program; gradient(weights, step) is traced."""

    def step(carry, number):
        weights, state = carry
        updates, state = optimizer.update(gradient(weights, number), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))[0])
    return run((weights, optimizer.init(weights)))


def noise(weights, number):
    """Returns random gradients of a step, a tenth as large from step 50 on."""
    keys = iter(jax.random.split(jax.random.key(number), len(jax.tree.leaves(weights))))
    size = jnp.where(number < 50, 1.0, 0.1)
    return jax.tree.map(lambda w: (size * (jax.random.normal(next(keys), w.shape) + 0.5)).astype(w.dtype), weights)


def test_moments_are_unbiased():
    """After 400 steps, most with small gradients, their means are within 1 % of those in float32; nearest rounding fails."""
    weights = jnp.ones((64, 256), "bfloat16")

    def in_float32(weights, number):
        return noise(weights.astype("bfloat16"), number).astype("float32")

    _, (exact, *_) = train(optax.adamw(1e-5), weights.astype("float32"), in_float32, 400)
    _, state = train(stochastic_adamw(1e-5), weights, noise, 400)
    _, (nearest, *_) = train(optax.adamw(1e-5), weights, noise, 400)
    assert state.mu.dtype == state.nu.dtype == jnp.bfloat16
    for name in ("mu", "nu"):
        mean = float(getattr(exact, name).mean())
        assert float(getattr(state, name).astype("float32").mean()) == pytest.approx(mean, rel=0.01)
    assert float(nearest.nu.astype("float32").mean()) != pytest.approx(float(exact.nu.mean()), rel=0.2)


def test_updates_reach_rounded_weights():
    """A weight plus its update is a bfloat16, so that apply_updates rounds nothing; it is a neighbour of optax's result."""
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=20_000) * 2.0 ** rng.integers(-12, 2, size=20_000), "bfloat16")
    optimizer, grads = stochastic_adamw(1e-2, weight_decay=0.1), jnp.asarray(rng.normal(size=20_000), "bfloat16")
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(weights), weights)
    moved = np.asarray(optax.apply_updates(weights, updates)).astype(np.float64)
    np.testing.assert_allclose(np.asarray(weights).astype(np.float32) + np.asarray(updates), moved, rtol=2**-23)

    exact = optax.adamw(1e-2, weight_decay=0.1)
    expected, wide = np.asarray(weights).astype(np.float64), weights.astype("float32")
    expected += np.asarray(exact.update(grads.astype("float32"), exact.init(wide), wide)[0])
    spacing = 2.0 ** (np.floor(np.log2(np.abs(expected))) - 7)
    # the moments are rounded, too: each by at most 2^-7, which changes an update of 0.01 by less than 2e-4
    assert (np.abs(moved - expected) <= spacing * 1.01 + 2e-4).all()
    error = (moved - expected) * np.sign(expected - np.asarray(weights, np.float64))
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(len(error))
    _, state = jax.jit(optimizer.update)(grads, state, optax.apply_updates(weights, updates))
    assert float(state.changed) == pytest.approx((np.asarray(updates) != 0).mean(), abs=0.02)


def small_problem():
    """Returns a network in float32, and its loss: to imitate another network. The weights have the scale of Qwen2-VL's."""
    keys = jax.random.split(jax.random.key(0), 4)
    scale = {"up": 0.02, "down": 0.02}
    shapes = {"up": (128, 256), "down": (256, 128)}
    weights, teacher = (
        {name: scale[name] * jax.random.normal(jax.random.fold_in(key, number), shape)
         for number, (name, shape) in enumerate(shapes.items())}
        for key in keys[:2]
    )  # fmt: skip
    weights = jax.tree.map(lambda w: w.astype("bfloat16").astype("float32"), weights)
    inputs = jax.random.normal(keys[2], (64, 128))

    def outputs(weights):
        return jnp.tanh(inputs @ weights["up"].astype("float32")) @ weights["down"].astype("float32")

    return weights, lambda weights: jnp.mean((outputs(weights) - outputs(teacher)) ** 2)


def test_trains_as_float32_does():
    """300 steps at 1e-5: the loss falls by at least 97 % of float32's drop, and over 80 % of the weights have moved."""
    start, loss = small_problem()

    def fit(optimizer, dtype):
        weights = jax.tree.map(lambda w: w.astype(dtype), start)
        trained, _ = train(optimizer, weights, lambda weights, _: jax.grad(loss)(weights), 300)
        moved = jnp.concatenate([(trained[name] != weights[name]).ravel() for name in weights]).mean()
        return float(loss(start) - loss(trained)) / float(loss(start)), float(moved)

    exact, _ = fit(optax.adamw(1e-5), "float32")
    drop, moved = fit(stochastic_adamw(1e-5), "bfloat16")
    nearest, nearest_moved = fit(optax.adamw(1e-5), "bfloat16")
    assert exact > 0.05
    assert abs(drop / exact - 1) < 0.03 and moved > 0.8
    assert nearest / exact < 0.6 and nearest_moved < 0.3


WEIGHTS = {
    "language_model": {
        "embed_tokens": {"weight": (64, 32)},
        "layers": {"self_attn": {"q_proj": {"kernel": (2, 32, 4, 16)}}, "input_layernorm": {"weight": (2, 32)}},
    }
}


def random_weights(dtype="bfloat16"):
    leaves, structure = jax.tree.flatten(WEIGHTS, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(2)
    return structure.unflatten([jnp.asarray(rng.normal(size=shape) * 0.02, dtype) for shape in leaves])


def assert_same_bits(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_sharded_weights_are_rounded_like_whole_ones():
    """Weights, moments and the share of changed weights are equal bit for bit; only that share needs communication."""
    optimizer = stochastic_adamw(1e-4, weight_decay=0.1)
    weights = random_weights()
    gradients = jax.tree.map(
        lambda w: jnp.asarray(np.random.default_rng(w.size).normal(size=w.shape), w.dtype), weights
    )

    def run(weights, gradients):
        def step(carry, _):
            weights, state = carry
            updates, state = optimizer.update(gradients, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, optimizer.init(weights)), length=3)[0]

    expected = jax.jit(run)(weights, gradients)
    for sizes in ({"fsdp": 4}, {"fsdp": 2, "tensor": 2}):
        mesh = make_mesh(**sizes)
        shardings = param_shardings(weights, mesh)
        placed = [jax.device_put(tree, shardings) for tree in (weights, gradients)]
        out = shardings, param_shardings(expected[1], mesh, strict=False)
        assert any(s.spec != P() for s in jax.tree.leaves(out[1], is_leaf=lambda s: isinstance(s, NamedSharding)))
        compiled = jax.jit(run, out_shardings=out).lower(*placed).compile()
        assert_same_bits(compiled(*placed), expected)
        assert not {"all-gather", "all-to-all", "collective-permute"} & set(
            compiled.as_text().replace("(", " ").split()
        )


def test_resumed_training_rounds_the_same():
    """Two steps, then two from a copy of weights and state with a new optimizer, equal four steps bit for bit."""

    def advance(weights, state, numbers):
        optimizer = make_optimizer(1e-4)
        step = jax.jit(lambda grads, state, weights: optimizer.update(grads, state, weights))
        state = optimizer.init(weights) if state is None else state
        for number in numbers:
            updates, state = step(noise(weights, number), state, weights)
            weights = optax.apply_updates(weights, updates)
        return weights, state

    expected = advance(random_weights(), None, range(4))
    stored = jax.tree.map(np.asarray, advance(random_weights(), None, range(2)))
    assert_same_bits(advance(*jax.tree.map(jnp.asarray, stored), range(2, 4)), expected)


def test_another_seed_rounds_differently():
    """The same seed gives the same updates; make_optimizer passes it on."""
    weights = random_weights()
    grads = jax.tree.map(jnp.ones_like, weights)

    def updates(seed):
        optimizer = make_optimizer(1e-4, seed=seed)
        return jax.tree.leaves(jax.jit(optimizer.update)(grads, optimizer.init(weights), weights)[0])

    first, again, other = updates(0), updates(0), updates(1)
    assert_same_bits(again, first)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


def test_updates_in_place():
    """The compiled update has no random number generator, gather or copy, and needs hardly any temporary memory."""
    weights = {"kernel": jnp.zeros((64, 256, 256), "bfloat16"), "bias": jnp.zeros(256, "bfloat16")}
    optimizer = stochastic_adamw(1e-5)

    def step(weights, state, grads):
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(weights, optimizer.init(weights), weights)
    assert not any(name in lowered.as_text() for name in ("gather", "threefry", "rng"))
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weights["kernel"].nbytes / 10
    assert "[64,256,256]{2,1,0} copy(" not in compiled.as_text()


# ---- make_optimizer --------------------------------------------------------------------------------------------------


def kinds(optimizer, weights):
    state = jax.eval_shape(optimizer.init, weights)
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, StochasticState))
    return [leaf for leaf in leaves if isinstance(leaf, StochasticState)]


def test_make_optimizer_rounds_stochastically():
    """By default and for bfloat16 weights only; the log gets the share of the trained weights that the last step changed."""
    weights = random_weights() | {"visual": {"patch_embed": {"kernel": jnp.ones((24, 8), "bfloat16")}}}
    for options in ({"stochastic_rounding": False}, {"master_weights": True}):
        assert not kinds(make_optimizer(1e-5, **options), weights)
    assert not kinds(make_optimizer(1e-5), random_weights("float32"))

    optimizer = make_optimizer(1e-5, freeze=["vision"])
    assert len(kinds(optimizer, weights)) == 1
    grads = jax.tree.map(jnp.ones_like, weights)
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(weights), weights)
    changed = np.concatenate([np.ravel(u != 0) for u in jax.tree.leaves(updates["language_model"])])
    assert not updates["visual"]["patch_embed"]["kernel"].any()
    assert float(read_grad_stats(state)["changed_weights"]) == 0
    _, state = jax.jit(optimizer.update)(grads, state, optax.apply_updates(weights, updates))
    share = float(read_grad_stats(state)["changed_weights"])
    assert 0.05 < share < 0.5 and share == pytest.approx(changed.mean(), abs=0.03)


def test_float32_weights_are_updated_as_before():
    """The traced update is the same with and without stochastic rounding, that is, optax.adamw."""
    weights = random_weights("float32")

    def program(**options):
        optimizer = make_optimizer(1e-3, weight_decay=0.1, **options)
        return str(jax.make_jaxpr(optimizer.update)(weights, optimizer.init(weights), weights))

    assert program() == program(stochastic_rounding=False)


def test_mixed_weights():
    """In a model that has bfloat16 weights too, float32 weights follow optax.adamw."""
    weights = {"a": jnp.ones(64, "bfloat16"), "b": jnp.linspace(-1, 1, 64)}
    grads = jax.tree.map(lambda w: jnp.linspace(0.5, 1, 64).astype(w.dtype), weights)
    results = [
        optax.apply_updates(weights, optimizer.update(grads, optimizer.init(weights), weights)[0])
        for optimizer in (stochastic_adamw(1e-3), optax.adamw(1e-3, weight_decay=0.0))
    ]
    np.testing.assert_allclose(results[0]["b"], results[1]["b"], rtol=1e-6)
    assert results[0]["b"].dtype == jnp.float32 and results[0]["a"].dtype == jnp.bfloat16


def test_missing_weights_are_refused():
    optimizer, weights = stochastic_adamw(1e-3), jnp.ones(2, "bfloat16")
    with pytest.raises(ValueError, match="params is None"):
        optimizer.update(weights, optimizer.init(weights))


def test_train_state_warns_about_lost_updates():
    """About bfloat16 weights with an optimizer that is neither ours nor has float32 masters, and not for abstract models."""
    narrow = Qwen2VL.init(Qwen2VLConfig.tiny())
    with pytest.warns(UserWarning, match="updates below 1/512 of a weight are lost") as caught:
        TrainState.create(narrow, optax.adamw(1e-5))
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="make_optimizer rounds stochastically"):
        TrainState.create(narrow, optax.sgd(1e-5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in (make_optimizer(1e-5), stochastic_adamw(1e-5), with_master_weights(optax.adamw(1e-5))):
            TrainState.create(narrow, optimizer)
        jax.eval_shape(lambda model: TrainState.create(model, optax.adamw(1e-5)), narrow)
        TrainState.create(jax.tree.map(lambda w: w.astype("float32"), narrow), optax.sgd(1e-5))
