"""finetune: a resumed run equals an uninterrupted one, and its output folder can be used like any model."""

import base64
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import liger_jax.train.finetune as finetune_module
from convert import from_hf, load_adapter
from convert.load import convert_checkpoint
from liger_jax import Processor, Qwen2VL, loss_fn, make_train_step, prepare
from liger_jax.checkpoint import load_model, restore_state, save_model
from liger_jax.data.dataset import make_dataset
from liger_jax.data.loader import load_batches
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.errors import AlreadyExistsError, UserError
from liger_jax.files import LOCK, lock_folder
from liger_jax.generation.answer import answer_conversations
from liger_jax.generation.options import GenerationOptions
from liger_jax.model.lora import TARGETS, adapted_parts
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import make_mesh, param_shardings
from liger_jax.options import Batching, Evaluation, LayerExecution, Optimization, Saving
from liger_jax.train.evaluation import split_last_answer
from liger_jax.train.finetune import choose_unroll, finetune
from liger_jax.train.loop import catch_signals
from liger_jax.train.optimizer import make_optimizer
from tests._support.quiet import assert_quiet

ROWS = 7
# All batches have the same shape, so that one program serves most of these tests.
DEFAULTS = {
    "batch_size": 2,
    "length": 64,
    "patches": 64,
    "workers": 0,
    "remat": "none",
    "optimizer": make_optimizer(1e-3),
    "progress": False,
}


def make_data():
    return list(itertools.islice(conversations(load_digits()[0], np.random.default_rng(0)), ROWS))


@pytest.fixture(scope="module")
def processor():
    return make_processor(load_digits()[0])


@pytest.fixture(scope="module")
def config(processor):
    return make_config(processor)


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs with the same options share their compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "make_train_step", functools.cache(make_train_step))
        yield


@functools.cache
def initial_model(config):
    return Qwen2VL.init(config, dtype="float32")


def run(config, processor, data, output, *, model=None, **options):
    """Calls finetune with the defaults above. `options` are its arguments, or fields of its options."""
    options = DEFAULTS | options
    for argument, kind in {
        "batching": Batching,
        "execution": LayerExecution,
        "saving": Saving,
        "evaluation": Evaluation,
    }.items():
        names = {field.name for field in dataclasses.fields(kind)} & options.keys()
        options[argument] = kind(**{name: options.pop(name) for name in names})
    model = jax.tree.map(jnp.copy, initial_model(config)) if model is None else model
    return finetune(model, processor, data, output, **options)


@pytest.fixture(scope="module")
def uninterrupted(config, processor, data, tmp_path_factory):
    """Returns the folder of an uninterrupted run and its last state."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    options = {"held_out": data[:3], "eval_generate": 2, "max_new_tokens": 4}
    return folder, run(config, processor, data, folder, steps=6, save_every=3, **options)


def logged(output, name="loss"):
    """Returns the lines of the log that have this metric."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if name in line]


def losses(output):
    return [(line["step"], line["loss"]) for line in logged(output)]


def assert_equal(state, expected):
    for (path, array), other in zip(param_paths(state).items(), param_paths(expected).values(), strict=True):
        assert (array == other).all(), path


def test_resumed_run_matches_uninterrupted_run(config, processor, data, tmp_path, uninterrupted):
    """Killed after a checkpoint: losses and weights are equal bit for bit, and nothing is logged twice."""
    run(config, processor, data, tmp_path / "parts", steps=3, save_every=3)
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')  # killed before the next checkpoint, and while writing
    resumed = run(config, processor, data, tmp_path / "parts", steps=6, save_every=2)
    folder, state = uninterrupted
    assert losses(tmp_path / "parts") == losses(folder)
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6]
    assert_equal(resumed, state)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir() if p.name.isdigit()) == ["3", "4", "6"]
    assert int(run(config, processor, data, tmp_path / "parts", steps=6).step) == 6  # nothing left to do


