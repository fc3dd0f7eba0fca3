"""finetune: a run that is stopped and continued is the run that was not; what it writes can be used."""

import base64
import functools
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import liger_jax.train.finetune as module
from convert import from_hf, load_adapter
from convert.__main__ import convert
from liger_jax import Processor, Qwen2VL, loss_fn, make_train_step, prepare
from liger_jax.checkpoint import load_model, save_model
from liger_jax.data.loader import load_batches
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.model.lora import TARGETS, adapted_parts
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import make_mesh, param_shardings
from liger_jax.train.evaluation import answer, question
from liger_jax.train.finetune import _sigterm, finetune
from liger_jax.train.optimizer import make_optimizer

ROWS = 7
# all batches have the demo's shapes, so that one program serves most of these tests
FIXED = {
    "batch_size": 2,
    "optimizer": make_optimizer(1e-3),
    "remat": "none",
    "workers": 0,
    "progress": False,
    "length": 64,
    "patches": 64,
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
        patch.setattr(module, "make_train_step", functools.cache(make_train_step))
        yield


@functools.cache
def start(config):
    return Qwen2VL.init(config, dtype="float32")


def run(config, processor, data, output, **options):
    model = jax.tree.map(jnp.copy, start(config))
    return finetune(model, processor, data, output, **(FIXED | options))


@pytest.fixture(scope="module")
def whole(config, processor, data, tmp_path_factory):
    """-> the folder of a run that nothing disturbed, and its last state."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = {"held_out": data[:3], "eval_generate": 2, "max_new_tokens": 4}
    return folder, run(config, processor, data, folder, steps=6, save_every=3, **options)


def lines(output, having="loss"):
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if having in line]


def losses(output):
    return [(line["step"], line["loss"]) for line in lines(output)]


def assert_same(state, other):
    for (path, got), want in zip(param_paths(state).items(), param_paths(other).values(), strict=True):
        assert (got == want).all(), path


def test_a_stopped_run_goes_on_as_if_nothing_had_been(config, processor, data, tmp_path, whole):
    """Stopped after a checkpoint and a step more: the same losses and weights, bit for bit; nothing is logged twice."""
    run(config, processor, data, tmp_path / "parts", steps=3, save_every=3)
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')  # killed before the next checkpoint, and while writing
    parts = run(config, processor, data, tmp_path / "parts", steps=6, save_every=2)
    folder, state = whole
    assert losses(tmp_path / "parts") == losses(folder)
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6]
    assert_same(parts, state)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir() if p.name.isdigit()) == ["3", "4", "6"]
    assert int(run(config, processor, data, tmp_path / "parts", steps=6).step) == 6  # nothing left to do


def test_killed_while_a_checkpoint_is_written(config, processor, data, tmp_path, whole):
    """SIGKILL when step 4 is half-written, in the background: it is not taken, and the run goes on from step 2."""
    script = """
        import os, signal, sys
        import jax
        jax.config.update("jax_num_cpu_devices", 4)
        jax.config.update("jax_default_matmul_precision", "highest")
        from pathlib import Path
        from liger_jax import Qwen2VL
        from tests.liger_jax import test_finetune as test
        rename = os.rename
        def killing(source, target, *more, **options):
            if "4.orbax-checkpoint-tmp" in str(source):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target, *more, **options)
        os.rename = killing
        processor = test.make_processor(test.load_digits()[0])
        config = test.make_config(processor)
        test.run(config, processor, test.make_data(), Path(sys.argv[1]), steps=6, save_every=2)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps = {path.name for path in tmp_path.iterdir() if path.name[0].isdigit()}
    assert steps == {"2", "4.orbax-checkpoint-tmp"}
    folder, state = whole
    assert losses(tmp_path)[:4] == losses(folder)[:4]
    assert_same(run(config, processor, data, tmp_path, steps=6), state)
    assert losses(tmp_path) == losses(folder)


def test_what_it_leaves_can_be_used(processor, whole):
    """The folder is a model with its processor."""
    folder, state = whole
    assert Processor.from_pretrained(folder).token_ids == processor.token_ids
    assert_same(load_model(folder), state.model)


