"""JAX and XLA settings: compiler options of the large programs, and the compilation cache."""

import os
from pathlib import Path

# Products by cuBLAS alone: trying out Triton's takes three quarters of the compilation and gains 1 % of a step at most.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def enable_compilation_cache() -> None:
    """Keeps compiled programs in ~/.cache/liger-jax, so that the next process need not compile them.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "liger-jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # by default 1: many small ones add up
