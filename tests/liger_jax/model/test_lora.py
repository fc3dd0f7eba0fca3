"""LoRA: what it adds, that it alone is trained, and that it can become part of the weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState, generate, make_train_step, prepare
from liger_jax.checkpoint import load_model, restore_state, save_model, save_state
from liger_jax.model.layers import Initializer, Linear, LoRA
from liger_jax.model.lora import TARGETS, TEXT_TARGETS, add_lora, lora_config, lora_leaves, merge_lora
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import param_shardings
from liger_jax.train.optimizer import BASE, make_optimizer
from tests._support import parity

CONFIG = Qwen2VLConfig.tiny()
logits_of = jax.jit(lambda model, batch: model(batch))


@functools.cache
def plain(dtype="float32", mesh=None):
    return Qwen2VL.init(CONFIG, dtype=dtype, mesh=mesh)


def random_lora(model, scale=0.1):
    """The model with numbers in B as well, as after training."""
    rng = np.random.default_rng(7)
    grown = {
        path: jnp.asarray(leaf + scale * rng.normal(size=leaf.shape), leaf.dtype)
        for path, leaf in lora_leaves(model).items()
    }
    leaves = [grown.get(path, leaf) for path, leaf in param_paths(model).items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def assert_same_bits(found, wanted):
    found = param_paths(found)
    for path, leaf in param_paths(wanted).items():
        assert found[path].dtype == leaf.dtype, path
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


# ---- one layer


@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (2, 3)), ((2, 3), (5,)), ((6,), (5,))])
@pytest.mark.parametrize("rslora", [False, True])
def test_value_and_gradients(inputs, outputs, rslora):
    """x W + bias + scale x A B, and the gradients of A, B and x, against the same with W + scale A B in one matrix."""
    rng, rank = np.random.default_rng(0), 4
    n, m = math.prod(inputs), math.prod(outputs)
    shapes = (n, m), (n, rank), (rank, m), (m,), (7, n), (7, m)
    w, a, b, bias, x, dy = (rng.normal(size=shape) for shape in shapes)
    scale = 6 / (2 if rslora else 4)
    wanted = {"y": x @ (w + scale * a @ b) + bias}
    merged = x.T @ dy  # gradient of W + scale A B
    wanted |= {"a": scale * merged @ b.T, "b": scale * a.T @ merged, "x": dy @ (w + scale * a @ b).T}

    linear = Linear(Initializer(0, "float32", 1.0), inputs, outputs, bias=True)
    linear.kernel[...] = jnp.asarray(w.reshape(inputs + outputs), jnp.float32)
    linear.bias[...] = jnp.asarray(bias.reshape(outputs), jnp.float32)
    a, b = a.reshape(*inputs, rank).astype(np.float32), b.reshape(rank, *outputs).astype(np.float32)
    linear.lora = LoRA(jnp.asarray(a), jnp.asarray(b), alpha=6, rslora=rslora)
    y, backward = jax.vjp(lambda linear, x: linear(x), linear, jnp.asarray(x.reshape(7, *inputs), jnp.float32))
    grads, dx = backward(jnp.asarray(dy.reshape(7, *outputs), jnp.float32))
    found = {"y": y, "a": grads.lora.a[...], "b": grads.lora.b[...], "x": dx}
    for key, value in wanted.items():
        np.testing.assert_allclose(np.ravel(found[key]), np.ravel(value), atol=2e-6 * np.abs(value).max(), err_msg=key)


def test_dtypes():
    """Activations keep theirs, and float32 A and B get float32 gradients beside a bfloat16 kernel."""
    linear = Linear(Initializer(0, "bfloat16", 1.0), (6,), (5,), bias=False)
    linear.lora = LoRA(jnp.ones((6, 2)), jnp.ones((2, 5)), alpha=1, rslora=False)
    y, backward = jax.vjp(lambda linear, x: linear(x), linear, jnp.ones((3, 6), jnp.bfloat16))
    grads, dx = backward(y)
    assert y.dtype == dx.dtype == grads.kernel.dtype == jnp.bfloat16
    assert grads.lora.a.dtype == grads.lora.b.dtype == jnp.float32


# ---- a model


def test_starts_as_the_model_it_is_added_to():
    """No output changes until B is trained; A as PEFT makes it, B zero; the weights are the model's own arrays."""
    model = parity.model()
    with_lora = add_lora(model, rank=4, targets="all-linear", seed=2**32 - 1)
    batch = parity.common(parity.batch("image"))
    parity.assert_near(logits_of(with_lora, batch), logits_of(model, batch), tolerance=1e-6)
    assert lora_config(model) is None
    assert lora_config(with_lora) == {"rank": 4, "alpha": 16, "targets": list(TARGETS), "rslora": False}
    assert len(lora_leaves(with_lora)) == 2 * len(TARGETS)
    found = param_paths(with_lora)
    assert all(found[path] is leaf for path, leaf in param_paths(model).items())
    for path in TARGETS.values():
        a, b = np.asarray(found[f"{path}/lora/a"]), np.asarray(found[f"{path}/lora/b"])
        inputs = a.size // 4 // (1 if "merger" in path else 2)  # two layers
        assert 0.8 < np.abs(a).max() * math.sqrt(inputs) <= 1 and abs(a.mean()) * math.sqrt(inputs) < 0.1
        assert a.dtype == b.dtype == np.float32 and not b.any()


