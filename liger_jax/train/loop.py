"""The training loop: steps and their log, checkpoints, and what is saved if a step, the data or the process fails."""

import contextlib
import functools
import os
import signal
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from liger_jax import processes
from liger_jax.checkpoint import checkpoint_manager, complete_steps, save_state
from liger_jax.data.share import RowShare, place_batches
from liger_jax.errors import LigerWarning, UserError, list_some
from liger_jax.inputs.batch import Batch
from liger_jax.model import QwenVL
from liger_jax.model.lora import adapted_parts
from liger_jax.train.loss import Metrics
from liger_jax.train.metrics import RunLog, batch_work, step_rates
from liger_jax.train.step import TrainState

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

Evaluator = Callable[[QwenVL, int], dict[str, float]]


class Checkpoints(NamedTuple):
    """Where and how often `fit` saves the state, and how it evaluates the saved state."""

    manager: "CheckpointManager"
    save_every: int
    evaluator: Evaluator | None = None


def fit(
    state: TrainState,
    batches: Iterable[Batch],
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    log: RunLog,
    *,
    checkpoints: Checkpoints | None = None,
    share: RowShare | None = None,
    frozen: Collection[str] = (),
    stop_requested: Callable[[], bool] = lambda: False,
    max_skipped_updates: int = 3,
    find_conversations: Callable[[int], Iterable[int]] | None = None,
) -> TrainState:
    """Trains on all batches and logs every step.

    The metrics of a step are read after the next one has been dispatched, so that the device never waits for the host. An
    error of the data, a step or the log ends training; the state is saved first, unless it already is.

    Args:
        state: the initial state; donated.
        batches: the batches, one per step.
        train_step: as returned by `make_train_step`.
        log: the open log of the run.
        checkpoints: if given, the state is saved every few steps, after the last one, and when training ends early.
        share: in several processes, which rows of each batch `batches` has.
        frozen: parts that the optimizer does not train, for the FLOPs in the log.
        stop_requested: returns whether to stop after the current step.
        max_skipped_updates: number of steps in a row whose loss or gradient norm is not finite after which training ends.
        find_conversations: returns the conversations of a step, for the error message.

    Returns:
        The last state. The logged steps are in `log.history`.

    Raises:
        UserError: at a checkpoint, no step so far had a token to train; or too many steps in a row were not finite.
    """
    config, adapted = state.model.config, adapted_parts(state.model)
    step = int(state.step)
    devices = sorted(state.step.devices(), key=lambda device: (device.process_index != processes.index(), device.id))
    steps = StepReader(log, devices, max_skipped_updates)
    saver = Saver(checkpoints, steps, step)
    count_work = functools.partial(batch_work, config, frozen=frozen, adapted=adapted)
    log.seconds_since_last()
    try:
        for batch, work in place_batches(iter(batches), share, count_work):
            state, metrics = train_step(state, batch)
            step += 1
            steps.add(PendingStep(step, metrics, work))
            stopping = stop_requested()
            saving = checkpoints and (step % checkpoints.save_every == 0 or step == log.steps or stopping)
            if saving:
                steps.read()  # so that the log is complete up to every checkpoint
            _check_skipped(steps, saver, find_conversations)
            if checkpoints and saving:
                saver.save(state, step)
                if checkpoints.evaluator and not stopping:
                    log.write_evaluation(step, checkpoints.evaluator(state.model, step))
                stopping = stop_requested()  # perhaps during the evaluation
                log.seconds_since_last()  # the next step's time starts here
            if stopping:
                break
        steps.read()
        _check_skipped(steps, saver, find_conversations)
    except Exception as caught:
        error = _agreed(caught)
        _append(error, saver.rescue(state, step))
        if error is caught:
            raise
        raise error from caught
    return state


def _agreed(error: Exception) -> Exception:
    """Returns the error that all processes raise because of this one, and lets the others know of it."""
    if processes.count() == 1 or processes.is_agreed(error):
        return error
    try:
        processes.exchange(error=error)
    except Exception as agreed:
        return agreed
    return error


# ---- the log of the steps --------------------------------------------------------------------------------------------


class PendingStep(NamedTuple):
    """A step that was dispatched to the device and whose metrics have not been read yet."""

    step: int
    metrics: Metrics
    work: dict[str, float]


