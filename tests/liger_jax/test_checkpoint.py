"""Orbax checkpoints: a saved state is restored bit for bit, and incomplete or foreign files are refused."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState
from liger_jax.checkpoint import (
    checkpoint_manager,
    is_model,
    load_model,
    restore_intact_state,
    restore_state,
    save_model,
    save_state,
)
from liger_jax.checkpoint.arrays import nest, raise_damage
from liger_jax.errors import AlreadyExistsError, DamagedError, UserError
from liger_jax.model.params import param_paths
from tests._support.scripts import run_script

CONFIG = dataclasses.replace(Qwen2VLConfig.tiny(), eos_token_ids=(7, 8), pad_token_id=8)


def random_like(abstract, seed: int = 0):
    """Returns the tree with random numbers, made on the host, since `init` takes long to compile."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(10 * rng.normal(size=leaf.shape), leaf.dtype), abstract)


@pytest.fixture(scope="module")
def model() -> Qwen2VL:
    return random_like(Qwen2VL.abstract(CONFIG, dtype="bfloat16"))


def abstract_state(model, optimizer) -> TrainState:
    return jax.eval_shape(lambda model: TrainState.create(model, optimizer), model)


@pytest.fixture(scope="module")
def state(model) -> TrainState:
    """Resembles a state after 12 steps: all arrays of the optimizer differ."""
    state = random_like(abstract_state(model, optax.adamw(1e-3, mu_dtype=jnp.float32)))
    return dataclasses.replace(state, step=jnp.int32(12), model=model)


def assert_same(actual, expected) -> None:
    """Asserts equal structures, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    actual = param_paths(actual)
    for path, leaf in param_paths(expected).items():
        assert actual[path].dtype == leaf.dtype, path
        assert np.asarray(actual[path]).tobytes() == np.asarray(leaf).tobytes(), path


# ---- models ----------------------------------------------------------------------------------------------------------


def test_model_round_trip(tmp_path, model):
    assert not is_model(tmp_path)
    save_model(model, tmp_path / "model")
    assert is_model(tmp_path / "model")
    assert_same(load_model(tmp_path / "model"), model)
    assert load_model(str(tmp_path / "model")).config == CONFIG
    assert Qwen2VLConfig.from_hf(tmp_path / "model") == CONFIG
    wide = load_model(tmp_path / "model", dtype="float32")
    assert_same(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model))


def test_tied_model_without_token_ids(tmp_path):
    tied = random_like(
        Qwen2VL.abstract(dataclasses.replace(Qwen2VLConfig.tiny(), tie_word_embeddings=True), dtype="float32")
    )
    save_model(tied, tmp_path)
    assert_same(load_model(tmp_path), tied)
    assert load_model(tmp_path).config == tied.config


def test_saving_to_a_folder_with_files(tmp_path, model):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AlreadyExistsError, match="not an empty folder"):
        save_model(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    save_model(model, tmp_path, overwrite=True)
    zeros = jax.tree.map(jnp.zeros_like, model)
    save_model(zeros, tmp_path, overwrite=True)
    assert_same(load_model(tmp_path), zeros)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_incomplete_and_mismatched_models_are_refused(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"has no model; expected config\.json with params/"):
        load_model(tmp_path / "nothing")
    save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load_model(tmp_path / "model", dtype="int8")
    shutil.copytree(tmp_path / "model", tmp_path / "half")
    (tmp_path / "half" / "params").rename(tmp_path / "half" / "params.orbax-checkpoint-tmp-1")
    with pytest.raises(FileNotFoundError, match="has no model"):
        load_model(tmp_path / "half")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 1
    config["tie_word_embeddings"] = True
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as raised:
        load_model(tmp_path / "model")
    assert "unexpected: lm_head/weight" in str(raised.value)
    assert "language_model/layers/mlp/down_proj/kernel is (2, 160, 64), expected (2, 161, 64)" in str(raised.value)


def test_error_names_damaged_files(tmp_path, model):
    save_model(model, tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "cut")
    for file in (tmp_path / "cut" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    (tmp_path / "model" / "params" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="params is damaged"):
        load_model(tmp_path / "model")
    # in a separate process, because Orbax's other reads print errors when the first one fails
    script = """
        import sys
        from liger_jax.checkpoint import load_model
        try:
            load_model(sys.argv[1])
        except ValueError as error:
            assert "params is damaged" in str(error)
        else:
            raise AssertionError("loaded")
    """
    run_script(script, tmp_path / "cut")


# ---- training runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_state_round_trip(tmp_path, state, asynchronous):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    with checkpoint_manager(tmp_path, asynchronous=asynchronous) as manager:
        training = jax.tree.map(lambda leaf: jnp.array(np.array(leaf)), state)
        assert save_state(manager, training) == 12
        overwrite(training)  # as the next step does, perhaps before the writing has finished
        assert_same(restore_state(manager, state), state)
    restored = restore_state(tmp_path, random_like(state, seed=1))
    assert_same(restored, state)
    assert restored.optimizer is state.optimizer
    assert_same(restore_state(str(tmp_path), jax.eval_shape(lambda: state), step=12), state)


def test_latest_steps_are_kept(tmp_path, state):
    with checkpoint_manager(tmp_path, max_to_keep=2) as manager:
        for step in (1, 5, 20):
            save_state(manager, dataclasses.replace(state, step=jnp.int32(step)))
        with pytest.raises(AlreadyExistsError, match="already holds step 20"):
            save_state(manager, dataclasses.replace(state, step=jnp.int32(20)))
    assert int(restore_state(tmp_path, state).step) == 20
    assert int(restore_state(tmp_path, state, step=5).step) == 5
    with pytest.raises(FileNotFoundError, match=r"has no step 1; expected one of its steps \[5, 20\]"):
        restore_state(tmp_path, state, step=1)
    # a run is also a model, with the weights of its latest step
    assert_same(load_model(tmp_path), state.model)
    assert load_model(tmp_path).config == CONFIG


def test_incomplete_steps_are_ignored(tmp_path, state):
    """A killed process leaves a step under Orbax's temporary name, or an incomplete copy of a step."""
    with pytest.raises(FileNotFoundError, match=r"has no training state; expected a folder that save_state wrote"):
        restore_state(tmp_path, state)
    save_state(tmp_path, state)
    shutil.copytree(tmp_path / "12", tmp_path / "30.orbax-checkpoint-tmp-1")
    shutil.copytree(tmp_path / "12" / "default" / "d", tmp_path / "40" / "default" / "d")
    (tmp_path / "50").mkdir()
    assert int(restore_state(tmp_path, state).step) == 12
    (tmp_path / "12/default/_METADATA").write_text("{")
    with pytest.raises(
        DamagedError, match=r"12/default is damaged \(Expecting.*; expected an intact Orbax checkpoint$"
    ):
        restore_state(tmp_path, state)


