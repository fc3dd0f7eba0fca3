"""The soak benchmark: short runs, what it counts as growth, and its table."""

import json

import jax
import numpy as np
import optax
import pytest

from benchmarks import soak, tables
from benchmarks.soak import Soak
from liger_jax import Qwen2VL
from liger_jax.errors import UserError
from pallas_kernels.registry import OPERATIONS


@pytest.fixture
def few_programs(monkeypatch):
    """Leaves one kind of batch per run, without images, in float32, which compiles faster."""
    init = Qwen2VL.init
    monkeypatch.setattr(soak, "KINDS", ((1, (), 5),))
    monkeypatch.setattr(soak, "OPTIONS", ({"max_new_tokens": 2},))
    monkeypatch.setattr(Qwen2VL, "init", lambda config: init(config, dtype="float32"))
    monkeypatch.setattr(soak, "make_optimizer", optax.sgd)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="measures operations on a GPU")
def test_training_and_generation_compile_nothing_after_warm_up(few_programs, tmp_path):
    """And memory, measured after each call of so short a run, stays within 2 %."""
    file = Soak(steps=40, calls=40, results=tmp_path).run()
    assert file == tmp_path / "soak_cpu.json"
    report = json.loads(file.read_text())
    for name in ("training steps", "generate calls"):
        run = report["runs"][name]
        assert (run["count"], run["kinds"], run["warm_up"]) == (40, 1, 10)
        assert run["programs"] > 0 and run["compilations_after_warm_up"] == 0
        assert len(run["memory"]) == 30 and run["memory"][0] > 50e6
    lines = tables.with_tables("<!-- table: soak -->\n<!-- end -->", tmp_path).splitlines()
    assert lines[3].startswith("| 40 training steps | 1 | ") and lines[4].startswith("| 40 generate calls | 1 | ")


def test_growth_and_late_compilations_are_errors():
    """A program that the cycle does not have, and memory that is kept, are found."""
    late = soak.soak("late", lambda i: jax.jit(lambda x: x + 1)(np.zeros(5 if i < 6 else i)), 2, 8)
    assert late["compilations_after_warm_up"] >= 2
    with pytest.raises(UserError, match="programs were compiled after warm-up; expected none"):
        soak.check({"late": late | {"memory": [1, 1]}})
    kept = []
    leak = soak.soak("leak", lambda i: kept.append(np.ones(2**22)), 1, 8)
    with pytest.raises(UserError, match=r"leak: memory changed by \d+\.\d%; expected at most 2%"):
        soak.check({"leak": leak})
    with pytest.raises(UserError, match="count is 8; expected above 8, the calls of the warm-up"):
        soak.soak("short", lambda i: None, 8, 8)


def test_every_operation_is_called_in_every_shape():
    calls = soak.operation_calls()
    assert {function.args[0].name for function, _ in calls} == set(OPERATIONS)
    for function, arguments in calls:
        _, gradients = jax.eval_shape(function, *arguments)
        assert len(gradients) == len(function.args[0].differentiable)
