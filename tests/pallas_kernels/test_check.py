"""The check of the kernels on a device: what it says None picks, what it compares, and what it reports as a failure."""

import dataclasses

import jax.numpy as jnp
import pytest

from pallas_kernels import check
from pallas_kernels.registry import OPERATIONS
from tests._support.lowered import on_gpus


def test_choices_are_those_of_the_documentation():
    """Reads them from programs lowered for a GPU, as the table in docs/kernels.md has them."""
    choices = {}
    for name, operation in OPERATIONS.items():
        arguments = operation.example(check.sizes_of(operation) | {"V": 256, "O": 64, "F": 64}, "bfloat16")
        with on_gpus():
            choices[name], reason = check.chosen(operation, arguments, "cuda")
        assert reason
    kernels = {name for name, uses in choices.items() if uses == "triton"}
    assert kernels == {name for name, op in OPERATIONS.items() if op.family in ("norm", "loss", "decode")} | {
        "qk_norm_rope"
    }
    assert choices["attention"] == "cudnn"
    assert {uses for name, uses in choices.items() if name not in (*kernels, "attention")} == {"xla"}


def test_kernels_are_compared_on_a_cpu(capsys):
    assert check.main(["rms_norm", "attention"]) == 0
    *_, header, norm, attention, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["operation", "uses", "difference", "why"] and last == "all kernels agree with XLA"
    for line, name in ((norm, "rms_norm"), (attention, "attention")):
        operation, uses, implementation, difference, *reason = line.split()
        assert (operation, uses, implementation) == (name, "xla", "interpret") and float(difference) < check.TOLERANCE
        assert " ".join(reason) == "kernels need an NVIDIA GPU, and JAX runs on cpu"


@pytest.mark.parametrize("fault", ["wrong value", "NaN", "exception"])
def test_failures_are_reported(monkeypatch, capsys, fault):
    operation = OPERATIONS["quick_gelu"]

    def broken(x, *, implementation=None):
        if implementation == "interpret" and fault == "exception":
            raise RuntimeError("no such instruction\nmore")
        wrong = implementation == "interpret"
        return operation.function(x, implementation="xla") * (jnp.nan if fault == "NaN" else 1 + 0.1 * wrong)

    broken_operation = dataclasses.replace(operation, function=broken)
    monkeypatch.setitem(check.OPERATIONS, "quick_gelu", broken_operation)
    assert check.main(["quick_gelu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "interpret FAILED" in lines[-3] and lines[-2] == "failed:"
    assert lines[-1].startswith("quick_gelu (interpret): ")
    assert ("RuntimeError: no such instruction" in lines[-1]) == (fault == "exception")


def test_unknown_operation_is_refused():
    with pytest.raises(SystemExit, match=r"operations are \['relu'\]; expected any of"):
        check.main(["relu"])
