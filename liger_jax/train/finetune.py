"""Training from conversations to checkpoints: batches, steps, a log, and going on where a run was stopped."""

import contextlib
import itertools
import json
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import optax

from liger_jax.checkpoint import GENERATION, checkpoint_manager, is_model, latest_step, restore_state, save_state
from liger_jax.data.dataset import OnError, make_dataset
from liger_jax.data.loader import load_batches
from liger_jax.files import atomic_write, fingerprint
from liger_jax.generation.loop import check_prompts
from liger_jax.inputs.batch import Batch, prepare
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor
from liger_jax.model import Qwen2VL
from liger_jax.model.lora import adapted_parts, lora_config
from liger_jax.train.evaluation import compare_answers, evaluate, question
from liger_jax.train.metrics import HELD_OUT, RunLog, batch_work, step_rates, truncate_after, was_measured
from liger_jax.train.run import check_record, is_run, write_record
from liger_jax.train.step import TrainState, make_train_step

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

METRICS = "metrics.jsonl"
ANSWERS = "answers.jsonl"
TENSORBOARD = "tensorboard"


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
    eval_generate: int = 0,
    max_new_tokens: int = 64,
    seed: int = 0,
    length: int | None = None,
    patches: int | None = None,
    pack_length: int | None = None,
    group_by_length: bool = False,
    on_error: OnError = "raise",
    remat: str = "auto",
    accumulate: int = 1,
    unroll: bool = False,
    save_every: int = 500,
    keep: int | None = 3,
    asynchronous: bool = True,
    workers: int | None = None,
    frozen: Collection[str] = (),
    generation_config: Path | None = None,
    progress: bool = True,
) -> TrainState:
    """Trains a model on the assistants' answers in conversations.

    Each time through the data has an order of its own, made from `seed`. If `output` holds a run, it is continued: on the
    same device the losses that follow are those of a run that was never stopped. At SIGTERM the state is saved and
    training ends.

    Args:
        model: where to begin; its arrays are given away. On a mesh, training is, too. A run that goes on has weights of its
            own, and takes the shapes alone.
        processor: of the model; saved along, so that `load_model` and `Processor.from_pretrained` find both in `output`.
        conversations: as `read_conversations` returns them.
        output: folder of the run: checkpoints, metrics.jsonl with a line a step, tensorboard/ with the same as curves,
            answers.jsonl with generated answers, run.json with what a continuation must have in common.
        steps: of the whole run, those before a continuation included.
        batch_size: rows in a step: conversations, or packs of them.
        optimizer: as `make_optimizer` returns it; a run must be continued with an optimizer of the same structure.
        held_out: conversations to measure loss and accuracy on, `evaluate`, whenever the state is saved; first, if a run
            goes on from such a step and was stopped before, or had no `held_out`.
        eval_generate: how many of them are also answered then, for the share of answers that are exactly right.
        max_new_tokens: longest of these answers.
        seed: of the order of the data.
        length, patches, pack_length, group_by_length, on_error: shapes of the batches, see `make_dataset`.
        remat, accumulate, unroll: see `make_train_step`.
        save_every, keep: steps between checkpoints; how many of them stay.
        asynchronous: write checkpoints while training goes on; takes memory for the whole state on the host.
        workers: see `load_batches`.
        frozen: parts that the optimizer does not train, for the count of operations in the log.
        generation_config: the model's generation_config.json, if there is such a file: how answers are made is not trained,
            and stands beside the checkpoints as it was.
        progress: show a bar.

    Returns:
        The last state.

    Raises:
        ValueError: an argument out of range, a conversation that does not fit or cannot be read, or a run in `output` of
            other data, another model or another optimizer.
        FileExistsError: `output` holds files and no run.
    """
    counts = {"steps": steps, "batch_size": batch_size, "save_every": save_every, "conversations": len(conversations)}
    counts |= {"keep": 1 if keep is None else keep, "accumulate": accumulate, "max_new_tokens": max_new_tokens}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    for name, value in {"seed": seed, "workers": workers or 0}.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; expected at least 0")
    if not 0 <= eval_generate <= len(held_out):
        raise ValueError(f"eval_generate is {eval_generate}; expected at most the {len(held_out)} of held_out")
    output = Path(output)
    if not is_run(output) and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} holds files and no training run: give an empty folder or a run to go on with")
    layout = {"length": length, "patches": patches, "pack_length": pack_length, "group_by_length": group_by_length}
    vocabulary = processor.tokenizer.get_vocab()
    record = {
        "conversations": len(conversations),
        "data": fingerprint(conversations),
        "tokenizer": fingerprint([sorted(vocabulary, key=vocabulary.get), processor.tokenizer.chat_template]),
        **{f"{name} of pictures": value for name, value in vars(processor.image).items()},
        **{f"{name} of videos": value for name, value in vars(processor.video).items()},
        "seed": seed,
        "batch_size": batch_size,
        **layout,
    }
    if (told := lora_config(model)) is not None:
        record["lora"] = told
    going_on = is_model(output)
    if going_on:
        check_record(output, record)
    start = latest_step(output) if going_on else 0
    if start > steps:
        raise ValueError(f"steps is {steps}, but the run in {output} is at step {start} already")

    def can_be_asked(number: int) -> bool:
        try:
            prompt = prepare(model.config, **processor(question(held_out[number])[0], add_generation_prompt=True))
            check_prompts(prompt, max_new_tokens, model.config.text.max_position_embeddings)
        except ValueError as error:
            if on_error == "raise":
                raise ValueError(f"conversation {number} cannot be answered: {error}") from error
            return False
        return True

    shapes = layout | {"batch_size": batch_size, "on_error": on_error, "progress": progress}
    dataset = make_dataset(processor, model.config, conversations, seed=seed, **shapes)
    with _held_out_named():
        unseen = make_dataset(processor, model.config, held_out, seed=None, **shapes) if held_out else None
        readable = (number for number in range(len(held_out)) if unseen.read(number) and can_be_asked(number))
        asked = list(itertools.islice(readable, eval_generate))
    due = going_on and unseen is not None and (start == steps or start % save_every == 0)
    to_measure = due and not was_measured(output / METRICS, start)

    state = TrainState.create(model, optimizer)
    if going_on:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        del state
        state = restore_state(output, like, step=start)
        for weight in jax.tree.leaves(model):
            weight.delete()  # a run that goes on has no use for it, and its step none for the memory
    if start == steps and not to_measure:
        return state
    write_record(output, record)
    processor.save_pretrained(output)
    if generation_config is not None and generation_config.is_file() and not (output / GENERATION).exists():
        atomic_write(output / GENERATION, generation_config.read_bytes())
    truncate_after(output / ANSWERS, start - to_measure)

    def measure(model: Qwen2VL, step: int) -> dict[str, float]:
        with _held_out_named():
            found = evaluate(model, load_batches(unseen, range(unseen.plan.epoch_batches), workers=0))
        if asked:
            questions = [held_out[number] for number in asked]
            room = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
            answers = compare_answers(model, processor, questions, **room)
            with (output / ANSWERS).open("a", encoding="utf-8") as file:
                for number, line in zip(asked, answers, strict=True):
                    print(json.dumps({"step": step, "conversation": number} | line, ensure_ascii=False), file=file)
            found["exact_match"] = sum(line["exact"] for line in answers) / len(answers)
        return found

    batches = load_batches(dataset, range(start, steps), workers=workers)
    with checkpoint_manager(output, keep=keep, asynchronous=asynchronous) as manager, _sigterm() as stop:
        how = {"remat": remat, "accumulate": accumulate, "unroll": unroll, "frozen": frozen, "progress": progress}
        after = {"save": (manager, save_every), "stop": stop, "measure": measure if unseen else None}
        after["measure_first"] = to_measure
        tensorboard = output / TENSORBOARD
        state, _ = fit(state, batches, output / METRICS, steps=steps, tensorboard=tensorboard, **after, **how)
    return state