def test_how_answers_are_made_stands_beside_the_checkpoints(config, processor, data, tmp_path):
    """Of the model's generation_config.json: from the first checkpoint on, with the ids of the model's configuration."""
    defaults = tmp_path / "generation_config.json"
    defaults.write_text('{"eos_token_id": 1, "top_k": 7}')
    run(config, processor, data, tmp_path / "run", steps=1, generation_config=defaults)
    stored = json.loads((tmp_path / "run/generation_config.json").read_text())
    ends = {"eos_token_id": list(config.eos_token_ids), "pad_token_id": config.pad_token_id}
    assert stored == {"top_k": 7} | ends


def test_log(whole):
    """A line a step, with what the optimizer saw and what the step achieved; the same as curves."""
    from tensorboardX.proto.event_pb2 import Event

    folder, _ = whole
    for line in lines(folder):
        assert line["learning_rate"] == pytest.approx(1e-3) and line["grad_norm"] > 0
        assert 0 < line["token_utilisation"] <= 1 and line["images_per_second"] > 0
        assert 0 < line["trained_tokens_per_second"] < line["tokens_per_second"]
        assert not {"model_flops_utilisation", "peak_memory_gib"} & line.keys()  # a CPU tells neither
    (file,) = (folder / "tensorboard").iterdir()
    curve, rest = [], file.read_bytes()
    while rest:  # each record: its length (8 bytes), a checksum (4), the event, a checksum (4)
        length = int.from_bytes(rest[:8], "little")
        event, rest = Event.FromString(rest[12 : 12 + length]), rest[16 + length :]
        curve += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "loss"]
    assert curve == [(step, np.float32(loss)) for step, loss in losses(folder)]


