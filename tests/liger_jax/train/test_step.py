"""The training step does what its pieces promise: the gradient of the whole batch, however it is computed, and an update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert import to_hf_state
from liger_jax import TrainState, loss_fn, make_train_step
from liger_jax.inputs.batch import IGNORE
from liger_jax.train.step import AUTO, gradients, next_token_labels
from tests._support import parity

SCENARIO = "batch_left"
RATE = 0.25
OPTIMIZER = optax.sgd(RATE, momentum=0.5)  # whose first update is the gradient


@functools.cache
def step_of(**options):
    """Compiled steps, shared by the tests of this file."""
    return make_train_step(**options)


WAYS = [{"remat": "dots"}, {"remat": "full", "accumulate": 2}, {"remat": "attention", "unroll": True}]


def fresh_state(model=None):
    """The step takes its state's memory: each test gets weights of its own."""
    return TrainState.create(jax.tree.map(jnp.copy, model or parity.model()), OPTIMIZER)


def batch(**changes):
    return dataclasses.replace(parity.batch(SCENARIO), **changes)


def uneven_labels():
    """Seven trained tokens in one row, two in the other: a mean of the rows' means is not the mean of the tokens."""
    labels = batch().labels.copy()
    labels[1, np.flatnonzero(labels[1] != IGNORE)[:-2]] = IGNORE
    return labels


def change(after, *, before=None):
    """What was subtracted from the weights, divided by the rate: {hub name: gradient}."""
    before, after = to_hf_state(before or parity.model()), to_hf_state(after)
    return {key: (before[key] - after[key]) / RATE for key in after}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_update_is_the_gradient(way):
    """Whatever is kept for the backward pass, and in parts or not: the gradient that transformers computes."""
    state, metrics = step_of(**way)(fresh_state(), batch())
    assert int(state.step) == 1
    parity.assert_near(metrics["loss"], parity.expected(SCENARIO, "loss"), what="loss")
    assert metrics["num_tokens"] == 14
    found = change(state.model)
    for key, value in parity.expected_gradients(SCENARIO).items():
        rounding = np.finfo(np.float32).eps * np.abs(to_hf_state(parity.model())[key]).max() / RATE
        scale = np.abs(value).max()
        parity.assert_near(found[key], value, tolerance=parity.TOLERANCE + 2 * rounding / scale, what=key)


def test_accumulation_weighs_tokens_not_parts():
    """Parts with different numbers of trained tokens: metrics and update equal those of the whole batch."""
    uneven = batch(labels=uneven_labels())
    (whole, whole_metrics), (parts, parts_metrics) = (step_of(**way)(fresh_state(), uneven) for way in WAYS[:2])
    assert whole_metrics.keys() == parts_metrics.keys() == {"loss", "num_tokens", "accuracy"}
    assert whole_metrics["num_tokens"] == parts_metrics["num_tokens"] == 9
    for key, value in whole_metrics.items():
        np.testing.assert_allclose(parts_metrics[key], value, rtol=1e-5, err_msg=key)
    found, wanted = to_hf_state(parts.model), to_hf_state(whole.model)
    for key, value in wanted.items():
        parity.assert_near(found[key], value, tolerance=1e-5, what=key)


def test_what_is_computed_again():
    """narrow makes the products into the MLPs' hidden sizes again (gate, up, fc1); attention all others of a layer, too."""

    def products(remat):
        grads = functools.partial(gradients, num_items=None, remat=remat)
        return str(jax.make_jaxpr(grads)(parity.model(), batch())).count("dot_general[")

    dots, narrow, attention, full = (products(remat) for remat in AUTO)
    assert narrow == dots + 3 and attention > narrow and full >= attention


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nothing_to_train(way):
    """All labels ignored: loss 0, gradient 0, no NaN. transformers gives NaN."""
    state, metrics = step_of(**way)(fresh_state(), batch(labels=np.full_like(batch().labels, IGNORE)))
    assert {key: float(value) for key, value in metrics.items()} == {"loss": 0, "num_tokens": 0, "accuracy": 0}
    assert not any(value.any() for value in change(state.model).values())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_ignored_row_changes_nothing(way):
    """With the second row's labels ignored, one part of the accumulation has nothing to train."""
    labels = batch().labels.copy()
    labels[1] = IGNORE
    state, metrics = step_of(**way)(fresh_state(), batch(labels=labels))
    assert metrics["num_tokens"] == 7
    assert np.isfinite(float(metrics["loss"]))
    assert all(np.isfinite(value).all() for value in change(state.model).values())


def test_overfits_one_batch():
    """Twenty steps on the same two answers: the loss falls to a tenth, and the answers are learnt."""
    state, losses = fresh_state(), []
    for _ in range(20):
        state, metrics = step_of(**WAYS[0])(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.1 * losses[0]
    assert float(metrics["accuracy"]) == 1
    assert int(state.step) == 20


def test_the_state_is_donated():
    """The old state's arrays are gone after the step: a run needs memory for one state, not two."""
    state = fresh_state()
    weights = jax.tree.leaves(state.model)
    step_of(**WAYS[0])(state, batch())
    assert all(weight.is_deleted() for weight in weights)


def test_the_optimizer_remembers():
    """Momentum: a second step goes further than one of a fresh optimizer from the same weights, by half of the first."""
    once, _ = step_of(**WAYS[0])(fresh_state(), batch())
    middle = jax.tree.map(jnp.copy, once.model)
    twice, _ = step_of(**WAYS[0])(once, batch())
    forgetful, _ = step_of(**WAYS[0])(fresh_state(middle), batch())
    first, found = change(middle), change(twice.model, before=forgetful.model)
    for key, value in first.items():
        np.testing.assert_allclose(found[key], 0.5 * value, atol=1e-4 * np.abs(value).max() + 1e-5, err_msg=key)


def test_targets():
    """Labels move one column to the left, within their sequence."""
    packed = parity.batch("packed_text_batch_left")
    packed = dataclasses.replace(packed, labels=packed.input_ids)
    targets = np.asarray(next_token_labels(packed))
    last = np.flatnonzero(np.diff(packed.segment_ids[0], append=0))
    assert (targets[0, last] == IGNORE).all()
    inside = np.setdiff1d(np.flatnonzero(packed.segment_ids[0]), last)
    np.testing.assert_array_equal(targets[0, inside], packed.input_ids[0, inside + 1])
    assert (targets[0, packed.segment_ids[0] == 0] == IGNORE).all()


@pytest.mark.parametrize(
    ("options", "message"), [({"remat": "some"}, "remat is 'some'"), ({"accumulate": 0}, "accumulate is 0")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_train_step(**options)


def test_no_labels():
    """Before anything is compiled, and with the state still usable."""
    state = fresh_state()
    with pytest.raises(ValueError, match="labels"):
        make_train_step()(state, batch(labels=None))
    with pytest.raises(ValueError, match="labels"):
        loss_fn(state.model, batch(labels=None))
    assert not jax.tree.leaves(state.model)[0].is_deleted()
