"""Times the candidate block sizes of each kernel at the models' shapes and keeps the fastest, for the GPU it runs on.

python -m pallas_kernels.tune
"""

import dataclasses
import functools
import importlib
import json
import statistics
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from pallas_kernels import _tuning, shapes

REPEATS = 5
SHAPES = [(rows, text.hidden) for text in shapes.TEXT.values() for rows in (2048, 8192, 32_768)]

_rms_norm = importlib.import_module("pallas_kernels.rms_norm")  # the module; the package exports the function
_STATIC = _rms_norm._Static(eps=1e-6, offset=0.0, casting="llama", implementation="triton")


def _rms_norm_forward(blocks, x, weight, grad, inverse_rms):
    return _rms_norm.forward_kernel(_STATIC, x, weight, interpret=False, blocks=blocks)


def _rms_norm_backward(blocks, x, weight, grad, inverse_rms):
    return _rms_norm.backward_kernel(_STATIC, x, grad, weight, inverse_rms, interpret=False, blocks=blocks)


KERNELS = {"rms_norm_forward": _rms_norm_forward, "rms_norm_backward": _rms_norm_backward}


def microseconds(program, *args) -> float:
    """Median kernel time of a compiled program."""
    from jax.experimental.mosaic.gpu import profiler  # needs a GPU build of JAX

    _, times = profiler.measure(program, iterations=REPEATS)(*args)
    return 1000 * statistics.median(times)


def tune(op: str, rows: int, width: int) -> dict:
    """Times every candidate of one kernel at one shape, in bfloat16. -> the entry for the file."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, grad = (jax.random.normal(key, (1, rows, width), jnp.bfloat16) for key in keys[:2])
    weight, inverse_rms = jax.random.normal(keys[2], (1, width), jnp.bfloat16), jnp.ones((1, rows), jnp.float32)
    args = x, weight, grad, inverse_rms
    candidates = list(_tuning.candidates(op, width=width))

    def compiled(blocks: _tuning.Blocks):
        return jax.jit(functools.partial(KERNELS[op], blocks)).lower(*args).compile()

    with ThreadPoolExecutor() as pool:
        programs = zip(candidates, pool.map(compiled, candidates), strict=True)
    times = {blocks: microseconds(program, *args) for blocks, program in programs}
    best, of_rule = min(times, key=times.get), times[_tuning.rule(op, width=width)]
    print(f"{op} {rows} x {width}: {times[best]:.1f} us with {best}; the rule takes {of_rule:.1f} us", flush=True)
    return {"op": op, "rows": rows, "width": width, "us": round(times[best], 1), "blocks": dataclasses.asdict(best)}


def main() -> None:
    """Tunes everything for the GPU at hand and writes its file."""
    kind = _tuning.device_kind()
    if kind is None:
        raise SystemExit("pallas_kernels.tune: no GPU found; run it on the device to tune for")
    entries = [tune(op, rows, width) for op in KERNELS for rows, width in SHAPES]
    file = _tuning.file_of(kind)
    file.parent.mkdir(exist_ok=True)
    file.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