class StepReader:
    """Logs each step after the next one has been dispatched, and remembers whose updates were left out.

    Attributes:
        log: the log of the run.
        max_skipped_updates: number of skipped updates in a row that are too many.
        skipped: the lines of the latest steps in a row whose updates were left out.
        last_update: the latest logged step whose update was not left out.
    """

    def __init__(self, log: RunLog, devices: list[jax.Device], max_skipped_updates: int):
        self.log = log
        self.max_skipped_updates = max_skipped_updates
        self.skipped: list[dict[str, float]] = []
        self.last_update: int | None = None
        self._devices = devices
        self._pending: PendingStep | None = None

    def add(self, step: PendingStep) -> None:
        """Logs the previous step."""
        self.read()
        self._pending = step

    def read(self) -> None:
        """Waits for the metrics of the pending step, if there is one, and logs them."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        values |= step_rates(pending.work, values["num_tokens"], self.log.seconds_since_last(), self._devices)
        self.log.write_step(pending.step, values)
        if values.get("skipped_update"):
            self.skipped.append({"step": pending.step} | values)
            if processes.is_first():
                warnings.warn(f"{_describe(self.skipped[-1])}: the update was left out", LigerWarning, stacklevel=3)
        else:
            self.skipped, self.last_update = [], pending.step


def _describe(line: dict[str, float]) -> str:
    return f"Step {line['step']} has loss {line['loss']:.4g} and gradient norm {line['grad_norm']:.4g}"


def _check_skipped(
    steps: StepReader, saver: "Saver", find_conversations: Callable[[int], Iterable[int]] | None
) -> None:
    """Raises UserError if the updates of too many steps in a row were left out."""
    if len(steps.skipped) < steps.max_skipped_updates:
        return
    descriptions = []
    for line in steps.skipped:
        conversations = sorted(find_conversations(int(line["step"]))) if find_conversations else []
        listed = list_some([str(number) for number in conversations], 20, separator=", ")
        descriptions.append(_describe(line) + (f" (conversations {listed})" if listed else ""))
    good, checkpoint = saver.last_good_checkpoint(), "There is no earlier checkpoint"
    if good is not None:
        checkpoint = f"The last good checkpoint is step {good}; to resume from it, remove the later ones"
    raise UserError(
        f"{'; '.join(descriptions)}; expected finite numbers. These {len(steps.skipped)} updates in a row were left out "
        f"(max_skipped_updates is {steps.max_skipped_updates}). {checkpoint}"
    )


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Saver:
    """Saves the state of a run, each step at most once, and never removes a good checkpoint for a doubtful one."""

    def __init__(self, checkpoints: Checkpoints | None, steps: StepReader, start: int):
        self._checkpoints = checkpoints
        self._steps = steps
        self._start = start
        self._attempted = start  # the latest step that was saved, or that could not be

    def save(self, state: TrainState, step: int) -> None:
        """Saves the state of a step.

        If the step's update was left out, the weights may be what made it fail: older checkpoints are then kept.

        Raises:
            UserError: no step so far had a token to train.
        """
        assert self._checkpoints is not None
        manager, self._attempted = self._checkpoints.manager, step
        with processes.agree():
            _check_trained(self._steps.log)
        if self._steps.skipped:
            manager.wait_until_finished()
            with checkpoint_manager(manager.directory, max_to_keep=None) as keep_all:
                save_state(keep_all, state)
            manager.reload()
        else:
            save_state(manager, state)

    def rescue(self, state: TrainState, step: int) -> str:
        """Saves the state that an error would lose, if it can be saved. Returns a sentence that says what is saved."""
        if self._checkpoints is None:
            return ""
        manager, sentences = self._checkpoints.manager, []
        try:
            can_be_saved = step != self._attempted and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            # an error in one of several processes may have come before or after a step of the others
            if all(other == [step, True] for other in processes.exchange([step, can_be_saved])):
                with processes.agree():
                    self._steps.read()
                self.save(state, step)
            manager.wait_until_finished()
        except Exception as error:  # the error that ends training matters more
            sentences.append(f"Step {step} could not be saved ({error})")
        saved = complete_steps(Path(manager.directory))
        if step in saved:
            return f"Step {step} is saved in {manager.directory}; repeat the command to resume"
        if saved:
            sentences.append(f"The latest checkpoint in {manager.directory} is step {saved[-1]}")
        return ". ".join(sentences)

    def last_good_checkpoint(self) -> int | None:
        """Returns the latest checkpoint whose weights gave a finite loss in a later step, or else the one at the start."""
        if self._checkpoints is None:
            return None
        last_update = self._steps.last_update
        limit = self._start if last_update is None else last_update - 1
        return max((step for step in self._checkpoints.manager.all_steps() if step <= limit), default=None)


def _check_trained(log: RunLog) -> None:
    """Raises UserError if no step so far had a token to train."""
    if not any(line["num_tokens"] for line in log.history):
        first, last = log.history[0]["step"], log.history[-1]["step"]
        raise UserError(f"Steps {first} to {last} had no token to train; expected at least one. Nothing was saved")


def _append(error: Exception, sentence: str) -> None:
    """Adds a sentence to the message of a UserError, or as a note to any other error."""
    if not sentence:
        return
    if isinstance(error, UserError):
        error.args = (f"{str(error).removesuffix('.')}. {sentence}",)
    else:
        error.add_note(sentence)


# ---- signals ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM or SIGINT (Ctrl-C) has arrived, in any of the processes.

    A second SIGINT is handled as it was before, which ends the program. The first one raises KeyboardInterrupt when the
    block has ended. Outside the main thread, signals are not caught.
    """
    received: list[int] = []
    seen: set[int] = set()  # in any process
    previous: dict[int, Any] = {}

    def announce(number: int, by: str = "", advice: str = "") -> None:
        message = (
            f"\n{by}{signal.Signals(number).name}: training ends after this step, and its state is saved{advice}\n"
        )
        if processes.is_first():
            os.write(2, message.encode())  # print must not be called in a signal handler

    def receive(number, frame):
        received.append(number)
        announce(number, advice="; a second one ends it at once" if number == signal.SIGINT else "")
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])

    def received_anywhere() -> set[int]:
        for process, numbers in enumerate(processes.exchange(received)):
            if set(numbers) - seen and process != processes.index():
                announce(numbers[0], by=f"process {process}: ")
            seen.update(numbers)
        return seen

    with contextlib.suppress(ValueError):  # not the main thread
        for caught in (signal.SIGTERM, signal.SIGINT):
            previous[caught] = signal.getsignal(caught) or signal.SIG_DFL
            signal.signal(caught, receive)
    try:
        yield lambda: bool(received_anywhere())
    finally:
        for number, handler in previous.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)
    if signal.SIGINT in received_anywhere():
        raise KeyboardInterrupt