def test_some_targets():
    """The text tower by default; a target's A does not depend on the other targets, but on the seed."""
    model = Qwen2VL.abstract(CONFIG)
    assert lora_config(jax.eval_shape(add_lora, model))["targets"] == list(TEXT_TARGETS)
    query, more = (add_lora(parity.model(), targets=targets) for targets in ("q_proj", ["up_proj", "q_proj"]))
    assert lora_config(more)["targets"] == ["q_proj", "up_proj"]
    path = TARGETS["q_proj"] + "/lora/a"
    np.testing.assert_array_equal(lora_leaves(query)[path], lora_leaves(more)[path])
    assert np.any(lora_leaves(query)[path] != lora_leaves(add_lora(parity.model(), targets="q_proj", seed=1))[path])


@pytest.mark.parametrize("rslora", [False, True])
def test_merged(rslora):
    """A plain model with W + scale A B (numpy, float64) in place of W; everything else is what it was."""
    model = parity.model()
    with_lora = random_lora(add_lora(model, rank=4, alpha=6, rslora=rslora, targets="all-linear"))
    merged = merge_lora(with_lora)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    before, found, lora = param_paths(model), param_paths(merged), lora_leaves(with_lora)
    for path, weight in before.items():
        wanted = np.asarray(weight, np.float64)
        module = path.removesuffix("/kernel")
        if module in TARGETS.values():
            a, b = (np.asarray(lora[f"{module}/lora/{half}"], np.float64) for half in "ab")
            layers = zip(a, b, strict=True) if "merger" not in module else [(a, b)]
            delta = np.stack([np.tensordot(a, b, axes=1) for a, b in layers]).reshape(weight.shape)
            wanted = wanted + 6 / (2 if rslora else 4) * delta
        np.testing.assert_allclose(found[path], wanted, atol=1e-6 * np.abs(wanted).max(), err_msg=path)
    assert lora_config(with_lora) is not None  # the model that was given is left alone


def test_merged_keeps_the_dtype():
    model = add_lora(plain("bfloat16"), targets=["v_proj"])
    assert {leaf.dtype for leaf in jax.tree.leaves(merge_lora(random_lora(model)))} == {jnp.dtype("bfloat16")}


def test_generates_what_the_merged_model_does():
    """Greedy tokens and logits, with adapters in all towers; and not those of the model without."""
    with_lora = random_lora(add_lora(parity.model(), rank=4, targets="all-linear"), scale=0.05)
    prompt = parity.common(parity.batch("image", prompt=True))
    unmerged, merged = logits_of(with_lora, prompt), logits_of(merge_lora(with_lora), prompt)
    parity.assert_near(unmerged, merged, tolerance=1e-5)
    tokens = [
        generate(model, prompt, max_new_tokens=6, eos_token_id=())
        for model in (with_lora, merge_lora(with_lora), parity.model())
    ]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert np.any(tokens[0] != tokens[2])


def test_what_cannot_be():
    model = Qwen2VL.abstract(CONFIG)
    for targets in (["q_proj", "proj"], [], "lm_head"):
        with pytest.raises(ValueError, match=r"targets is .* expected 'all-linear' or some of \['q_proj'"):
            add_lora(model, targets=targets)
    for wrong in ({"rank": 0}, {"alpha": 0}):
        with pytest.raises(ValueError, match="expected a rank of at least 1 and an alpha over 0"):
            add_lora(model, **wrong)
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(jax.eval_shape(add_lora, model))
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge_lora(model)


# ---- training


def batch_with_pictures():
    ids = np.random.default_rng(0).integers(5, 300, size=(4, 20))
    ids[:, 1], ids[:, 2:6], ids[:, 6] = CONFIG.vision_start_token_id, CONFIG.image_token_id, CONFIG.vision_end_token_id
    pixels = np.random.default_rng(1).normal(size=(64, CONFIG.vision.patch_values)).astype(np.float32)
    grid = np.array([[1, 4, 4]] * 4)
    return prepare(CONFIG, input_ids=ids, labels=ids, pixel_values=pixels, image_grid_thw=grid)


@functools.cache
def start(mesh):
    return add_lora(plain(mesh=mesh), rank=4, targets="all-linear")


