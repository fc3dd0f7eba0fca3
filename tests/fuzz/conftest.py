"""Counts the inputs of each fuzz test."""

import pytest

from tests._support.fuzzing import INPUTS, counts


@pytest.fixture(autouse=True)
def count_inputs(request, record_property):
    """Fails if a test had fewer inputs than INPUTS says, and reports how many it had."""
    yield
    name = request.node.originalname
    if name in INPUTS:
        record_property("fuzz_inputs", counts[name])
        assert counts[name] >= INPUTS[name], f"{counts[name]} inputs; expected at least {INPUTS[name]}"
