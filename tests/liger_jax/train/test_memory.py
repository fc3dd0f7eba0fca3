"""The estimate of a step's memory agrees with what was measured on a GPU, and its exact parts with placed arrays."""

import functools
import json
import math
from pathlib import Path

import jax
import pytest

from liger_jax import QwenVL, QwenVLConfig, TrainState, add_lora
from liger_jax.model.params import PARTS
from liger_jax.train.memory import Training, estimate_memory, sample_row, saved_bytes
from liger_jax.train.optimizer import make_optimizer

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "model.json"
CASES = (
    {"model": "qwen2-vl-2b", "rows": 4, "remat": "dots", "unroll": "none"},
    {"model": "qwen2-vl-2b", "rows": 16, "remat": "full"},
    {"model": "qwen2-vl-2b", "rows": 4, "remat": "dots", "lora": 16},
    {"model": "qwen2-vl-7b", "rows": 4, "remat": "narrow"},
    {"model": "qwen3-vl-2b", "rows": 4, "remat": "dots"},
)


def measured(case):
    """Returns the peak that `python -m benchmarks train` measured on one GPU, in bytes."""
    options = {"devices": 1, "package": "liger-jax", "what": "train", "lora": None, "master_weights": None, **case}
    (result,) = (r for r in json.loads(RESULTS.read_text()) if all(r.get(key) == options[key] for key in options))
    return result["peak_gib"] * 2**30


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_estimate_is_within_2_percent_of_measurements(case):
    config = getattr(QwenVLConfig, case["model"].replace("-", "_"))()
    frozen = PARTS if "lora" in case else ()
    adapt = functools.partial(add_lora, rank=case["lora"]) if "lora" in case else None
    row = sample_row(config, length=2048, patches=4096)
    training = Training(config, make_optimizer(1e-5, freeze=frozen), row, case["remat"], frozen, adapt)
    estimate = estimate_memory(training, {}, case["rows"]).total
    assert abs(estimate / measured(case) - 1) < 0.02


@functools.cache
def training(remat="dots"):
    config = QwenVLConfig.tiny()
    return Training(config, make_optimizer(1e-3), sample_row(config, length=64, patches=64), remat)


def test_state_is_exact():
    """Weights and optimizer take the bytes that the arrays of a state take on a device."""
    mesh = {"data": 2, "fsdp": 2}
    devices = jax.make_mesh(tuple(mesh.values()), tuple(mesh))
    state = TrainState.create(QwenVL.init(QwenVLConfig.tiny(), mesh=devices), make_optimizer(1e-3))
    sizes = [
        sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        for tree in (state.model, state.opt_state)
    ]
    memory = estimate_memory(training(), mesh, 4)
    assert [memory.weights, memory.optimizer] == sizes


def test_saved_bytes_follow_the_policy():
    """More recomputation saves less; frozen weights need no activations of the vision tower."""
    sizes = [training(remat).activations["text"] for remat in ("dots", "narrow", "attention", "full")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    one = training()
    frozen = saved_bytes(one.model, one.row, remat="dots", frozen=("vision", "merger"))
    assert frozen < one.activations["text"] - one.activations["vision"] / 2


def test_memory_on_meshes():
    """Rows and layers are split as the mesh says; gathering all weights costs their bytes."""
    one, fsdp = estimate_memory(training(), {}, 4), estimate_memory(training(), {"fsdp": 4}, 16)
    assert fsdp.activations == one.activations and fsdp.gradients == one.gradients
    assert fsdp.gathered == one.weights and math.isclose(fsdp.weights, one.weights / 4, rel_tol=0.1)
    by_layer = estimate_memory(training(), {"fsdp": 4}, 16, by_device=False)
    assert by_layer.gathered < fsdp.gathered and by_layer.gradients < fsdp.gradients
    assert estimate_memory(training(), {"tensor": 2}, 4).activations == one.activations // 2
