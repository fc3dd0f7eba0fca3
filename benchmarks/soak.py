"""`python -m benchmarks soak`: thousands of calls with mixed shapes, over which memory and compilations must not grow.

On a CPU: training steps and generate calls of a tiny model, each on a new batch that the processor makes of new images.
On a GPU: calls of all operations of pallas_kernels with their gradients. The shapes and options repeat in a cycle, so that
the number of programs is finite. Memory is that of this process on a CPU, and that in use on a GPU.
"""

import dataclasses
import datetime
import functools
import gc
import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import RESULTS, file_name, versions_of
from liger_jax import Processor, QwenVL, QwenVLConfig, TrainState, generate, make_train_step, prepare
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.errors import UserError
from liger_jax.progress import progress_bar
from liger_jax.train.optimizer import make_optimizer
from pallas_kernels.registry import OPERATIONS, Operation

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event for compiling a program
WARM_UP = 0.25  # share of the calls, at least one cycle
SAMPLES = 200  # measurements of the memory
ALLOWED_GROWTH = 0.02  # of the memory after warm-up

# The kinds of batches: conversations, the sizes of each one's images, and the words of each question.
KINDS: tuple[tuple[int, tuple[tuple[int, int], ...], int], ...] = (
    (1, (), 5),
    (2, ((56, 56),), 60),
    (1, ((112, 84), (28, 140)), 100),
    (3, (), 200),
    (1, ((84, 84),), 10),
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 8},
    {"max_new_tokens": 12, "eos_token_id": [3, 5], "repetition_penalty": 1.2},
    {"max_new_tokens": 8, "do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    {"max_new_tokens": 6, "do_sample": True, "min_p": 0.05, "bad_words_ids": [[7], [8, 9]]},
)
# Rows and widths of the operations' arguments, and their dtypes.
SHAPES = (((2, 3), 32, "float32"), ((4, 256), 128, "bfloat16"), ((1, 1000), 128, "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Soak:
    """Repeats training steps and generate calls (on a CPU), or calls of operations (on a GPU), thousands of times.

    Memory after warm-up must stay within 2 %, and nothing may be compiled. Writes soak_<device>.json.
    """

    steps: int = 2000
    """Training steps, on a CPU. 0 keeps the earlier result, here and below."""
    calls: int = 2000
    """Generate calls, on a CPU."""
    operation_calls: int = 20_000
    """Calls of operations, on a GPU."""
    results: Path = RESULTS
    """Folder of the result files."""

    def run(self) -> Path:
        device = jax.devices()[0]
        if device.platform == "cpu":
            parts = [("training steps", training, self.steps), ("generate calls", generation, self.calls)]
        else:
            parts = [("calls of operations", operations, self.operation_calls)]
        file = self.results / f"{file_name('soak', device.device_kind)}.json"
        runs = json.loads(file.read_text())["runs"] if file.exists() else {}
        runs |= {name: soak(name, *make(), count) for name, make, count in parts if count}
        report = {
            "device": device.device_kind,
            "versions": versions_of(("jax", "flax")),
            "date": datetime.date.today().isoformat(),
            "runs": runs,
        }
        self.results.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report) + "\n")
        check(runs)
        return file


