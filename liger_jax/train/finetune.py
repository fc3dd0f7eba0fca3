"""Fine-tuning, from conversations to checkpoints: batches, steps, a log, and resuming an interrupted run."""

import contextlib
import dataclasses
import json
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import jax
import optax

from liger_jax.checkpoint import checkpoint_manager, restore_intact_state, save_state
from liger_jax.data.dataset import Dataset, check_batching, make_dataset
from liger_jax.data.loader import load_batches
from liger_jax.errors import UserError
from liger_jax.files import lock_folder
from liger_jax.generation.answer import prepare_prompt
from liger_jax.inputs.batch import Batch
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor
from liger_jax.model import Qwen2VL
from liger_jax.model.lora import adapted_parts
from liger_jax.options import Batching, Evaluation, LayerExecution, Optimization, Saving
from liger_jax.train.evaluation import compare_answers, evaluate, split_last_answer
from liger_jax.train.metrics import HELD_OUT, RunLog, batch_work, step_rates
from liger_jax.train.optimizer import build_optimizer
from liger_jax.train.run import Run, RunOptions, make_record, open_run
from liger_jax.train.step import Metrics, TrainState, make_train_step

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

Evaluator = Callable[[Qwen2VL, int], dict[str, float]]


def finetune(
    model: Qwen2VL,
    processor: Processor,
    conversations: Sequence[Conversation],
    output: str | Path,
    *,
    steps: int,
    optimizer: Optimization | optax.GradientTransformation = Optimization(),
    batching: Batching = Batching(),
    execution: LayerExecution = LayerExecution(remat="auto"),
    saving: Saving = Saving(),
    held_out: Sequence[Conversation] = (),
    evaluation: Evaluation = Evaluation(),
    progress: bool = True,
) -> TrainState:
    """Trains a model on the assistant's answers in conversations.

    If `output` has a run, it is resumed from its latest intact checkpoint. On the same device, its losses equal those of an
    uninterrupted run bit for bit. On SIGTERM, the state is saved and training ends.

    Args:
        model: the initial weights; the buffers are donated. A sharded model trains sharded. A resumed run uses only
            their shapes and shardings.
        processor: the model's processor. It is saved as well, so that `load_model` and `Processor.from_pretrained` accept
            `output`.
        conversations: as returned by `read_conversations`. Each epoch has another order.
        output: folder of the run, see `liger_jax.train.run`.
        steps: number of steps of the whole run, including those before a resumption.
        optimizer: options for AdamW, or any optax transformation. A resumed run needs one with the same state structure.
        batching: how conversations become batches.
        execution: how the layers run.
        saving: when checkpoints are written.
        held_out: conversations for evaluation whenever a checkpoint is saved. A resumed run first evaluates its latest
            checkpoint, if that has not been done.
        evaluation: how they are evaluated.
        progress: show progress bars.

    Returns:
        The last state.

    Raises:
        UserError: an option is out of range, a conversation is too large or cannot be read, or `output` has a run with
            other data, another model or another optimizer.
        AlreadyExistsError: `output` has files, but no run, or another process trains in it.
        DamagedError: the run has checkpoints, and none is intact.

    Example:
        >>> from liger_jax import finetune, read_conversations
        >>> from liger_jax.options import Batching, Optimization
        >>> finetune(  # doctest: +SKIP
        ...     model, processor, read_conversations("train.json"), "runs/first", steps=1000,
        ...     optimizer=Optimization(learning_rate=2e-5), batching=Batching(batch_size=16, pack_length=2048),
        ... )
    """
    optimization = optimizer if isinstance(optimizer, Optimization) else None
    options = RunOptions(steps, optimization, batching, execution, saving, evaluation)
    validate(options, conversations=len(conversations), held_out=len(held_out))
    if optimization:
        optimizer = build_optimizer(optimization, steps, seed=batching.seed)
    train_step = make_train_step(remat=execution.remat, accumulate=batching.accumulate, unroll=execution.unroll)

    with lock_folder(Path(output)):
        run = open_run(Path(output), make_record(options, model, processor, conversations))
        dataset = make_dataset(processor, model.config, conversations, batching, progress=progress)
        evaluator = None
        if held_out:
            with _named_held_out():
                unseen = make_dataset(processor, model.config, held_out, batching, shuffle=False, progress=progress)
                evaluator = HeldOutEvaluator.create(unseen, evaluation, answers_file=run.answers)
        state, run = open_state(model, optimizer, run)
        evaluate_first = evaluator is not None and run.needs_evaluation(options)
        if run.start == steps and not evaluate_first:
            return state

        last_answers = run.start - 1 if evaluate_first else run.start
        run.begin(processor, generation_config=saving.generation_config, last_answers=last_answers)
        batches = load_batches(dataset, range(run.start, steps), workers=batching.workers)
        frozen = optimization.freeze if optimization else ()
        with (
            checkpoint_manager(run.folder, max_to_keep=saving.max_to_keep, asynchronous=saving.asynchronous) as manager,
            RunLog(run.metrics, begin=run.start, steps=steps, tensorboard=run.tensorboard, progress=progress) as log,
            catch_sigterm() as stop_requested,
        ):
            if evaluator and evaluate_first:
                log.write(run.start, evaluator(state.model, run.start))
            saves = Checkpoints(manager, saving.save_every, evaluator)
            return fit(state, batches, train_step, log, checkpoints=saves, frozen=frozen, stop_requested=stop_requested)


