"""Qwen2-VL for JAX on NVIDIA GPUs."""

from liger_jax.batch import Batch, prepare
from liger_jax.config import Qwen2VLConfig
from liger_jax.generate import generate
from liger_jax.model import Qwen2VL
from liger_jax.train import TrainState, loss_fn, make_train_step

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Processor",
    "Qwen2VL",
    "Qwen2VLConfig",
    "TrainState",
    "generate",
    "loss_fn",
    "make_train_step",
    "prepare",
]


def __getattr__(name: str):
    # the processor needs transformers, which alone takes longer to import than everything else
    if name == "Processor":
        from liger_jax.processing import Processor

        return Processor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
