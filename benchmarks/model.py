"""Conversion, training and generation of a checkpoint of real size, on the device at hand.

python benchmarks/hf_checkpoint.py 2b /tmp/qwen2-vl-2b
python benchmarks/model.py /tmp/qwen2-vl-2b --train-rows 4 --generate-rows 1 16 --results results.json
"""

import argparse
import json
import pathlib
import resource
import sys
import threading
import time

import flax
import jax
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import work
from convert import from_hf
from liger_jax import Batch, Qwen2VL, TrainState, generate, make_train_step, prepare
from liger_jax.mesh import mesh_of, put_batch

GIB = 2**30


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
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()


def device_peak() -> float:
    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / GIB


def convert(directory: str, mesh) -> tuple[Qwen2VL, dict]:
    jax.block_until_ready(
        jax.jit(lambda: 0)()
    )  # the first program sets up the device, which takes gigabytes of its own
    start = time.perf_counter()
    with HostMemory() as host:
        model = jax.block_until_ready(from_hf(directory, mesh=mesh))
    return model, {"seconds": time.perf_counter() - start, "host_gib_above_start": host.above_start / GIB}


def on_devices(model: Qwen2VL, arrays: dict) -> Batch:
    """The batch where the weights are, so that its transfer is not part of what is timed."""
    return jax.device_put(put_batch(prepare(model.config, **arrays), mesh_of(model)))


def train(model: Qwen2VL, arrays: dict, remat: str) -> tuple[Qwen2VL, dict]:
    state = TrainState.create(model, optax.adamw(1e-5))
    step = make_train_step(remat=remat)
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
    step_s = float(np.median(seconds[work.WARM :]))
    return state.model, {
        "step_ms": step_s * 1e3,
        "tokens_per_s": arrays["input_ids"].size / step_s,
        "peak_gib": device_peak(),
        "compile_s": compile_s,
        "losses": losses[:3],
    }


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
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--train-rows", type=int, nargs="*", default=[])
    parser.add_argument("--generate-rows", type=int, nargs="*", default=[])
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--fsdp", type=int, help="devices to split weights and rows over; by default one holds all")
    parser.add_argument("--results", help="JSON list to add to")
    args = parser.parse_args()
    config = json.loads((pathlib.Path(args.checkpoint) / "config.json").read_text())
    common = {
        "package": "liger-jax",
        "model": pathlib.Path(args.checkpoint).name,
        "device": jax.local_devices()[0].device_kind,
        "devices": args.fsdp or 1,
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__},
    }
    mesh = jax.make_mesh((args.fsdp,), ("fsdp",)) if args.fsdp else None
    model, result = convert(args.checkpoint, mesh)
    work.record(args.results, **common, what="convert", **result)
    for rows in args.generate_rows:
        result = decode(model, work.rows(config, rows))
        work.record(args.results, **common, what="generate", rows=rows, new_tokens=work.NEW_TOKENS, **result)
    for rows in args.train_rows:
        model, result = train(model, work.rows(config, rows), args.remat)
        work.record(args.results, **common, what="train", rows=rows, length=work.LENGTH, remat=args.remat, **result)


if __name__ == "__main__":
    main()