def test_newer_incomplete_step_is_reported_by_load_model(tmp_path, state):
    save_state(tmp_path, state)
    (tmp_path / "40").mkdir()
    with pytest.warns(UserWarning, match=r"steps \[40\] are incomplete; loading step 12"):
        load_model(tmp_path)


def damage(file, how: str) -> None:
    """Damages a file as a full disk, an interrupted copy or a lost block does."""
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"emptied": b"", "truncated": content[: len(content) // 2]}[how])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("_METADATA", "missing"),
        ("_METADATA", "truncated"),
        ("manifest.ocdbt", "emptied"),
        ("ocdbt.process_0/d/*", "truncated"),
        ("d/*", "missing"),
    ],
)
def test_damaged_step_is_moved_aside_and_the_previous_one_restored(tmp_path, state, name, how):
    for step in (3, 12):
        save_state(tmp_path, dataclasses.replace(state, step=jnp.int32(step)))
    damage(max((tmp_path / "12/default").glob(name), key=lambda file: file.stat().st_size), how)
    with pytest.warns(
        UserWarning, match=r"/12.* is (damaged|incomplete).*moved to \*\.damaged, and resumed from step 3$"
    ):
        restored = restore_intact_state(tmp_path, state)
    assert_same(restored, dataclasses.replace(state, step=jnp.int32(3)))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"3", "12.damaged"}
    # the step can be saved again, and the damaged one does not count as one of the steps to keep
    with checkpoint_manager(tmp_path, max_to_keep=2) as manager:
        save_state(manager, state)
    assert_same(restore_intact_state(tmp_path, state), state)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"3", "12", "12.damaged"}


def test_no_intact_step(tmp_path, state):
    """The error lists every step, nothing is moved, and load_model names the step before the damaged one."""
    for step in (3, 12):
        save_state(tmp_path, dataclasses.replace(state, step=jnp.int32(step)))
        (tmp_path / f"{step}/default/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(
        DamagedError, match=r"No checkpoint is intact: .*/12/default is damaged .*/3/default is damaged"
    ):
        restore_intact_state(tmp_path, state)
    with pytest.raises(DamagedError, match=r"12/default is damaged .*without .*/12, the run resumes from step 3"):
        load_model(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"3", "12"}


def test_other_errors_are_not_taken_for_damage(tmp_path, state):
    """Another optimizer, or a file that may not be read: no step is moved aside."""
    save_state(tmp_path, state)
    with pytest.raises(UserError, match=r"missing|unexpected") as raised:
        restore_intact_state(tmp_path, abstract_state(state.model, optax.sgd(1e-3, momentum=0.9)))
    assert not isinstance(raised.value, DamagedError)
    with pytest.raises(MemoryError), raise_damage(tmp_path / "12/default"):
        raise MemoryError
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"), raise_damage(tmp_path / "12/default"):
        raise ValueError("RESOURCE_EXHAUSTED: out of memory")
    with pytest.raises(DamagedError, match=r"is damaged \(KeyError\)"), raise_damage(tmp_path / "12/default"):
        raise KeyError  # without a message
    assert (tmp_path / "12").is_dir()


