"""The training step applies the optimizer's update to the gradient of the whole batch, however that is computed."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import liger_jax.train.step as step_module
from convert import to_hf_state
from liger_jax import QwenVL, QwenVLConfig, TrainState, loss_fn, make_train_step
from liger_jax.errors import UserError
from liger_jax.inputs.batch import IGNORE
from liger_jax.model.params import param_paths
from liger_jax.model.remat import REMAT
from liger_jax.model.sharding import make_mesh, param_shardings
from liger_jax.options import LayerExecution
from liger_jax.train.loss import next_token_labels
from liger_jax.train.memory import least_temporaries, sample_row
from liger_jax.train.optimizer import make_optimizer
from liger_jax.train.step import AUTO_REMAT, TrainStep, gradients, train_step, used_gradients
from pallas_kernels import _fa4
from tests._support import parity
from tests._support.lowered import count_calls

SCENARIO = "batch_left"
RATE = 0.25
METRICS = {"loss", "num_tokens", "accuracy", "grad_norm", "skipped_update"}
OPTIMIZER = optax.sgd(RATE, momentum=0.5)  # its first update is the gradient


shared_train_step = functools.cache(make_train_step)  # compiled once for all tests of this file
VARIANTS = [
    {"remat": "dots"},
    {"remat": "full", "accumulate": 2},
    {"remat": "attention", "unroll": "all"},
    {"unroll": "none"},
]


def fresh_state(model=None):
    """Returns a state with its own copy of the weights, because the step donates them."""
    return TrainState.create(jax.tree.map(jnp.copy, model or parity.model()), OPTIMIZER)


def batch(**changes):
    return dataclasses.replace(parity.batch(SCENARIO), **changes)


def uneven_labels():
    """Returns labels with seven trained tokens in one sequence and two in the other, so that their means differ."""
    labels = batch().labels.copy()
    labels[1, np.flatnonzero(labels[1] != IGNORE)[:-2]] = IGNORE
    return labels


def applied_gradient(new_model, *, old_model=None):
    """Returns the change of the weights, divided by the learning rate: {hub name: gradient}."""
    old, new = to_hf_state(old_model or parity.model()), to_hf_state(new_model)
    return {key: (old[key] - new[key]) / RATE for key in new}


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_update_equals_the_gradient_of_transformers(options):
    """With any rematerialization, with and without accumulation."""
    state, metrics = shared_train_step(**options)(fresh_state(), batch())
    assert int(state.step) == 1
    parity.assert_near(metrics["loss"], parity.expected(SCENARIO, "loss"), name="loss")
    assert metrics["num_tokens"] == 14
    update = applied_gradient(state.model)
    for key, value in parity.expected_gradients(SCENARIO).items():
        rounding = np.finfo(np.float32).eps * np.abs(to_hf_state(parity.model())[key]).max() / RATE
        scale = np.abs(value).max()
        parity.assert_near(update[key], value, tolerance=parity.TOLERANCE + 2 * rounding / scale, name=key)


def test_policies_that_cannot_fit_are_not_compiled(monkeypatch):
    """By their activations; those of a frozen tower do not count. The last policy is compiled without a check."""
    tried = []
    monkeypatch.setattr(TrainStep, "_compile_choice", lambda *args: tried.append(args[-2]))
    monkeypatch.setattr(step_module, "_fits_memory", lambda compiled: True)
    state, frozen = (
        TrainState.create(parity.model(), make_optimizer(1e-3, freeze=parts)) for parts in ((), ("vision", "merger"))
    )

    def least(state, remat):
        trained = step_module.reads_gradients(state)
        temporaries = least_temporaries(state.model, batch(), remat=remat, is_trained=trained, by_device=False)
        return temporaries + sum(x.nbytes for x in jax.tree.leaves((state, batch())))

    sizes = [least(state, remat) for remat in AUTO_REMAT]
    assert sizes == sorted(set(sizes), reverse=True) and least(frozen, "dots") < sizes[0]
    for limit, expected in ((sizes[0], "dots"), (sizes[1], "narrow"), (sizes[2], "attention"), (sizes[3] - 1, "full")):
        monkeypatch.setattr(step_module, "_memory_limit", lambda limit=limit: limit)
        make_train_step().compile(state, batch())
        assert tried.pop() == expected and not tried


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_choice_of_a_policy_reads_the_optimizer_as_the_step_does(kind, monkeypatch):
    """Regression: on GPUs, the check of memory ran the optimizer's update on Explicit axes, or without the mesh it names."""

    def update(grads, state, params=None):
        grads = jax.tree.map(lambda x, total: x * jnp.vdot(total, total), grads, state)  # sums over sharded dimensions
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), grads), state

    tried = []
    monkeypatch.setattr(TrainStep, "_compile_choice", lambda *args: tried.append(args[-2:]))
    monkeypatch.setattr(step_module, "_fits_memory", lambda compiled: True)
    monkeypatch.setattr(step_module, "_memory_limit", lambda: 2**40)
    monkeypatch.setattr(step_module, "most_temporaries", lambda *_: 2**40)  # so that the check is made
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(kind,), devices=jax.devices()[:2])
    model = jax.device_put(parity.model(), param_shardings(parity.model(), mesh))
    optimizer = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    state = TrainState.create(model, optimizer)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for arguments in (state, shapes):
        make_train_step().compile(arguments, batch())
        assert tried.pop() == ("dots", True)


