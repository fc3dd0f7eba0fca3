"""A processor with a small tokenizer, in memory and saved."""

import pytest

from liger_jax import Processor
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.inputs.images import VisionSettings
from tests._support.processing import HUB_LIMITS, SMALL_LIMITS


@pytest.fixture(scope="module")
def processor():
    """Returns a processor with the tokenizer of the stored outputs (bytes, no merges) and the hub's limits."""
    limits = VisionSettings(**HUB_LIMITS)
    return Processor(train_tokenizer([]), limits, limits)


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    Processor(processor.tokenizer, VisionSettings(max_pixels=50_000), VisionSettings(**SMALL_LIMITS)).save_pretrained(
        folder
    )
    return folder