def validate(options: RunOptions, *, conversations: int, held_out: int) -> None:
    """Raises UserError if an option is out of range, before anything is read or written."""
    check_batching(options.batching)
    saving, evaluation = options.saving, options.evaluation
    for name, value in {
        "steps": options.steps,
        "conversations": conversations,
        "save_every": saving.save_every,
        "max_to_keep": 1 if saving.max_to_keep is None else saving.max_to_keep,
        "max_new_tokens": evaluation.max_new_tokens,
    }.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    if not 0 <= evaluation.eval_generate <= held_out:
        raise UserError(
            f"eval_generate is {evaluation.eval_generate}; expected 0 to {held_out}, the number of held_out conversations"
        )


def open_state(model: Qwen2VL, optimizer: optax.GradientTransformation, run: Run) -> tuple[TrainState, Run]:
    """Returns the initial state of a new run, or the latest intact state of a run to resume, after freeing `model`.

    The returned run starts at the step of the state.
    """
    state = TrainState.create(model, optimizer)
    if not run.resumes:
        return state, run
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    del state  # frees the optimizer's arrays before the stored ones are read
    state = restore_intact_state(run.folder, abstract)
    for weight in jax.tree.leaves(model):
        weight.delete()  # no longer needed, and the step needs the memory
    return state, dataclasses.replace(run, start=int(state.step))


# ---- the loop --------------------------------------------------------------------------------------------------------


class Checkpoints(NamedTuple):
    """Where and how often `fit` saves the state, and how it evaluates the saved state."""

    manager: "CheckpointManager"
    save_every: int
    evaluator: Evaluator | None = None


class PendingStep(NamedTuple):
    """A step that was dispatched to the device and whose metrics have not been read yet."""

    step: int
    metrics: Metrics
    work: dict[str, float]


