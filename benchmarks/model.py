"""`liger-jax bench train | generate`: a model of real size on the GPU at hand, beside transformers with Liger's kernels.

Both get the same checkpoint, written by transformers with random weights, and the same arrays. A training step is timed
from its call to its end; a new token is the difference between generating 128 and 1. What transformers is not compared
in (packed pictures of many sizes, LoRA, master weights, long prompts) is measured alone, on weights made here.
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
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from benchmarks import work
from benchmarks.mixed import batches as mixed_batches
from benchmarks.ops import check_for_gpu, device_kind, first_line, versions_of
from liger_jax import Batch, Qwen2VL, Qwen2VLConfig, TrainState, generate, make_train_step, prepare
from liger_jax.inputs.batch import IGNORE
from liger_jax.model.lora import adapted_parts, add_lora
from liger_jax.model.sharding import get_mesh, shard_batch
from liger_jax.train.master_weights import with_master_weights
from liger_jax.train.metrics import batch_work, step_rates
from liger_jax.train.optimizer import BASE, make_optimizer

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


def on_devices(model: Qwen2VL, batch: Batch) -> Batch:
    """The batch where the weights are, so that its transfer is not part of what is timed."""
    return jax.device_put(shard_batch(batch, get_mesh(model)))


def train(
    model: Qwen2VL,
    batches: Sequence[Batch],
    *,
    optimizer: optax.GradientTransformation,
    frozen: Collection[str] = (),
    remat: str = "auto",
    unroll: bool = False,
    profile: Path | None = None,
) -> dict:
    """Steps on the batches, one after the other and from the first again. The model's memory is the state's from then on."""
    counted = [batch_work(model.config, batch, frozen=frozen, adapted=adapted_parts(model)) for batch in batches]
    trained = [int(np.count_nonzero(batch.labels != IGNORE)) for batch in batches]
    mean = {name: float(np.mean([each[name] for each in counted])) for name in counted[0]}
    state = TrainState.create(model, optimizer)
    step = make_train_step(remat=remat, unroll=unroll)
    placed = [on_devices(model, batch) for batch in batches]
    seconds, losses = [], []
    for number in range(work.WARM + work.TIMED):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, placed[number % len(placed)]))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    if profile is not None:
        with tempfile.TemporaryDirectory() as trace:
            with jax.profiler.trace(trace):
                state, _ = jax.block_until_ready(step(state, placed[0]))
            profile.write_text(kernel_table(Path(trace)))
    timed = range(work.WARM, len(seconds))
    of_batch = [[seconds[i] for i in timed if i % len(placed) == number] for number in range(len(placed))]
    step_s = float(np.mean([np.median(of_one) for of_one in of_batch if of_one]))
    rates = step_rates(
        mean, float(np.mean(trained)), step_s, sorted(state.step.devices(), key=lambda device: device.id)
    )
    return {
        "remat": step.chosen,
        "unroll": unroll,
        "step_ms": step_s * 1e3,
        "tokens_per_s": rates["tokens_per_second"],
        "trained_tokens_per_s": rates["trained_tokens_per_second"],
        "images": mean["images"],
        "token_utilisation": rates["token_utilisation"],
        **{name: value for name, value in rates.items() if name == "model_flops_utilisation"},
        "peak_gib": device_peak(),
        "compile_s": seconds[0] - step_s,
        "compilations": len(step.compiled),
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
    batch = on_devices(model, prepare(model.config, **arrays))

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


def run_train(
    size: str,
    rows: Sequence[int],
    directory: Path,
    *,
    from_hf: Callable,
    peers: bool = False,
    fsdp: int | None = None,
    remat: str = "auto",
    unroll: bool = False,
    profile: bool = False,
    mixed: bool = False,
    lora: int | None = None,
    master_weights: bool = False,
) -> Path:
    """Measures and writes; see `liger-jax bench train --help`. -> the file of results."""
    if lora is not None and master_weights:
        raise ValueError("bench train: LoRA's matrices are float32 already; expected --lora or --master-weights")
    optimizer, frozen = optax.adamw(work.LEARNING_RATE), ()
    if master_weights:
        optimizer = with_master_weights(optimizer)
    if lora is not None:
        optimizer, frozen = make_optimizer(work.LEARNING_RATE, freeze=BASE), BASE

    def measure(model: Qwen2VL, count: int) -> dict:
        if lora is not None:
            model = add_lora(model, rank=lora, alpha=2 * lora)
        batches = mixed_batches(model.config, count, work.MIXES) if mixed else [uniform_batch(model.config, count)]
        how = {"remat": remat, "unroll": unroll, "optimizer": optimizer, "frozen": frozen}
        table = directory / f"profile_{'_'.join([size, *variant])}_x{count}.md"
        return train(model, batches, **how, profile=table if profile else None)

    case = {"what": "train mixed" if mixed else "train"}
    case |= {"lora": lora} if lora is not None else {}
    case |= {"master_weights": True} if master_weights else {}
    variant = ["mixed"] * mixed + [name for name in case if name != "what"]
    variant += [remat] * (remat != "auto") + ["unrolled"] * unroll + [f"fsdp{fsdp}"] * (fsdp is not None)
    return _run(
        case, size, rows, directory, measure, from_hf=from_hf, fsdp=fsdp, peers=peers and case == {"what": "train"}
    )


def run_generate(
    size: str,
    rows: Sequence[int],
    directory: Path,
    *,
    from_hf: Callable,
    peers: bool = False,
    length: int | None = None,
) -> Path:
    """Measures and writes; see `liger-jax bench generate --help`. -> the file of results."""
    shortest = work.IMAGE_TOKENS + 20 + work.NEW_TOKENS
    if length is not None and length < shortest:
        raise ValueError(f"bench generate: length is {length}; expected at least {shortest}, for image and new tokens")
    prompt = work.LENGTH if length is None else length - work.NEW_TOKENS

    def measure(model: Qwen2VL, count: int) -> dict:
        return decode(model, work.rows(vars(model.config), count, prompt))

    case = {"what": "generate"} | ({} if length is None else {"prompt_tokens": prompt})
    return _run(case, size, rows, directory, measure, from_hf=from_hf, peers=peers and length is None)


def _run(
    case: dict,
    size: str,
    rows: Sequence[int],
    directory: Path,
    measure: Callable[[Qwen2VL, int], dict],
    *,
    from_hf: Callable,
    peers: bool,
    fsdp: int | None = None,
) -> Path:
    """measure(model, rows) for each number of rows, after the peers; `case` is kept with each result."""
    file = directory / "model.json"
    common = {
        "package": work.OURS,
        "model": f"qwen2-vl-{size}",
        "devices": fsdp or 1,
        "versions": versions_of(PACKAGES),
    }
    with checkpoint_of(size, peers) as checkpoint:
        losses = {}
        if checkpoint:  # first, as long as JAX has not yet taken the GPU's memory
            losses = _run_peers(case["what"], checkpoint, rows, file)
        common["device"] = device_kind()
        mesh = jax.make_mesh((fsdp,), ("fsdp",)) if fsdp else None
        model = None
        for count in sorted(rows):  # memory's peak is that of the process: from few to many
            if model is None and checkpoint:
                model, result = load(checkpoint, from_hf, mesh)
                if count == min(rows):
                    work.keep(file, {**common, "what": "convert", **result})
            elif model is None:
                model = Qwen2VL.init(getattr(Qwen2VLConfig, f"qwen2_vl_{size}")(), mesh=mesh)
            about = {**common, **case, "rows": count}
            try:
                result = measure(model, count)
            except Exception as error:
                print(work.line({**about, "error": first_line(error)}), flush=True)
                break  # with more rows it would fail as well
            work.keep(file, {**about, **result})
            pairs = zip(result.get("losses", ()), losses.get(count, ()), strict=False)
            if (apart := max((abs(a - b) for a, b in pairs), default=0)) > NOT_EQUAL:
                print(f"  WARNING: the losses are {apart:.2g} apart: {result['losses']}, {losses[count]}", flush=True)
            if case["what"] != "generate":
                model = None  # training took it over
    return file


def uniform_batch(config: Qwen2VLConfig, rows: int) -> Batch:
    return prepare(config, **work.rows(vars(config), rows))


@contextlib.contextmanager
def checkpoint_of(size: str, peers: bool) -> Iterator[Path | None]:
    """A folder with random weights by transformers; None where torch is not installed or nobody else needs it."""
    if not peers or importlib.util.find_spec("torch") is None:
        yield None
        return
    check_for_gpu()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / f"qwen2-vl-{size}"
        subprocess.run([sys.executable, "-m", "benchmarks.peer_model", "write", size, checkpoint], check=True)
        yield checkpoint


def _run_peers(what: str, checkpoint: Path, rows: Sequence[int], file: Path) -> dict[int, list[float]]:
    """transformers in processes of their own, so that each has all memory. -> the first losses by number of rows."""
    losses: dict[int, list[float]] = {}
    for options in PEERS[what]:
        for count in rows:
            command = [sys.executable, "-m", "benchmarks.peer_model", what, checkpoint, str(count), *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            for text in done.stdout.splitlines():
                if text.startswith('{"package"'):  # and not what other packages print
                    result = json.loads(text)
                    work.keep(file, result)
                    losses.setdefault(count, result.get("losses", []))
    return losses