def test_resume_after_kill_during_a_checkpoint(config, processor, data, tmp_path, uninterrupted):
    """SIGKILL while step 4 is written in the background: the run ignores that checkpoint and resumes from step 2."""
    script = """
        import os, signal, sys
        import jax
        jax.config.update("jax_num_cpu_devices", 4)
        jax.config.update("jax_default_matmul_precision", "highest")
        from pathlib import Path
        from liger_jax import Qwen2VL
        from tests.liger_jax.train import test_finetune as test
        rename = os.rename
        def rename_or_kill(source, target, *arguments, **options):
            if "4.orbax-checkpoint-tmp" in str(source):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target, *arguments, **options)
        os.rename = rename_or_kill
        processor = test.make_processor(test.load_digits()[0])
        config = test.make_config(processor)
        test.run(config, processor, test.make_data(), Path(sys.argv[1]), steps=6, save_every=2)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    steps = {path.name for path in tmp_path.iterdir() if path.name[0].isdigit()}
    assert steps == {"2", "4.orbax-checkpoint-tmp"}
    folder, state = uninterrupted
    assert losses(tmp_path)[:4] == losses(folder)[:4]
    assert_equal(run(config, processor, data, tmp_path, steps=6), state)
    assert losses(tmp_path) == losses(folder)


def test_output_folder_is_a_model_with_its_processor(processor, uninterrupted):
    folder, state = uninterrupted
    assert Processor.from_pretrained(folder).token_ids == processor.token_ids
    assert_equal(load_model(folder), state.model)


def test_generation_config_is_copied(config, processor, data, tmp_path):
    """The model's generation_config.json, with the end and padding ids of the model's configuration."""
    defaults = tmp_path / "generation_config.json"
    defaults.write_text('{"eos_token_id": 1, "top_k": 7}')
    run(config, processor, data, tmp_path / "run", steps=1, generation_config=defaults)
    stored = json.loads((tmp_path / "run/generation_config.json").read_text())
    ends = {"eos_token_id": list(config.eos_token_ids), "pad_token_id": config.pad_token_id}
    assert stored == {"top_k": 7} | ends


def test_log(uninterrupted):
    """One line per step with the optimizer's metrics and the throughput; TensorBoard has the same values."""
    from tensorboardX.proto.event_pb2 import Event

    folder, _ = uninterrupted
    for line in logged(folder):
        assert line["learning_rate"] == pytest.approx(1e-3) and line["grad_norm"] > 0
        assert 0 < line["token_utilisation"] <= 1 and line["images_per_second"] > 0
        assert 0 < line["trained_tokens_per_second"] < line["tokens_per_second"]
        assert not {"model_flops_utilisation", "peak_memory_gib"} & line.keys()  # a CPU reports neither
    (file,) = (folder / "tensorboard").iterdir()
    curve, data = [], file.read_bytes()
    while data:  # each record: its length (8 bytes), a checksum (4), the event, a checksum (4)
        length = int.from_bytes(data[:8], "little")
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        curve += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "loss"]
    assert curve == [(step, np.float32(loss)) for step, loss in losses(folder)]


