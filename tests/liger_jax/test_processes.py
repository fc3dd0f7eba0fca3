"""Two processes train as one does, and end together. They run `tests._support.process_runs`, with two devices each."""

import functools
import json
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import liger_jax.train.finetune as finetune_module
from convert import load_adapter, to_hf
from liger_jax import make_train_step, processes
from liger_jax.errors import DataWarning, UserError, warn_skipped
from tests._support import process_runs as runs

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the processes would share a GPU")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "make_train_step", functools.cache(make_train_step))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_once):
    """Returns the folder in which one process trained alone, and two processes then ran all scenarios."""
    folder = tmp_path_factory.mktemp("processes")
    model = runs.initial_model()
    to_hf(model, folder / "hub")
    runs.shared_processor().save_pretrained(folder / "hub")
    texts = [{"role": "user", "content": "Which digit?"}, {"role": "assistant", "content": "7"}]
    (folder / "data.json").write_text(json.dumps([{"messages": texts}] * 4))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    commands = [[sys.executable, "-m", "tests._support.process_runs", port, number, folder] for number in (0, 1)]
    started = [
        subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        runs.train(folder / "alone", runs.STEPS)
        shutil.copytree(folder / "alone", folder / "copy")
        for step in (4, 6):
            shutil.rmtree(folder / "copy" / str(step))
        (folder / "copy").rename(folder / "resumed")
        for process in started:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-5000:]
    finally:
        for process in started:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """Returns what each process saw in each scenario."""
    return [json.loads((folder / f"{number}.json").read_text()) for number in (0, 1)]


def logged(folder, *names: str) -> list:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], *(line[name] for name in names)] for line in lines if names[0] in line]


def test_losses_equal_those_of_one_process(folder, seen):
    """Steps 1 and 2 were trained by one process, 3 and 4 by two, 5 and 6 by one again."""
    assert [each["resumed"] for each in seen] == [4, 4]
    assert runs.train(folder / "resumed", runs.STEPS) == runs.STEPS
    losses = (["loss", "num_tokens", "accuracy"], 1e-5), (["held_out_loss", "held_out_num_tokens"], 1e-5)
    # the order of the sum over processes varies, and each step multiplies the difference: more in gradients than in losses
    for names, tolerance in (*losses, (["grad_norm"], 1e-4)):
        resumed, alone = (logged(folder / run, *names) for run in ("resumed", "alone"))
        np.testing.assert_allclose(resumed, alone, rtol=tolerance, err_msg=str(names))
    answers = [(folder / run / "answers.jsonl").read_text() for run in ("resumed", "alone")]
    assert answers[0] == answers[1] and answers[0].count("\n") == 3
    utilisation = [logged(folder / run, "token_utilisation") for run in ("resumed", "alone")]
    rows = [
        [step, 0.75 * value if step in (3, 4) else value] for step, value in utilisation[1]
    ]  # 3 rows are padded to 4
    np.testing.assert_allclose(utilisation[0], rows, rtol=1e-6)


def test_processes_read_their_rows_of_the_same_batches(seen):
    first, second = (each["batches"] for each in seen)
    assert (first["rows"], second["rows"]) == ([0, 1], [2, 3]) and first["copies"] == [1, 2]
    assert first["arrays"] == second["arrays"] and first["segments"] == second["segments"]
    dataset = runs.dataset_of(runs.make_data())
    for step, (arrays, segments) in enumerate(zip(first["arrays"], first["segments"], strict=True)):
        expected = dataset(step)
        assert segments == [expected.max_segments, expected.vision.max_segments]
        for array, leaf in zip(arrays, jax.tree.leaves(expected.pad_rows(4)), strict=True):
            np.testing.assert_array_equal(array, leaf)


def test_models_are_saved_and_loaded_by_both(seen):
    assert [each["models"] for each in seen] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("scenario", "process", "kind", "message"),
    [
        ("locked", 0, "AlreadyExistsError", r".*locked is in use by process \d+ on .*; expected an output folder"),
        (
            "other_data",
            0,
            "UserError",
            "process 1 has other settings: conversations is 6, and 5 in process 0; data is .*",
        ),
        ("damaged_image", 1, "UserError", r"conversation \d: image .* cannot be decoded .* Step 1 is saved in .*"),
        ("full_disk", 0, "UserError", r".*No space left on device.* Step 2 is saved in .*"),
    ],
)
def test_all_processes_raise_the_error_of_one(seen, scenario, process, kind, message):
    for number, each in enumerate(seen):
        prefix = "" if number == process else f"process {process}( failed)?: "
        assert re.match(f"{kind}: {prefix}{message}", each[scenario]), each[scenario]


