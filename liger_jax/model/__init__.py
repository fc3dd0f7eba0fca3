"""The device side: turns a Batch into hidden states and logits."""

from liger_jax.model.qwen_vl import Qwen2VL as Qwen2VL
from liger_jax.model.qwen_vl import QwenVL as QwenVL