def test_policy_that_surely_fits_is_not_checked(monkeypatch):
    """The check traces the model and the optimizer, which takes as long as tracing the step."""
    tried = []
    monkeypatch.setattr(TrainStep, "_compile_choice", lambda *args: tried.append(args[-2]))
    monkeypatch.setattr(step_module, "_fits_memory", lambda compiled: True)
    monkeypatch.setattr(step_module, "least_temporaries", lambda *args, **options: pytest.fail("it was checked"))
    monkeypatch.setattr(step_module, "_memory_limit", lambda: 2**40)
    make_train_step().compile(TrainState.create(parity.model(), make_optimizer(1e-3)), batch())
    assert tried == ["dots"]


def test_optimizer_may_require_whether_the_gradients_are_finite():
    """Regression: the step found out which gradients the optimizer reads without passing `finite`."""

    def update(grads, state, params=None, *, finite):
        return jax.tree.map(lambda x: jnp.where(finite, -0.01 * x, 0), grads), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    state = TrainState.create(jax.tree.map(jnp.copy, parity.model()), optimizer)
    _, metrics = make_train_step()(state, batch())
    assert np.isfinite(metrics["loss"]) and metrics["skipped_update"] == 0


def test_accumulation_weights_tokens_equally():
    """With different numbers of trained tokens in the parts, metrics and update equal those of the whole batch."""
    uneven = batch(labels=uneven_labels())
    (whole, whole_metrics), (parts, parts_metrics) = (
        shared_train_step(**options)(fresh_state(), uneven) for options in VARIANTS[:2]
    )
    assert whole_metrics.keys() == parts_metrics.keys() == METRICS
    assert whole_metrics["num_tokens"] == parts_metrics["num_tokens"] == 9
    for key, value in whole_metrics.items():
        np.testing.assert_allclose(parts_metrics[key], value, rtol=1e-5, err_msg=key)
    accumulated = to_hf_state(parts.model)
    for key, value in to_hf_state(whole.model).items():
        parity.assert_near(accumulated[key], value, tolerance=1e-5, name=key)


def test_recomputed_matmuls():
    """narrow recomputes the matmuls into the MLPs' hidden sizes (gate, up, fc1); attention all matmuls of a layer."""

    def count_matmuls(remat):
        grads = functools.partial(gradients, num_items=None, execution=LayerExecution(remat))
        return str(jax.make_jaxpr(grads)(parity.model(), batch())).count("dot_general[")

    dots, narrow, attention, full = (count_matmuls(remat) for remat in AUTO_REMAT)
    assert narrow == dots + 3 and attention > narrow and full >= attention


