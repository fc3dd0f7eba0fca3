"""How XLA is asked to compile the large programs: training steps and prefill."""

# Products by cuBLAS alone: trying out Triton's takes three quarters of the compilation and gains 1 % of a step at most.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
