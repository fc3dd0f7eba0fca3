"""A second batch in the same bucket compiles nothing, whatever the sizes of its pictures: counted, not timed."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from liger_jax import TrainState, generate, make_train_step, prepare
from tests import parity

CONFIG = parity.config()
COMPILED = "/jax/core/compile/backend_compile_duration"
events: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def listener():
    """jax reports each compilation. Listeners cannot be taken off again without private functions; this one only counts."""
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))


@contextlib.contextmanager
def compilations(expected):
    start = len(events)
    yield
    found = events[start:].count(COMPILED)
    if expected is None:
        assert found > 0, "nothing was compiled: the counter does not work"
    else:
        assert found == expected, f"{found} programs were compiled, expected {expected}"


def conversation(*grids, words, rows=2):
    """Rows with one picture for each grid; another number of words in each."""
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
    """Nor do other end tokens, a few more or fewer new tokens, or another seed."""
    model = parity.model()
    with compilations(None):
        generate(model, FIRST, max_new_tokens=8)
    with compilations(0):
        generate(model, SECOND, max_new_tokens=8)
        generate(model, SECOND, max_new_tokens=8, eos_token_id=[3, 4, 5], pad_token_id=9)
    with compilations(0):
        generate(model, SECOND, max_new_tokens=11)


def test_sampling():
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 10, "top_p": 0.9}
    generate(parity.model(), FIRST, **options)
    with compilations(0):
        generate(parity.model(), SECOND, **options | {"top_k": 20, "top_p": 0.5, "temperature": 0.7, "seed": 3})
