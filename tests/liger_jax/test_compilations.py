"""Counts compilations: a second batch in the same bucket compiles nothing, even if its images have other sizes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from liger_jax import TrainState, generate, loss_fn, make_train_step, prepare
from liger_jax.generation import loop
from liger_jax.model import decode_layout
from liger_jax.model.sharding import make_mesh, param_shardings
from tests._support import parity

CONFIG = parity.config()
COMPILED = "/jax/core/compile/backend_compile_duration"
events: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def listener():
    """Records each compilation that JAX reports. It is never removed, which would require private functions of JAX."""
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))


@contextlib.contextmanager
def compilations(expected):
    """Checks the number of programs that the block compiles; None expects at least one."""
    start = len(events)
    yield
    count = events[start:].count(COMPILED)
    if expected is None:
        assert count > 0, "nothing was compiled: the counter does not work"
    else:
        assert count == expected, f"{count} programs were compiled, expected {expected}"


def conversation(*grids, words, rows=2):
    """Returns a batch of sequences of different lengths, each with one image per grid."""
    rng = np.random.default_rng(len(grids) + words)
    ids = [5] * words
    for grid in grids:
        ids += [CONFIG.image_token_id] * (int(np.prod(grid)) // 4) + [6]
    lengths = [len(ids) - row for row in range(rows)]
    input_ids = np.array([ids[row:] + [150] * row for row in range(rows)])
    mask = np.array([[1] * n + [0] * (len(ids) - n) for n in lengths])
    count = rows * sum(int(np.prod(grid)) for grid in grids)
    return prepare(
        CONFIG,
        input_ids=input_ids,
        attention_mask=mask,
        labels=np.where(mask == 1, input_ids, -100),
        image_grid_thw=np.array(list(grids) * rows),
        pixel_values=rng.normal(size=(count, 1176)).astype(np.float32),
    )


FIRST = conversation([1, 4, 4], words=9)
SECOND = conversation([1, 2, 14], words=40)
OTHER_BUCKET = conversation([1, 4, 4], words=90)


def test_model():
    forward = jax.jit(lambda model, batch: model(batch))
    with compilations(None):
        forward(parity.model(), FIRST)
    with compilations(0):
        forward(parity.model(), SECOND)
    with compilations(None):
        forward(parity.model(), OTHER_BUCKET)


def test_train_step():
    state = TrainState.create(jax.tree.map(jnp.copy, parity.model()), optax.adamw(1e-4))
    step = make_train_step()
    with compilations(None):
        state, _ = step(state, FIRST)
    with compilations(0):
        for batch in (SECOND, FIRST):
            state, _ = step(state, batch)


def test_generate():
    """Other end tokens, or a few more new tokens, compile nothing either."""
    model = parity.model()
    with compilations(None):
        generate(model, FIRST, max_new_tokens=8)
    with compilations(0):
        generate(model, SECOND, max_new_tokens=8)
        generate(model, SECOND, max_new_tokens=8, eos_token_id=[3, 4, 5], pad_token_id=9)
    with compilations(0):
        generate(model, SECOND, max_new_tokens=11)


def test_generate_on_a_mesh(monkeypatch):
    """Laying out the weights for decoding, too, compiles once."""
    monkeypatch.setattr(decode_layout, "SMALLEST_SAVING", 0)
    mesh = make_mesh(data=2, tensor=2)
    model = jax.device_put(parity.model(), param_shardings(parity.model(), mesh))
    with compilations(None):
        generate(model, FIRST, max_new_tokens=8)
    with compilations(0):
        generate(model, SECOND, max_new_tokens=8)


def test_more_new_tokens():
    """Room for more tokens requires another cache and another loop, but prefill is not compiled again."""
    generate(parity.model(), FIRST, max_new_tokens=8)
    programs = loop.prefill._cache_size()
    with compilations(None):
        generate(parity.model(), FIRST, max_new_tokens=loop.NEW_TOKENS + 1)
    assert loop.prefill._cache_size() == programs


def test_sampling():
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 10, "top_p": 0.9}
    generate(parity.model(), FIRST, **options)
    with compilations(0):
        generate(parity.model(), SECOND, **options | {"top_k": 20, "top_p": 0.5, "temperature": 0.7, "seed": 3})


def test_fifty_requests():
    """Different lengths, images, padding and options compile at most one program per function, bucket and batch size."""
    rng = np.random.default_rng(0)
    functions = ("prefill", "first_token_logits", "init_cache", "init_decode_state", "decode_loop")
    buckets = {function: set() for function in functions} | {"_pack_layer": {parity.model}}
    requests = []
    for _ in range(50):
        rows, longest = int(rng.integers(1, 3)), int(rng.integers(20, 120))
        lengths = rng.integers(12, longest + 1, rows)
        ids, mask, grids = np.full((rows, longest), 150), np.zeros((rows, longest), int), []
        for b, length in enumerate(lengths):
            positions = slice(longest - length, None) if rng.random() < 0.5 else slice(length)
            ids[b, positions], mask[b, positions] = rng.integers(3, 150, length), 1
            for i in range(int(rng.integers(0, 3))):
                grid = [1, 2 * int(rng.integers(1, 3)), 2 * int(rng.integers(1, 3))]
                start = positions.start or 0
                ids[b, start + 6 * i : start + 6 * i + np.prod(grid) // 4] = CONFIG.image_token_id
                grids.append(grid)
        images = {}
        if grids:
            pixels = rng.normal(size=(int(np.prod(grids, axis=1).sum()), 1176)).astype(np.float32)
            images = {"image_grid_thw": np.array(grids), "pixel_values": pixels}
        batch = prepare(CONFIG, input_ids=ids, attention_mask=mask, **images)
        for function in functions:
            image_shapes = str(jax.tree.map(np.shape, batch.vision)) if function == "prefill" else None
            buckets[function].add((batch.shape, image_shapes))
        options = {
            "max_new_tokens": int(rng.integers(5, 9)),
            "min_new_tokens": int(rng.integers(1, 4)),
            "eos_token_id": rng.integers(0, 150, rng.integers(1, 4)),
            "temperature": rng.uniform(0.5, 2),
            "top_k": int(rng.integers(2, 100)),
            "top_p": rng.uniform(0.1, 1),
            "min_p": rng.uniform(0, 0.1),
            "repetition_penalty": rng.uniform(1.01, 1.5),
            "bad_words_ids": rng.integers(0, 150, (rng.integers(1, 4), rng.integers(2, 4))),
            "seed": int(rng.integers(100)) if rng.random() < 0.5 else rng.integers(0, 100, rows),
        }
        requests.append((batch, options))
    start = len(events)
    for batch, options in requests:
        generate(parity.model(), batch, do_sample=True, **options)
    assert 0 < events[start:].count(COMPILED) <= sum(map(len, buckets.values()))


@pytest.mark.parametrize(
    "kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=lambda kind: kind.name
)
def test_calls_outside_of_jit_on_a_mesh(kind):
    """They are compiled as a whole, once for all models and batches of the same shapes."""
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(kind,), devices=jax.devices()[:2])
    one, other = (jax.device_put(parity.model(), param_shardings(parity.model(), mesh)) for _ in range(2))
    with compilations(None):
        one(FIRST), loss_fn(one, FIRST)
    with compilations(0):
        other(FIRST), loss_fn(other, FIRST)
