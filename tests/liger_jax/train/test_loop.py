"""fit: a step that is not finite, an error or a signal loses no training, and never replaces a good checkpoint."""

import dataclasses
import itertools
import json
import math
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import liger_jax.train.loop as loop_module
from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState, prepare
from liger_jax.checkpoint import checkpoint_manager, restore_state
from liger_jax.errors import LigerWarning, UserError
from liger_jax.train.loop import Checkpoints, catch_signals, fit
from liger_jax.train.metrics import RunLog

CONFIG = Qwen2VLConfig.tiny()
NAN = float("nan")


def make_state():
    return TrainState.create(Qwen2VL.init(CONFIG, dtype="float32"), optax.sgd(1.0))


def make_batches(count):
    ids = np.array([[5, 6, 7]])
    return [prepare(CONFIG, input_ids=ids, labels=ids)] * count


def scripted_step(losses):
    """Returns a training step with these losses, by step. Each finite one adds 1 to a weight."""

    def step(state, batch):
        loss = losses[int(state.step)]
        norm = state.model.language_model.norm
        if math.isfinite(loss):
            norm.weight.set_value(norm.weight + 1)
        metrics = {"loss": loss, "grad_norm": 2 * loss, "num_tokens": 2, "skipped_update": not math.isfinite(loss)}
        return dataclasses.replace(state, step=state.step + 1), {name: jnp.float32(x) for name, x in metrics.items()}

    return step


def run(folder, losses, *, batches=None, save_every=2, keep=2, evaluator=None, state=None, **options):
    """Calls fit with a scripted step and checkpoints in `folder`."""
    state = make_state() if state is None else state
    folder.mkdir(exist_ok=True)
    with (
        checkpoint_manager(folder, max_to_keep=keep, asynchronous=True) as manager,
        RunLog(folder / "metrics.jsonl", begin=int(state.step), steps=len(losses), progress=False) as log,
    ):
        checkpoints = Checkpoints(manager, save_every, evaluator)
        batches = make_batches(len(losses) - int(state.step)) if batches is None else batches
        return fit(state, batches, scripted_step(losses), log, checkpoints=checkpoints, **options)


def saved(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def updates(folder, step):
    """Returns the number of updates in the weights of a checkpoint."""
    state = restore_state(folder, make_state(), step=step)
    return int(state.model.language_model.norm.weight[0]) - 1


def log_lines(folder):
    def reject(name):
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_skipped_update_warns(tmp_path):
    """Training continues, the log has null for NaN, and a checkpoint in between keeps the older ones."""
    with pytest.warns(
        LigerWarning, match="Step 4 has loss nan and gradient norm nan: the update was left out"
    ) as caught:
        run(tmp_path, [1, 1, 1, NAN, 1, 1, 1], save_every=1, keep=2)
    assert len(caught) == 1
    assert [(line["loss"], line["skipped_update"]) for line in log_lines(tmp_path)[2:5]] == [(1, 0), (None, 1), (1, 0)]
    assert saved(tmp_path) == [6, 7] and updates(tmp_path, 7) == 6


@pytest.mark.filterwarnings("ignore:Step")
@pytest.mark.parametrize(
    ("losses", "save_every", "keep", "good", "kept"),
    [
        ([1, 1, 1, 1, 1, NAN, NAN, NAN, 1], 2, 2, 4, [2, 4, 6, 8]),  # 4 is followed by a finite step
        ([1, 1, 1, 1, 1, NAN, NAN, NAN, NAN], 1, 2, 4, [4, 5, 6, 7, 8]),  # the update of step 5 made the weights fail
        ([1, 1, 1, NAN, NAN, NAN, NAN, NAN, 1], 500, 2, None, [7]),  # read one step late
        ([1, 1, 1, 1, math.inf, math.inf, -math.inf], 3, 1, 3, [3, 6, 7]),
    ],
)
def test_run_of_skipped_updates_ends_training(tmp_path, losses, save_every, keep, good, kept):
    """Regression: a run that turned NaN trained on, saved NaN, and removed its last good checkpoint.

    The message names the steps, their conversations and the last good checkpoint, which is kept. The state is saved.
    """
    with pytest.raises(UserError) as error:
        run(tmp_path, losses, save_every=save_every, keep=keep, find_conversations=lambda step: [step + 10, step])
    first = next(step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss))
    for step in range(first, first + 3):
        expected = f"Step {step} has loss {losses[step - 1]} and gradient norm {losses[step - 1]}"
        assert f"{expected} (conversations {step}, {step + 10})" in str(error.value)
    assert "3 updates in a row were left out (max_skipped_updates is 3)" in str(error.value)
    assert ("no earlier checkpoint" if good is None else f"last good checkpoint is step {good};") in str(error.value)
    assert str(error.value).endswith(f"Step {kept[-1]} is saved in {tmp_path}; repeat the command to resume")
    assert saved(tmp_path) == kept
    assert updates(tmp_path, kept[-1]) == first - 1
    if good:
        assert updates(tmp_path, good) == good