def test_held_out_conversations_are_measured(config, processor, data, whole):
    """At each checkpoint, per token over all of them: as one batch would have it, though the last one is not full."""
    folder, state = whole
    first, second = lines(folder, "held_out_loss")
    assert (first["step"], second["step"]) == (3, 6) and first["held_out_loss"] != second["held_out_loss"]
    loss, metrics = jax.jit(loss_fn)(state.model, prepare(config, **processor(data[:3], labels=True)))
    assert second["held_out_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert second["held_out_accuracy"] == pytest.approx(float(metrics["accuracy"]), abs=1e-6)
    assert second["held_out_num_tokens"] == int(metrics["num_tokens"])


def test_held_out_conversations_of_a_run_that_has_ended(config, processor, data, tmp_path, whole):
    """What a run was stopped before it could measure, or was not asked for, is measured when it goes on; once."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    before, answers = lines(whole[0], "held_out_loss"), (folder / "answers.jsonl").read_bytes()
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:-1]))  # killed while it measured
    assert lines(folder, "held_out_loss") == before[:1]
    options = {"steps": 6, "save_every": 3, "eval_generate": 2, "max_new_tokens": 4}
    for _ in range(2):
        run(config, processor, data, folder, **options, held_out=data[:3])
        assert lines(folder, "held_out_loss") == before
        assert (folder / "answers.jsonl").read_bytes() == answers


def test_held_out_conversations_are_answered(processor, data, whole):
    """The answers, beside the right ones, are those that the model gives when it is asked."""
    folder, state = whole
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(line["step"], line["conversation"]) for line in answers] == [(3, 0), (3, 1), (6, 0), (6, 1)]
    for line, conversation in zip(answers[2:], data, strict=False):
        prompt, expected = question(conversation)
        assert line["expected"] == expected
        assert [line["answer"]] == answer(state.model, processor, [prompt], max_new_tokens=4, batch_size=1)
        assert line["exact"] == (line["answer"].strip() == expected)
    right = np.mean([line["exact"] for line in answers[2:]])
    assert lines(folder, "held_out_exact_match")[1]["held_out_exact_match"] == right


def test_on_a_mesh(config, processor, data, tmp_path, whole):
    """Weights split four ways: the losses of one device."""
    mesh = make_mesh(fsdp=2, tensor=2)
    model = jax.tree.map(jnp.copy, start(config))
    model = jax.device_put(model, param_shardings(model, mesh))
    finetune(model, processor, data, tmp_path, steps=3, **FIXED | {"remat": "dots"})
    for key in ("loss", "grad_norm", "num_tokens"):
        found, wanted = ([line[key] for line in lines(folder)[:3]] for folder in (tmp_path, whole[0]))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=key)
    with pytest.raises(ValueError, match="has 8 devices; found 4"):
        make_mesh(data=8)


def test_sigterm_saves_and_ends(config, processor, data, tmp_path, monkeypatch):
    """The signal comes during the second step: that step is the last, and it is saved."""

    def load(make, steps, workers):
        for step in steps:
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield make(step)

    monkeypatch.setattr(module, "load_batches", load)
    state = run(config, processor, data, tmp_path, steps=5)
    assert int(state.step) == 2 and (tmp_path / "2").is_dir() and len(losses(tmp_path)) == 2
    with _sigterm() as stop:
        assert not stop()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_workers_make_the_same_batches(config, processor, data):
    """In a thread or in processes, from any step on; what goes wrong there is raised here."""
    dataset = module.make_dataset(processor, config, data, batch_size=2)
    for workers in (0, 2):
        found = list(load_batches(dataset, range(1, 4), workers=workers))
        assert len(found) == 3
        for batch, index in zip(found, range(1, 4), strict=True):
            assert (batch.input_ids == dataset(index).input_ids).all()
            assert (batch.vision.pixel_values == dataset(index).vision.pixel_values).all()
    broken = module.make_dataset(processor, config, [*data[:2], [{"role": "user", "content": "?"}]], batch_size=3)
    for workers in (0, 2):
        with pytest.raises(Exception, match=r"conversation 2: .*nothing to train on"):
            list(load_batches(broken, range(2), workers=workers))


def test_what_cannot_be(config, processor, data, tmp_path, whole):
    """Arguments out of range, a folder of something else, fewer steps than were made, another optimizer."""
    new = functools.partial(run, config, processor, data, tmp_path / "new")
    for name in ("steps", "batch_size", "save_every", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            new(**({"steps": 1} | {name: 0}))
    with pytest.raises(ValueError, match="conversations is 0"):
        run(config, processor, [], tmp_path / "new", steps=1)
    with pytest.raises(ValueError, match="eval_generate is 4; expected at most the 3 of held_out"):
        new(steps=1, held_out=data[:3], eval_generate=4)
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        new(steps=1, on_error="ignore")
    assert not (tmp_path / "new").exists()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="no training run"):
        run(config, processor, data, tmp_path, steps=1)
    with pytest.raises(ValueError, match="at step 6 already"):
        run(config, processor, data, whole[0], steps=1)
    with pytest.raises(ValueError, match=r"missing|unexpected"):
        run(config, processor, data, whole[0], steps=7, optimizer=make_optimizer(1e-3, freeze=["vision"]))


def test_a_run_goes_on_with_the_same_data_only(config, processor, data, whole):
    """All differences are named, before anything is written."""
    folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"seed was 0 and is 1; batch_size was 2 and is 3; length was 64 and is 48"):
        run(config, processor, data, folder, steps=7, batch_size=3, length=48, seed=1)
    with pytest.raises(ValueError, match=r"conversations was 7 and is 6; data was '\w+' and is '\w+'\. Give"):
        run(config, processor, data[:-1], folder, steps=7)
    with pytest.raises(ValueError, match="pack_length was None and is 64"):
        run(config, processor, data, folder, steps=7, pack_length=64, length=None)
    limited = Processor(processor.tokenizer, processor.image.with_limits(max_pixels=28 * 28), processor.video)
    with pytest.raises(ValueError, match="max_pixels of pictures was 12544 and is 784"):
        run(config, limited, data, folder, steps=7)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_step_that_is_half_there_is_written_anew(config, processor, data, tmp_path, whole):
    """A copy or a deletion that was interrupted is not taken, and does not stand in the way."""
    run(config, processor, data, tmp_path / "run", steps=6, save_every=3)
    (tmp_path / "run/6/default/_METADATA").unlink()
    assert_same(run(config, processor, data, tmp_path / "run", steps=6, save_every=3), whole[1])


def test_a_run_that_goes_on_frees_what_it_was_given(config, processor, data, tmp_path):
    run(config, processor, data, tmp_path / "run", steps=1)
    model = jax.tree.map(jnp.copy, start(config))
    finetune(model, processor, data, tmp_path / "run", steps=2, **FIXED)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(model))
    with pytest.raises(ValueError, match=r"steps is 1, but the run in .* is at step 2 already"):
        run(config, processor, data, tmp_path / "run", steps=1)


REFUSED = {
    "keep": ({"keep": 0}, "keep is 0; expected at least 1"),
    "accumulate": ({"accumulate": 0}, "accumulate is 0; expected at least 1"),
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


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(config, processor, data, tmp_path, case):
    options, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        run(config, processor, data, tmp_path / "run", steps=1, **options)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_token_to_train_saves_nothing(config, processor, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    content = [{"type": "image", "image": str(tmp_path / "cut.png")}, {"type": "text", "text": "Which?"}]
    data = [[{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]]
    options = {"length": None, "patches": None, "on_error": "skip", "batch_size": 1}
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="no token to train"):
        run(config, processor, data, tmp_path / "run", steps=1, **options)
    assert not (tmp_path / "run/1").exists()


def test_command(config, processor, data, tmp_path, monkeypatch, capsys):
    """`liger-jax finetune` from files to a checkpoint: pictures in base64, packed, a frozen part, bfloat16 with master
    weights, two devices, a broken record left out."""
    from liger_jax.cli import main

    def as_record(messages):
        *_, user, answer = messages
        pictures, text = [], ""
        for part in user["content"]:
            if part["type"] == "image":
                file = io.BytesIO()
                part["image"].save(file, "PNG")
                pictures.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
                text += "<image>"
            else:
                text += part["text"]
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer["content"]}]
        return {"image": pictures, "conversations": turns}

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
        "--dtype bfloat16 --master-weights --workers 0 --remat none --unroll --fsdp 2"
    )
    monkeypatch.setattr(sys, "argv", ["liger-jax", *arguments, *options.split()])
    with pytest.warns(UserWarning, match="left out 1 of 8 records"):
        main()
    assert "step 2 of 2" in capsys.readouterr().out
    assert "held_out_loss" in (tmp_path / "out/metrics.jsonl").read_text()
    assert all(line["token_utilisation"] > 0.5 for line in lines(tmp_path / "out"))
    assert "repetition_penalty" in (tmp_path / "out/generation_config.json").read_text()
    before, after = (param_paths(load_model(tmp_path / name, dtype="bfloat16")) for name in ("model", "out"))
    assert (before["visual/patch_embed/kernel"] == after["visual/patch_embed/kernel"]).all()
    assert (before["visual/merger/fc1/kernel"] != after["visual/merger/fc1/kernel"]).any()

    # LoRA alone: the base stays, the adapter is there for PEFT, and converting merges it into the weights
    arguments[-1] = str(tmp_path / "lora")
    options = "--steps 2 --batch-size 2 --skip-broken --workers 0 --remat none --learning-rate 0.1"
    for wrong in ("--lora-alpha 4", "--lora 4 --freeze vision", "--lora 4 --master-weights"):
        monkeypatch.setattr(sys, "argv", ["liger-jax", *arguments, *options.split(), *wrong.split()])
        with pytest.raises(SystemExit, match="lora"):
            main()
    monkeypatch.setattr(
        sys, "argv", ["liger-jax", *arguments, *options.split(), *["--lora", "4", "--lora-targets", "v_proj", "fc2"]]
    )
    with pytest.warns(UserWarning, match="left out 1 of 8 records"):
        main()
    model = load_model(tmp_path / "lora")
    assert adapted_parts(model) == {"text", "vision"}
    after = param_paths(model)
    before = param_paths(load_model(tmp_path / "model"))
    assert all((before[path] == after[path]).all() for path in before)
    again = param_paths(load_adapter(load_model(tmp_path / "model"), tmp_path / "lora/adapter"))
    assert all((again[path] == after[path]).all() for path in after)
    convert(tmp_path / "lora", tmp_path / "merged", dtype="float32")
    merged = param_paths(from_hf(tmp_path / "merged", dtype="float32"))
    changed = {path for path in before if (before[path] != merged[path]).any()}
    assert changed == {f"{TARGETS[name]}/kernel" for name in ("v_proj", "fc2")}
