"""The planner: which meshes it compares, what they move, and what it prints."""

import dataclasses
import functools
import math
import re

import pytest

from liger_jax import QwenVLConfig
from liger_jax.cli import main
from liger_jax.errors import UserError
from liger_jax.options import PlanOptions
from liger_jax.plan import make_plans, meshes, report
from liger_jax.train.communication import step_traffic
from liger_jax.train.memory import sample_row

TINY = {"length": 64, "patches": 64, "remat": "dots"}


def test_all_meshes_are_compared():
    """Those whose axes multiply to the GPUs, divide the batch and the heads, and keep `tensor` within a host."""
    config, options = QwenVLConfig.qwen2_vl_2b(), PlanOptions(gpus=8, batch_size=16, gpus_per_host=4)
    shapes = list(meshes(config, options))
    assert all(math.prod(mesh.values()) == 8 and mesh.get("tensor", 1) <= 4 for mesh in shapes)
    assert {"fsdp": 8} in shapes and {"data": 2, "tensor": 4} in shapes and len(shapes) == 9
    few_rows = list(meshes(config, PlanOptions(gpus=8, batch_size=2)))
    assert all(mesh.get("data", 1) * mesh.get("fsdp", 1) in (1, 2) for mesh in few_rows)


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
    numbers = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
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


def test_command(capsys, monkeypatch):
    monkeypatch.setattr("liger_jax.runtime.compile_without_gpus", lambda: None)  # JAX is imported already
    main(["plan", "qwen2_vl_2b", "--gpus", "2", "--gpu", "H200", "--remat", "dots", "--fsdp", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 x H200") and re.match(r"fsdp=2 +dots +\d\d\.\d +\d+ ms", lines[4])
    assert any(line.startswith("fsdp: 4.4") for line in lines)
    with pytest.raises(SystemExit, match="MODEL is 'qwen9'; expected one of"):
        main(["plan", "qwen9"])
    with pytest.raises(SystemExit, match=r"MODEL is 'qwen2-vl-7b'; expected one of .*; did you mean qwen2_vl_7b\?"):
        main(["plan", "qwen2-vl-7b"])
    with pytest.raises(SystemExit, match="MODEL is '7b'; expected one of"):  # without a request to the hub
        main(["plan", "7b"])
