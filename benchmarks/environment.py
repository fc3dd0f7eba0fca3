"""The machine that a benchmark runs on: its GPU, its package versions, and the folder of results."""

import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import jax

from liger_jax.errors import UserError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30
NO_GPU = "device is not a GPU; expected an NVIDIA GPU that JAX can use"


def device_kind() -> str:
    """Returns the name of the GPU. Raises UserError without one."""
    try:
        return jax.devices("gpu")[0].device_kind
    except RuntimeError as error:
        raise UserError(NO_GPU) from error


def check_for_gpu() -> None:
    """Raises UserError without a GPU. Checks in a child process, so that this process does not reserve GPU memory."""
    if subprocess.run([sys.executable, "-c", "import jax; jax.devices('gpu')"], capture_output=True).returncode:
        raise UserError(NO_GPU)


def file_name(prefix: str, device: str) -> str:
    """Returns the name of a device's results file, without its suffix.

    Example:
        >>> file_name("ops", "NVIDIA H200")
        'ops_nvidia_h200'
    """
    return f"{prefix}_{device.lower().replace(' ', '_')}"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Returns {package: version} for the packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def first_line(error: Exception) -> str:
    """Returns the type and the first line of an error, cut to 300 characters."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
