"""`liger-jax bench ops`: kernel time, memory and errors of each operation, beside jitted jnp, cuDNN, and other packages.

Times are those of the kernels alone, from the profiler, in bfloat16 on fresh random inputs, forward and forward with all
gradients; of the operations of generation, which have none, one after the other on many inputs. In the same run the
values are compared with the formula in float32. "copy" is a program that only reads and writes as many bytes.
"""

import datetime
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks import cases
from benchmarks.cases import Case
from liger_jax import runtime
from pallas_kernels.tune import PAST_ALL_CACHES

REPEATS = 9
LARGE_ERROR = 2e-2  # of a norm; bfloat16 results are 2e-3 to 4e-3 away from float32
PASSES = ("forward", "both")
FEWEST_SETS = 16  # of inputs that are used in turn, together more than any cache holds
PACKAGES = ("jax", "jaxlib")
XLA_BY_DEFAULT = (
    "swiglu",
    "geglu",
    "quick_gelu",
    "rope",
    "mrope",
)  # where None is XLA, and the kernel is asked for by name


# ---- implementations --------------------------------------------------------------------------------------------------


def _ours(op: str, implementation: str | None, *args, lengths=None, **options):
    return getattr(pallas_kernels, op)(*args, **options, implementation=implementation)


def _each_image(attention: Callable, q, k, v, lengths):
    """Calls attention(q, k, v) with a row for each of the images, which are of one size."""
    images = (a.reshape(-1, lengths[0], *a.shape[2:]) if lengths else a for a in (q, k, v))
    return attention(*images).reshape(q.shape)


def _cudnn_attention(q, k, v, *, causal=False, lengths=None, **_):
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    return _each_image(attention, q, k, v, lengths)


def _tokamax():
    # for reports that are not made here, tokamax imports a package that it does not install
    reports = types.ModuleType("xprof.cli.tools")
    reports.get_kernel_stats_tool = None
    sys.modules.setdefault(reports.__name__, reports)
    import tokamax

    return tokamax


def _tokamax_rms_norm(x, weight):
    return _tokamax().layer_norm(x, weight, None, subtract_mean=False, implementation="triton")


def _tokamax_layer_norm(x, weight, bias):
    return _tokamax().layer_norm(x, weight, bias, implementation="triton")


def _tokamax_linear_cross_entropy(x, weight, labels):
    loss = _tokamax().linear_softmax_cross_entropy_loss
    return loss(x, labels, weight.T, reduction="mean", implementation="chunked_xla")


def _tokamax_attention(q, k, v, *, causal=False, lengths=None, **_):
    attention = functools.partial(_tokamax().dot_product_attention, is_causal=causal, implementation="mosaic_gpu")
    return _each_image(attention, q, k, v, lengths)


TOKAMAX = {
    "rms_norm": _tokamax_rms_norm,
    "layer_norm": _tokamax_layer_norm,
    "linear_cross_entropy": _tokamax_linear_cross_entropy,
    "attention": _tokamax_attention,
}


def implementations(case: Case, peers: bool = True) -> dict[str, Callable]:
    """Name -> f(**arrays, **constants), of everything that runs on JAX and computes this case."""
    hows = {"ours": None} | ({"kernel": "triton"} if case.op in XLA_BY_DEFAULT else {"xla": "xla"})
    if case.in_turns:
        del hows["xla"]  # the same formula as jnp's
    found = {name: functools.partial(_ours, case.op, how) for name, how in hows.items()}
    found |= {"cudnn": _cudnn_attention} if case.op == "attention" else {"jnp": cases.FORMULAS[case.op]}
    if peers and case.op in TOKAMAX:
        found["tokamax"] = TOKAMAX[case.op]
    return {name: functools.partial(f, **case.options) for name, f in found.items() if name not in case.without}


