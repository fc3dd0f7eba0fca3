"""The planner: which meshes it compares, what they move, and what it prints."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import pytest

from liger_jax import QwenVLConfig
from liger_jax.cli.plan_report import report
from liger_jax.errors import UserError
from liger_jax.options import PlanOptions
from liger_jax.plan import make_plans, meshes
from liger_jax.train.communication import step_traffic
from liger_jax.train.memory import sample_row

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "model.json"
STEPS = [r for r in json.loads(RESULTS.read_text()) if r["what"] == "train"]
MEASURED = [r for r in STEPS if "mesh" in r]
TINY = {"length": 64, "patches": 64, "remat": "dots"}


def test_all_meshes_are_compared():
    """Those whose axes multiply to the GPUs, divide the batch and the heads, and keep `tensor` within a host."""
    config, options = QwenVLConfig.qwen2_vl_2b(), PlanOptions(gpus=8, batch_size=16, gpus_per_host=4)
    shapes = list(meshes(config, options))
    assert all(math.prod(mesh.values()) == 8 and mesh.get("tensor", 1) <= 4 for mesh in shapes)
    assert {"fsdp": 8} in shapes and {"data": 2, "tensor": 4} in shapes and len(shapes) == 9
    few_rows = list(meshes(config, PlanOptions(gpus=8, batch_size=2)))
    assert all(mesh.get("data", 1) * mesh.get("fsdp", 1) in (1, 2) for mesh in few_rows)


def test_sequence_is_compared_if_the_gpus_cannot_share_the_rows():
    """Regression: no mesh of 8 GPUs was found for one long row of the 2B, and of 4 GPUs only `tensor`, which is slower."""
    config, long_row = QwenVLConfig.qwen2_vl_2b(), {"batch_size": 1, "length": 32768, "patches": 65536, "remat": "dots"}
    best = [make_plans(config, PlanOptions(gpus=gpus, **long_row))[0] for gpus in (4, 8)]
    assert [plan.mesh for plan in best] == [{"sequence": 4}, {"sequence": 8}]
    assert best[0].alone_s == best[0].compute_s and best[1].alone_s < best[1].compute_s  # 12 heads are padded to 16
    assert all("sequence" not in mesh for mesh in meshes(config, PlanOptions(gpus=8, batch_size=8)))
    across_hosts = PlanOptions(gpus=16, batch_size=1)
    assert not list(meshes(config, across_hosts))
    assert list(meshes(config, dataclasses.replace(across_hosts, sequence=16))) == [{"sequence": 16}]


def test_heads_that_a_named_mesh_does_not_divide():
    """Regression: their projections, which each GPU repeats, counted as split, and nothing said so."""
    options = PlanOptions(gpus=5, tensor=5, remat="dots")
    plans = make_plans(QwenVLConfig.qwen2_vl_2b(), options)
    assert "tensor=5 does not divide the attention heads" in report(options, plans)
    options = PlanOptions(gpus=4, tensor=4, remat="dots")
    assert "divide" not in report(options, make_plans(QwenVLConfig.qwen2_vl_2b(), options))


@pytest.mark.parametrize(
    "result", [r for r in MEASURED if "tokens" not in r], ids=lambda result: f"{result['model']} {result['mesh']}"
)
def test_time_is_near_that_of_each_measured_step_on_a_mesh(result):
    """Regression: with the weights gathered by layer, the 7B was planned 13 % slower than measured."""
    mesh = {name: int(size) for name, size in (axis.split("=") for axis in result["mesh"].split())}
    options = PlanOptions(gpus=math.prod(mesh.values()), gpu="H200", batch_size=result["rows"], remat="dots", **mesh)
    if "memory_limit_gib" in result:
        options = dataclasses.replace(options, memory=result["memory_limit_gib"] / 0.95)
    (plan,) = make_plans(getattr(QwenVLConfig, result["model"].replace("-", "_"))(), options)
    assert plan.fits and plan.by_device == ("memory_limit_gib" not in result and {*mesh} <= {"data", "fsdp"})
    assert plan.step_s * 1e3 == pytest.approx(result["step_ms"], rel=0.07)


def test_efficiency_of_a_long_row_is_near_the_measured_one():
    """Only relative to one GPU: with long rows, all GPUs compute at a higher rate than planned."""
    (two,) = (r for r in MEASURED if r["mesh"] == "sequence=2")
    work = ("model", "tokens", "rows", "remat", "attention")
    (one,) = (r for r in STEPS if r.get("devices") == 1 and all(r.get(name) == two[name] for name in work))
    options = PlanOptions(gpus=2, gpu="H200", batch_size=1, length=two["tokens"], remat="dots", sequence=2)
    (plan,) = make_plans(QwenVLConfig.qwen2_vl_2b(), options)
    assert plan.efficiency == pytest.approx(one["step_ms"] / 2 / two["step_ms"], abs=0.03)


def test_plans_that_fit_come_first():
    config, options = QwenVLConfig.tiny(), PlanOptions(gpus=4, **TINY)
    sizes = sorted(candidate.memory.total for candidate in make_plans(config, options))
    options = dataclasses.replace(options, memory=sizes[1] / 2**30 / 0.95)
    plans = make_plans(config, options)
    fits = [candidate.fits for candidate in plans]
    assert fits == sorted(fits, reverse=True) and fits[0] and not fits[-1]
    times = [candidate.step_s for candidate in plans if candidate.fits]
    assert times == sorted(times)
    assert "does not fit" in report(options, plans)


def test_remat_auto_is_the_fastest_that_fits():
    """16 rows of the 2B need narrow on one GPU of 80 GB, as measured."""
    (one,) = make_plans(QwenVLConfig.qwen2_vl_2b(), PlanOptions(gpus=1, batch_size=16, memory=79.1))
    assert (
        one.remat == "narrow" and one.fits and one.limit == pytest.approx(0.95 * 79.1 * 2**30) and one.efficiency == 1
    )


def test_traffic():
    """By hand, for weights of 1000 bytes, of which 600 are trained, and a row without images."""
    config, row = QwenVLConfig.tiny(), sample_row(QwenVLConfig.tiny(), length=64, patches=0)
    move = functools.partial(step_traffic, config, row=row, weights={"w": 1000}, trained={"w": 600})
    assert move({"fsdp": 4}, rows=1, by_device=True) == {"fsdp": (1000 + 600) * 3 / 4}
    assert move({"fsdp": 4}, rows=1, by_device=False) == {"fsdp": (2000 + 600) * 3 / 4}
    assert move({"data": 2, "fsdp": 4}, rows=1, by_device=True)["data"] == 2 * 600 / 4 / 2
    text = config.text
    activations = 10 * 64 * text.num_hidden_layers * text.hidden_size * 2
    assert move({"tensor": 2}, rows=3, by_device=False) == {"tensor": 3 * activations / 2}
    key_heads = 2 * text.num_key_value_heads  # twice as many devices: each key head is sent to two of them
    numbers = 2 * (text.num_attention_heads + key_heads) * text.head_dim
    heads = 3 * 64 * text.num_hidden_layers * numbers * 2
    assert move({"sequence": 4}, rows=1, by_device=False) == {"sequence": (heads / 4 + 2600) * 3 / 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 4, "tensor": 3}, "has 3 GPUs; expected 4"),
        ({"memory": -1.0}, "memory is -1.0; expected above 0"),
        ({"length": 64, "patches": 4096}, "patches is 4096; expected 0 to 244"),
        ({"gpus": 8, "batch_size": 3, "gpus_per_host": 1}, "batch_size is 3; expected a multiple"),
    ],
    ids=str,
)
def test_errors(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_plans(QwenVLConfig.tiny(), PlanOptions(**{"remat": "dots", **TINY, **options}))