def test_training_ends_after_the_same_step_in_all(folder, seen):
    """After an error, or a signal to one of them, the state is saved. LoRA's adapter is complete."""
    assert [path.name for path in (folder / "damaged_image").iterdir() if path.name.isdigit()] == ["1"]
    assert [each["terminated_command"][0] for each in seen] == [143, 143]
    assert [path.name for path in (folder / "terminated").iterdir() if path.name.isdigit()] == ["1"]
    load_adapter(runs.initial_model(), folder / "terminated" / "adapter")


def test_resumes_from_the_last_intact_checkpoint(folder, seen):
    assert [each["damaged_checkpoint"] for each in seen] == [4, 4]
    assert sorted(path.name for path in (folder / "damaged_checkpoint").iterdir() if path.name[0].isdigit()) == [
        *("2", "4", "4.damaged")
    ]
    losses, expected = (logged(folder / run, "loss")[:4] for run in ("damaged_checkpoint", "resumed"))
    assert losses[:2] == expected[:2]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)  # the order of the sum over processes varies


def test_process_0_alone_prints(seen):
    """The error, which is one line, and the last line of a run."""
    (status, error, _), (other_status, other_error, _) = (each["refused_command"] for each in seen)
    assert other_status == 1 and error == other_error == ""
    assert status == "liger-jax: The mesh fsdp 2 has 2 of 4 devices; expected all devices of the 2 processes"
    printed = [each["terminated_command"][2] for each in seen]
    assert printed[0].startswith("step 1 of 3: checkpoint") and printed[1] == ""


def test_process_0_alone_warns_of_what_concerns_all(monkeypatch, recwarn):
    for process, expected in ((0, ["all", "data"]), (1, ["data"])):
        monkeypatch.setattr("jax._src.distributed.global_state.process_id", process)
        with processes.connected(None, None, None):
            warn_skipped("all", ["problem"])
            warn_skipped("data", ["problem"], category=DataWarning)
        assert [str(warning.message).partition(":")[0] for warning in recwarn.list] == expected
        recwarn.clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "coordinator is missing; expected --coordinator"),
        (("host", 2, 0), "coordinator is 'host'; expected HOST:PORT"),
        (("host:1", None, 0), "processes is None; expected the number"),
        (("host:1", 2, 2), "process is 2; expected 0 to 1"),
        (("auto", 2, None), "coordinator is auto; expected neither"),
        (("auto", None, None), "coordinator is auto, but there is no SLURM"),
    ],
)
def test_connection_is_checked(monkeypatch, arguments, message):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(UserError, match=message), processes.connected(*arguments):
        pass


def test_process_0_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(processes, "CONNECT_SECONDS", 0)
    with pytest.raises(UserError, match=r"process 0 at localhost:1 cannot be reached .* expected it to be running"):
        processes._wait_for("localhost", 1, 1)


def test_process_that_does_not_answer(monkeypatch):
    """Its error names it. An error of this process is raised as it is."""

    class Client:
        values: dict = {}  # noqa: RUF012

        def key_value_set(self, key, value):
            self.values[key] = value

        def blocking_key_value_get(self, key, milliseconds):
            if key not in self.values:
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: no {key}")
            return self.values[key]

    for name, value in {"num_processes": 2, "process_id": 0, "client": Client()}.items():
        monkeypatch.setattr(f"jax._src.distributed.global_state.{name}", value)
    monkeypatch.setattr(processes, "_silent", set())
    monkeypatch.setattr(processes, "ANSWER_SECONDS", 0)
    with pytest.raises(UserError, match=r"Processes \[1\] do not answer"):
        processes.exchange()
    with pytest.raises(KeyError) as error, processes.agree():  # at once: ERROR_SECONDS are minutes
        raise KeyError("here")
    assert not processes.is_agreed(error.value)


def test_a_single_process_agrees_with_itself():
    assert processes.exchange("value") == ["value"] and processes.from_first(lambda: 7) == 7
    with pytest.raises(KeyError), processes.agree():
        raise KeyError("as it is")
    assert not processes.spans(jax.numpy.ones(3)) and processes.on_this_host() == 1
