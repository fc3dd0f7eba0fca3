"""Settings of JAX, XLA and other packages: compiler options, the compilation cache, and which messages are printed."""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from liger_jax.errors import LigerWarning

# Only cuBLAS matmuls: autotuning Triton's takes three quarters of the compilation time and saves at most 1 % of a step.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}

# The decode loop is one CUDA graph, its condition included, so that the host dispatches it once, not once per token. XLA's
# default types of commands are these without WHILE and CONDITIONAL, and by default a graph has at least five commands.
DECODE_COMPILER_OPTIONS: dict[str, str | int] = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
    ),
    "xla_gpu_graph_min_graph_size": 1,
}


def step_compiler_options(mesh: Any) -> dict[str, str | bool]:
    """Returns the compiler options of a training step.

    Without a mesh there is no communication whose latency to hide. XLA's latency hiding scheduler then only takes time: with
    it, a step of the 2B on an H200 takes 3 to 6 ms longer, and compiles up to 8 s longer. On a mesh, no other option was
    found to help; docs/performance.md lists those that were measured.
    """
    return (
        COMPILER_OPTIONS if mesh is not None else COMPILER_OPTIONS | {"xla_gpu_enable_latency_hiding_scheduler": False}
    )


def enable_compilation_cache() -> None:
    """Caches compiled programs in ~/.cache/liger-jax, so that later processes start faster.

    Commands that run a model call it first. Call it before anything compiles. The environment variable
    JAX_COMPILATION_CACHE_DIR sets another folder, and JAX_ENABLE_COMPILATION_CACHE=false disables the cache.

    Example:
        >>> from liger_jax.runtime import enable_compilation_cache
        >>> enable_compilation_cache()  # doctest: +SKIP
    """
    import jax

    from pallas_kernels import cache_kernels

    config: Any = jax.config  # its attributes have no type annotations
    if not config.jax_enable_compilation_cache:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache_kernels(Path(config.jax_compilation_cache_dir or caches / "liger-jax") / "kernels")
    if config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(caches / "liger-jax"))
        # JAX's default of 1 s would leave out many small programs, which add up
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pauses Python's garbage collection. It takes a fifth of the time of tracing, which makes few objects that die."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compile_without_gpus() -> None:
    """Keeps JAX off the GPUs of this machine, and lets it compile for others. Call it before JAX is imported.

    JAX's CUDA plugin then looks for no driver, and XLA, which can time nothing, does not autotune.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": flags}


# ---- messages --------------------------------------------------------------------------------------------------------

# Environment variables that packages read when they are imported, here and in worker processes. Errors are still printed.
QUIET = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TRANSFORMERS_VERBOSITY": "error", "TF_CPP_MIN_LOG_LEVEL": "2"}


def silence_packages() -> None:
    """Silences warnings and logs of other packages, and prints this project's warnings as one line each.

    It lasts for the rest of the process.

    Python's own switches (`-W`, PYTHONWARNINGS) choose the warnings if they are set.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they are full of carriage returns
    logging.disable(logging.ERROR)  # failures are also raised as exceptions
    sys.unraisablehook = _handle_unraisable
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", LigerWarning)
        # Those of pallas_kernels are recognized by the module: to import a category of its own would be to import JAX.
        warnings.filterwarnings("default", category=UserWarning, module=r"pallas_kernels\.")
    warnings.showwarning = _print_warning


def worker_initializer() -> Callable[[int, int], None] | None:
    """Returns a function that makes a worker process as silent as this one, for Grain; None if this one is not silent."""
    return _silence_worker if warnings.showwarning is _print_warning else None


def _silence_worker(index: int, count: int) -> None:
    silence_packages()


def _handle_unraisable(error: Any) -> None:
    """Prints an error that cannot be raised. Omits those of TensorStore after a failed write, since the failure is raised.

    Ctrl-C can also arrive where nothing can be raised, often in JAX's garbage collection after a compilation. The signal is
    then sent again a moment later.
    """
    if issubclass(error.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    elif "Event loop is closed" not in str(error.exc_value):
        sys.__unraisablehook__(error)


def _print_warning(message: Any, category: type, *place: Any, **options: Any) -> None:
    """Prints a warning without the source line that it came from."""
    over_bar = "\r\x1b[K" if sys.stderr.isatty() else ""  # clears the line, which may hold a progress bar
    print(f"{over_bar}warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def warn_if_gpu_is_unused() -> None:
    """Warns if JAX runs on the CPU of a machine with an NVIDIA GPU, unless JAX_PLATFORMS asks for that."""
    import jax

    config: Any = jax.config
    if Path("/dev/nvidia0").exists() and jax.default_backend() == "cpu" and not config.jax_platforms:
        warnings.warn(
            "JAX runs on the CPU, although this machine has an NVIDIA GPU; expected jax[cuda12] or jax[cuda13] to be "
            "installed, and a driver that fits it",
            LigerWarning,
            stacklevel=2,
        )
