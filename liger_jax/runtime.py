"""JAX and XLA settings: compiler options for large programs, and the compilation cache."""

import os
from pathlib import Path
from typing import Any

# Only cuBLAS matmuls: autotuning Triton's takes three quarters of the compilation time and saves at most 1 % of a step.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}


def enable_compilation_cache() -> None:
    """Caches compiled programs in ~/.cache/liger-jax, so that later processes start faster.

    The environment variable JAX_COMPILATION_CACHE_DIR sets another folder, and JAX_ENABLE_COMPILATION_CACHE=false disables
    the cache.
    """
    import jax

    config: Any = jax.config  # its attributes have no type annotations
    if config.jax_compilation_cache_dir is None and config.jax_enable_compilation_cache:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "liger-jax"))
        # JAX's default of 1 s would leave out many small programs, which add up
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
