"""The demo's data and model, for runs of `finetune`."""

import functools

import pytest

import liger_jax.train.finetune as finetune_module
from liger_jax import make_train_step
from liger_jax.demo.run import make_config
from tests._support.finetune_runs import demo_processor, make_data


@pytest.fixture(scope="module")
def processor():
    return demo_processor()


@pytest.fixture(scope="module")
def config(processor):
    return make_config(processor)


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def compiled_once():
    """Runs with the same options share their compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "make_train_step", functools.cache(make_train_step))
        yield