def fit(
    state: TrainState,
    batches: Iterator[Batch],
    metrics_file: Path,
    *,
    steps: int,
    remat: str = "auto",
    accumulate: int = 1,
    unroll: bool = False,
    save: "tuple[CheckpointManager, int] | None" = None,
    stop: Callable[[], bool] = lambda: False,
    measure: Callable[[Qwen2VL, int], dict[str, float]] | None = None,
    measure_first: bool = False,
    tensorboard: Path | None = None,
    frozen: Collection[str] = (),
    progress: bool = True,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains on all batches; -> the last state, and what was added to `metrics_file`, one line a step.

    A step's metrics are read when the next step has been handed to the device, so that it never waits for the host.
    `save` is where to save and every how many steps; it also happens at the end, and when `stop` says so. What `measure`
    finds of the model that is saved is a line of its own; with `measure_first` also of the model as it is given.
    """
    step_fn = make_train_step(remat=remat, accumulate=accumulate, unroll=unroll)
    config, devices = state.model.config, sorted(state.step.devices(), key=lambda device: device.id)
    adapted = adapted_parts(state.model)
    done = int(state.step)
    history: list[dict[str, Any]] = []
    running: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
    with RunLog(metrics_file, begin=done, steps=steps, tensorboard=tensorboard, progress=progress) as log:

        def finish(step: int, metrics: dict[str, jax.Array], work: dict[str, float]) -> None:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            values |= step_rates(work, values["num_tokens"], log.lap(), devices)
            history.append({"step": step} | values)
            log.write(step, values)
            log.advance(values)

        def tell_held_out() -> None:
            log.write(done, {f"{HELD_OUT}{name}": value for name, value in measure(state.model, done).items()})

        if measure_first:
            tell_held_out()
        log.lap()
        for batch in batches:
            work = batch_work(config, batch, frozen=frozen, adapted=adapted)
            state, metrics = step_fn(state, batch)
            if running:
                finish(*running)
            done += 1
            running, stopping = (done, metrics, work), stop()
            if save and (done % save[1] == 0 or done == steps or stopping):
                finish(*running)  # the log is never behind a checkpoint
                running = None
                if not any(line["num_tokens"] for line in history):
                    raise ValueError(f"Steps {history[0]['step']} to {done} had no token to train: nothing is saved")
                save_state(save[0], state)
                if measure and not stopping:
                    tell_held_out()
                log.lap()
            if stopping:
                break
        if running:
            finish(*running)
    return state, history


@contextlib.contextmanager
def _held_out_named() -> Iterator[None]:
    """A ValueError from inside says that it is about the held-out conversations."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"held-out data: {error}") from error


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
