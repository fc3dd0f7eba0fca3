"""Runs of `finetune` on a few of the demo's conversations, and what they log."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from liger_jax import Qwen2VL
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import make_processor
from liger_jax.model.params import param_paths
from liger_jax.options import Batching, Evaluation, LayerExecution, Saving
from liger_jax.train.finetune import finetune
from liger_jax.train.optimizer import make_optimizer

ROWS = 7
# All batches have the same shape, so that one program serves most of these tests.
DEFAULTS = {
    "batch_size": 2,
    "length": 64,
    "patches": 64,
    "workers": 0,
    "remat": "none",
    "optimizer": make_optimizer(1e-3),
    "progress": False,
}


def make_data():
    return list(itertools.islice(conversations(load_digits()[0], np.random.default_rng(0)), ROWS))


@functools.cache
def demo_processor():
    return make_processor(load_digits()[0])


@functools.cache
def initial_model(config):
    return Qwen2VL.init(config, dtype="float32")


def run(config, processor, data, output, *, model=None, **options):
    """Calls finetune with the defaults above. `options` are its arguments, or fields of its options."""
    options = DEFAULTS | options
    for argument, kind in {
        "batching": Batching,
        "execution": LayerExecution,
        "saving": Saving,
        "evaluation": Evaluation,
    }.items():
        names = {field.name for field in dataclasses.fields(kind)} & options.keys()
        options[argument] = kind(**{name: options.pop(name) for name in names})
    model = jax.tree.map(jnp.copy, initial_model(config)) if model is None else model
    return finetune(model, processor, data, output, **options)


def logged(output, name="loss"):
    """Returns the lines of the log that have this metric."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if name in line]


def losses(output):
    return [(line["step"], line["loss"]) for line in logged(output)]


def assert_equal(state, expected):
    for (path, array), other in zip(param_paths(state).items(), param_paths(expected).values(), strict=True):
        assert (array == other).all(), path
