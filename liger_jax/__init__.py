"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL for JAX on NVIDIA GPUs."""

import importlib
from typing import TYPE_CHECKING, Any

from liger_jax.names import check_imports

if TYPE_CHECKING:
    from liger_jax.checkpoint import load_model as load_model
    from liger_jax.checkpoint import save_model as save_model
    from liger_jax.config import Qwen2VLConfig as Qwen2VLConfig
    from liger_jax.config import QwenVLConfig as QwenVLConfig
    from liger_jax.data.records import read_conversations as read_conversations
    from liger_jax.errors import UserError as UserError
    from liger_jax.generation.chat import Chat as Chat
    from liger_jax.generation.generate import generate as generate
    from liger_jax.generation.generate import stream as stream
    from liger_jax.generation.options import GenerationOptions as GenerationOptions
    from liger_jax.inputs.batch import Batch as Batch
    from liger_jax.inputs.batch import prepare as prepare
    from liger_jax.inputs.processor import Processor as Processor
    from liger_jax.model import Qwen2VL as Qwen2VL
    from liger_jax.model import QwenVL as QwenVL
    from liger_jax.model.lora import add_lora as add_lora
    from liger_jax.model.lora import merge_lora as merge_lora
    from liger_jax.options import Batching as Batching
    from liger_jax.options import Evaluation as Evaluation
    from liger_jax.options import LayerExecution as LayerExecution
    from liger_jax.options import Optimization as Optimization
    from liger_jax.options import Saving as Saving
    from liger_jax.train.finetune import finetune as finetune
    from liger_jax.train.loss import loss_fn as loss_fn
    from liger_jax.train.optimizer import make_optimizer as make_optimizer
    from liger_jax.train.step import TrainState as TrainState
    from liger_jax.train.step import make_train_step as make_train_step

__version__ = "0.2.0"

check_imports()

# name -> module. Modules are imported on first use: JAX takes a second to import, transformers two, and
# `liger-jax --help` needs neither.
_MODULES = {
    "Batch": "inputs.batch",
    "Batching": "options",
    "Chat": "generation.chat",
    "Evaluation": "options",
    "GenerationOptions": "generation.options",
    "LayerExecution": "options",
    "Optimization": "options",
    "Processor": "inputs.processor",
    "Qwen2VL": "model",
    "QwenVL": "model",
    "Qwen2VLConfig": "config",
    "QwenVLConfig": "config",
    "Saving": "options",
    "TrainState": "train.step",
    "UserError": "errors",
    "add_lora": "model.lora",
    "finetune": "train.finetune",
    "generate": "generation.generate",
    "load_model": "checkpoint",
    "loss_fn": "train.loss",
    "make_optimizer": "train.optimizer",
    "make_train_step": "train.step",
    "merge_lora": "model.lora",
    "prepare": "inputs.batch",
    "read_conversations": "data.records",
    "save_model": "checkpoint",
    "stream": "generation.generate",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"liger_jax.{_MODULES[name]}"), name)
