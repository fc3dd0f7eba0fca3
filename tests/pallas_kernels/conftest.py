"""These tests run on the CPU wherever they run; tests/gpu is for the device."""

import jax
import pytest


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield
