"""LoRA: values and gradients, training LoRA alone, merging into the weights, and checkpoints."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState, generate, make_train_step, prepare
from liger_jax.checkpoint import load_model, restore_state, save_model, save_state
from liger_jax.model.layers import Initializer, Linear, LoRA
from liger_jax.model.lora import TEXT_TARGETS, LoraOptions, add_lora, find_targets, lora_config, lora_leaves, merge_lora
from liger_jax.model.params import PARTS, param_paths
from liger_jax.model.sharding import param_shardings
from liger_jax.train.optimizer import make_optimizer
from tests._support import parity

CONFIG = Qwen2VLConfig.tiny()
TARGETS = find_targets(Qwen2VL.abstract(CONFIG))
jitted_logits = jax.jit(lambda model, batch: model(batch))


@functools.cache
def base_model(dtype="float32", mesh=None):
    return Qwen2VL.init(CONFIG, dtype=dtype, mesh=mesh)


def random_lora(model, scale=0.1):
    """Returns the model with noise added to A and B, as after training."""
    rng = np.random.default_rng(7)
    trained = {
        path: jnp.asarray(leaf + scale * rng.normal(size=leaf.shape), leaf.dtype)
        for path, leaf in lora_leaves(model).items()
    }
    leaves = [trained.get(path, leaf) for path, leaf in param_paths(model).items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def assert_same_bits(actual, expected):
    actual = param_paths(actual)
    for path, leaf in param_paths(expected).items():
        assert actual[path].dtype == leaf.dtype, path
        assert np.asarray(actual[path]).tobytes() == np.asarray(leaf).tobytes(), path


# ---- one layer


@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (2, 3)), ((2, 3), (5,)), ((6,), (5,))])
@pytest.mark.parametrize("rslora", [False, True])
def test_value_and_gradients(inputs, outputs, rslora):
    """x W + bias + scale x A B, and the gradients of A, B and x, equal those of a single matrix W + scale A B."""
    rng, rank = np.random.default_rng(0), 4
    n, m = math.prod(inputs), math.prod(outputs)
    shapes = (n, m), (n, rank), (rank, m), (m,), (7, n), (7, m)
    w, a, b, bias, x, dy = (rng.normal(size=shape) for shape in shapes)
    scale = 6 / (2 if rslora else 4)
    expected = {"y": x @ (w + scale * a @ b) + bias}
    dw = x.T @ dy  # gradient of W + scale A B
    expected |= {"a": scale * dw @ b.T, "b": scale * a.T @ dw, "x": dy @ (w + scale * a @ b).T}

    linear = Linear(Initializer(0, "float32", 1.0), inputs, outputs, bias=True)
    linear.kernel[...] = jnp.asarray(w.reshape(inputs + outputs), jnp.float32)
    linear.bias[...] = jnp.asarray(bias.reshape(outputs), jnp.float32)
    a, b = a.reshape(*inputs, rank).astype(np.float32), b.reshape(rank, *outputs).astype(np.float32)
    linear.lora = LoRA(jnp.asarray(a), jnp.asarray(b), alpha=6, rslora=rslora)
    y, backward = jax.vjp(lambda linear, x: linear(x), linear, jnp.asarray(x.reshape(7, *inputs), jnp.float32))
    grads, dx = backward(jnp.asarray(dy.reshape(7, *outputs), jnp.float32))
    actual = {"y": y, "a": grads.lora.a[...], "b": grads.lora.b[...], "x": dx}
    for key, value in expected.items():
        np.testing.assert_allclose(np.ravel(actual[key]), np.ravel(value), atol=2e-6 * np.abs(value).max(), err_msg=key)


def test_dtypes():
    """Activations keep their dtype, and float32 A and B on a bfloat16 kernel get float32 gradients."""
    linear = Linear(Initializer(0, "bfloat16", 1.0), (6,), (5,), bias=False)
    linear.lora = LoRA(jnp.ones((6, 2)), jnp.ones((2, 5)), alpha=1, rslora=False)
    y, backward = jax.vjp(lambda linear, x: linear(x), linear, jnp.ones((3, 6), jnp.bfloat16))
    grads, dx = backward(y)
    assert y.dtype == dx.dtype == grads.kernel.dtype == jnp.bfloat16
    assert grads.lora.a.dtype == grads.lora.b.dtype == jnp.float32


# ---- a model


def test_new_lora_changes_no_output():
    """A is initialized as in PEFT and B is zero; the weights are the model's own arrays."""
    model = parity.model()
    with_lora = add_lora(model, rank=4, targets="all-linear", seed=2**32 - 1)
    batch = parity.common(parity.batch("image"))
    parity.assert_near(jitted_logits(with_lora, batch), jitted_logits(model, batch), tolerance=1e-6)
    assert lora_config(model) is None
    assert lora_config(with_lora) == LoraOptions(rank=4, alpha=16, targets=tuple(TARGETS), rslora=False)
    assert len(lora_leaves(with_lora)) == 2 * len(TARGETS)
    paths = param_paths(with_lora)
    assert all(paths[path] is leaf for path, leaf in param_paths(model).items())
    for path in TARGETS.values():
        a, b = np.asarray(paths[f"{path}/lora/a"]), np.asarray(paths[f"{path}/lora/b"])
        inputs = a.size // 4 // (1 if "merger" in path else 2)  # two layers
        assert 0.8 < np.abs(a).max() * math.sqrt(inputs) <= 1 and abs(a.mean()) * math.sqrt(inputs) < 0.1
        assert a.dtype == b.dtype == np.float32 and not b.any()


def test_targets():
    """The default is the text tower. A depends on the seed, and not on which other layers are adapted."""
    model = Qwen2VL.abstract(CONFIG)
    assert lora_config(jax.eval_shape(add_lora, model)).targets == tuple(TEXT_TARGETS)
    query, query_and_up = (add_lora(parity.model(), targets=targets) for targets in ("q_proj", ["up_proj", "q_proj"]))
    assert lora_config(query_and_up).targets == ("q_proj", "up_proj")
    path = TARGETS["q_proj"] + "/lora/a"
    np.testing.assert_array_equal(lora_leaves(query)[path], lora_leaves(query_and_up)[path])
    assert np.any(lora_leaves(query)[path] != lora_leaves(add_lora(parity.model(), targets="q_proj", seed=1))[path])


@pytest.mark.parametrize("rslora", [False, True])
def test_merge(rslora):
    """The merged model has W + scale A B (numpy, float64) in place of W; everything else is unchanged."""
    model = parity.model()
    with_lora = random_lora(add_lora(model, rank=4, alpha=6, rslora=rslora, targets="all-linear"))
    merged = merge_lora(with_lora)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    before, after, lora = param_paths(model), param_paths(merged), lora_leaves(with_lora)
    for path, weight in before.items():
        expected = np.asarray(weight, np.float64)
        module = path.removesuffix("/kernel")
        if module in TARGETS.values():
            a, b = (np.asarray(lora[f"{module}/lora/{half}"], np.float64) for half in "ab")
            layers = zip(a, b, strict=True) if "merger" not in module else [(a, b)]
            delta = np.stack([np.tensordot(a, b, axes=1) for a, b in layers]).reshape(weight.shape)
            expected = expected + 6 / (2 if rslora else 4) * delta
        np.testing.assert_allclose(after[path], expected, atol=1e-6 * np.abs(expected).max(), err_msg=path)
    assert lora_config(with_lora) is not None  # the argument is unchanged


def test_merge_keeps_the_dtype():
    model = add_lora(base_model("bfloat16"), targets=["v_proj"])
    assert {leaf.dtype for leaf in jax.tree.leaves(merge_lora(random_lora(model)))} == {jnp.dtype("bfloat16")}


