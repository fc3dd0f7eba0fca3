"""Times the candidate block sizes of each kernel at the models' shapes and keeps the fastest, for the GPU it runs on.

python -m pallas_kernels.tune [kernel ...]
"""

import dataclasses
import functools
import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from pallas_kernels import _cross_entropy_kernel, _cross_entropy_math, _tuning, shapes

REPEATS = 5
PAST_ALL_CACHES = 200_000_000  # bytes
ROWS = (2048, 8192, 32_768)
TEXT, VISION = shapes.TEXT.values(), shapes.VISION

# the modules: the package exports functions of the same names
_rms, _add, _layer, _gated, _rope, _thin = (
    importlib.import_module(f"pallas_kernels.{name}")
    for name in ("rms_norm", "add_rms_norm", "layer_norm", "activations", "rope", "decode_linear")
)
_RMS = _rms.Static(eps=1e-6, offset=0.0, casting="llama", implementation="triton")
_LAYER, _SILU = _layer._Static(1e-6, "triton"), _gated._Static("silu", "triton")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, the shapes (rows, width) to tune it for, and its operands as letters.

    x: rows [1, R, W]; w: a weight [1, W]; r: a float32 a row [1, R]; q: heads [1, R, 16, W]; t: angles [1, R, W/2];
    l: logits [1, R, W]; i: labels [1, R]. For the one row of a step of generation, W is the depth of a product: v: [1, W];
    n: a norm's weight [W]; o: [1, R]; m: several weights [R, W], and g: [2, R, W], so many that no cache holds them, for a
    call each.
    """

    run: Callable
    operands: str
    shapes: Iterable[tuple[int, int]]


def _logits(logits, labels, lse=None, cotangent=None, **how):
    return _cross_entropy_kernel._launch(_cross_entropy_math.Options(), logits, labels, None, lse, cotangent, **how)


def _one_row(op, names, x, beside, weights, **how):
    static = _thin.Static(op, names, None if op == "linear_add" else 1e-6, "triton")
    run, results = jax.jit(functools.partial(_thin.thin_kernel, static, **how)), []  # traced once for all weights
    for weight in weights:
        x, _ = jax.lax.optimization_barrier((x, results[-1:]))  # one after the other
        results.append(run(x, beside, weight))
    return results


_WIDTHS = [(rows, text.hidden) for text in TEXT for rows in ROWS]
_PATCHES = [(rows, VISION.embed) for rows in shapes.VISION_ROWS]
_GATES = [(8192, text.intermediate) for text in TEXT] + [(16_384, VISION.intermediate)]
_NORMED = [
    (outputs, text.hidden)
    for text in TEXT
    for outputs in ((text.heads + 2 * text.kv_heads) * text.head_dim, text.vocab)
]
_ADDED = [(text.hidden, depth) for text in TEXT for depth in (text.heads * text.head_dim, text.intermediate)]
_LOGITS = [(2048, vocab) for vocab in sorted({text.vocab for text in TEXT})]
KERNELS = {
    "one_row_norm_linear": Kernel(
        functools.partial(_one_row, "norm_linear", ("x", "norm_weight", "weight")), "vnm", _NORMED
    ),
    "one_row_norm_swiglu": Kernel(
        functools.partial(_one_row, "norm_swiglu", ("x", "norm_weight", "weight")),
        "vng",
        [(text.intermediate, text.hidden) for text in TEXT],
    ),
    "one_row_linear_add": Kernel(functools.partial(_one_row, "linear_add", ("x", "residual", "weight")), "vom", _ADDED),
    "rms_norm_forward": Kernel(functools.partial(_rms.forward_kernel, _RMS), "xw", _WIDTHS),
    "rms_norm_backward": Kernel(functools.partial(_rms.backward_kernel, _RMS), "xxwr", _WIDTHS),
    "add_rms_norm_forward": Kernel(functools.partial(_add.forward_kernel, _RMS), "xxw", _WIDTHS),
    "add_rms_norm_backward": Kernel(functools.partial(_add.backward_kernel, _RMS), "xxxwr", _WIDTHS),
    "layer_norm_forward": Kernel(functools.partial(_layer.forward_kernel, _LAYER), "xww", _PATCHES),
    "layer_norm_backward": Kernel(functools.partial(_layer.backward_kernel, _LAYER), "xxwrr", _PATCHES),
    "gate_forward": Kernel(functools.partial(_gated.forward_kernel, _SILU), "xx", _GATES),
    "gate_backward": Kernel(functools.partial(_gated.backward_kernel, _SILU), "xxx", _GATES),
    "rope": Kernel(
        functools.partial(_rope.rotate_kernel, _rope._Static(None, 1, "triton")),
        "qqtt",
        [(8192, 128), (16_384, VISION.head_dim)],
    ),
    "cross_entropy_forward": Kernel(_logits, "li", _LOGITS),
    "cross_entropy": Kernel(lambda l, i, r, **how: _logits(l, i, None, r, **how), "lir", _LOGITS),
    "cross_entropy_backward": Kernel(_logits, "lirr", _LOGITS),
}


def operands(letters: str, rows: int, width: int) -> Sequence[jax.Array | tuple[jax.Array, ...]]:
    """Random operands, bfloat16 unless they are kept in float32; see Kernel."""
    keys = iter(jax.random.split(jax.random.key(0), len(letters)))

    def several(key, *shape):
        count = min(2 + PAST_ALL_CACHES // (2 * math.prod(shape)), 64)
        return tuple(jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key, count))

    make = {
        "x": lambda key: jax.random.normal(key, (1, rows, width), jnp.bfloat16),
        "w": lambda key: jax.random.normal(key, (1, width), jnp.bfloat16),
        "r": lambda key: jax.random.uniform(key, (1, rows), jnp.float32, 0.5, 1.5),
        "q": lambda key: jax.random.normal(key, (1, rows, 16, width), jnp.bfloat16),
        "t": lambda key: jax.random.normal(key, (1, rows, width // 2), jnp.float32),
        "l": lambda key: jax.random.normal(key, (1, rows, width), jnp.bfloat16),
        "i": lambda key: jax.random.randint(key, (1, rows), 0, width),
        "v": lambda key: jax.random.normal(key, (1, width), jnp.bfloat16),
        "n": lambda key: jax.random.normal(key, (width,), jnp.bfloat16),
        "o": lambda key: jax.random.normal(key, (1, rows), jnp.bfloat16),
        "m": lambda key: several(key, rows, width),
        "g": lambda key: several(key, 2, rows, width),
    }
    return [make[letter](key) for letter, key in zip(letters, keys, strict=True)]


def microseconds(program, *args) -> float:
    """Median kernel time of a compiled program."""
    from jax.experimental.mosaic.gpu import profiler  # needs a GPU build of JAX

    _, times = profiler.measure(program, iterations=REPEATS)(*args)
    return 1000 * statistics.median(times)


def tune(op: str, rows: int, width: int) -> dict:
    """Times every candidate of one kernel at one shape, in bfloat16. -> the entry for the file."""
    kernel = KERNELS[op]
    args = operands(kernel.operands, rows, width)
    candidates = list(_tuning.candidates(op, width=width))

    def compiled(blocks: _tuning.Blocks):
        run = functools.partial(kernel.run, interpret=False, blocks=blocks)
        return jax.jit(run).lower(*args).compile()

    with ThreadPoolExecutor() as pool:
        programs = zip(candidates, pool.map(compiled, candidates), strict=True)
    calls = len(args[-1]) if isinstance(args[-1], tuple) else 1
    times = {blocks: microseconds(program, *args) / calls for blocks, program in programs}
    best, of_rule = min(times, key=times.get), times[_tuning.rule(op, width=width)]
    print(f"{op} {rows} x {width}: {times[best]:.1f} us with {best}; the rule takes {of_rule:.1f} us", flush=True)
    return {"op": op, "rows": rows, "width": width, "us": round(times[best], 1), "blocks": dataclasses.asdict(best)}


def main(names: Sequence[str] = ()) -> None:
    """Tunes the named kernels, or all, for the GPU at hand and writes its file; what is not tuned anew stays."""
    kind = _tuning.device_kind()
    if kind is None:
        raise SystemExit("pallas_kernels.tune: no GPU found; run it on the device to tune for")
    if unknown := set(names) - set(KERNELS):
        raise SystemExit(f"pallas_kernels.tune: unknown kernels {sorted(unknown)}; expected some of {list(KERNELS)}")
    file = _tuning.file_of(kind)
    entries = json.loads(file.read_text()) if file.exists() else []
    file.parent.mkdir(exist_ok=True)
    for op in names or KERNELS:
        tuned = [tune(op, rows, width) for rows, width in KERNELS[op].shapes]
        entries = [entry for entry in entries if entry["op"] != op] + tuned
        file.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
