"""These tests run on the CPU, also on a machine with a GPU; tests/gpu is for the GPU."""

import jax
import pytest


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield
