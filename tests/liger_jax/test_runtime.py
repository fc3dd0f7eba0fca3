"""Settings of JAX: the compilation cache, and the warning about an unused GPU."""

import gc
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from liger_jax import runtime
from liger_jax.errors import LigerWarning
from tests._support.command_line import ROOT


def test_unused_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    config = types.SimpleNamespace(jax_platforms=None)
    monkeypatch.setattr("jax.config", config)
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    with pytest.warns(LigerWarning, match="JAX runs on the CPU, although this machine has an NVIDIA GPU"):
        runtime.warn_if_gpu_is_unused()
    config.jax_platforms = "cpu"
    runtime.warn_if_gpu_is_unused()


def test_garbage_collection_is_paused_and_resumed():
    with pytest.raises(KeyError), runtime.without_garbage_collection():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_compilation_cache(tmp_path):
    """The cache is in the user's cache folder by default. The environment can choose another folder or disable it."""
    code = (
        "import jax; from liger_jax import runtime; runtime.enable_compilation_cache(); "
        "from pallas_kernels import _fa4_cache; print(jax.config.jax_compilation_cache_dir, _fa4_cache._folder)"
    )

    def cache_folder(**variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | variables
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        return result.stdout.strip() or result.stderr

    assert cache_folder() == f"{tmp_path}/liger-jax {tmp_path}/liger-jax/kernels"
    assert cache_folder(JAX_COMPILATION_CACHE_DIR="mine") == "mine mine/kernels"
    assert cache_folder(JAX_ENABLE_COMPILATION_CACHE="false") == "None None"
