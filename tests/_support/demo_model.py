"""The demo's model with random weights, and its processor, shared by the tests of generation."""

import functools

from liger_jax import Processor, Qwen2VL
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_config, make_processor


@functools.cache
def model_and_processor() -> tuple[Qwen2VL, Processor]:
    processor = make_processor(load_digits()[0])
    return Qwen2VL.init(make_config(processor), seed=1, dtype="float32"), processor