@pytest.mark.skipif(importlib.util.find_spec("fa4_jax") is None, reason="fa4-jax is not installed")
@pytest.mark.parametrize("unroll", ["none", "all"])
@pytest.mark.parametrize("remat", REMAT)
def test_forward_kernels_run_once(remat, unroll, monkeypatch):
    """No policy but "full" runs FlashAttention-4's forward kernels again in the backward pass."""
    monkeypatch.setattr(_fa4._pallas, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(_fa4, "import_problem", lambda: None)
    monkeypatch.setattr(_fa4, "BACKEND", "reference")
    config = QwenVLConfig.tiny()
    shapes = jax.eval_shape(lambda: QwenVL.init(config, dtype="bfloat16")), sample_row(config, length=256, patches=256)
    grads = functools.partial(gradients, num_items=None, execution=LayerExecution(remat, unroll))
    layers = config.text.num_hidden_layers + config.vision.depth
    assert count_calls("fa4_vjp", grads, *shapes) == layers
    assert count_calls("fa4_fwd", grads, *shapes) == layers * (2 if remat == "full" else 1)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_batch_without_trained_tokens(options):
    """Loss and gradient are 0, not NaN as in transformers."""
    state, metrics = shared_train_step(**options)(fresh_state(), batch(labels=np.full_like(batch().labels, IGNORE)))
    assert {key: float(value) for key, value in metrics.items()} == dict.fromkeys(METRICS, 0)
    assert not any(value.any() for value in applied_gradient(state.model).values())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_sequence_without_trained_tokens(options):
    """One part of the accumulation has no trained token; loss and gradient stay finite."""
    labels = batch().labels.copy()
    labels[1] = IGNORE
    state, metrics = shared_train_step(**options)(fresh_state(), batch(labels=labels))
    assert metrics["num_tokens"] == 7
    assert np.isfinite(float(metrics["loss"]))
    assert all(np.isfinite(value).all() for value in applied_gradient(state.model).values())


def test_overfits_one_batch():
    """In twenty steps on the same two answers, the loss falls to a tenth and the answers are learnt."""
    state, losses = fresh_state(), []
    for _ in range(20):
        state, metrics = shared_train_step(**VARIANTS[0])(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.1 * losses[0]
    assert float(metrics["accuracy"]) == 1
    assert int(state.step) == 20


def test_compilations_are_reported():
    """Each compilation is one line, which explains the choices; a second batch of the same shape compiles nothing."""
    step, lines = make_train_step(), []
    step.report = lines.append
    state, _ = step(fresh_state(), batch())
    step(state, batch())
    (line,) = lines
    rows, length = batch().shape
    patches = batch().vision.pixel_values.shape[1]
    assert re.fullmatch(
        rf"compiled the training step for {rows} x {length} tokens with {patches} patches each in \d+ s: "
        r"remat dots \(the fastest that fits in memory\), unrolled layers: vision \(unrolling all pays off from 2,000 steps "
        r"of one batch shape\)",
        line,
    )


@pytest.mark.parametrize(
    "options, reason",
    [({}, " (none fits in memory; this one needs the least)"), ({"remat": "full"}, " (does not fit in memory)")],
)
def test_policy_that_does_not_fit_is_reported(options, reason, monkeypatch):
    """Regression: the report called the last policy the fastest that fits in memory, also if it did not fit."""
    monkeypatch.setattr(TrainStep, "_compile_choice", lambda *_: None)
    monkeypatch.setattr(step_module, "_fits_memory", lambda compiled: False)
    step, lines = make_train_step(**options), []
    step.report = lines.append
    step.compile(fresh_state(), batch())
    assert f"remat full{reason}, unrolled layers: none (with remat full, a scan needs less memory)" in lines[0]


@pytest.mark.parametrize(
    "options, fits, remat, unrolled",
    [
        ({}, True, "dots", "vision"),
        ({"long_run": True}, True, "dots", "all"),
        ({"long_run": True}, False, "full", "none"),
        ({"long_run": True, "remat": "full"}, True, "full", "none"),
        ({"long_run": True, "unroll": "none"}, True, "dots", "none"),
        ({"unroll": "all"}, False, "full", "all"),
    ],
)
def test_layers_to_unroll_are_chosen_for_the_chosen_policy(options, fits, remat, unrolled, monkeypatch):
    """Regression: a long run unrolled all layers also where only remat "full", the policy with the least memory, fits."""
    executions, lines = [], []
    monkeypatch.setattr(step_module, "_flat_train_step", lambda *_, execution, **__: executions.append(execution))
    monkeypatch.setattr(step_module, "_fits_memory", lambda compiled: fits)
    step = make_train_step(**options)
    step.report = lines.append
    step.compile(fresh_state(), batch())
    assert executions[-1] == LayerExecution(remat, unrolled)
    reason = "" if "unroll" in options else f" ({step_module.UNROLL_REASONS[unrolled]})"
    assert lines[0].endswith(f"unrolled layers: {unrolled}{reason}")


def test_state_is_donated():
    """The step deletes the old state's arrays: a run needs memory for one state, not two."""
    state = fresh_state()
    weights = jax.tree.leaves(state.model)
    shared_train_step(**VARIANTS[0])(state, batch())
    assert all(weight.is_deleted() for weight in weights)


def test_optimizer_state_is_carried_over():
    """With momentum, a second step exceeds that of a fresh optimizer from the same weights by half of the first step."""
    once, _ = shared_train_step(**VARIANTS[0])(fresh_state(), batch())
    middle = jax.tree.map(jnp.copy, once.model)
    twice, _ = shared_train_step(**VARIANTS[0])(once, batch())
    without_momentum, _ = shared_train_step(**VARIANTS[0])(fresh_state(middle), batch())
    first, extra = applied_gradient(middle), applied_gradient(twice.model, old_model=without_momentum.model)
    for key, value in first.items():
        np.testing.assert_allclose(extra[key], 0.5 * value, atol=1e-4 * np.abs(value).max() + 1e-5, err_msg=key)


def test_next_token_labels():
    """Labels shift one position to the left within their sequence."""
    packed = parity.batch("packed_text_batch_left")
    packed = dataclasses.replace(packed, labels=packed.input_ids)
    targets = np.asarray(next_token_labels(packed))
    last = np.flatnonzero(np.diff(packed.segment_ids[0], append=0))
    assert (targets[0, last] == IGNORE).all()
    inside = np.setdiff1d(np.flatnonzero(packed.segment_ids[0]), last)
    np.testing.assert_array_equal(targets[0, inside], packed.input_ids[0, inside + 1])
    assert (targets[0, packed.segment_ids[0] == 0] == IGNORE).all()


def poisoned_batch():
    """Returns a batch of the usual shape with an infinite pixel in its first image."""
    vision = batch().vision
    pixels = np.array(vision.pixel_values)
    pixels[0, 0, 0] = np.inf
    return batch(vision=dataclasses.replace(vision, pixel_values=pixels))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_step_that_is_not_finite_changes_nothing(options):
    """Regression: NaN reached weights and optimizer. Only the step advances; the next update is as if it had not been."""
    step = shared_train_step(**options)
    state, _ = step(fresh_state(), batch())
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, poisoned_batch())
    assert not np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"]) and metrics["skipped_update"] == 1
    assert int(state.step) == 2
    assert_same_bits((state.model, state.opt_state), (before.model, before.opt_state))
    expected, expected_metrics = step(jax.tree.map(jnp.asarray, before), batch())
    state, metrics = step(state, batch())
    assert_same_bits((state.model, state.opt_state, metrics), (expected.model, expected.opt_state, expected_metrics))
    assert metrics["skipped_update"] == 0 and metrics["grad_norm"] > 0


def assert_same_bits(actual, expected):
    for (path, a), b in zip(param_paths(actual).items(), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


PARTS = {
    "language_model": {"layers": {"self_attn": {"q_proj": {"kernel": (2, 32, 4, 16)}}}},
    "visual": {"patch_embed": {"kernel": (24, 8)}},
}
OPTIMIZERS = {
    "default": (make_optimizer(1e-3, weight_decay=0.1), "bfloat16"),
    "no clipping": (make_optimizer(1e-3, max_grad_norm=None), "bfloat16"),
    "master weights": (make_optimizer(1e-3, master_weights=True), "bfloat16"),
    "float32": (make_optimizer(1e-3), "float32"),
    "frozen": (make_optimizer(1e-3, freeze=["vision"]), "bfloat16"),
    "adamw": (optax.adamw(1e-3), "float32"),
    "schedule and accumulation": (optax.MultiSteps(optax.adam(optax.linear_schedule(1, 0, 9)), 2), "float32"),
    "sign": (optax.lion(1e-3), "float32"),
}


@functools.cache
def part_state(name, sharded=False):
    """Returns a state of a few weights, and a jitted step in which the batch is the gradient and the loss."""
    optimizer, dtype = OPTIMIZERS[name]
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), PARTS, is_leaf=lambda x: isinstance(x, tuple)
    )
    if sharded:
        weights = jax.device_put(weights, param_shardings(weights, make_mesh(fsdp=2, tensor=2)))
    state = TrainState(jnp.zeros((), jnp.int32), weights, jax.jit(optimizer.init)(weights), optimizer)

    def step(state, text, vision, loss):
        def gradients(model, *_, **options):
            fill = {"language_model": text, "visual": vision}
            grads = {part: jax.tree.map(lambda w, x=fill[part]: jnp.full_like(w, x), model[part]) for part in model}
            return grads, {"loss": loss}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_module, "gradients", gradients)
            return train_step(state, None, accumulate=1, execution=LayerExecution())

    return state, jax.jit(step)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_skips_the_update(name, sharded):
    """A NaN or infinity in the loss or in the gradient of any part leaves all weights, moments, masters and counts alone."""
    state, step = part_state(name, sharded)
    for text, vision, loss in ((0.1, 0.2, 1.0), (0.3, -0.1, 1.0), (0.1, 0.1, 1.0)):
        state, metrics = step(state, text, vision, loss)
        assert metrics["skipped_update"] == 0
    moved = [
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (state.model, part_state(name)[0].model)), strict=True)
    ]
    assert moved == [True, name != "frozen"]
    finite = step(state, 0.1, 0.2, 1.0)
    for bad in ((np.nan, 0.1, 1.0), (np.inf, 0.1, 1.0), (0.1, -np.inf, 1.0), (0.1, 0.1, np.nan), (0.1, 0.1, np.inf)):
        if name == "frozen" and np.isinf(bad[1]):
            assert step(state, *bad)[1]["skipped_update"] == 0  # the gradient of a frozen part does not matter
            continue
        skipped, metrics = step(state, *bad)
        assert metrics["skipped_update"] == 1
        assert_same_bits((skipped.model, skipped.opt_state), (state.model, state.opt_state))
        assert_same_bits(step(skipped, 0.1, 0.2, 1.0)[0].model, finite[0].model)