def soak(name: str, call: Callable[[int], Any], cycle: int, count: int) -> dict[str, Any]:
    """Runs call(0), call(1), ... and returns the memory over time, and the programs compiled before and after warm-up.

    Args:
        name: name of the run.
        call: makes a call; calls i and i + `cycle` have the same shapes and options.
        cycle: number of calls with different shapes or options.
        count: number of calls.
    """
    compiled = [0]
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.__setitem__(0, compiled[0] + (event == COMPILED))
    )
    warm_up = max(cycle, round(count * WARM_UP))
    if count <= warm_up:
        raise UserError(f"{name}: count is {count}; expected above {warm_up}, the calls of the warm-up")
    memory, programs = [], 0
    for i in progress_bar(range(count), desc=f"{name}: "):
        jax.block_until_ready(call(i))
        if i < warm_up:
            programs = compiled[0]
        elif i % max(1, count // SAMPLES) == 0 or i == count - 1:
            gc.collect()
            memory.append(memory_in_use())
    return {
        "count": count,
        "kinds": cycle,
        "warm_up": warm_up,
        "programs": programs,
        "compilations_after_warm_up": compiled[0] - programs,
        "memory": memory,
    }


def memory_in_use() -> int:
    """Returns the bytes in use on the device; on a CPU, the resident bytes of this process."""
    if statistics := jax.devices()[0].memory_stats():
        return statistics["bytes_in_use"]
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def growth(memory: list[int]) -> float:
    """Returns the largest difference from the first measurement, as a share of it.

    Example:
        >>> growth([100, 99, 103])
        0.03
    """
    return max(abs(size - memory[0]) for size in memory) / memory[0]


def check(runs: dict[str, dict]) -> None:
    """Raises UserError if memory grew or a program was compiled after warm-up."""
    for name, run in runs.items():
        if (share := growth(run["memory"])) > ALLOWED_GROWTH:
            raise UserError(f"{name}: memory changed by {share:.1%}; expected at most {ALLOWED_GROWTH:.0%}")
        if count := run["compilations_after_warm_up"]:
            raise UserError(f"{name}: {count} programs were compiled after warm-up; expected none")


# ---- workloads: functions that return a call and the length of its cycle ------------------------------------------------


def training() -> tuple[Callable[[int], Any], int]:
    """Returns the training step of a tiny model in bfloat16, with the optimizer that finetune uses."""
    processor, config = _tiny()
    step = make_train_step()
    states = [TrainState.create(QwenVL.init(config), make_optimizer(1e-4))]

    def call(i: int) -> Any:
        batch = _batch(processor, config, KINDS[i % len(KINDS)], seed=i, answered=True)
        states[0], metrics = step(states[0], batch)
        return {name: float(value) for name, value in metrics.items()}

    return call, len(KINDS)


def generation() -> tuple[Callable[[int], Any], int]:
    """Returns generate for a tiny model in bfloat16, with all options for every kind of batch."""
    processor, config = _tiny()
    model = QwenVL.init(config)

    def call(i: int) -> Any:
        batch = _batch(processor, config, KINDS[i % len(KINDS)], seed=i, answered=False)
        tokens = generate(model, batch, seed=i, **OPTIONS[i // len(KINDS) % len(OPTIONS)])
        return processor.decode(np.asarray(tokens))

    return call, len(KINDS) * len(OPTIONS)


def operations() -> tuple[Callable[[int], Any], int]:
    """Returns all operations and variants, with their gradients, in all shapes."""
    programs = [(jax.jit(function), arguments) for function, arguments in operation_calls()]

    def call(i: int) -> Any:
        function, arguments = programs[i % len(programs)]
        return function(*arguments)

    return call, len(programs)


def operation_calls() -> list[tuple[Callable, list[jax.Array]]]:
    """Returns a function and its arguments for each operation, variant and shape."""
    return [
        (functools.partial(_with_gradients, operation, options), operation.example(operation.sizes(rows, width), dtype))
        for operation in OPERATIONS.values()
        for options in ({}, *operation.variants.values())
        for rows, width, dtype in SHAPES
    ]


def _with_gradients(operation: Operation, options: Mapping[str, Any], *arguments: jax.Array) -> Any:
    """Returns the results of an operation, and the gradients of their sum."""
    count = len(operation.differentiable)
    inputs, constants = arguments[:count], arguments[count:]
    results, pullback = jax.vjp(lambda *inputs: operation.function(*inputs, *constants, **options), *inputs)
    return results, pullback(jax.tree.map(jnp.ones_like, results)) if count else ()


@functools.cache
def _tiny() -> tuple[Processor, QwenVLConfig]:
    """Returns the processor and the configuration of the demo's model."""
    processor = make_processor(load_digits()[0])
    return processor, make_config(processor)


def _batch(processor: Processor, config: QwenVLConfig, kind: tuple, *, seed: int, answered: bool) -> Any:
    """Returns a batch of one kind with random images."""
    rows, sizes, words = kind
    rng = np.random.default_rng(seed)
    conversations = []
    for _ in range(rows):
        images = [{"type": "image", "image": rng.integers(0, 256, (*size, 3), dtype=np.uint8)} for size in sizes]
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": "digit " * words}]}]
        conversations.append(messages + [{"role": "assistant", "content": "seven"}] * answered)
    inputs = processor(conversations, **({"labels": True} if answered else {"add_generation_prompt": True}))
    return prepare(config, **inputs)
