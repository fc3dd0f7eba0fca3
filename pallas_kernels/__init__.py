"""Fused Pallas/Triton kernels for transformers on NVIDIA GPUs, each with an equivalent pure-XLA implementation.

The operations take arrays, know nothing about models, and depend only on JAX. Every operation takes `implementation`:

  None         the kernel on a GPU, XLA elsewhere, as decided by the platform that the program is lowered for (activations
               and RoPE: XLA everywhere; attention: FlashAttention-4 where it is installed, then cuDNN, for calls that they
               support)
  "triton"     the Pallas kernel, lowered to Triton
  "xla"        plain JAX
  "interpret"  the same kernel in Pallas's interpreter: on any platform, slow, for tests
  "cudnn"      cuDNN, only for `attention`
  "fa4"        FlashAttention-4 of the package fa4-jax, only for `attention`

An implementation that does not support a call raises.
"""

from pallas_kernels._fa4_cache import cache_kernels
from pallas_kernels._sharding import split_rows_over
from pallas_kernels.activations import geglu, gelu_tanh, quick_gelu, swiglu
from pallas_kernels.add_rms_norm import add_rms_norm
from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import cross_entropy
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_linear import linear_add, norm_linear, norm_swiglu
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.qk_norm_rope import qk_norm_rope
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope import mrope, rope
from pallas_kernels.segments import Segments, find_segments

__all__ = [
    "Segments",
    "add_rms_norm",
    "attention",
    "cache_kernels",
    "cross_entropy",
    "decode_attention",
    "find_segments",
    "geglu",
    "gelu_tanh",
    "layer_norm",
    "linear_add",
    "linear_cross_entropy",
    "mrope",
    "norm_linear",
    "norm_swiglu",
    "qk_norm_rope",
    "quick_gelu",
    "rms_norm",
    "rope",
    "split_rows_over",
    "swiglu",
]