def test_only_used_gradients_count():
    """Those of parts that a user's optimizer freezes are neither in the norm nor computed."""
    freeze = optax.masked(optax.set_to_zero(), {"language_model": False, "visual": True})
    optimizer = optax.chain(freeze, optax.adamw(1e-3))
    weights = part_state("adamw")[0].model
    state = TrainState(jnp.zeros((), jnp.int32), weights, optimizer.init(weights), optimizer)
    (used,) = used_gradients(state, weights)
    assert used is weights["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"]


def test_skipping_needs_no_memory(monkeypatch):
    """With the default optimizer, the compiled update has no more temporary memory and no copies of weights."""
    optimizer, shape = make_optimizer(1e-3), jax.ShapeDtypeStruct((64, 128, 128), jnp.bfloat16)
    weights = {"language_model": {"layers": {"self_attn": {"q_proj": {"kernel": shape}}}}}

    def compile_update(*, skips):
        def gradients(model, batch, *_, **options):
            return jax.lax.optimization_barrier(jax.tree.map(lambda w: jnp.sin(w * batch), model)), {"loss": batch}

        monkeypatch.setattr(step_module, "gradients", gradients)
        if not skips:
            monkeypatch.setattr(step_module, "_select", lambda finite, new, old: new)

        def step(state, batch):
            return train_step(state, batch, accumulate=1, execution=LayerExecution())

        opt_state = jax.eval_shape(optimizer.init, weights)
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), weights, opt_state, optimizer)
        return jax.jit(step, donate_argnums=0).lower(state, jax.ShapeDtypeStruct((), jnp.bfloat16)).compile()

    skipping, plain = compile_update(skips=True), compile_update(skips=False)
    more = skipping.memory_analysis().temp_size_in_bytes - plain.memory_analysis().temp_size_in_bytes
    assert more < 0.01 * 2 * shape.size
    assert "[64,128,128]{2,1,0} copy(" not in skipping.as_text()


@pytest.mark.parametrize(
    ("options", "message"), [({"remat": "some"}, "remat is 'some'"), ({"accumulate": 0}, "accumulate is 0")]
)
def test_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        make_train_step(**options)


def test_batch_without_labels():
    """It is rejected before anything is compiled, and the state remains usable."""
    state = fresh_state()
    with pytest.raises(UserError, match="labels"):
        make_train_step()(state, batch(labels=None))
    with pytest.raises(UserError, match="labels"):
        loss_fn(state.model, batch(labels=None))
    assert not jax.tree.leaves(state.model)[0].is_deleted()