def fit(
    state: TrainState,
    batches: Iterable[Batch],
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    log: RunLog,
    *,
    checkpoints: Checkpoints | None = None,
    frozen: Collection[str] = (),
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains on all batches and logs every step.

    The metrics of a step are read after the next one has been dispatched, so that the device never waits for the host.

    Args:
        state: the initial state; donated.
        batches: the batches, one per step.
        train_step: as returned by `make_train_step`.
        log: the open log of the run.
        checkpoints: if given, the state is saved every few steps, after the last one, and when a stop is requested.
        frozen: parts that the optimizer does not train, for the FLOPs in the log.
        stop_requested: returns whether to stop after the current step.

    Returns:
        The last state. The logged steps are in `log.history`.

    Raises:
        UserError: at a checkpoint, no step so far had a token to train.
    """
    config, adapted = state.model.config, adapted_parts(state.model)
    devices = sorted(state.step.devices(), key=lambda device: device.id)
    step, pending = int(state.step), None
    log.seconds_since_last()
    for batch in batches:
        work = batch_work(config, batch, frozen=frozen, adapted=adapted)
        state, metrics = train_step(state, batch)
        if pending:
            _log_step(log, pending, devices)
        step += 1
        pending, stopping = PendingStep(step, metrics, work), stop_requested()
        if checkpoints and (step % checkpoints.save_every == 0 or step == log.steps or stopping):
            _log_step(log, pending, devices)  # first, so that the log is complete up to every checkpoint
            pending = None
            _check_trained(log)
            save_state(checkpoints.manager, state)
            if checkpoints.evaluator and not stopping:
                log.write(step, checkpoints.evaluator(state.model, step))
            log.seconds_since_last()  # the next step's time starts here
        if stopping:
            break
    if pending:
        _log_step(log, pending, devices)
    return state


def _log_step(log: RunLog, pending: PendingStep, devices: list[jax.Device]) -> None:
    """Waits for the metrics of a step and logs them."""
    values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
    values |= step_rates(pending.work, values["num_tokens"], log.seconds_since_last(), devices)
    log.write_step(pending.step, values)


def _check_trained(log: RunLog) -> None:
    """Raises UserError if no step so far had a token to train."""
    if not any(line["num_tokens"] for line in log.history):
        first, last = log.history[0]["step"], log.history[-1]["step"]
        raise UserError(f"Steps {first} to {last} had no token to train; expected at least one. Nothing was saved")


@contextlib.contextmanager
def catch_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM has arrived. Outside the main thread, it always returns False."""
    received: list[int] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


# ---- held-out data ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeldOutEvaluator:
    """Evaluates a model on held-out conversations: their loss and accuracy, and answers to some of them.

    Attributes:
        dataset: the conversations, one epoch of which is evaluated.
        questions: indices of the conversations to answer.
        max_new_tokens: maximum length of an answer.
        answers_file: JSON lines, to which the answers are appended.
    """

    dataset: Dataset
    questions: list[int]
    max_new_tokens: int
    answers_file: Path

    @classmethod
    def create(cls, dataset: Dataset, evaluation: Evaluation, *, answers_file: Path) -> Self:
        """Returns an evaluator that answers the first conversations that can be answered."""
        questions: list[int] = []
        for index in range(len(dataset.conversations)):
            if len(questions) == evaluation.eval_generate:
                break
            if dataset.read(index) and _can_be_answered(dataset, index, evaluation.max_new_tokens):
                questions.append(index)
        return cls(dataset, questions, evaluation.max_new_tokens, answers_file)

    def __call__(self, model: Qwen2VL, step: int) -> dict[str, float]:
        """Returns the metrics for the log, named held_out_loss and so on."""
        batches = range(self.dataset.schedule.epoch_batches)
        with _named_held_out():
            metrics = evaluate(model, load_batches(self.dataset, batches, workers=0))
        if self.questions:
            metrics["exact_match"] = self._answer_questions(model, step)
        return {f"{HELD_OUT}{name}": value for name, value in metrics.items()}

    def _answer_questions(self, model: Qwen2VL, step: int) -> float:
        """Appends the model's answers to the file and returns the fraction that equals the expected ones."""
        answers = compare_answers(
            model,
            self.dataset.processor,
            [self.dataset.conversations[index] for index in self.questions],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.dataset.schedule.batch_size,
        )
        with self.answers_file.open("a", encoding="utf-8") as file:
            for index, answer in zip(self.questions, answers, strict=True):
                print(json.dumps({"step": step, "conversation": index} | answer, ensure_ascii=False), file=file)
        return sum(answer["exact"] for answer in answers) / len(answers)


def _can_be_answered(dataset: Dataset, index: int, max_new_tokens: int) -> bool:
    """Returns whether a conversation has a question and room for an answer.

    Raises:
        UserError: it does not, and the dataset does not skip broken conversations.
    """
    try:
        prompt, _ = split_last_answer(dataset.conversations[index])
        prepare_prompt(dataset.processor, dataset.config, prompt, max_new_tokens)
    except UserError as error:
        if not dataset.skip_broken:
            raise UserError(f"conversation {index} cannot be answered: {error}") from error
        return False
    return True


@contextlib.contextmanager
def _named_held_out() -> Iterator[None]:
    """Adds to the message of a UserError that it concerns the held-out conversations."""
    try:
        yield
    except UserError as error:
        raise UserError(f"held-out data: {error}") from error
