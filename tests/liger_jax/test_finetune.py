"""finetune: a run that is stopped and continued is the run that was not; what it writes can be used."""

import base64
import functools
import io
import itertools
import json
import os
import signal

import numpy as np
import pytest

from liger_jax import Processor, Qwen2VL, loss_fn, prepare
from liger_jax.checkpoint import load_model, save_model
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.finetune import _order, _sigterm, conversation_batch, finetune
from liger_jax.loader import load_batches
from liger_jax.optimizer import make_optimizer
from liger_jax.tree import param_paths

ROWS = 7
FIXED = {"batch_size": 2, "optimizer": make_optimizer(1e-3), "remat": "none", "workers": 0, "progress": False}


@pytest.fixture(scope="module")
def processor():
    return make_processor(load_digits()[0])


@pytest.fixture(scope="module")
def config(processor):
    return make_config(processor)


@pytest.fixture(scope="module")
def data():
    return list(itertools.islice(conversations(load_digits()[0], np.random.default_rng(0)), ROWS))


def run(config, processor, data, output, **options):
    return finetune(Qwen2VL.init(config, dtype="float32"), processor, data, output, **(FIXED | options))


def log(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_stopped_run_goes_on_as_if_nothing_had_been(config, processor, data, tmp_path):
    """Stopped after a checkpoint and a step more: the same losses and weights, bit for bit; nothing is logged twice."""
    whole = run(config, processor, data, tmp_path / "whole", steps=6, save_every=6)
    run(config, processor, data, tmp_path / "parts", steps=3, save_every=3)
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')  # killed before the next checkpoint, and while writing
    parts = run(config, processor, data, tmp_path / "parts", steps=6, save_every=2)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert [step for step, _ in log(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    for (path, got), want in zip(param_paths(parts).items(), param_paths(whole).values(), strict=True):
        assert (got == want).all(), path
    assert sorted(p.name for p in (tmp_path / "parts").iterdir() if p.name.isdigit()) == ["3", "4", "6"]
    assert int(run(config, processor, data, tmp_path / "parts", steps=6).step) == 6  # nothing left to do


def test_what_it_leaves_can_be_used(config, processor, data, tmp_path):
    """The folder is a model with its processor."""
    state = run(config, processor, data, tmp_path, steps=1, save_every=1)
    model = load_model(tmp_path)
    assert Processor.from_pretrained(tmp_path).token_ids == processor.token_ids
    for got, want in zip(param_paths(model).values(), param_paths(state.model).values(), strict=True):
        assert (got == want).all()


def test_held_out_conversations_are_measured(config, processor, data, tmp_path):
    """At each checkpoint, per token over all of them: as one batch would have it, though the last one is not full."""
    state = run(config, processor, data, tmp_path, steps=2, save_every=1, held_out=data[:3])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = [line for line in lines if "held_out_loss" in line]
    assert (first["step"], second["step"]) == (1, 2) and first["held_out_loss"] != second["held_out_loss"]
    loss, metrics = loss_fn(state.model, prepare(config, **processor(data[:3], labels=True)))
    assert second["held_out_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert second["held_out_accuracy"] == pytest.approx(float(metrics["accuracy"]), abs=1e-6)
    assert second["held_out_num_tokens"] == int(metrics["num_tokens"])


def test_sigterm_saves_and_ends(config, processor, data, tmp_path, monkeypatch):
    """The signal comes during the second step: that step is the last, and it is saved."""
    import liger_jax.finetune as module

    def make(*args):
        if args[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return conversation_batch(*args)

    def one_after_the_other(make, indices, workers):
        return (make(index) for index in indices)

    monkeypatch.setattr(module, "conversation_batch", make)
    monkeypatch.setattr(module, "load_batches", one_after_the_other)
    state = run(config, processor, data, tmp_path, steps=5)
    assert int(state.step) == 2 and (tmp_path / "2").is_dir() and len(log(tmp_path)) == 2
    with _sigterm() as stop:
        assert not stop()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_every_conversation_comes_once_in_an_epoch(config, processor, data):
    """Steps run over the ends of the data without leaving anything out, in another order each time."""
    seen = []

    def note(rows, **_):
        seen.extend(rows)
        raise StopIteration

    for index in range(7):  # 14 rows: twice through
        with pytest.raises(StopIteration):
            conversation_batch(note, config, list(range(ROWS)), 0, 2, None, None, index)
    assert sorted(seen[:ROWS]) == sorted(seen[ROWS:]) == list(range(ROWS)) and seen[:ROWS] != seen[ROWS:]
    assert _order(ROWS, 0, 0).tolist() != _order(ROWS, 1, 0).tolist()


def test_workers_make_the_same_batches(config, processor, data):
    """In a thread or in processes, from any step on; what goes wrong there is raised here."""
    make = functools.partial(conversation_batch, processor, config, data, 0, 2, 64, 64)
    for workers in (0, 2):
        found = list(load_batches(make, range(1, 4), workers=workers))
        assert len(found) == 3
        for batch, index in zip(found, range(1, 4), strict=True):
            assert (batch.input_ids == make(index).input_ids).all()
            assert (batch.vision.pixel_values == make(index).vision.pixel_values).all()
    short = functools.partial(conversation_batch, processor, config, data, 0, 2, 8, None)
    with pytest.raises(ValueError, match="length"):
        list(load_batches(short, range(2), workers=0))


def test_what_cannot_be(config, processor, data, tmp_path):
    """Arguments out of range, a folder of something else, fewer steps than were made, another optimizer."""
    for name in ("steps", "batch_size", "save_every"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            run(config, processor, data, tmp_path / "new", **({"steps": 1} | {name: 0}))
    with pytest.raises(ValueError, match="conversations is 0"):
        run(config, processor, [], tmp_path / "new", steps=1)
    assert not (tmp_path / "new").exists()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="no training run"):
        run(config, processor, data, tmp_path, steps=1)
    run(config, processor, data, tmp_path / "run", steps=2)
    with pytest.raises(ValueError, match="at step 2 already"):
        run(config, processor, data, tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match=r"missing|unexpected"):
        run(config, processor, data, tmp_path / "run", steps=3, optimizer=make_optimizer(1e-3, freeze=["vision"]))


def test_command(config, processor, data, tmp_path, monkeypatch, capsys):
    """`liger-jax finetune` from files to a checkpoint: pictures in base64, a frozen part, a broken record left out."""
    import sys

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
    arguments = [
        "finetune",
        *(str(tmp_path / name) for name in ("model", "data.json")),
        "--output",
        str(tmp_path / "out"),
    ]
    options = f"--steps 2 --batch-size 2 --freeze vision --skip-broken --held-out {tmp_path / 'data.json'}"
    monkeypatch.setattr(sys, "argv", ["liger-jax", *arguments, *options.split()])
    with pytest.warns(UserWarning, match="left out 1 of 8 records"):
        main()
    assert "step 2 of 2" in capsys.readouterr().out
    assert "held_out_loss" in (tmp_path / "out/metrics.jsonl").read_text()
    before, after = (param_paths(load_model(tmp_path / name)) for name in ("model", "out"))
    assert (before["visual/patch_embed/kernel"] == after["visual/patch_embed/kernel"]).all()
    assert (before["lm_head/weight" if "lm_head/weight" in before else "language_model/embed_tokens/weight"] != 0).any()
    assert (before["visual/merger/fc1/kernel"] != after["visual/merger/fc1/kernel"]).any()
