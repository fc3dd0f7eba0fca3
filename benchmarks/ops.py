"""`python -m benchmarks ops`: kernel time, memory and errors of each operation, compared with other packages.

The peers are jitted jnp, cuDNN and tokamax in this process, and Liger-Kernel, torch and cut-cross-entropy in another
(benchmarks/peers.py). "copy" is a program that only reads and writes as many bytes. Operations with a gradient are timed
both forward and forward + backward. Decoding operations are timed forward, one call after the other on different inputs.
"""

import dataclasses
import datetime
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.environment import RESULTS, device_kind, file_name, versions_of
from benchmarks.implementations import jax_implementations
from benchmarks.programs import LARGE_ERROR
from benchmarks.sweep import plot_sweep, sweep_table
from benchmarks.timing import measure, measure_copy
from pallas_kernels.registry import OPERATIONS

PACKAGES = ("jax", "jaxlib", "fa4-jax")
MEMORY_BOUND = ("norm", "activation", "rope")  # families of operations that are compared with a copy


@dataclasses.dataclass(frozen=True)
class Ops:
    """Compares the operations of pallas_kernels with jitted jnp, cuDNN and other packages.

    Measures kernel times, memory and errors, and rewrites ops_<device>.json after each case. A case replaces its earlier
    result in the file, so a benchmark can be run in parts.
    """

    only: tuple[str, ...] = ()
    """Names of operations or of single cases; by default all."""
    peers: bool = True
    """Also measure other packages: tokamax, and in a separate process Liger-Kernel, torch and cut-cross-entropy."""
    sweep: bool = False
    """Instead, compare only with jitted jnp, from few rows to many. Writes ops_sweep_<device>.json, a table and a plot."""
    results: Path = RESULTS
    """Folder of the result files."""

    def run(self) -> Path:
        # The profiler cannot see kernels inside CUDA graphs.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
        return _run_sweep(self.only, self.results) if self.sweep else _run(self.only, self.peers, self.results)


def _run(only: Sequence[str], peers: bool, directory: Path) -> Path:
    chosen = cases.choose(only, cases.CASES)
    if peers:  # they run first, while JAX has not yet reserved the GPU's memory
        _run_torch_peers(chosen, directory)
    results = OpsResults(directory, "ops", device_kind(), cases.CASES)
    versions = versions_of((*PACKAGES, "tokamax") if peers else PACKAGES)
    for case in chosen:
        measured = measure(case, jax_implementations(case, peers))
        if OPERATIONS[case.op].family in MEMORY_BOUND:
            measured["copy"] = measure_copy(case)
        results.add(case, versions, measured)
        print(summary(case, measured), flush=True)
    return results.file


def _run_torch_peers(chosen: Sequence[Case], directory: Path) -> None:
    """Measures the packages that run on torch, in another process, because only one profiler can trace a process."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed; its packages are not measured", flush=True)
        return
    by_name = {case.name: case for case in chosen if not case.decoding}  # decoding operations have no torch peers
    if not by_name:
        return
    command = [sys.executable, "-m", "benchmarks.peers", *by_name]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # leaves the GPU to torch
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for text in process.stdout or ():
            if not text.startswith('{"case"'):  # printed by another package
                continue
            report = json.loads(text)
            case = by_name[report["case"]]
            results = OpsResults(directory, "ops", report["device"], cases.CASES)
            results.add(case, report["versions"], report["results"])
            print(summary(case, report["results"]), flush=True)
    if process.returncode:
        print(f"the peers exited with status {process.returncode}; their results so far are kept", flush=True)


def _run_sweep(only: Sequence[str], directory: Path) -> Path:
    swept = {case.name: (model, rows) for model, rows, case in cases.sweep()}
    every = [case for *_, case in cases.sweep()]
    chosen = cases.choose(only, every)
    results = OpsResults(directory, "ops_sweep", device_kind(), every)
    versions = versions_of(PACKAGES)
    for case in chosen:
        functions = jax_implementations(case, peers=False)
        measured = measure(case, {name: functions[name] for name in ("ours", "jnp")}, passes=("both",))
        model, rows = swept[case.name]
        results.add(case, versions, measured, model=model, rows=rows)
        print(summary(case, measured), flush=True)
    entries = list(results.entries.values())
    results.file.with_suffix(".md").write_text(sweep_table(entries))
    plot_sweep(entries, results.file.with_suffix(".png"))
    return results.file


class OpsResults:
    """A JSON list with one entry per case, rewritten whenever a result is added."""

    def __init__(self, directory: Path, prefix: str, device: str, order: Sequence[Case]):
        self.file = directory / f"{file_name(prefix, device)}.json"
        self.device = device
        self.order = {case.name: i for i, case in enumerate(order)}
        self.entries = (
            {entry["case"]: entry for entry in json.loads(self.file.read_text())} if self.file.exists() else {}
        )

    def add(self, case: Case, versions: dict[str, str], measured: dict[str, dict], **labels) -> None:
        """Replaces the results of the implementations in `measured`, keeps earlier results of others, writes the file."""
        known = self.entries.get(case.name, {"versions": {}, "results": {}})
        self.entries[case.name] = {
            "op": case.op,
            "case": case.name,
            "size": case.size,
            "shapes": case.shapes(),
            **labels,
            "device": self.device,
            "versions": known["versions"] | versions,
            "date": datetime.date.today().isoformat(),
            "results": known["results"] | measured,
        }
        entries = sorted(self.entries.values(), key=lambda entry: self.order.get(entry["case"], len(self.order)))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(entries, indent=1) + "\n")


def summary(case: Case, measured: dict[str, dict]) -> str:
    """Returns one line per case, and one line per implementation with a large error."""
    cells, warnings = [], []
    for name, result in measured.items():
        times = " / ".join(f"{result[key]['median']:.1f}" for key in ("forward_us", "both_us") if key in result)
        cells.append(f"{name} {result.get('error', times)}")
        errors = result.get("errors", {})
        large = [f"{value} {error:.1e}" for value, error in errors.items() if not error <= LARGE_ERROR]
        if large:
            warnings.append(f"  WARNING: {name} is far from float32: {', '.join(large)}")
    return "\n".join([f"{case.name}: {' | '.join(cells)}", *warnings])
