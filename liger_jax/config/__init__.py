"""The configuration of a Qwen-VL model, read from any layout of config.json on the hub.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL are one model with different switches. `families.FAMILIES` lists what each of them fixes
and the keys of its config.json; the model and `prepare` read only the switches.
"""

from liger_jax.config.hub import read_end_tokens as read_end_tokens
from liger_jax.config.qwen_vl import Qwen2VLConfig as Qwen2VLConfig
from liger_jax.config.qwen_vl import QwenVLConfig as QwenVLConfig
from liger_jax.config.towers import TextConfig as TextConfig
from liger_jax.config.towers import VisionConfig as VisionConfig
