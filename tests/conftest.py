"""JAX settings for all tests, made before JAX looks for devices, and the order of test files."""

import gc
import importlib.metadata
import os
import shutil
import signal

# Most of the time goes into compiling programs that then run for milliseconds, so compile with fewer optimizations.
if shutil.which("nvidia-smi"):
    flags = ["--xla_gpu_autotune_level=0"]
else:
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # commands run by tests write nothing to the user's folders

import jax

jax.config.update("jax_num_cpu_devices", 4)  # so that any test can build a mesh
jax.config.update("jax_default_matmul_precision", "highest")  # a GPU rounds float32 products to tf32 otherwise

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a script; tests send this signal
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.set_threshold(50_000)  # tracing allocates many objects that live on: collecting them often takes a tenth of the time

# The longest files run first: a worker that started one of them last would run on alone.
LONGEST = {
    *("test_notebooks", "test_finetune", "test_lora", "test_benchmarks", "test_sharding", "test_docs"),
    "test_snippets",
    *("test_kernels", "test_linear_cross_entropy", "test_soak", "test_faults", "test_processes", "test_loader"),
}


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would start with the files that have the most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish():
    gc.freeze()  # modules and tests live on: the garbage collector need not traverse them, as it did hundreds of times


def pytest_terminal_summary(terminalreporter):
    reports = (report for reports in terminalreporter.stats.values() for report in reports)
    properties = [item for report in reports for item in getattr(report, "user_properties", ())]
    if inputs := sum(value for name, value in properties if name == "fuzz_inputs"):
        terminalreporter.write_line(f"fuzzing: {inputs:,} inputs")
