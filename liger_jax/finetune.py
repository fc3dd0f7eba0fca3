"""Training from conversations to checkpoints: batches, steps, a log, and going on where a run was stopped."""

import contextlib
import functools
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
import optax
from tqdm import tqdm

from liger_jax.batch import Batch, prepare
from liger_jax.checkpoint import checkpoint_manager, is_model, restore_state, save_state
from liger_jax.config import Qwen2VLConfig
from liger_jax.loader import load_batches
from liger_jax.mesh import mesh_context, mesh_of, put_batch
from liger_jax.messages import Conversation
from liger_jax.model import Qwen2VL
from liger_jax.processing import Processor
from liger_jax.train import TrainState, loss_fn, make_train_step

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

METRICS = "metrics.jsonl"


def finetune(
    model: Qwen2VL,
    processor: Processor,
    conversations: Sequence[Conversation],
    output: str | Path,
    *,
    steps: int,
    batch_size: int,
    optimizer: optax.GradientTransformation,
    held_out: Sequence[Conversation] = (),
    seed: int = 0,
    length: int | None = None,
    patches: int | None = None,
    remat: str = "auto",
    accumulate: int = 1,
    save_every: int = 500,
    keep: int | None = 3,
    workers: int | None = None,
    progress: bool = True,
) -> TrainState:
    """Trains a model on the assistants' answers in conversations, one conversation a row.

    Each time through the data has an order of its own, made from `seed`. If `output` holds a run, it is continued: on the
    same device the losses that follow are those of a run that was never stopped. At SIGTERM the state is saved and
    training ends.

    Args:
        model: where to begin; its arrays are donated to the first step.
        processor: of the model; saved along, so that `load_model` and `Processor.from_pretrained` find both in `output`.
        conversations: as `read_conversations` returns them.
        output: folder of the run: checkpoints, and a line of metrics a step in metrics.jsonl.
        steps: of the whole run, those before a continuation included.
        batch_size: conversations in a step.
        optimizer: as `make_optimizer` returns it; a run must be continued with an optimizer of the same structure.
        held_out: conversations to measure loss and accuracy on, `evaluate`, whenever the state is saved.
        seed: of the order of the data.
        length, patches: tokens and patches of a row, see `prepare`; None: each batch its own bucket.
        remat, accumulate: see `make_train_step`.
        save_every, keep: steps between checkpoints; how many of them stay.
        workers: see `load_batches`.
        progress: show a bar.

    Returns:
        The last state.

    Raises:
        ValueError: an argument out of range, a conversation that does not fit, or a run in `output` of another model or
            optimizer.
        FileExistsError: `output` holds files and no run.
    """
    counts = {"steps": steps, "batch_size": batch_size, "save_every": save_every, "conversations": len(conversations)}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    output = Path(output)
    going_on = is_model(output)
    started = (output / METRICS).is_file()  # perhaps without having come to a checkpoint
    if not started and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} holds files and no training run: give an empty folder or a run to go on with")

    config, state = model.config, TrainState.create(model, optimizer)
    del model  # a run that goes on has no use for it
    if going_on:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        del state
        state = restore_state(output, like)
    start = int(state.step)
    if start > steps:
        raise ValueError(f"steps is {steps}, but the run in {output} is at step {start} already")
    if start == steps:
        return state
    sizes = batch_size, length, patches
    make = functools.partial(conversation_batch, processor, config, list(conversations), seed, *sizes)
    batches = load_batches(make, range(start, steps), workers=workers)
    processor.save_pretrained(output)

    def measure(model: Qwen2VL) -> dict[str, float]:
        make = functools.partial(_held_out_batch, processor, config, list(held_out), *sizes)
        return evaluate(model, load_batches(make, range(-(-len(held_out) // batch_size)), workers=0))

    with checkpoint_manager(output, keep=keep) as manager, _sigterm() as stop:
        how = {"remat": remat, "accumulate": accumulate, "measure": measure if held_out else None, "progress": progress}
        state, _ = fit(state, batches, output / METRICS, steps=steps, save=(manager, save_every), stop=stop, **how)
    return state


def evaluate(model: Qwen2VL, batches: Iterable[Batch]) -> dict[str, float]:
    """{"loss", "accuracy"} per trained token over all batches, and "num_tokens", how many there are.

    Raises:
        ValueError: a batch has no labels.

    Example:
        >>> import numpy as np
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, prepare
        >>> from liger_jax.finetune import evaluate
        >>> model, ids = Qwen2VL.init(Qwen2VLConfig.tiny(), dtype="float32"), np.array([[5, 6, 7]])
        >>> evaluate(model, [prepare(model.config, input_ids=ids, labels=ids)])["num_tokens"]
        2
    """
    mesh = mesh_of(model)
    sums, tokens = dict.fromkeys(("loss", "accuracy"), 0.0), 0
    for batch in batches:
        with mesh_context(mesh):
            metrics = _metrics(model, put_batch(batch, mesh))
        count = int(metrics["num_tokens"])
        tokens += count
        sums = {name: total + count * float(metrics[name]) for name, total in sums.items()}
    return {name: total / max(tokens, 1) for name, total in sums.items()} | {"num_tokens": tokens}


@jax.jit
def _metrics(model: Qwen2VL, batch: Batch) -> dict[str, jax.Array]:
    return loss_fn(model, batch)[1]


def conversation_batch(
    processor: Processor,
    config: Qwen2VLConfig,
    conversations: Sequence[Conversation],
    seed: int,
    batch_size: int,
    length: int | None,
    patches: int | None,
    index: int,
) -> Batch:
    """The batch of a step: the same one whoever makes it. Steps go through the data without leaving anything out."""
    count = len(conversations)
    places = [divmod(place, count) for place in range(index * batch_size, (index + 1) * batch_size)]
    rows = [conversations[_order(count, seed, epoch)[place]] for epoch, place in places]
    return prepare(config, **processor(rows, labels=True, padding="right"), length=length, patches=patches)


def _held_out_batch(
    processor: Processor,
    config: Qwen2VLConfig,
    conversations: Sequence[Conversation],
    batch_size: int,
    length: int | None,
    patches: int | None,
    index: int,
) -> Batch:
    rows = conversations[index * batch_size : (index + 1) * batch_size]
    batch = prepare(config, **processor(rows, labels=True, padding="right"), length=length, patches=patches)
    return batch.pad_rows(batch_size)  # the last one is of the others' shape


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def fit(
    state: TrainState,
    batches: Iterator[Batch],
    metrics_file: Path,
    *,
    steps: int,
    remat: str = "auto",
    accumulate: int = 1,
    save: "tuple[CheckpointManager, int] | None" = None,
    stop: Callable[[], bool] = lambda: False,
    measure: Callable[[Qwen2VL], dict[str, float]] | None = None,
    progress: bool = True,
) -> tuple[TrainState, list[dict]]:
    """Trains on all batches; -> the last state, and what was added to `metrics_file`, one line a step.

    A step's metrics are read when the next step has been handed to the device, so that it never waits for the host.
    `save` is where to save and every how many steps; it also happens at the end, and when `stop` says so. What `measure`
    finds of the model that is saved is a line of its own.
    """
    step_fn = make_train_step(remat=remat, accumulate=accumulate)
    begin = done = int(state.step)
    history: list[dict] = []
    running: tuple[dict, int] | None = None
    _forget_after(metrics_file, begin)
    with metrics_file.open("a") as file, tqdm(total=steps, initial=begin, unit="step", disable=not progress) as bar:
        clock = time.perf_counter()

        def finish(metrics: dict, tokens: int) -> None:
            nonlocal clock
            values = {name: float(value) for name, value in metrics.items()}
            now = time.perf_counter()
            line = {"step": begin + len(history) + 1, **values, "tokens_per_second": tokens / (now - clock)}
            clock = now
            history.append(line)
            print(json.dumps(line), file=file, flush=True)
            bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_s=f"{line['tokens_per_second']:,.0f}")
            bar.update()

        for batch in batches:
            state, metrics = step_fn(state, batch)
            if running:
                finish(*running)
            running, done = (metrics, int(np.sum(batch.segment_ids > 0))), done + 1
            stopping = stop()
            if save and (done % save[1] == 0 or done == steps or stopping):
                finish(*running)  # the log is never behind a checkpoint
                running = None
                save_state(save[0], state)
                if measure and not stopping:
                    found = {f"held_out_{name}": value for name, value in measure(state.model).items()}
                    print(json.dumps({"step": done} | found), file=file, flush=True)
                    clock = time.perf_counter()
            if stopping:
                break
        if running:
            finish(*running)
    return state, history


def _forget_after(metrics_file: Path, step: int) -> None:
    """Drops lines of steps after the checkpoint that a run continues from, the last of which may have been cut short."""
    if metrics_file.exists():
        lines = [line for line in metrics_file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        metrics_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """-> whether SIGTERM has come while the block runs; outside of the main thread it cannot be seen."""
    came: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
