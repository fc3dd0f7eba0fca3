from liger_jax.model.qwen2_vl import Qwen2VL as Qwen2VL
from liger_jax.tree import param_paths as param_paths
