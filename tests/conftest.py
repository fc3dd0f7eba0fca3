"""Settings of JAX for all tests, made before it looks for devices; and which files begin."""

import importlib.metadata
import os
import shutil

# Most of the time goes into compiling what then runs for milliseconds: compile less carefully.
if shutil.which("nvidia-smi"):
    flags = ["--xla_gpu_autotune_level=0"]
else:
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # commands that tests run leave nothing in the user's folders

import jax

jax.config.update("jax_num_cpu_devices", 4)  # so that any test can build a mesh
jax.config.update("jax_default_matmul_precision", "highest")  # a GPU rounds float32 products to tf32 otherwise

# The longest files begin: a worker that got one of them last would keep the others waiting.
LONGEST = {
    *("test_notebooks", "test_finetune", "test_lora", "test_bench", "test_mesh", "test_docs"),
    *("test_kernels", "test_linear_cross_entropy"),
}


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)