@pytest.mark.filterwarnings("ignore:Step")
def test_run_resumes_after_skipped_updates(tmp_path):
    """Repeating the command continues with the batches after those that were not finite."""
    losses = [1, NAN, NAN, 1, 1, 1]
    with pytest.raises(UserError, match=r"2 updates in a row .* There is no earlier checkpoint\. Step 4 is saved"):
        run(tmp_path, losses, max_skipped_updates=2, save_every=500)
    state = run(tmp_path, losses, state=restore_state(tmp_path, make_state()), max_skipped_updates=2)
    assert int(state.step) == 6 and updates(tmp_path, 6) == 4
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def failing_batches(count, error):
    yield from make_batches(count)
    raise error


@pytest.mark.parametrize("error", [UserError("image 'a.png' is truncated"), RuntimeError("a bug")])
def test_error_of_the_data_saves_the_state(tmp_path, error):
    """Regression: a damaged image in mid-run lost the steps since the last checkpoint."""
    with pytest.raises(type(error)) as caught:
        run(tmp_path, [1] * 9, batches=failing_batches(5, error), save_every=4)
    assert caught.value is error
    message = " ".join([str(error), *getattr(error, "__notes__", [])])
    assert (
        message.startswith(("image 'a.png' is truncated. ", "a bug ")) and f"Step 5 is saved in {tmp_path}" in message
    )
    assert saved(tmp_path) == [4, 5] and updates(tmp_path, 5) == 5
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_error_before_the_first_step(tmp_path):
    """Regression: the message said that step 0 was saved."""
    with pytest.raises(UserError, match=r"^broken$"):
        run(tmp_path, [1] * 9, batches=failing_batches(0, UserError("broken")))
    assert saved(tmp_path) == []


def test_state_is_saved_once(tmp_path, monkeypatch):
    """An error right after a checkpoint, in the data or in an evaluation, does not save it again."""
    counts = []
    save_state = loop_module.save_state
    monkeypatch.setattr(loop_module, "save_state", lambda *args: counts.append(save_state(*args)))
    with pytest.raises(UserError, match="broken"):
        run(tmp_path / "a", [1] * 9, batches=failing_batches(4, UserError("broken")))

    def evaluate(model, step):
        raise RuntimeError("evaluation")

    with pytest.raises(RuntimeError, match="evaluation") as error:
        run(tmp_path / "b", [1] * 9, evaluator=evaluate)
    assert error.value.__notes__ == [f"Step 2 is saved in {tmp_path / 'b'}; repeat the command to resume"]
    assert counts == [2, 4, 2] and saved(tmp_path / "b") == [2]


