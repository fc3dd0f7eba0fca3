"""`liger-jax bench train | generate`: a model of real size on the GPU at hand, beside transformers with Liger's kernels.

Both get the same checkpoint, written by transformers with random weights, and the same arrays. A training step is timed
from its call to its end; a new token is the difference between generating 128 and 1.
"""

import contextlib
import gzip
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from liger_jax import Batch, Qwen2VL, Qwen2VLConfig, TrainState, generate, make_train_step, prepare
from liger_jax.bench import work
from liger_jax.bench.ops import device_kind, first_line, versions_of
from liger_jax.mesh import mesh_of, put_batch

GIB = 2**30
PACKAGES = ("jax", "flax", "optax")
NOT_EQUAL = 1e-2  # of a loss
PEERS = {
    "train": (["--liger"], ["--liger", "--checkpointing"]),
    "generate": (["--cache", "dynamic"], ["--cache", "static"]),
}


# ---- measurement ------------------------------------------------------------------------------------------------------


class HostMemory:
    """The largest resident memory of this process while the block runs, above what it was before. In bytes."""

    def __enter__(self):
        self.before = self.peak = self.now()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.01)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.above_start = max(self.peak, self.now()) - self.before

    @staticmethod
    def now() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()


def device_peak() -> float:
    """The most device memory that was in use at any time of this process, in GiB; 0 where the device does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB


def load(checkpoint: Path, from_hf: Callable, mesh) -> tuple[Qwen2VL, dict]:
    """The converted checkpoint, and what converting took."""
    # the first program sets up the device, which takes gigabytes of its own
    jax.block_until_ready(jax.jit(lambda: 0)())
    start = time.perf_counter()
    with HostMemory() as host:
        model = jax.block_until_ready(from_hf(checkpoint, mesh=mesh))
    return model, {"seconds": time.perf_counter() - start, "host_gib_above_start": host.above_start / GIB}


def on_devices(model: Qwen2VL, arrays: dict) -> Batch:
    """The batch where the weights are, so that its transfer is not part of what is timed."""
    return jax.device_put(put_batch(prepare(model.config, **arrays), mesh_of(model)))


def train(model: Qwen2VL, arrays: dict, *, remat: str, unroll: bool, profile: Path | None) -> tuple[Qwen2VL, dict]:
    state = TrainState.create(model, optax.adamw(work.LEARNING_RATE))
    step = make_train_step(remat=remat, unroll=unroll)
    batch = on_devices(model, arrays)
    start = time.perf_counter()
    compiled = step.compile(state, batch)
    compile_s = time.perf_counter() - start
    seconds, losses = [], []
    for _ in range(work.WARM + work.TIMED):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    if profile is not None:
        with tempfile.TemporaryDirectory() as trace:
            with jax.profiler.trace(trace):
                state, _ = jax.block_until_ready(compiled(state, batch))
            profile.write_text(kernel_table(Path(trace)))
    step_s = float(np.median(seconds[work.WARM :]))
    return state.model, {
        "remat": step.chosen,
        "unroll": unroll,
        "step_ms": step_s * 1e3,
        "tokens_per_s": arrays["input_ids"].size / step_s,
        "peak_gib": device_peak(),
        "compile_s": compile_s,
        "losses": losses[:3],
    }


def kernel_table(trace: Path) -> str:
    """The kernels of a trace by name with their summed time, most first, as a Markdown table."""
    (file,) = trace.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("ph") == "M" and "name" in event.get("args", {})]
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    threads = {(e["pid"], e.get("tid")): e["args"]["name"] for e in named if e["name"] == "thread_name"}
    total, count = Counter(), Counter()
    for event in events:
        where = event.get("pid"), event.get("tid")
        if event.get("ph") == "X" and "GPU" in processes.get(where[0], "") and "Stream" in threads.get(where, ""):
            name = re.sub(r"\(.*", "", event["name"])
            total[name] += event["dur"]
            count[name] += 1
    lines = ["| ms | calls | us each | kernel |", "|---|---|---|---|"]
    lines += [f"| {us / 1e3:.2f} | {count[n]} | {us / count[n]:.1f} | `{n}` |" for n, us in total.most_common(60)]
    return f"{total.total() / 1e3:.1f} ms in {count.total()} kernels.\n\n" + "\n".join(lines) + "\n"


def decode(model: Qwen2VL, arrays: dict) -> dict:
    arrays = {name: value for name, value in arrays.items() if name != "labels"}
    batch = on_devices(model, arrays)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        tokens = generate(model, batch, max_new_tokens=count, eos_token_id=())
        jax.block_until_ready(tokens)
        return time.perf_counter() - start

    first = {count: seconds(count) for count in (1, work.NEW_TOKENS)}
    again = {count: float(np.median([seconds(count) for _ in range(5)])) for count in first}
    return {
        "prefill_ms": again[1] * 1e3,
        "ms_per_token": (again[work.NEW_TOKENS] - again[1]) / (work.NEW_TOKENS - 1) * 1e3,
        "tokens_per_s": len(arrays["input_ids"]) * work.NEW_TOKENS / again[work.NEW_TOKENS],
        "compile_s": sum(first.values()) - sum(again.values()),
        "peak_gib": device_peak(),
        "new_tokens": work.NEW_TOKENS,
    }


# ---- the commands -----------------------------------------------------------------------------------------------------


def run(
    what: str,
    size: str,
    rows: Sequence[int],
    directory: Path,
    *,
    from_hf: Callable,
    peers: bool,
    fsdp: int | None = None,
    remat: str = "auto",
    unroll: bool = False,
    profile: bool = False,
) -> Path:
    """Measures and writes; see `liger-jax bench train --help` and `generate`. -> the file of results."""
    file = directory / "model.json"
    common = {
        "package": work.OURS,
        "model": f"qwen2-vl-{size}",
        "devices": fsdp or 1,
        "versions": versions_of(PACKAGES),
    }
    with checkpoint_of(size, peers) as checkpoint:
        losses = {}
        if checkpoint and peers:  # first, as long as JAX has not yet taken the GPU's memory
            losses = _run_peers(what, checkpoint, rows, file)
        common["device"] = device_kind()
        mesh = jax.make_mesh((fsdp,), ("fsdp",)) if fsdp else None
        if checkpoint:
            model, result = load(checkpoint, from_hf, mesh)
            work.keep(file, {**common, "what": "convert", **result})
        else:
            model = Qwen2VL.init(getattr(Qwen2VLConfig, f"qwen2_vl_{size}")(), mesh=mesh)
    for count in sorted(rows):  # memory's peak is that of the process: from few to many
        arrays = work.rows(vars(model.config), count)
        case = {**common, "what": what, "rows": count}
        try:
            if what == "train":
                table = directory / f"profile_{size}_x{count}.md" if profile else None
                model, result = train(model, arrays, remat=remat, unroll=unroll, profile=table)
            else:
                result = decode(model, arrays)
        except Exception as error:
            work.keep(file, {**case, "error": first_line(error)})
            break  # a step that fails has taken the weights with it
        work.keep(file, {**case, **result})
        apart = max(
            (abs(a - b) for a, b in zip(result.get("losses", ()), losses.get(count, ()), strict=False)), default=0
        )
        if apart > NOT_EQUAL:
            print(f"  WARNING: the losses are {apart:.2g} apart: {result['losses']} and {losses[count]}", flush=True)
    return file


@contextlib.contextmanager
def checkpoint_of(size: str, peers: bool) -> Iterator[Path | None]:
    """A folder with random weights by transformers; None where torch is not installed or nobody else needs it."""
    if not peers or importlib.util.find_spec("torch") is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / f"qwen2-vl-{size}"
        subprocess.run([sys.executable, "-m", "liger_jax.bench.peer_model", "write", size, checkpoint], check=True)
        yield checkpoint


def _run_peers(what: str, checkpoint: Path, rows: Sequence[int], file: Path) -> dict[int, list[float]]:
    """transformers in processes of their own, so that each has all memory. -> the first losses by number of rows."""
    losses: dict[int, list[float]] = {}
    for options in PEERS[what]:
        for count in rows:
            command = [sys.executable, "-m", "liger_jax.bench.peer_model", what, checkpoint, str(count), *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            for text in done.stdout.splitlines():
                if text.startswith('{"package"'):  # and not what other packages print
                    result = json.loads(text)
                    work.keep(file, result)
                    losses.setdefault(count, result.get("losses", []))
    return losses
