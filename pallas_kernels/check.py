"""Runs each operation once on this machine's device: compares its kernels with XLA, and shows what it uses and why.

python -m pallas_kernels.check [operation ...]
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import _pallas, _tuning
from pallas_kernels.registry import OPERATIONS, Operation, Sizes

TOLERANCE = 2e-2  # of the largest entry of an array; bfloat16 has steps of 0.4 to 0.8 %
# Sizes of a layer of Qwen2-VL-2B, with fewer tokens and a smaller vocabulary.
LAYER: Sizes = {"T": 256, "S": 256, "N": 12, "K": 2, "D": 128, "heads": 16, "H": 1536, "O": 2048, "F": 8960, "V": 8192}
ROWS, ROW_WIDTH = (512,), 1536
# Why None picks an implementation on a GPU, by family.
REASONS = {
    ("norm", "triton"): "faster than XLA, forward and backward",
    ("activation", "xla"): "XLA fuses it with the operations around it",
    ("rope", "xla"): "XLA fuses it with the operations around it",
    ("rope", "triton"): "reads and writes q and k only once",
    ("loss", "triton"): "reads the logits once per pass and never stores their softmax",
    ("attention", "fa4"): "FlashAttention-4 is the fastest at every shape",
    ("decode", "triton"): "one kernel for a step's single row, instead of several launches",
}


def main(names: Sequence[str] = ()) -> int:
    """Checks the named operations, by default all, and prints a line for each.

    Returns:
        0, or 1 if a kernel fails, or if its values or gradients differ from XLA's.
    """
    if unknown := set(names) - set(OPERATIONS):
        raise SystemExit(f"pallas_kernels.check: operations are {sorted(unknown)}; expected any of {list(OPERATIONS)}")
    on_gpu = _tuning.device_kind() is not None
    device = jax.devices("gpu" if on_gpu else None)[0]
    where = device.device_kind if on_gpu else f"{device.device_kind}, in Pallas's interpreter: there is no NVIDIA GPU"
    print(f"\nkernels against XLA on {where}")
    print("difference: the largest one of values and gradients in bfloat16, relative to the largest entry")
    print(f"{'operation':<22}{'uses':<8}{'difference':<46}why")
    failures = []
    with jax.default_device(device):
        for operation in (OPERATIONS[name] for name in names or OPERATIONS):
            arguments = operation.example(sizes_of(operation) if on_gpu else None, "bfloat16")
            uses, reason = chosen(operation, arguments, "cuda" if on_gpu else device.platform)
            results = {name: compare(operation, name, arguments) for name in implementations(operation, on_gpu)}
            failures += [f"{operation.name} ({name}): {text}" for name, (text, failed) in results.items() if failed]
            differences = ", ".join(
                f"{name} {'FAILED' if failed else text}" for name, (text, failed) in results.items()
            )
            print(f"{operation.name:<22}{uses:<8}{differences:<46}{reason}", flush=True)
    if kind := _tuning.device_kind():
        measured = _tuning.file_of(kind).exists()
        print("block sizes:", "measured for this GPU" if measured else "defaults; `liger-jax tune` measures this GPU's")
    print("\n".join(["failed:", *failures]) if failures else "all kernels agree with XLA")
    return 1 if failures else 0


def sizes_of(operation: Operation) -> Sizes:
    """Returns the axis sizes of an operation in a layer of a model."""
    width = {"D": ROW_WIDTH} if operation.family in ("norm", "activation") else {}
    return {**LAYER, "...": ROWS, "B": 1, **width}


def implementations(operation: Operation, on_gpu: bool) -> list[str]:
    """Returns the names of the kernels to compare with XLA."""
    if not on_gpu:
        return ["interpret"]
    return ["fa4", "cudnn", "triton"] if operation.family == "attention" else ["triton"]


def chosen(operation: Operation, arguments: Sequence[jax.Array], platform: str) -> tuple[str, str]:
    """Returns which implementation None picks on a platform, as read from the lowered program, and why."""
    if platform != "cuda":
        return "xla", f"kernels need an NVIDIA GPU, and JAX runs on {platform}"
    if _pallas.plgpu is None:
        return "xla", f"JAX {jax.__version__} has no Triton backend for Pallas"
    program = jax.jit(operation.function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    uses = "triton" if _pallas.TRITON_CALL in program else "cudnn" if "__cudnn$" in program else "xla"
    if operation.family == "attention" and uses == "xla" and unsupported_reason(operation, "fa4", arguments) is None:
        uses = "fa4"  # the names of its calls do not matter
    if operation.family == "attention" and uses != "fa4":
        better = {"cudnn": ["fa4"], "triton": ["fa4", "cudnn"], "xla": ["fa4", "cudnn", "triton"]}[uses]
        return uses, "; ".join(f"no {name}: {unsupported_reason(operation, name, arguments)}" for name in better)
    return uses, REASONS.get((operation.family, uses), "")


def unsupported_reason(operation: Operation, implementation: str, arguments: Sequence[jax.Array]) -> str | None:
    """Returns why an implementation does not support a call, or None if it does."""
    try:
        jax.eval_shape(functools.partial(operation.function, implementation=implementation), *arguments)
    except NotImplementedError as error:
        return str(error).partition("does not support this call: ")[2] or str(error)
    return None


def compare(operation: Operation, implementation: str, arguments: Sequence[jax.Array]) -> tuple[str, bool]:
    """Returns the largest difference from XLA, or what went wrong, and whether that is a failure."""
    try:
        if unsupported_reason(operation, implementation, arguments) is not None:
            return "-", False
        difference = max(
            _difference(actual, expected)
            for actual, expected in zip(
                values_and_gradients(operation, implementation, arguments),
                values_and_gradients(operation, "xla", arguments),
                strict=True,
            )
        )
    except Exception as error:  # a kernel that does not compile or run can raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0], True
    return f"{difference:.1e}", not difference <= TOLERANCE


def values_and_gradients(operation: Operation, implementation: str, arguments: Sequence[jax.Array]) -> list[np.ndarray]:
    """Returns an operation's results, and the gradients of its differentiable arguments for random cotangents."""
    count = len(operation.differentiable)
    function = functools.partial(operation.function, implementation=implementation)

    @jax.jit
    def run(*arguments: Any) -> Any:
        if not count:
            return function(*arguments)
        results, pullback = jax.vjp(lambda *inputs: function(*inputs, *arguments[count:]), *arguments[:count])
        cotangents = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype), results)
        return results, pullback(cotangents)

    return [np.asarray(array, np.float64) for array in jax.tree.leaves(run(*arguments))]


def _difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest entry; NaN if an entry is NaN."""
    return float(np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