def test_nan_and_infinity_are_not_saved(tmp_path, state):
    """Neither in weights nor in the optimizer's arrays; nothing is written. A scalar of an optimizer may be infinite."""
    broken = jax.tree.map(lambda leaf: leaf, state.model)
    broken.lm_head.weight.set_value(broken.lm_head.weight.at[3, 5].set(jnp.nan))
    with pytest.raises(UserError, match=r"model: lm_head/weight holds NaN or infinity; expected finite numbers"):
        save_model(broken, tmp_path / "model")
    with pytest.raises(UserError, match=r"12: model/lm_head/weight holds NaN or infinity"):
        save_state(tmp_path / "run", dataclasses.replace(state, model=broken))
    moments = jax.tree.map(lambda leaf: leaf.at[..., -1].set(jnp.inf) if leaf.ndim else leaf, state.opt_state)
    with pytest.raises(UserError, match=r"12: opt_state/.*/mu/.* holds NaN or infinity"):
        save_state(tmp_path / "run", dataclasses.replace(state, opt_state=moments))
    assert not (tmp_path / "model").exists() and not (tmp_path / "run/12").exists()
    save_model(broken, tmp_path / "model", allow_non_finite=True)
    assert_same(load_model(tmp_path / "model", allow_non_finite=True), broken)
    unbounded = dataclasses.replace(state, opt_state=(state.opt_state, jnp.float32(jnp.inf)))
    assert save_state(tmp_path / "run", unbounded) == 12


def test_step_with_nan_is_not_restored(tmp_path, state):
    """A run resumes from the step before; the weights can be restored if that is asked for."""
    broken = dataclasses.replace(state, model=jax.tree.map(lambda leaf: leaf.at[...].set(jnp.nan), state.model))
    with checkpoint_manager(tmp_path) as manager:
        save_state(manager, dataclasses.replace(state, step=jnp.int32(3)))
        manager.save(12, args=ocp.args.PyTreeSave(nest(param_paths(broken))), force=True)
    with pytest.raises(DamagedError, match=r"12/default: model/.* holds NaN or infinity"):
        restore_state(tmp_path, state)
    assert_same(restore_state(tmp_path, state, allow_non_finite=True), broken)
    with pytest.warns(UserWarning, match="resumed from step 3"):
        assert int(restore_intact_state(tmp_path, state).step) == 3


def test_full_disk_is_noticed_before_a_checkpoint_is_written(tmp_path, state, monkeypatch):
    save_state(tmp_path, dataclasses.replace(state, step=jnp.int32(3)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=2**19))
    with pytest.raises(UserError, match=r"has 0 MiB of free space; expected at least \d MiB for a checkpoint"):
        save_state(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["3"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))  # not known
    assert save_state(tmp_path, state) == 12


def test_model_cannot_be_saved_into_a_run(tmp_path, model, state):
    save_state(tmp_path, state)
    with pytest.raises(AlreadyExistsError, match=r"holds a training run, steps \[12\]"):
        save_model(model, tmp_path, overwrite=True)
    assert not (tmp_path / "params").exists()


def test_mismatched_states_are_refused(tmp_path, state):
    """Another optimizer, model size or dtype: one error lists all differences."""
    save_state(tmp_path, state)
    with pytest.raises(ValueError) as raised:
        restore_state(tmp_path, abstract_state(state.model, optax.sgd(1e-3, momentum=0.9)))
    assert "missing: opt_state/0/trace/language_model/embed_tokens/weight" in str(raised.value)
    assert "unexpected: opt_state/0/count; opt_state/0/mu/" in str(raised.value)
    small = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_hidden_layers=1))
    with pytest.raises(
        ValueError, match=r"input_layernorm/weight is \(\(2, 64\), 'bfloat16'\), expected \(\(1, 64\), 'bfloat16'\)"
    ):
        restore_state(tmp_path, abstract_state(Qwen2VL.abstract(small), state.optimizer))
    with pytest.raises(ValueError, match=r"model/.* is .*'bfloat16'\), expected .*'float32'\)"):
        restore_state(tmp_path, abstract_state(Qwen2VL.abstract(CONFIG, dtype="float32"), state.optimizer))


def test_meshes(tmp_path, model, state):
    """Checkpoints saved on one device load on four, and back. Arrays are placed like those of the abstract state."""
    save_model(model, tmp_path / "model")
    save_state(tmp_path / "run", state)
    script = """
        import os, sys
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax, jax.numpy as jnp, numpy as np, optax
        from liger_jax import Qwen2VL, TrainState
        from liger_jax.checkpoint import load_model, restore_state, save_model
        from liger_jax.model.sharding import param_shardings
        folder = sys.argv[1]
        mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
        one, four = load_model(folder + "/model"), load_model(folder + "/model", mesh=mesh)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
            np.testing.assert_array_equal(a, b)
        assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(four)) > 10
        optimizer = optax.adamw(1e-3, mu_dtype=jnp.float32)
        like = jax.eval_shape(lambda model: TrainState.create(model, optimizer), one)
        like = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), like, param_shardings(like, mesh))
        state = restore_state(folder + "/run", like)
        for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(state), strict=True):
            assert b.sharding.is_equivalent_to(a.sharding, a.ndim)
        save_model(four, folder + "/model4")
    """
    run_script(script, tmp_path)
    assert_same(load_model(tmp_path / "model4"), model)
