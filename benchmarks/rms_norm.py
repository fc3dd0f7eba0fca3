"""Kernel time of rms_norm, forward and with its backward pass: the Triton kernels, jitted jnp, and Liger on torch.

    python benchmarks/rms_norm.py --results benchmarks/results/rms_norm.json

Times are of the kernels alone, from the profiler, on fresh random inputs in bfloat16; the values are compared with float64.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import work

SHAPES = [(rows, width) for width in (1536, 3584, 8192) for rows in (2048, 8192, 16_384)]
EPS = 1e-6
REPEATS = 9


def inputs(rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, weight and the cotangent, float32."""
    rng = np.random.default_rng(rows + width)
    x, grad = rng.normal(size=(2, rows, width)).astype(np.float32)
    return x, rng.normal(1, 0.2, size=width).astype(np.float32), grad


def reference(x: np.ndarray, weight: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out, dx, dweight in float64."""
    x, weight, grad = (a.astype(np.float64) for a in (x, weight, grad))
    inverse = 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS)
    normed, g = x * inverse, grad * weight
    dx = inverse * (g - normed * np.mean(g * normed, axis=1, keepdims=True))
    return normed * weight, dx, np.sum(grad * normed, axis=0)


def errors(found: tuple, expected: tuple) -> list[float]:
    """Relative distance of out, dx and dweight from float64."""
    return [
        float(np.linalg.norm(np.asarray(f, np.float64) - e) / np.linalg.norm(e))
        for f, e in zip(found, expected, strict=True)
    ]


def ours(rows: int, width: int, implementation: str) -> dict:
    import jax
    import jax.numpy as jnp
    from jax.experimental.mosaic.gpu import profiler

    from pallas_kernels import rms_norm

    given = inputs(rows, width)
    x, weight, grad = (jnp.asarray(a, jnp.bfloat16) for a in given)

    def forward(x, weight):
        return rms_norm(x, weight, eps=EPS, implementation=implementation)

    def both(x, weight, grad):
        out, vjp = jax.vjp(forward, x, weight)
        return out, *vjp(grad)

    found, both_ms = profiler.measure(jax.jit(both), iterations=REPEATS)(x, weight, grad)
    _, forward_ms = profiler.measure(jax.jit(forward), iterations=REPEATS)(x, weight)
    rounded = tuple(np.asarray(a, np.float32) for a in (x, weight, grad))
    return {
        "forward_us": 1e3 * statistics.median(forward_ms),
        "both_us": 1e3 * statistics.median(both_ms),
        "errors": errors([np.asarray(a, np.float32) for a in found], reference(*rounded)),
    }


def liger(rows: int, width: int) -> dict:
    import torch
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight, grad = (torch.from_numpy(a).cuda().bfloat16() for a in inputs(rows, width))
    x.requires_grad_(), weight.requires_grad_()

    def forward():
        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    def both():
        out = forward()
        return (out, *torch.autograd.grad(out, (x, weight), grad))

    def kernel_us(function) -> float:
        function(), torch.cuda.synchronize()
        times = []
        for _ in range(REPEATS):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                function(), torch.cuda.synchronize()
            times.append(sum(event.self_device_time_total for event in profile.key_averages()))
        return statistics.median(times)

    found = [a.detach().float().cpu().numpy() for a in both()]
    expected = reference(*(a.detach().float().cpu().numpy() for a in (x, weight, grad)))
    return {"forward_us": kernel_us(forward), "both_us": kernel_us(both), "errors": errors(found, expected)}


def liger_in_another_process() -> dict[str, dict]:
    """Liger's results by shape: only one profiler at a time can read a process's kernels. Empty without Liger."""
    done = subprocess.run([sys.executable, __file__, "--liger"], capture_output=True, text=True, check=False)
    if done.returncode:
        print("without Liger:", done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--liger", action="store_true", help="only Liger, as one line of JSON")
    parser.add_argument("--results", help="JSON list to add to")
    args = parser.parse_args()
    if args.liger:
        import importlib.metadata

        results = {f"{rows} x {width}": liger(rows, width) for rows, width in SHAPES}
        versions = {name: importlib.metadata.version(name) for name in ("torch", "liger-kernel")}
        print(json.dumps(results | {"versions": versions}))
        return
    peer = liger_in_another_process()

    import jax

    device, versions = jax.local_devices()[0].device_kind, {"jax": jax.__version__} | peer.get("versions", {})
    for rows, width in SHAPES:
        result = {name: ours(rows, width, name) for name in ("triton", "xla")}
        if peer:
            result["liger"] = peer[f"{rows} x {width}"]
        work.record(args.results, device=device, versions=versions, rows=rows, width=width, **result)


if __name__ == "__main__":
    main()