# ---- inputs and values ------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def _draw(key: jax.Array, normal: cases.Normal) -> jax.Array:
    return (normal.mean + normal.scale * jax.random.normal(key, normal.shape)).astype(jnp.bfloat16)


def inputs(case: Case, number: int = 0) -> tuple[dict, dict, Any]:
    """-> arrays, constants, and the cotangents of the results: None for a loss, where they are 1, and without a gradient.

    Each `number` gives other arrays.
    """
    *keys, last = jax.random.split(jax.random.key((case.seed + number) % 2**32), len(case.arrays) + 1)
    arrays = {name: _draw(key, normal) for key, (name, normal) in zip(keys, case.arrays.items(), strict=True)}
    constants = {name: jnp.asarray(value) for name, value in case.constants().items()}
    formula = functools.partial(cases.FORMULAS[case.op], **case.options)
    results = jax.tree.leaves(jax.eval_shape(lambda: formula(**arrays, **constants)))
    if case.in_turns or not results[0].shape:
        return arrays, constants, None
    cotangents = [_draw(jax.random.fold_in(last, i), cases.Normal(out.shape)) for i, out in enumerate(results)]
    return arrays, constants, tuple(cotangents)


def program(function: Callable, which: str) -> Callable:
    """The function to compile: (arrays, constants, cotangents) -> the results, or for "both" also all gradients."""

    def forward(arrays, constants, cotangents):
        return function(**arrays, **constants)

    def both(arrays, constants, cotangents):
        def results(arrays):
            return tuple(jax.tree.leaves(function(**arrays, **constants)))

        out, pullback = jax.vjp(results, arrays)
        (gradients,) = pullback(jax.tree.map(jnp.ones_like, out) if cotangents is None else cotangents)
        return named(out) | {f"d{name}": value for name, value in gradients.items()}

    return {"forward": forward, "both": both}[which]


def named(results: Any) -> dict[str, jax.Array]:
    results = jax.tree.leaves(results)
    return {"out" if len(results) == 1 else f"out{i}": result for i, result in enumerate(results)}


def in_turns(function: Callable) -> Callable:
    """(several arrays, constants) -> a result for each, one after the other: no input is in a cache, as in generation."""
    function = jax.jit(function)  # traced once for all

    def run(several, constants):
        results = []
        for arrays in several:
            arrays, _ = jax.lax.optimization_barrier((arrays, results[-1:]))  # or the compiler calls some at once
            results.append(function(**arrays, **constants))
        return results

    return run


def reference(case: Case, arrays: dict, constants: dict, cotangents: Any) -> dict[str, jax.Array]:
    """Results and gradients of the formula in float32, for the same rounded inputs."""
    function = functools.partial(cases.REFERENCES[case.op], **case.options)
    wide_arrays, wide_cotangents = jax.tree.map(lambda a: a.astype(jnp.float32), (arrays, cotangents))
    with jax.default_matmul_precision("highest"):
        return jax.jit(program(function, "both"))(wide_arrays, constants, wide_cotangents)


@jax.jit
def _distances(found: dict, expected: dict) -> dict:
    def distance(f, e):
        return jnp.linalg.norm((f.astype(jnp.float32) - e).ravel()) / jnp.linalg.norm(e.ravel())

    return jax.tree.map(distance, found, expected)


def errors(found: dict, expected: dict) -> dict[str, float]:
    """|found - expected| / |expected| of every result and gradient."""
    return {name: float(f"{value:.2e}") for name, value in _distances(found, expected).items()}


# ---- measurement ------------------------------------------------------------------------------------------------------


def kernel_us(compiled: jax.stages.Compiled, *args) -> tuple[Any, list[float]]:
    """-> the result, and the summed time of the kernels of each of several runs, in microseconds."""
    from jax.experimental.mosaic.gpu import profiler  # needs a GPU build of JAX

    try:
        result, ms = profiler.measure(compiled, iterations=REPEATS)(*args)
    except RuntimeError:  # the runs were not of the same kernels, or their results do not fit together: one by one
        runs = [profiler.measure(compiled)(*args) for _ in range(REPEATS)]
        result, ms = runs[0][0], [run[1] for run in runs]
    if not ms or None in ms:
        raise RuntimeError("the profiler saw no kernel")
    return result, [1e3 * time for time in ms]