def test_held_out_loss_and_accuracy(config, processor, data, uninterrupted):
    """At each checkpoint, they equal those of all conversations in a single batch, although the last batch is not full."""
    folder, state = uninterrupted
    first, second = logged(folder, "held_out_loss")
    assert (first["step"], second["step"]) == (3, 6) and first["held_out_loss"] != second["held_out_loss"]
    loss, metrics = jax.jit(loss_fn)(state.model, prepare(config, **processor(data[:3], labels=True)))
    assert second["held_out_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert second["held_out_accuracy"] == pytest.approx(float(metrics["accuracy"]), abs=1e-6)
    assert second["held_out_num_tokens"] == int(metrics["num_tokens"])


def test_missing_evaluation_is_run_on_resume(config, processor, data, tmp_path, uninterrupted):
    """An evaluation that was interrupted, or for which the run had no held-out data, is run once."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[0], folder)
    before, answers = logged(uninterrupted[0], "held_out_loss"), (folder / "answers.jsonl").read_bytes()
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:-1]))  # killed during the evaluation
    assert logged(folder, "held_out_loss") == before[:1]
    options = {"steps": 6, "save_every": 3, "eval_generate": 2, "max_new_tokens": 4}
    for _ in range(2):
        run(config, processor, data, folder, **options, held_out=data[:3])
        assert logged(folder, "held_out_loss") == before
        assert (folder / "answers.jsonl").read_bytes() == answers


def test_held_out_answers(processor, data, uninterrupted):
    """answers.jsonl has the expected answers and those that the model generates."""
    folder, state = uninterrupted
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(line["step"], line["conversation"]) for line in answers] == [(3, 0), (3, 1), (6, 0), (6, 1)]
    for line, conversation in zip(answers[2:], data, strict=False):
        prompt, expected = split_last_answer(conversation)
        options = GenerationOptions(max_new_tokens=4)
        assert line["expected"] == expected
        assert [line["answer"]] == answer_conversations(state.model, processor, [prompt], options, batch_size=1)
        assert line["exact"] == (line["answer"].strip() == expected)
    exact_match = np.mean([line["exact"] for line in answers[2:]])
    assert logged(folder, "held_out_exact_match")[1]["held_out_exact_match"] == exact_match


def test_on_a_mesh(config, processor, data, tmp_path, uninterrupted):
    """Weights sharded over four devices give the losses of one device."""
    mesh = make_mesh(fsdp=2, tensor=2)
    model = jax.tree.map(jnp.copy, initial_model(config))
    model = jax.device_put(model, param_shardings(model, mesh))
    run(config, processor, data, tmp_path, model=model, steps=3, remat="dots")
    for key in ("loss", "grad_norm", "num_tokens"):
        values, expected = ([line[key] for line in logged(folder)[:3]] for folder in (tmp_path, uninterrupted[0]))
        np.testing.assert_allclose(values, expected, rtol=1e-5, err_msg=key)
    with pytest.raises(UserError, match="has 8 devices; expected at most 4"):
        make_mesh(data=8)


def test_sigterm_saves_and_stops(config, processor, data, tmp_path, monkeypatch):
    """The signal arrives during the second step, which becomes the last one and is saved."""

    def load(make, steps, workers):
        for step in steps:
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield make(step)

    monkeypatch.setattr(finetune_module, "load_batches", load)
    state = run(config, processor, data, tmp_path, steps=5)
    assert int(state.step) == 2 and (tmp_path / "2").is_dir() and len(losses(tmp_path)) == 2
    with catch_signals() as stop_requested:
        assert not stop_requested()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}], ids=["one device", "mesh"])
def test_bfloat16_run_resumes_bit_for_bit(config, processor, data, tmp_path, monkeypatch, sizes):
    """Killed between two checkpoints, with stochastic rounding: all arrays and metrics equal an uninterrupted run's."""

    def train(output):
        model = Qwen2VL.init(config, dtype="bfloat16", mesh=make_mesh(**sizes) if sizes else None)
        return run(config, processor, data, output, model=model, steps=4, save_every=2)

    def die(make, steps, workers):
        for step in steps:
            if step == 3:
                raise SystemExit  # not an error: nothing is saved
            yield make(step)

    expected = train(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(finetune_module, "load_batches", die)
        train(tmp_path / "parts")
    assert sorted(p.name for p in (tmp_path / "parts").iterdir() if p.name.isdigit()) == ["2"]
    resumed = train(tmp_path / "parts")
    moments = [name for name, leaf in param_paths(resumed.opt_state).items() if leaf.dtype == jnp.bfloat16]
    assert len(moments) > 2 * len(jax.tree.leaves(resumed.model))  # both moments and the sample
    for (path, array), other in zip(param_paths(resumed).items(), param_paths(expected).values(), strict=True):
        assert array.dtype == other.dtype and np.asarray(array).tobytes() == np.asarray(other).tobytes(), path
    for name in ("loss", "accuracy", "grad_norm", "learning_rate", "num_tokens", "changed_weights", "skipped_update"):
        parts, whole = ([line[name] for line in logged(tmp_path / run)] for run in ("parts", "whole"))
        assert len(whole) == 4 and parts == whole, name


def test_damaged_image_loses_no_step(config, processor, data, tmp_path, uninterrupted):
    """Regression: the steps since the last checkpoint were lost. When it is repaired, the run resumes and matches."""
    order = [make_dataset(processor, config, data, Batching(batch_size=2)).schedule.batch(i) for i in range(3)]
    (index,) = order[2][0]
    image = next(part["image"] for part in data[index][-2]["content"] if part["type"] == "image")
    image.save(tmp_path / "image.png")
    whole = (tmp_path / "image.png").read_bytes()
    content = [
        part | {"image": str(tmp_path / "image.png")} if part.get("image") is image else part
        for part in data[index][-2]["content"]
    ]
    changed = list(data)
    changed[index] = [*data[index][:-2], data[index][-2] | {"content": content}, data[index][-1]]
    (tmp_path / "image.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=rf"conversation {index}: .*image\.png.* Step 2 is saved in .*; repeat the command"
    ):
        run(config, processor, changed, tmp_path / "run", steps=6)
    assert (tmp_path / "run/2").is_dir() and losses(tmp_path / "run") == losses(uninterrupted[0])[:2]
    (tmp_path / "image.png").write_bytes(whole)
    assert_equal(run(config, processor, changed, tmp_path / "run", steps=6), uninterrupted[1])


@pytest.mark.filterwarnings("ignore:Step")
def test_diverging_run_keeps_its_last_good_checkpoint(config, processor, data, tmp_path):
    """Regression: it trained on with NaN, saved it, and removed good checkpoints. The message names the conversations."""
    good = run(config, processor, data, tmp_path, steps=4, save_every=2, optimizer=Optimization(learning_rate=1e-3))
    with pytest.raises(
        UserError, match=r"3 updates in a row.*last good checkpoint is step 4;.*Step 8 is saved"
    ) as error:
        options = Optimization(learning_rate=1e20, max_skipped_updates=2)
        run(config, processor, data, tmp_path, steps=12, save_every=2, max_to_keep=1, optimizer=options)
    dataset = make_dataset(processor, config, data, Batching(batch_size=2))
    assert f"(conversations {', '.join(map(str, sorted(i for (i,) in dataset.schedule.batch(6))))})" in str(error.value)
    assert_equal(restore_state(tmp_path, good, step=4), good)


def test_workers_make_the_same_batches(config, processor, data):
    """In a thread or in processes, starting at any step. Their errors reach the caller."""
    dataset = make_dataset(processor, config, data, Batching(batch_size=2))
    for workers in (0, 2):
        batches = list(load_batches(dataset, range(1, 4), workers=workers))
        assert len(batches) == 3
        for batch, index in zip(batches, range(1, 4), strict=True):
            assert (batch.input_ids == dataset(index).input_ids).all()
            assert (batch.vision.pixel_values == dataset(index).vision.pixel_values).all()
    broken = make_dataset(processor, config, [*data[:2], [{"role": "user", "content": "?"}]], Batching(batch_size=3))
    for workers in (0, 2):
        with pytest.raises(Exception, match=r"conversation 2: .*no assistant message"):
            list(load_batches(broken, range(2), workers=workers))


def test_killed_worker_is_an_error(config, processor, data):
    """Nothing hangs, and the message says how to go on."""
    dataset = make_dataset(processor, config, data, Batching(batch_size=2))
    batches = load_batches(dataset, range(10_000), workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(UserError, match=r"data worker ended with exit code -9; expected .* fewer workers"):
        list(batches)


def test_signals_do_not_reach_starting_workers():
    """Regression: Ctrl-C in the seconds in which workers import their packages ended them, each with a traceback."""

    def interrupt_worker():
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        for _ in range(20):
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(workers[0].pid, number)
            time.sleep(0.05)

    batches = load_batches(np.array, range(3), workers=1)
    thread = threading.Thread(target=interrupt_worker)
    thread.start()
    assert [batch.tolist() for batch in batches] == [0, 1, 2]
    thread.join()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()  # of this thread


def test_workers_end_with_their_parent():
    """Also if it is killed: workers that outlive it would keep their memory for ever."""
    script = """
        import multiprocessing, os, signal
        import numpy as np
        from liger_jax.data.loader import load_batches
        if __name__ == "__main__":
            batches = load_batches(np.array, range(10_000), workers=1)
            next(batches)
            (worker,) = multiprocessing.active_children()
            print(worker.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    worker = Path(f"/proc/{killed.stdout.strip()}")
    deadline = time.monotonic() + 30
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists()


def test_no_conversations(config, processor, tmp_path):
    with pytest.raises(UserError, match="conversations is 0"):
        run(config, processor, [], tmp_path / "new", steps=1)
    assert not (tmp_path / "new").exists()


def test_unsuitable_folders_are_rejected(config, processor, data, tmp_path, uninterrupted):
    """A folder with other files, with a run of more steps, or with a run with another optimizer."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(AlreadyExistsError, match="no training run"):
        run(config, processor, data, tmp_path, steps=1)
    with pytest.raises(UserError, match=r"steps is 1; expected at least 6, the latest step of the run in"):
        run(config, processor, data, uninterrupted[0], steps=1)
    with pytest.raises(UserError, match=r"missing|unexpected"):
        run(config, processor, data, uninterrupted[0], steps=7, optimizer=make_optimizer(1e-3, freeze=["vision"]))


def test_resuming_requires_the_same_data_and_batches(config, processor, data, uninterrupted):
    """All differences are named, before anything is written."""
    folder, _ = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    differences = (
        r"batching\.batch_size was 2 and is 3; batching\.length was 64 and is 48; batching\.seed was 0 and is 1\. Use"
    )
    with pytest.raises(UserError, match=differences):
        run(config, processor, data, folder, steps=7, batch_size=3, length=48, seed=1)
    with pytest.raises(UserError, match=r"conversations was 7 and is 6; data was '\w+' and is '\w+'\. Use"):
        run(config, processor, data[:-1], folder, steps=7)
    with pytest.raises(UserError, match="pack_length was None and is 64"):
        run(config, processor, data, folder, steps=7, pack_length=64, length=None)
    limited = Processor(processor.tokenizer, processor.image.with_limits(max_pixels=28 * 28), processor.video)
    with pytest.raises(UserError, match=r"images\.max_pixels was 12544 and is 784"):
        run(config, limited, data, folder, steps=7)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_resume_from_the_checkpoint_before_a_damaged_one(config, processor, data, tmp_path, uninterrupted):
    """The log and the answers of later steps are written again, and the run ends with the same weights."""
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    (tmp_path / "run/6/default/_METADATA").unlink()
    (tmp_path / "run/7.orbax-checkpoint-tmp").mkdir()  # left by a process that was killed
    options = {"held_out": data[:3], "eval_generate": 2, "max_new_tokens": 4}
    with pytest.warns(UserWarning, match=r"/6 is incomplete: moved to \*\.damaged, and resumed from step 3"):
        state = run(config, processor, data, tmp_path / "run", steps=6, save_every=3, **options)
    assert_equal(state, uninterrupted[1])
    for name in ("metrics.jsonl", "answers.jsonl"):
        lines, expected = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for folder in (tmp_path / "run", uninterrupted[0])
        )
        assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert losses(tmp_path / "run") == losses(uninterrupted[0])
    assert {path.name for path in (tmp_path / "run").iterdir() if path.name[0].isdigit()} == {"3", "6", "6.damaged"}


def test_folder_of_another_process_is_refused(config, processor, data, tmp_path):
    """Nothing is read or written, and the error names the process."""
    with lock_folder(tmp_path / "run"):
        before = {path.name for path in (tmp_path / "run").iterdir()}
        with pytest.raises(AlreadyExistsError, match=rf"run is in use by process {os.getpid()} on .*; expected"):
            run(config, processor, data, tmp_path / "run", steps=1)
        assert {path.name for path in (tmp_path / "run").iterdir()} == before == {LOCK}


def test_resumed_run_frees_the_initial_weights(config, processor, data, tmp_path):
    run(config, processor, data, tmp_path / "run", steps=1)
    model = jax.tree.map(jnp.copy, initial_model(config))
    run(config, processor, data, tmp_path / "run", model=model, steps=2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(model))
    with pytest.raises(UserError, match=r"steps is 1; expected at least 2, the latest step of the run in"):
        run(config, processor, data, tmp_path / "run", steps=1)


REJECTED = {
    **{name: ({name: 0}, f"{name} is 0; expected at least 1") for name in ("steps", "batch_size", "save_every")},
    "max_to_keep": ({"max_to_keep": 0}, "max_to_keep is 0; expected at least 1"),
    "max_new_tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
    "eval_generate": (
        {"held_out": make_data()[:3], "eval_generate": 4},
        "eval_generate is 4; expected 0 to 3, the number of held_out conversations",
    ),
    "remat": ({"remat": "some"}, "remat is 'some'; expected one of"),
    "learning rate": ({"optimizer": Optimization(learning_rate=-1.0)}, "learning_rate is -1.0; expected 0 or more"),
    "accumulate": ({"accumulate": 0}, "accumulate is 0; expected at least 1"),
    "patches": ({"patches": 62}, "patches is 62; expected a multiple of 4"),
    "seed": ({"seed": -1}, "seed is -1; expected at least 0"),
    "workers": ({"workers": -1}, "workers is -1; expected at least 0"),
    "question without text": (
        {"held_out": [[{"role": "assistant", "content": "7"}]], "eval_generate": 1},
        "held-out data: conversation 0 cannot be answered",
    ),
    "no room for an answer": (
        {"held_out": make_data()[:1], "eval_generate": 1, "max_new_tokens": 10**6},
        "held-out data: conversation 0 cannot be answered.*reach position",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_before_anything_is_written(config, processor, data, tmp_path, case):
    options, message = REJECTED[case]
    with pytest.raises(UserError, match=message):
        run(config, processor, data, tmp_path / "run", **({"steps": 1} | options))
    assert not (tmp_path / "run").exists()


def test_run_without_a_trained_token_saves_nothing(config, processor, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    content = [{"type": "image", "image": str(tmp_path / "cut.png")}, {"type": "text", "text": "Which?"}]
    data = [[{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]]
    options = {"length": None, "patches": None, "skip_broken": True, "batch_size": 1}
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UserError, match="no token to train"):
        run(config, processor, data, tmp_path / "run", steps=1, **options)
    assert not (tmp_path / "run/1").exists()


def test_command(config, processor, data, tmp_path, monkeypatch, capsys):
    """`liger-jax finetune`, from files to a checkpoint.

    With base64 images, packing, a frozen part, bfloat16 with master weights, two devices and a skipped record.
    """
    from liger_jax.cli import main

    def as_record(messages):
        *_, user, answer = messages
        images, text = [], ""
        for part in user["content"]:
            if part["type"] == "image":
                file = io.BytesIO()
                part["image"].save(file, "PNG")
                images.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
                text += "<image>"
            else:
                text += part["text"]
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer["content"]}]
        return {"image": images, "conversations": turns}

    records = [*map(as_record, data), {"image": "gone.png", "conversations": []}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    save_model(Qwen2VL.init(config, dtype="float32"), tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [1], "repetition_penalty": 1.1}')
    arguments = [
        "finetune",
        *(str(tmp_path / name) for name in ("model", "data.json")),
        "--output",
        str(tmp_path / "out"),
    ]
    options = (
        f"--steps 2 --batch-size 2 --freeze vision --skip-broken --held-out {tmp_path / 'data.json'} --pack 96 "
        "--dtype bfloat16 --master-weights --workers 0 --remat none --unroll all --fsdp 2"
    )
    monkeypatch.setattr(sys, "argv", ["liger-jax", *arguments, *options.split()])
    main()
    printed = capsys.readouterr()
    assert printed.out == f"step 2 of 2: checkpoint and metrics.jsonl in {tmp_path / 'out'}\n"
    assert "step 2: held_out_loss " in printed.err
    assert_quiet(printed.err, "left out 1 of 8 records")  # once, though the file is also the held-out one
    assert "held_out_loss" in (tmp_path / "out/metrics.jsonl").read_text()
    assert all(line["token_utilisation"] > 0.5 for line in logged(tmp_path / "out"))
    assert "repetition_penalty" in (tmp_path / "out/generation_config.json").read_text()
    before, after = (param_paths(load_model(tmp_path / name, dtype="bfloat16")) for name in ("model", "out"))
    assert (before["visual/patch_embed/kernel"] == after["visual/patch_embed/kernel"]).all()
    assert (before["visual/merger/fc1/kernel"] != after["visual/merger/fc1/kernel"]).any()

    # LoRA: the base weights do not change, the adapter is written for PEFT, and conversion merges it into the weights
    arguments[-1] = str(tmp_path / "lora")
    options = "--steps 2 --batch-size 2 --skip-broken --workers 0 --remat none --learning-rate 0.1"
    for contradiction in ("--lora-alpha 4", "--lora 4 --freeze vision", "--lora 4 --master-weights"):
        monkeypatch.setattr(sys, "argv", ["liger-jax", *arguments, *options.split(), *contradiction.split()])
        with pytest.raises(SystemExit, match="lora"):
            main()
    monkeypatch.setattr(
        sys, "argv", ["liger-jax", *arguments, *options.split(), *["--lora", "4", "--lora-targets", "v_proj", "fc2"]]
    )
    main()
    printed = capsys.readouterr()
    assert "step 2 of 2: checkpoint, adapter and metrics.jsonl in " in printed.out
    assert_quiet(printed.err, "left out 1 of 8 records")
    model = load_model(tmp_path / "lora")
    assert adapted_parts(model) == {"text", "vision"}
    after = param_paths(model)
    before = param_paths(load_model(tmp_path / "model"))
    assert all((before[path] == after[path]).all() for path in before)
    reloaded = param_paths(load_adapter(load_model(tmp_path / "model"), tmp_path / "lora/adapter"))
    assert all((reloaded[path] == after[path]).all() for path in after)
    convert_checkpoint(tmp_path / "lora", tmp_path / "merged", dtype="float32")
    merged = param_paths(from_hf(tmp_path / "merged", dtype="float32"))
    changed = {path for path in before if (before[path] != merged[path]).any()}
    assert changed == {f"{TARGETS[name]}/kernel" for name in ("v_proj", "fc2")}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_status_of_a_run_that_a_signal_ends(config, processor, tmp_path, monkeypatch, number, status):
    """128 plus the number of the signal, as shells and supervisors expect: an unfinished run is not a success."""
    from liger_jax.cli import main

    save_model(Qwen2VL.init(config, dtype="float32"), tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns}]))

    def fit(state, *_, **options):
        os.kill(os.getpid(), number)
        assert options["stop_requested"]()
        return state

    monkeypatch.setattr(finetune_module, "fit", fit)
    with pytest.raises(SystemExit) as error:
        main(
            ["finetune", *(str(tmp_path / name) for name in ("model", "data.json")), "--output", str(tmp_path / "out")]
        )
    assert error.value.code == status


@pytest.mark.parametrize(
    "unroll, steps, options, chosen",
    [
        ("auto", 5000, {"pack_length": 64}, "all"),
        ("auto", 5000, {"length": 64, "patches": 64}, "all"),
        ("auto", 4999, {"pack_length": 64}, "auto"),
        ("auto", 5000, {"length": 64}, "auto"),
        ("none", 5000, {"pack_length": 64}, "none"),
    ],
)
def test_long_runs_with_one_program_unroll_all_layers(unroll, steps, options, chosen):
    """A run whose batches have several shapes compiles several programs, for which "auto" only unrolls the vision tower."""
    assert choose_unroll(LayerExecution(unroll=unroll), steps, Batching(**options)) == chosen
    least_memory = LayerExecution("full", unroll)
    assert choose_unroll(least_memory, steps, Batching(**options)) == unroll
    assert least_memory.unrolled == "none"
