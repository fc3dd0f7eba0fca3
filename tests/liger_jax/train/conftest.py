"""Compiled steps that runs of `finetune` share."""

import functools

import pytest

import liger_jax.train.finetune as finetune_module
from liger_jax import make_train_step


@pytest.fixture(scope="module")
def compiled_once():
    """Runs with the same options share their compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "make_train_step", functools.cache(make_train_step))
        yield
