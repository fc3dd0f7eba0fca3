"""A step that is compiled from shapes alone is the program that training compiles."""

import jax
import numpy as np
import pytest

from liger_jax import QwenVL, QwenVLConfig, TrainState, make_train_step
from liger_jax.errors import UserError
from liger_jax.options import PlanOptions
from liger_jax.plan import make_training
from liger_jax.train import ahead


def test_memory_is_that_of_a_real_step(monkeypatch):
    """For a mesh of simulated devices, in place of GPUs that are described."""
    monkeypatch.setattr(ahead, "describe_gpus", lambda gpu, count: jax.devices()[:count])
    config = QwenVLConfig.tiny()
    training = make_training(config, PlanOptions(length=64, patches=0), "dots")
    size = ahead.compiled_bytes(training, {"fsdp": 2}, 4, gpu="H100", by_device=True)
    mesh = jax.make_mesh((2,), ("fsdp",))
    state = TrainState.create(QwenVL.init(config, mesh=mesh), training.optimizer)
    batch = jax.tree.map(lambda x: np.concatenate([x] * 4), training.row)
    memory = make_train_step(remat="dots").compile(state, batch).memory_analysis()
    assert size == memory.argument_size_in_bytes + memory.temp_size_in_bytes


def test_unknown_gpu():
    with pytest.raises(UserError, match=r"gpu is 'A100'; expected one of \['H100', 'H200'\]"):
        ahead.describe_gpus("A100", 1)
