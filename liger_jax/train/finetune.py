"""Fine-tuning, from conversations to checkpoints: batches, steps, a log, and resuming an interrupted run."""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Self

import jax
import optax

from liger_jax import processes
from liger_jax.checkpoint import check_space, checkpoint_manager, restore_intact_state
from liger_jax.config import QwenVLConfig
from liger_jax.data.dataset import Dataset, check_batching, make_dataset
from liger_jax.data.loader import default_workers, load_batches
from liger_jax.data.share import RowShare
from liger_jax.errors import UserError
from liger_jax.generation.answer import prepare_prompt
from liger_jax.inputs.batch import Batch
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor
from liger_jax.model import QwenVL
from liger_jax.model.sharding import get_mesh
from liger_jax.options import Batching, Evaluation, LayerExecution, Optimization, Saving
from liger_jax.train.evaluation import compare_answers, evaluate, split_last_answer
from liger_jax.train.loop import Checkpoints, catch_signals, fit
from liger_jax.train.metrics import HELD_OUT, RunLog
from liger_jax.train.optimizer import build_optimizer
from liger_jax.train.run import Run, RunOptions, lock_run, make_record, open_run
from liger_jax.train.step import LONG_RUN, TrainState, make_train_step


def finetune(
    model: QwenVL,
    processor: Processor,
    conversations: Sequence[Conversation],
    output: str | Path,
    *,
    steps: int,
    optimizer: Optimization | optax.GradientTransformation = Optimization(),
    batching: Batching = Batching(),
    execution: LayerExecution = LayerExecution(remat="auto", unroll="auto"),
    saving: Saving = Saving(),
    held_out: Sequence[Conversation] = (),
    evaluation: Evaluation = Evaluation(),
    progress: bool = True,
) -> TrainState:
    """Trains a model on the assistant's answers in conversations.

    If `output` has a run, it is resumed from its latest intact checkpoint. On the same device, its losses equal those of an
    uninterrupted run bit for bit. SIGTERM and SIGINT (Ctrl-C) end training after the current step, whose state is saved.
    If an error in the data ends training, the state of the latest step is also saved.

    In several processes (`liger_jax.processes`), all of them call this with the same arguments, on a mesh of all devices.
    Each process reads its part of the data. If one of them fails or receives a signal, all end together. The run can be
    resumed by another number of processes.

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
        execution: how the layers run. unroll="auto" unrolls all layers in a run of 2,000 steps or more that compiles a
            single program, except with remat "full".
        saving: when checkpoints are written.
        held_out: conversations for evaluation whenever a checkpoint is saved. A resumed run first evaluates its latest
            checkpoint, if that has not been done.
        evaluation: how they are evaluated.
        progress: show progress bars.

    Returns:
        The last state, which after SIGTERM is not that of the last step.

    Raises:
        KeyboardInterrupt: after SIGINT, when the state is saved. A second SIGINT raises it at once.
        UserError: an option is out of range, a conversation is too large or cannot be read, or `output` has a run with
            other data, another model or another optimizer; a conversation cannot be read when a batch needs it; or loss or
            gradient norm is not finite in `max_skipped_updates` steps in a row, see `make_train_step`.
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
    validate(options, model.config, conversations=len(conversations), held_out=len(held_out))
    if optimization:
        optimizer = build_optimizer(optimization, steps, seed=batching.seed)
    train_step = make_train_step(
        remat=execution.remat,
        accumulate=batching.accumulate,
        unroll=execution.unroll,
        long_run=is_long_run(steps, batching),
    )

    share = make_share(model, batching)
    rows = None if share is None else share.rows
    with processes.agree(), lock_run(Path(output)):
        run = open_run(Path(output), make_record(options, model, processor, conversations))
        progress = progress and processes.is_first()
        read = functools.partial(make_dataset, processor, model.config, batching=batching, progress=progress, rows=rows)
        dataset = read(conversations)
        evaluator = make_evaluator(read, held_out, evaluation, run, share)
        state, run = open_state(model, optimizer, run)
        evaluate_first = evaluator is not None and run.needs_evaluation(options)
        if run.start == steps and not evaluate_first:
            return state

        run.begin(processor, generation_config=saving.generation_config, last_answers=run.start - int(evaluate_first))
        processes.from_first(lambda: check_space(run.folder, state))  # after begin has removed unfinished checkpoints
        batches = start_loading(dataset, range(run.start, steps), batching.workers)
        with (
            catch_signals() as stop_requested,  # outermost: a signal does not interrupt the last write of a checkpoint
            contextlib.closing(batches),
            checkpoint_manager(run.folder, max_to_keep=saving.max_to_keep, asynchronous=saving.asynchronous) as manager,
            open_log(run, steps, progress=progress) as log,
        ):
            train_step.report = log.note
            if run.resumes:
                log.note(f"resuming from step {run.start}")
            if evaluator and evaluate_first:
                log.write_evaluation(run.start, evaluator(state.model, run.start))
            log.note("compiling the training step")
            return fit(
                state,
                batches,
                train_step,
                log,
                checkpoints=Checkpoints(manager, saving.save_every, evaluator),
                share=share,
                frozen=optimization.freeze if optimization else (),
                stop_requested=stop_requested,
                max_skipped_updates=(optimization or Optimization()).max_skipped_updates,
                find_conversations=lambda step: itertools.chain.from_iterable(dataset.schedule.batch(step - 1)),
            )


def make_share(model: QwenVL, batching: Batching) -> RowShare | None:
    """Returns the rows of each batch that this process reads, or None for all of them.

    Raises:
        UserError: there are several processes, and the model is not on a mesh of all their devices.
    """
    if processes.count() == 1:
        return None
    mesh = get_mesh(model)
    processes.check_mesh(mesh)
    assert mesh is not None
    return RowShare.create(mesh, batching.batch_size, multiple=batching.accumulate)


def start_loading(dataset: Dataset, indices: range, workers: int | None) -> Generator[Batch, None, None]:
    """Returns the batches of the steps. By default, the processes of a host share its cores."""
    if workers is None:
        workers = default_workers(processes.on_this_host())
    return load_batches(dataset, indices, workers=workers)


def make_evaluator(
    read: Callable[..., Dataset],
    held_out: Sequence[Conversation],
    evaluation: Evaluation,
    run: Run,
    share: RowShare | None,
) -> "HeldOutEvaluator | None":
    """Returns the evaluator of a run, or None without held-out conversations."""
    if not held_out:
        return None
    with _named_held_out():
        dataset = read(held_out, shuffle=False)
        return HeldOutEvaluator.create(dataset, evaluation, answers_file=run.answers, share=share)


def open_log(run: Run, steps: int, *, progress: bool) -> RunLog:
    """Returns the log of a run from its start on. Process 0 alone writes it."""
    if not processes.is_first():
        return RunLog(None, begin=run.start, steps=steps, progress=False)
    return RunLog(run.metrics, begin=run.start, steps=steps, tensorboard=run.tensorboard, progress=progress)


def is_long_run(steps: int, batching: Batching) -> bool:
    """Returns whether a run compiles a single program and has so many steps that it pays to compile longer."""
    compiles_once = batching.pack_length is not None or None not in (batching.length, batching.patches)
    return compiles_once and steps >= LONG_RUN


def validate(options: RunOptions, config: QwenVLConfig, *, conversations: int, held_out: int) -> None:
    """Raises UserError if an option is out of range, before anything is read or written."""
    check_batching(options.batching, config.vision)
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


def open_state(model: QwenVL, optimizer: optax.GradientTransformation, run: Run) -> tuple[TrainState, Run]:
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


# ---- held-out data ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeldOutEvaluator:
    """Evaluates a model on held-out conversations: their loss and accuracy, and answers to some of them.

    Attributes:
        dataset: the conversations, one epoch of which is evaluated.
        questions: indices of the conversations to answer.
        max_new_tokens: maximum length of an answer.
        answers_file: JSON lines, to which the answers are appended.
        share: in several processes, the rows of each batch that this process reads.
    """

    dataset: Dataset
    questions: list[int]
    max_new_tokens: int
    answers_file: Path
    share: RowShare | None = None

    @classmethod
    def create(
        cls, dataset: Dataset, evaluation: Evaluation, *, answers_file: Path, share: RowShare | None = None
    ) -> Self:
        """Returns an evaluator that answers the first conversations that can be answered."""
        questions: list[int] = []
        for index in range(len(dataset.conversations)):
            if len(questions) == evaluation.eval_generate:
                break
            if dataset.read(index) and _can_be_answered(dataset, index, evaluation.max_new_tokens):
                questions.append(index)
        return cls(dataset, questions, evaluation.max_new_tokens, answers_file, share)

    def __call__(self, model: QwenVL, step: int) -> dict[str, float]:
        """Returns the metrics for the log, named held_out_loss and so on."""
        batches = range(self.dataset.schedule.epoch_batches)
        with _named_held_out():
            metrics = evaluate(model, load_batches(self.dataset, batches, workers=0), share=self.share)
        if self.questions:
            metrics["exact_match"] = self._answer_questions(model, step)
        return {f"{HELD_OUT}{name}": value for name, value in metrics.items()}

    def _answer_questions(self, model: QwenVL, step: int) -> float:
        """Appends the model's answers to the file and returns the fraction that equals the expected ones."""
        answers = compare_answers(
            model,
            self.dataset.processor,
            [self.dataset.conversations[index] for index in self.questions],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.dataset.schedule.batch_size,
        )
        if processes.is_first():
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