def test_error_is_raised_even_if_the_state_cannot_be_saved(tmp_path, monkeypatch):
    def fail(manager, state):
        raise OSError("No space left on device")

    monkeypatch.setattr(loop_module, "save_state", fail)
    with pytest.raises(UserError, match=r"broken\. Step 3 could not be saved \(No space left on device\)"):
        run(tmp_path, [1] * 9, batches=failing_batches(3, UserError("broken")), save_every=9)
    with pytest.raises(OSError, match="No space left"):  # of the save itself: it is not repeated
        run(tmp_path, [1] * 9, save_every=3)
    assert saved(tmp_path) == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A user's step that makes NaN weights: the run stops at the next checkpoint, names the tensor, and keeps the others."""
    step = scripted_step([1] * 9)

    def poisoned(state, batch):
        state, metrics = step(state, batch)
        if int(state.step) == 3:
            state.model.lm_head.weight.set_value(state.model.lm_head.weight.at[0, 0].set(jnp.inf))
        return state, metrics

    with (
        checkpoint_manager(tmp_path, max_to_keep=1) as manager,
        RunLog(tmp_path / "metrics.jsonl", begin=0, steps=9, progress=False) as log,
        pytest.raises(
            UserError, match=r"4: model/lm_head/weight holds NaN or infinity.*latest checkpoint .* is step 2$"
        ),
    ):
        fit(make_state(), make_batches(9), poisoned, log, checkpoints=Checkpoints(manager, 2))
    assert saved(tmp_path) == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_state_and_ends_training(tmp_path, number, capfd):
    """After the step in which it arrives. SIGINT then raises KeyboardInterrupt."""
    before = signal.getsignal(number)

    def batches():
        for step, batch in enumerate(make_batches(9)):
            if step == 2:
                os.kill(os.getpid(), number)
            yield batch

    def train():
        with catch_signals() as stop_requested:
            return run(tmp_path, [1] * 9, batches=batches(), save_every=500, stop_requested=stop_requested)

    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            train()
    else:
        assert int(train().step) == 3
    assert saved(tmp_path) == [3] and updates(tmp_path, 3) == 3
    assert signal.getsignal(number) == before
    assert f"{number.name}: training ends after this step, and its state is saved" in capfd.readouterr().err


@pytest.mark.parametrize("first", range(1, 6))
def test_a_stop_at_any_moment_saves_the_state(tmp_path, first):
    """From whichever question on the answer is yes, the last step is saved, once. Step 2 asks again after its evaluation."""
    questions = itertools.count(1)
    state = run(
        tmp_path,
        [1] * 9,
        save_every=2,
        evaluator=lambda model, step: {"held_out_loss": 0.0},
        stop_requested=lambda: next(questions) >= first,
    )
    assert int(state.step) == [1, 2, 2, 3, 4][first - 1] == saved(tmp_path)[-1]


def test_second_sigint_ends_at_once(tmp_path):
    """Even between two steps; the step is not saved."""

    def batches():
        yield from make_batches(2)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt), catch_signals() as stop_requested:
        run(tmp_path, [1] * 9, batches=batches(), save_every=500, stop_requested=stop_requested)
    assert saved(tmp_path) == []


def test_signals_are_not_caught_in_other_threads():
    results = []

    def call():
        with catch_signals() as stop_requested:
            results.append(stop_requested())

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert results == [False]


def test_metrics_are_read_after_the_next_step_was_dispatched(tmp_path, monkeypatch):
    """The device does not wait for the host, also when updates are skipped."""
    events = []
    step, device_get = scripted_step([1, NAN, 1, 1]), jax.device_get

    def record(state, batch):
        events.append(f"step {int(state.step) + 1}")
        return step(state, batch)

    def get(metrics):
        events.append("read")
        return device_get(metrics)

    with RunLog(tmp_path / "metrics.jsonl", begin=0, steps=4, progress=False) as log, pytest.warns(LigerWarning):
        monkeypatch.setattr(jax, "device_get", get)
        fit(make_state(), make_batches(4), record, log)
    assert events == ["step 1", "step 2", "read", "step 3", "read", "step 4", "read", "read"]
