"""make_optimizer: learning rates per part, frozen parts, weight decay, clipping, and statistics for the log."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState, make_train_step, prepare
from liger_jax.checkpoint import restore_state, save_state
from liger_jax.model.lora import add_lora
from liger_jax.model.params import PARTS, find_row, param_group, param_paths
from liger_jax.options import Optimization
from liger_jax.train.optimizer import build_optimizer, make_optimizer, read_grad_stats, warmup_cosine

CONFIG = Qwen2VLConfig.tiny()


@pytest.fixture(scope="module")
def model():
    return Qwen2VL.init(CONFIG, dtype="float32")


def updated(model, optimizer, gradient=1.0):
    """Returns {path: update} of one step with the same gradient everywhere."""
    grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), model)

    @jax.jit
    def step(model, grads):
        return optimizer.update(grads, optimizer.init(model), model)[0]

    return {path: np.asarray(change) for path, change in param_paths(step(model, grads)).items()}


def batch_with_an_image():
    ids = np.full((1, 12), 7)
    ids[0, 1], ids[0, 2:6], ids[0, 6] = CONFIG.vision_start_token_id, CONFIG.image_token_id, CONFIG.vision_end_token_id
    pixels = np.random.default_rng(0).normal(size=(16, CONFIG.vision.patch_values)).astype(np.float32)
    return prepare(CONFIG, input_ids=ids, labels=ids, pixel_values=pixels, image_grid_thw=np.array([[1, 4, 4]]))


def test_every_weight_belongs_to_one_part(model):
    """LoRA is a part of its own, and the merger does not belong to the vision tower. An unknown path raises."""
    parts = {path: param_group(path) for path in param_paths(add_lora(model, targets="all-linear"))}
    assert set(parts.values()) == {"lora", *PARTS} == {"lora", "vision", "merger", "text"}
    assert parts["visual/merger/fc1/kernel"] == "merger" and parts["visual/patch_embed/kernel"] == "vision"
    assert parts["visual/merger/fc1/lora/a"] == parts["language_model/layers/mlp/up_proj/lora/b"] == "lora"
    with pytest.raises(LookupError, match="adapter/kernel has no row"):
        param_group("adapter/kernel")


def test_learning_rates_of_parts(model):
    """Adam's first update equals the learning rate, for any gradient; schedules are supported."""
    rates = {"text": 1e-3, "vision": 2e-3, "merger": 4e-3}
    schedule = optax.constant_schedule(rates["merger"])
    changes = updated(model, make_optimizer(rates["text"], vision=rates["vision"], merger=schedule))
    for path, change in changes.items():
        np.testing.assert_allclose(change, -rates[param_group(path)], rtol=1e-3)


def test_equals_optax_adamw(model):
    """With one learning rate and decay, updates equal optax.adamw on kernels and embeddings, Adam on norms and biases."""
    changes = updated(model, make_optimizer(1e-3, weight_decay=0.1, max_grad_norm=None), gradient=0.3)
    undecayed = updated(model, optax.adam(1e-3), gradient=0.3)
    decayed = updated(model, optax.adamw(1e-3, weight_decay=0.1), gradient=0.3)
    for path, change in changes.items():
        decays = path.endswith("kernel") or path.split("/")[-2] in ("embed_tokens", "lm_head")
        np.testing.assert_allclose(change, (decayed if decays else undecayed)[path], rtol=1e-6)
        assert find_row(path).decays == decays == (not ("norm" in path or "ln_q" in path or path.endswith("bias")))


@functools.cache
def trained(model, freeze):
    """Returns the state after a step with these parts frozen, and the step's executable."""
    optimizer, step = make_optimizer(1e-3, freeze=freeze, weight_decay=0.1), make_train_step(remat="none")
    state, _ = step(TrainState.create(jax.tree.map(jnp.copy, model), optimizer), batch_with_an_image())
    (compiled,) = step.compiled.values()
    return state, compiled


