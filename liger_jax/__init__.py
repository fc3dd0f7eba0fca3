"""Qwen2-VL for JAX on NVIDIA GPUs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liger_jax.batch import Batch, prepare
    from liger_jax.chat import Chat
    from liger_jax.config import Qwen2VLConfig
    from liger_jax.generation import generate, stream
    from liger_jax.model import Qwen2VL
    from liger_jax.processing import Processor
    from liger_jax.train import TrainState, loss_fn, make_train_step

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Chat",
    "Processor",
    "Qwen2VL",
    "Qwen2VLConfig",
    "TrainState",
    "generate",
    "loss_fn",
    "make_train_step",
    "prepare",
    "stream",
]

# Imported when first used: JAX takes a second, transformers two, and `liger-jax --help` needs neither.
_HOMES = {
    "Batch": "batch",
    "prepare": "batch",
    "Chat": "chat",
    "Qwen2VLConfig": "config",
    "generate": "generation",
    "stream": "generation",
    "Qwen2VL": "model",
    "Processor": "processing",
    "TrainState": "train",
    "loss_fn": "train",
    "make_train_step": "train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"liger_jax.{_HOMES[name]}"), name)