def spread(us: Sequence[float]) -> dict[str, float]:
    found = {"median": statistics.median(us), "min": min(us), "max": max(us)}
    return {name: round(value, 2) for name, value in found.items()}


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def measure(case: Case, functions: dict[str, Callable], passes: Sequence[str] = PASSES) -> dict[str, dict]:
    """-> for each implementation {"forward_us", "both_us", "errors", "temp_bytes"}, or {"error"}.

    Without the forward pass among `passes` nothing is compared either.
    """
    try:
        return _measure_in_turns(case, functions) if case.in_turns else _measure(case, functions, passes)
    except Exception as error:  # of the inputs or the reference: the other cases are measured
        return {name: {"error": first_line(error)} for name in functions}


def _measure(case: Case, functions: dict[str, Callable], passes: Sequence[str]) -> dict[str, dict]:
    """`measure`; all programs are compiled at once, which takes longer than running them, and ours as a training step is."""
    given = inputs(case)
    expected = jax.block_until_ready(reference(case, *given)) if "forward" in passes else None

    def compiled(name: str, which: str):
        options = runtime.COMPILER_OPTIONS if name in ("ours", "kernel", "xla") else {}
        return jax.jit(program(functions[name], which)).lower(*given).compile(compiler_options=options)

    found: dict[str, dict] = {}
    with ThreadPoolExecutor() as pool:
        programs = {name: {p: pool.submit(compiled, name, p) for p in passes} for name in functions}
    for name, of_pass in programs.items():
        try:
            result = {}
            for which, future in of_pass.items():
                values, us = kernel_us(future.result(), *given)
                result[f"{which}_us"] = spread(us)
            if expected is not None:
                result["errors"] = errors(values, expected)
            if case.op == "linear_cross_entropy":
                result["temp_bytes"] = of_pass["both"].result().memory_analysis().temp_size_in_bytes
        except Exception as error:  # whatever one implementation cannot do, the others are measured
            result = {"error": first_line(error)}
        values = None  # its memory is needed for the next
        found[name] = result
    return found