@pytest.mark.parametrize("freeze", [("vision",), ("vision", "merger"), ("text",)])
def test_frozen_parts_do_not_change(model, freeze, tmp_path):
    """In a train step, frozen weights stay equal to the last bit and have no moments; the state survives a checkpoint."""
    before = {path: np.asarray(leaf) for path, leaf in param_paths(model).items()}
    state, _ = trained(model, freeze)
    moments = {path for path in param_paths(state.opt_state) if "/mu/" in path or "/nu/" in path}
    assert len(moments) == 2 * sum(param_group(path) not in freeze for path in before)
    for path, leaf in param_paths(state.model).items():
        moved = bool(np.any(np.asarray(leaf) != before[path]))
        assert moved == (param_group(path) not in freeze)
    save_state(tmp_path, state)
    restored = restore_state(tmp_path, state)
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert (actual == expected).all()


def test_gradients_of_frozen_parts_are_not_computed(model):
    """With a frozen vision tower and merger, the compiled step has no backward pass through them."""
    (_, frozen), (_, whole) = (trained(model, freeze) for freeze in (("vision", "merger"), ()))
    assert frozen.cost_analysis()["flops"] < 0.8 * whole.cost_analysis()["flops"]


def test_frozen_parts_do_not_count_in_the_norm(model):
    """Clipping uses the gradients of the trained parts only."""
    clipped = make_optimizer(1.0, freeze=["text"], max_grad_norm=1.0, b1=0.0, b2=0.0, eps=1e6)  # update: gradient / 1e6
    changes = updated(model, clipped)
    norm = np.sqrt(sum(np.sum(np.square(change, dtype=np.float64)) for change in changes.values()))
    assert norm == pytest.approx(1e-6, rel=1e-3)


def test_invalid_arguments_are_rejected(model):
    with pytest.raises(ValueError, match=r"freeze has \['head'\]"):
        make_optimizer(1e-3, freeze=["head"])
    with pytest.raises(ValueError, match="at least one part to train"):
        TrainState.create(model, make_optimizer(1e-3, freeze=PARTS))
    with pytest.raises(ValueError, match=r"max_grad_norm is 0\.0"):
        make_optimizer(1e-3, max_grad_norm=0.0)


def test_grad_stats():
    """The gradient norm of the trained parts, before clipping, and the learning rate; {} for other optimizers."""
    weights = {
        "visual": {"patch_embed": {"kernel": jnp.zeros(4)}},
        "language_model": {"norm": {"weight": jnp.zeros(2)}},
    }
    grads = jax.tree.map(lambda w: jnp.full_like(w, 3.0), weights)
    optimizer = make_optimizer(optax.linear_schedule(0.0, 1.0, 4), freeze=["vision"], max_grad_norm=1.0)
    state, rates = optimizer.init(weights), []
    for _ in range(3):
        _, state = optimizer.update(grads, state, weights)
        stats = read_grad_stats(state)
        rates.append(float(stats["learning_rate"]))
        assert float(stats["grad_norm"]) == pytest.approx(3 * np.sqrt(2))
    assert rates == [0, 0.25, 0.5]
    assert read_grad_stats(optax.adam(1e-3).init(weights)) == {}


def test_build_optimizer(model):
    """The options of a run give the same optimizer as make_optimizer with warmup and cosine schedules."""
    options = Optimization(1e-3, vision_learning_rate=2e-3, freeze=("merger",), weight_decay=0.1, warmup=0.5)
    built = updated(model, build_optimizer(options, steps=8))
    schedules = (warmup_cosine(rate, steps=8, warmup=0.5) for rate in (1e-3, 2e-3))
    expected = updated(
        model, make_optimizer(next(schedules), vision=next(schedules), freeze=["merger"], weight_decay=0.1)
    )
    for path, change in expected.items():
        np.testing.assert_array_equal(built[path], change, err_msg=path)
    with pytest.raises(ValueError, match=r"warmup is 2; expected a fraction of the steps"):
        build_optimizer(Optimization(warmup=2), steps=8)
