"""`liger-jax env`."""

import sys
from importlib import metadata

from liger_jax import names

PACKAGES = ("liger-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "pillow")
# Those for GPUs are listed where they are installed.
OPTIONAL = ("jax-cuda12-plugin", "jax-cuda13-plugin", "fa4-jax", "nvidia-cutlass-dsl")


def env(check: bool = False) -> None:
    """Show versions and devices, for a bug report; with --check, also test each kernel on this device.

    Args:
        check: Run each operation once, compare its kernels with XLA, and show which implementation it uses and why. Takes
            about a minute. The exit status is 1 if a kernel fails.
    """
    import platform

    import jax

    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in (*PACKAGES, *OPTIONAL):
        try:
            print(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            if package in PACKAGES:
                print(package, "not installed as a package")
    if overwriting := names.other_distributions():
        print("warning: packages of liger-jax were also installed, and overwritten, by", ", ".join(overwriting))
    print("platform", jax.default_backend())
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        print("device", device.id, device.device_kind, *([f"{memory / 2**30:.1f} GiB"] if memory else []))
    if check:
        from pallas_kernels.check import main as check_kernels

        sys.exit(check_kernels())
