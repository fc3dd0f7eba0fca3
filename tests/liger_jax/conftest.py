"""The demo's processor, configuration and data, for tests that load data or fine-tune."""

import pytest

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