def _measure_in_turns(case: Case, functions: dict[str, Callable]) -> dict[str, dict]:
    """`measure` of a forward pass that reads other inputs at each call."""
    _, constants, _ = inputs(case)
    size = sum(2 * int(np.prod(normal.shape)) for normal in case.arrays.values())
    several = [inputs(case, number)[0] for number in range(max(FEWEST_SETS, -(-PAST_ALL_CACHES // size)))]
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), several[0])
    with jax.default_matmul_precision("highest"):
        expected = named(jax.jit(cases.REFERENCES[case.op])(**wide, **constants))
    found: dict[str, dict] = {}
    for name, function in functions.items():
        try:
            values, us = kernel_us(jax.jit(in_turns(function)).lower(several, constants).compile(), several, constants)
            each = spread([time / len(several) for time in us])
            found[name] = {"forward_us": each, "errors": errors(named(values[0]), expected)}
        except Exception as error:  # whatever one implementation cannot do, the others are measured
            found[name] = {"error": first_line(error)}
    return found


def measure_copy(case: Case) -> dict[str, Any]:
    """{"forward_us"} of a program that reads and writes as many bytes as the forward pass, and does nothing else."""
    constants = case.constants()
    arrays = {name: jax.ShapeDtypeStruct(normal.shape, jnp.bfloat16) for name, normal in case.arrays.items()}
    results = jax.eval_shape(functools.partial(cases.FORMULAS[case.op], **case.options), **arrays, **constants)
    tables = sum(table.nbytes for table in constants.values())
    tables //= 3 if case.op == "mrope" else 1  # of three angles it reads one
    moved = tables + sum(array.size * array.dtype.itemsize for array in jax.tree.leaves((arrays, results)))
    try:
        array = jnp.ones(moved // 4, jnp.bfloat16)
        return {"forward_us": spread(kernel_us(jax.jit(jnp.negative).lower(array).compile(), array)[1])}
    except Exception as error:
        return {"error": first_line(error)}


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class Results:
    """A JSON list with one entry a case, written anew whenever something is added."""

    def __init__(self, directory: Path, name: str, device: str, order: Sequence[Case]):
        self.file = directory / f"{name}_{device.lower().replace(' ', '_')}.json"
        self.device = device
        self.order = {case.name: i for i, case in enumerate(order)}
        self.entries = (
            {entry["case"]: entry for entry in json.loads(self.file.read_text())} if self.file.exists() else {}
        )

    def add(self, case: Case, versions: dict[str, str], found: dict[str, dict], **more) -> None:
        """Replaces what `found` holds and keeps what earlier runs found of other implementations."""
        known = self.entries.get(case.name, {"versions": {}, "results": {}})
        self.entries[case.name] = {
            "op": case.op,
            "case": case.name,
            "size": case.size,
            "shapes": case.shapes(),
            **more,
            "device": self.device,
            "versions": known["versions"] | versions,
            "date": datetime.date.today().isoformat(),
            "results": known["results"] | found,
        }
        entries = sorted(self.entries.values(), key=lambda entry: self.order.get(entry["case"], len(self.order)))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(entries, indent=1) + "\n")


def line(case: Case, found: dict[str, dict]) -> str:
    """One case in a line, and a line for each error that is too large."""
    cells, warnings = [], []
    for name, result in found.items():
        times = " / ".join(f"{result[key]['median']:.1f}" for key in ("forward_us", "both_us") if key in result)
        cells.append(f"{name} {result.get('error', times)}")
        wrong = [f"{what} {value:.1e}" for what, value in result.get("errors", {}).items() if not value <= LARGE_ERROR]
        if wrong:
            warnings.append(f"  WARNING: {name} is far from float32: {', '.join(wrong)}")
    return "\n".join([f"{case.name}: {' | '.join(cells)}", *warnings])


# ---- the command ------------------------------------------------------------------------------------------------------


def run(only: Sequence[str], peers: bool, sweep: bool, directory: Path) -> Path:
    """Measures and writes; see `liger-jax bench ops --help`. -> the file of results."""
    # kernels inside of CUDA graphs are hidden from the profiler
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    if sweep:
        return _run_sweep(only, directory)
    chosen = cases.choose(only, cases.CASES)
    if peers:  # first, as long as JAX has not yet taken the GPU's memory
        _run_peers(chosen, directory)
    results = Results(directory, "ops", device_kind(), cases.CASES)
    versions = versions_of((*PACKAGES, "tokamax") if peers else PACKAGES)
    for case in chosen:
        found = measure(case, implementations(case, peers))
        if case.op in cases.BY_ROWS:
            found["copy"] = measure_copy(case)
        results.add(case, versions, found)
        print(line(case, found), flush=True)
    return results.file


NO_GPU = "bench: no GPU found; it measures NVIDIA GPUs"


def device_kind() -> str:
    try:
        return jax.devices("gpu")[0].device_kind
    except RuntimeError as error:
        raise ValueError(NO_GPU) from error


def check_for_gpu() -> None:
    """Raises ValueError where there is none; in a process of its own, so that this one does not take the memory."""
    if subprocess.run([sys.executable, "-c", "import jax; jax.devices('gpu')"], capture_output=True).returncode:
        raise ValueError(NO_GPU)


def _run_peers(chosen: Sequence[Case], directory: Path) -> None:
    """What runs on torch, in a process of its own: only one profiler can read the kernels of a process."""
    if importlib.util.find_spec("torch") is None:
        print("without peers: torch is not installed", flush=True)
        return
    by_name = {case.name: case for case in chosen if not case.in_turns}  # torch has nothing like those
    if not by_name:
        return
    command = [sys.executable, "-m", "benchmarks.peers", *by_name]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # the GPU is torch's as long as that process runs
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for text in process.stdout:
            if not text.startswith('{"case"'):  # what other packages print
                continue
            told = json.loads(text)
            case = by_name[told["case"]]
            Results(directory, "ops", told["device"], cases.CASES).add(case, told["versions"], told["results"])
            print(line(case, told["results"]), flush=True)
    if process.returncode:
        print(f"the peers ended with exit status {process.returncode}; what they had is kept", flush=True)


def _run_sweep(only: Sequence[str], directory: Path) -> Path:
    swept = {case.name: (model, rows) for model, rows, case in cases.sweep()}
    every = [case for *_, case in cases.sweep()]
    chosen = cases.choose(only, every)
    results = Results(directory, "ops_sweep", device_kind(), every)
    versions = versions_of(PACKAGES)
    for case in chosen:
        both = implementations(case, peers=False)
        found = measure(case, {name: both[name] for name in ("ours", "jnp")}, passes=("both",))
        model, rows = swept[case.name]
        results.add(case, versions, found, model=model, rows=rows)
        print(line(case, found), flush=True)
    entries = list(results.entries.values())
    results.file.with_suffix(".md").write_text(sweep_table(entries))
    plot(entries, results.file.with_suffix(".png"))
    return results.file


def sweep_table(entries: Sequence[dict]) -> str:
    """Forward with backward, ours / jitted jnp in microseconds, as a Markdown table: models' operations over rows."""
    counts = sorted({entry["rows"] for entry in entries})
    found: dict[tuple[str, str], dict[int, str]] = {}
    for entry in entries:
        times = [f"{r['both_us']['median']:.1f}" if "both_us" in r else "-" for r in entry["results"].values()]
        found.setdefault((entry["model"], entry["op"]), {})[entry["rows"]] = " / ".join(times)
    lines = [f"| ours / jnp, us | {' | '.join(map(str, counts))} |", "|---" * (1 + len(counts)) + "|"]
    for (model, op), cells in found.items():
        lines.append(f"| {model} `{op}` | {' | '.join(cells.get(count, '') for count in counts)} |")
    return "\n".join(lines) + "\n"


def plot(entries: Sequence[dict], path: Path) -> None:
    """Time relative to jitted jnp over rows, a panel for each model and a line for each operation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = [m for m in ("2b", "7b", "72b", "vision") if any(entry["model"] == m for entry in entries)]
    ops = list(dict.fromkeys(entry["op"] for entry in entries))
    figure = Figure(figsize=(4.2 * len(models) + 2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        for i, op in enumerate(ops):
            points = sorted(
                (
                    entry["rows"],
                    entry["results"]["ours"]["both_us"]["median"] / entry["results"]["jnp"]["both_us"]["median"],
                )
                for entry in entries
                if (entry["model"], entry["op"]) == (model, op)
                and all("both_us" in entry["results"][name] for name in ("ours", "jnp"))
            )
            if points:
                panel.plot(*np.transpose(points), marker="o", color=f"C{i % 10}", ls="-" if i < 10 else "--", label=op)
        rows = sorted({entry["rows"] for entry in entries if entry["model"] == model})
        panel.axhline(1.0, color="black", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(rows, [str(n) for n in rows])
        panel.set_title(f"Qwen2-VL {model}" if model != "vision" else "vision tower")
        panel.set_xlabel("patches" if model == "vision" else "tokens")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("forward + backward, time / time of jitted jnp")
    panels[0].set_ylim(bottom=0)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    figure.suptitle(f"{entries[0]['device']}, bfloat16; below 1 is faster than jitted jnp")
    figure.savefig(path, dpi=120)