def test_merged_model_generates_the_same_tokens():
    """Greedy tokens and logits, with LoRA in all layers; they differ from those of the base model."""
    with_lora = random_lora(add_lora(parity.model(), rank=4, targets="all-linear"), scale=0.05)
    prompt = parity.common(parity.batch("image", prompt=True))
    unmerged, merged = jitted_logits(with_lora, prompt), jitted_logits(merge_lora(with_lora), prompt)
    parity.assert_near(unmerged, merged, tolerance=1e-5)
    tokens = [
        generate(model, prompt, max_new_tokens=6, eos_token_id=())
        for model in (with_lora, merge_lora(with_lora), parity.model())
    ]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert np.any(tokens[0] != tokens[2])


def test_invalid_arguments_are_rejected():
    model = Qwen2VL.abstract(CONFIG)
    with pytest.raises(
        ValueError, match=r"targets has \['deepstack.fc1'\], which the model lacks; expected 'all-linear' or"
    ):
        add_lora(model, targets=["q_proj", "deepstack.fc1"])
    for targets in (["q_proj", "proj"], [], "lm_head"):
        with pytest.raises(ValueError, match=r"targets is .* expected 'all-linear' or some of \['q_proj'"):
            add_lora(model, targets=targets)
    for argument, message in (("rank", "rank is 0; expected at least 1"), ("alpha", "alpha is 0; expected above 0")):
        with pytest.raises(ValueError, match=message):
            add_lora(model, **{argument: 0})
    with pytest.raises(ValueError, match="already has LoRA"):
        add_lora(jax.eval_shape(add_lora, model))
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge_lora(model)


# ---- training


def batch_with_images():
    ids = np.random.default_rng(0).integers(5, 300, size=(4, 20))
    ids[:, 1], ids[:, 2:6], ids[:, 6] = CONFIG.vision_start_token_id, CONFIG.image_token_id, CONFIG.vision_end_token_id
    pixels = np.random.default_rng(1).normal(size=(64, CONFIG.vision.patch_values)).astype(np.float32)
    grid = np.array([[1, 4, 4]] * 4)
    return prepare(CONFIG, input_ids=ids, labels=ids, pixel_values=pixels, image_grid_thw=grid)


@functools.cache
def initial_model(mesh):
    return add_lora(base_model(mesh=mesh), rank=4, targets="all-linear")


@functools.cache
def trained(remat="dots", accumulate=2, mesh_shape=None):
    """Returns the state after three steps, and the losses."""
    mesh = mesh_shape and jax.make_mesh(mesh_shape, ("fsdp", "tensor"))
    state = TrainState.create(jax.tree.map(jnp.copy, initial_model(mesh)), make_optimizer(1e-2, freeze=PARTS))
    step = make_train_step(remat=remat, accumulate=accumulate)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch_with_images())
        losses.append(float(metrics["loss"]))
    assert len(step.compiled) == 1
    return state, losses


def test_only_lora_is_trained():
    """All A and B change, no other weight does, and only A and B have moments. The loss falls."""
    state, losses = trained()
    before, after = param_paths(initial_model(None)), param_paths(state.model)
    lora = lora_leaves(state.model)
    for path, leaf in before.items():
        assert np.any(np.asarray(after[path]) != np.asarray(leaf)) == (path in lora), path
    moments = {path: leaf for path, leaf in param_paths(state.opt_state).items() if leaf.ndim}
    assert sorted(leaf.shape for leaf in moments.values()) == sorted(2 * [leaf.shape for leaf in lora.values()])
    assert all("/lora/" in path for path in moments)
    assert losses[2] < losses[1] < losses[0]


def test_accumulation_and_remat_change_nothing():
    state, losses = trained()
    reference, reference_losses = trained(remat="none", accumulate=1)
    np.testing.assert_allclose(losses, reference_losses, rtol=1e-5)
    for path, leaf in lora_leaves(reference.model).items():
        parity.assert_near(lora_leaves(state.model)[path], leaf, tolerance=2e-3, name=path)  # Adam divides by |g|


