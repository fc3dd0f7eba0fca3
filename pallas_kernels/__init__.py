"""Fused operations for transformer language models on NVIDIA GPUs. They know arrays, not models, and import JAX only.

Every operation takes `implementation`: None picks by the platform that the program is lowered for (gates and rotations are
XLA's on all of them, see there), "triton" is the Pallas kernel lowered to Triton, "interpret" the same kernel in Pallas's
interpreter (any platform, slow, for tests), "xla" plain JAX. For `attention` it is None, "cudnn" or "xla". A name that
cannot run raises.
"""

from pallas_kernels.activations import geglu, quick_gelu, swiglu
from pallas_kernels.add_rms_norm import add_rms_norm
from pallas_kernels.attention import Segments, attention, find_segments
from pallas_kernels.cross_entropy import cross_entropy
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_linear import linear_add, norm_linear, norm_swiglu
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope import mrope, rope

__all__ = [
    "Segments",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "decode_attention",
    "find_segments",
    "geglu",
    "layer_norm",
    "linear_add",
    "linear_cross_entropy",
    "mrope",
    "norm_linear",
    "norm_swiglu",
    "quick_gelu",
    "rms_norm",
    "rope",
    "swiglu",
]
