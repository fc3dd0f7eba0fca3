"""Times the candidate block sizes of each kernel at the models' shapes on this machine's GPU, and saves the fastest.

python -m pallas_kernels.tune [kernel ...]
"""

import dataclasses
import functools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _tuning
from pallas_kernels.registry import KERNELS, Argument, Kernel, Sizes

REPEATS = 5
PAST_ALL_CACHES = 200_000_000  # bytes


def random_operands(kernel: Kernel, rows: int, width: int) -> list[Any]:
    """Returns random operands, bfloat16 except for tables, statistics and labels.

    The operand `kernel.uncached` is a tuple of arrays, one for each call, that together exceed all caches.
    """
    sizes = kernel.sizes(rows, width)
    keys = jax.random.split(jax.random.key(0), len(kernel.operands))

    def draw(name: str, argument: Argument, key: jax.Array) -> Any:
        if name != kernel.uncached:
            return _random(argument, key, sizes)
        count = min(2 + PAST_ALL_CACHES // (2 * math.prod(argument.shape(sizes))), 64)
        return tuple(_random(argument, key, sizes) for key in jax.random.split(key, count))

    return [draw(name, argument, key) for (name, argument), key in zip(kernel.operands.items(), keys, strict=True)]


def _random(argument: Argument, key: jax.Array, sizes: Sizes) -> jax.Array:
    shape = argument.shape(sizes)
    if argument.kind == "labels":
        return jax.random.randint(key, shape, 0, sizes["V"])
    if argument.kind == "statistic":
        return jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5)
    return jax.random.normal(key, shape, jnp.float32 if argument.kind == "table" else jnp.bfloat16)


def run_uncached(kernel: Kernel, *operands: Any, **options: Any) -> list[Any]:
    """Returns the results of a kernel for each array of its uncached operand, computed one after the other."""
    names = list(kernel.operands)
    uncached = names.index(kernel.uncached or "")
    run = jax.jit(functools.partial(kernel.run, **options))  # traced once for all arrays
    results: list[Any] = []
    for array in operands[uncached]:
        first, _ = jax.lax.optimization_barrier((operands[0], results[-1:]))
        arrays = [first, *operands[1:]]
        arrays[uncached] = array
        results.append(run(*arrays))
    return results


def microseconds(program, *args) -> float:
    """Returns the median kernel time of a compiled program."""
    from jax.experimental.mosaic.gpu import profiler  # needs a GPU build of JAX

    _, times = profiler.measure(program, iterations=REPEATS)(*args)
    return 1000 * statistics.median(times or ())


def tune(name: str, rows: int, width: int) -> dict[str, Any]:
    """Times every candidate of one kernel at one shape, in bfloat16. Returns the entry for the file."""
    kernel = KERNELS[name]
    operands = random_operands(kernel, rows, width)
    candidates = list(_tuning.candidates(name, width=width))
    run = functools.partial(run_uncached, kernel) if kernel.uncached else kernel.run

    def compile_with(blocks: _tuning.Blocks) -> Any:
        return jax.jit(functools.partial(run, interpret=False, blocks=blocks)).lower(*operands).compile()

    with ThreadPoolExecutor() as pool:
        programs = zip(candidates, pool.map(compile_with, candidates), strict=True)
    calls = max(len(operand) if isinstance(operand, tuple) else 1 for operand in operands)
    times = {blocks: microseconds(program, *operands) / calls for blocks, program in programs}
    best = min(times, key=lambda blocks: times[blocks])
    default = times[_tuning.rule(name, width=width)]
    print(f"{name} {rows} x {width}: {times[best]:.1f} us with {best}; the rule takes {default:.1f} us", flush=True)
    return {"op": name, "rows": rows, "width": width, "us": round(times[best], 1), "blocks": dataclasses.asdict(best)}


def main(names: Sequence[str] = ()) -> None:
    """Tunes the named kernels, by default all, for this machine's GPU. Keeps the entries of other kernels in its file."""
    kind = _tuning.device_kind()
    if kind is None:
        raise SystemExit("pallas_kernels.tune: device is not a GPU; expected the GPU to tune for")
    if unknown := set(names) - set(KERNELS):
        raise SystemExit(f"pallas_kernels.tune: kernels are {sorted(unknown)}; expected any of {list(KERNELS)}")
    file = _tuning.file_of(kind)
    entries = json.loads(file.read_text()) if file.exists() else []
    file.parent.mkdir(exist_ok=True)
    for name in names or KERNELS:
        tuned = [tune(name, rows, width) for rows, width in KERNELS[name].shapes]
        entries = [entry for entry in entries if entry["op"] != name] + tuned
        file.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
