"""`liger-jax demo`."""

import json
import shlex
import sys
from pathlib import Path

import pytest

import liger_jax.cli as cli
from liger_jax.demo.run import Report


def test_demo_ends_with_commands_to_try(monkeypatch, capsys, tmp_path):
    """They name what the demo wrote, with quotes where a path needs them, and this command line accepts all of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")  # the command changes it
    paths = [Path("my demo") / name for name in ("checkpoint", "answers.png", "loss.png", "metrics.jsonl", "digit.png")]
    monkeypatch.setattr("liger_jax.demo.run.run_demo", lambda output, **options: Report(0.5, 1.0, *paths))
    cli.main(["demo"])
    lines = [line.strip().partition("  #")[0] for line in capsys.readouterr().out.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("liger-jax ")]
    checkpoint, digit = str(paths[0]), str(paths[-1])
    assert commands[:2] == [["generate", checkpoint, "Which digit is shown?", "--images", digit], ["chat", checkpoint]]
    opened = []
    for opener in ("finetune.open_processor", "generate.open_for_answers", "chat.open_for_answers"):
        monkeypatch.setattr(
            f"liger_jax.cli.{opener}", lambda model, *options: opened.append(model) or sys.exit("opened")
        )
    monkeypatch.setattr("pallas_kernels.check.main", lambda: "opened")
    record = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]}
    Path("train.json").write_text(json.dumps([record]))
    for image in (paths[-1], Path("dog.jpg")):
        image.parent.mkdir(exist_ok=True)
        image.touch()
    for command in commands:
        with pytest.raises(SystemExit, match="opened"):
            cli.main(command)
    released = "Qwen/Qwen3-VL-2B-Instruct"
    assert opened == [checkpoint, checkpoint, released, released]
