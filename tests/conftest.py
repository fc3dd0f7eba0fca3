"""Settings of JAX for all tests, made before it looks for devices."""

import importlib.metadata
import os
import shutil

# Most of the time goes into compiling for the CPU what then runs for milliseconds: compile less carefully.
if not shutil.which("nvidia-smi"):
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # commands that tests run leave nothing in the user's folders

import jax

jax.config.update("jax_num_cpu_devices", 4)  # so that any test can build a mesh
jax.config.update("jax_default_matmul_precision", "highest")  # a GPU rounds float32 products to tf32 otherwise