def test_four_devices():
    """With all weights split over fsdp and tensor, the losses equal those of one device, and the state stays split."""
    state, losses = trained(mesh_shape=(2, 2))
    np.testing.assert_allclose(losses, trained()[1], rtol=1e-5)
    split = 0
    for tree in (state.model, state.opt_state):
        shardings = param_paths(param_shardings(tree, jax.make_mesh((2, 2), ("fsdp", "tensor"))))
        for path, leaf in lora_leaves(tree).items():
            assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path
            split += not leaf.sharding.is_fully_replicated
    assert split == 3 * 2 * len(TARGETS)
    merged = merge_lora(state.model)
    after, before = (model.language_model.layers.mlp.up_proj for model in (merged, state.model))
    delta = np.einsum("lhr,lrf->lhf", before.lora.a[...], before.lora.b[...])
    parity.assert_near(after.kernel[...], before.kernel[...] + 16 / 4 * delta, tolerance=1e-6)
    for path, leaf in param_paths(merged).items():
        assert leaf.sharding.is_equivalent_to(param_paths(state.model)[path].sharding, leaf.ndim), path


def test_frozen_weights_cost_nothing():
    """The compiled step has no matmuls for their gradients, and no memory for accumulating them."""
    ids = np.full((2, 12), 7)
    batch = prepare(CONFIG, input_ids=ids, labels=ids)
    model = add_lora(base_model(), rank=4)

    def cost(freeze):
        state = TrainState.create(jax.tree.map(jnp.copy, model), make_optimizer(1e-3, freeze=freeze))
        compiled = make_train_step(remat="none", accumulate=2).compile(state, batch)
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    (flops, bytes_), (all_flops, all_bytes) = cost(PARTS), cost(["vision", "merger"])
    text = sum(leaf.nbytes for leaf in jax.tree.leaves(model.language_model)) + model.head.nbytes
    assert flops < 0.72 * all_flops  # two matmuls per weight instead of three
    assert bytes_ < all_bytes - 0.9 * text


def test_unfrozen_parts_are_trained_with_lora():
    """The merger is not in `freeze`, so it is trained as well."""
    model = jax.eval_shape(add_lora, Qwen2VL.abstract(CONFIG))
    optimizer = make_optimizer(1e-3, freeze=["vision", "text"])
    state = jax.eval_shape(lambda model: TrainState.create(model, optimizer), model)
    moments = {path for path in param_paths(state.opt_state) if "/mu/" in path}
    assert {"/lora/" in path or "visual/merger/" in path for path in moments} == {True}
    assert len(moments) == 2 * len(TEXT_TARGETS) + 6


# ---- checkpoints


def test_state_checkpoint_round_trip(tmp_path):
    """Exact to the last bit. The latest weights of a run also load as a model with LoRA."""
    state, _ = trained()
    save_state(tmp_path, state)
    assert_same_bits(restore_state(tmp_path, state), state)
    model = load_model(tmp_path)
    assert jax.tree.structure(model) == jax.tree.structure(state.model)
    assert_same_bits(model, state.model)


def test_model_checkpoint_round_trip(tmp_path):
    """Rank, alpha and dtypes are restored; overwriting with a model without LoRA removes it."""
    model = random_lora(add_lora(base_model("bfloat16"), rank=2, alpha=5.5, rslora=True, targets=["qkv", "down_proj"]))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert lora_config(loaded) == LoraOptions(rank=2, alpha=5.5, targets=("down_proj", "qkv"), rslora=True)
    assert_same_bits(loaded, model)
    (tmp_path / "lora.json").write_text('{"rank": 2, "beta": 3}')
    with pytest.raises(ValueError, match=r"lora\.json is invalid .*as save_model writes them"):
        load_model(tmp_path)
    save_model(base_model("bfloat16"), tmp_path, overwrite=True)
    assert lora_config(load_model(tmp_path)) is None