@functools.cache
def trained(remat="dots", accumulate=2, mesh_shape=None):
    """-> the state after three steps, and the losses."""
    mesh = mesh_shape and jax.make_mesh(mesh_shape, ("fsdp", "tensor"))
    state = TrainState.create(jax.tree.map(jnp.copy, start(mesh)), make_optimizer(1e-2, freeze=BASE))
    step = make_train_step(remat=remat, accumulate=accumulate)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch_with_pictures())
        losses.append(float(metrics["loss"]))
    assert len(step.compiled) == 1
    return state, losses


def test_lora_alone_is_trained():
    """All A and B move, no other weight does, and only A and B have moments. The loss falls."""
    state, losses = trained()
    before, after = param_paths(start(None)), param_paths(state.model)
    lora = lora_leaves(state.model)
    for path, leaf in before.items():
        assert np.any(np.asarray(after[path]) != np.asarray(leaf)) == (path in lora), path
    moments = {path: leaf for path, leaf in param_paths(state.opt_state).items() if leaf.ndim}
    assert sorted(leaf.shape for leaf in moments.values()) == sorted(2 * [leaf.shape for leaf in lora.values()])
    assert all("/lora/" in path for path in moments)
    assert losses[2] < losses[1] < losses[0]


def test_accumulation_and_remat_change_nothing():
    state, losses = trained()
    whole, whole_losses = trained(remat="none", accumulate=1)
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
    for path, leaf in lora_leaves(whole.model).items():
        parity.assert_near(lora_leaves(state.model)[path], leaf, tolerance=2e-3, what=path)  # Adam divides by |g|


def test_four_devices():
    """Weights and A, B split over fsdp and tensor: the losses of one device, and the state stays split."""
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
    up, was = (model.language_model.layers.mlp.up_proj for model in (merged, state.model))
    delta = np.einsum("lhr,lrf->lhf", was.lora.a[...], was.lora.b[...])
    parity.assert_near(up.kernel[...], was.kernel[...] + 16 / 4 * delta, tolerance=1e-6)
    for path, leaf in param_paths(merged).items():
        assert leaf.sharding.is_equivalent_to(param_paths(state.model)[path].sharding, leaf.ndim), path


def test_frozen_weights_cost_nothing():
    """No products for their gradients, nor room for their sums while accumulating: the compiled step has neither."""
    ids = np.full((2, 12), 7)
    batch = prepare(CONFIG, input_ids=ids, labels=ids)
    model = add_lora(plain(), rank=4)

    def cost(freeze):
        state = TrainState.create(jax.tree.map(jnp.copy, model), make_optimizer(1e-3, freeze=freeze))
        compiled = make_train_step(remat="none", accumulate=2).compile(state, batch)
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    (flops, bytes_), (flops_of_all, bytes_of_all) = cost(BASE), cost(["vision", "merger"])
    text = sum(leaf.nbytes for leaf in jax.tree.leaves(model.language_model)) + model.head.nbytes
    assert flops < 0.72 * flops_of_all  # two products of a weight in place of three
    assert bytes_ < bytes_of_all - 0.9 * text


def test_other_parts_beside_lora():
    """Also the merger is trained where freeze leaves it out."""
    model = jax.eval_shape(add_lora, Qwen2VL.abstract(CONFIG))
    optimizer = make_optimizer(1e-3, freeze=["vision", "text"])
    state = jax.eval_shape(lambda model: TrainState.create(model, optimizer), model)
    moments = {path for path in param_paths(state.opt_state) if "/mu/" in path}
    assert {"/lora/" in path or "visual/merger/" in path for path in moments} == {True}
    assert len(moments) == 2 * len(TEXT_TARGETS) + 6


# ---- checkpoints


def test_state_goes_through_a_checkpoint(tmp_path):
    """To the last bit; and the latest weights of a run load as a model with its LoRA."""
    state, _ = trained()
    save_state(tmp_path, state)
    assert_same_bits(restore_state(tmp_path, state), state)
    model = load_model(tmp_path)
    assert jax.tree.structure(model) == jax.tree.structure(state.model)
    assert_same_bits(model, state.model)


def test_model_goes_through_a_checkpoint(tmp_path):
    """With rank, alpha and dtypes; a plain model in its place is plain again."""
    model = random_lora(add_lora(plain("bfloat16"), rank=2, alpha=5.5, rslora=True, targets=["qkv", "down_proj"]))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert lora_config(loaded) == {"rank": 2, "alpha": 5.5, "targets": ["down_proj", "qkv"], "rslora": True}
    assert_same_bits(loaded, model)
    (tmp_path / "lora.json").write_text('{"rank": 2, "beta": 3}')
    with pytest.raises(ValueError, match=r"lora\.json is not what save_model writes"):
        load_model(tmp_path)
    save_model(plain("bfloat16"), tmp_path, overwrite=True)
    assert lora_config(load_model(tmp_path)) is None
