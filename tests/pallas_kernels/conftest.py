"""Runs these tests on the CPU even if the machine has a GPU; tests/gpu tests the GPU."""

import jax
import pytest


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield
