"""The fuzz tests are enough."""

from tests._support.fuzzing import INPUTS


def test_a_run_has_at_least_5000_inputs():
    """Each test checks its own number (see conftest.py), so the sum is that of all inputs."""
    assert sum(INPUTS.values()) >= 5_000
