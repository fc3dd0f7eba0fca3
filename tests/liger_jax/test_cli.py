"""The command line: help is quick and complete, env and convert work, and mistakes are told in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import liger_jax.cli as cli
from liger_jax import Qwen2VL, Qwen2VLConfig
from liger_jax.checkpoint import load_model, save_model

ROOT = Path(__file__).parents[2]
CALL = "import sys; from liger_jax.cli import main; sys.argv[0] = 'liger-jax'; main()"


def command(*arguments):
    """Runs `liger-jax ARGUMENTS` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def call(monkeypatch, *arguments):
    """Runs `liger-jax ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["liger-jax", *map(str, arguments)])
    cli.main()


def test_help_names_every_command():
    result = command("--help")
    assert result.returncode == 0, result.stderr
    for name in ("demo", "convert", "env"):
        assert name in result.stdout


def test_help_takes_less_than_one_and_a_half_seconds():
    """Processor time, which does not depend on what else runs; the better of two, as the first may fill caches."""
    resource = pytest.importorskip("resource")
    times = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.5


def test_commands_import_what_they_need_only_when_they_run():
    """The heavy packages that a mere --help must not load."""
    code = "import liger_jax.cli, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "jax",
        "flax",
        "transformers",
        "orbax.checkpoint",
        "matplotlib",
        "convert",
        "liger_jax.demo.run",
        "safetensors",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[]", result.stderr


def test_env_tells_versions_and_devices(monkeypatch, capsys):
    call(monkeypatch, "env")
    told = capsys.readouterr().out
    for line in ("python ", "jax ", "flax ", "platform ", "device 0 "):
        assert line in told


def test_convert_goes_to_hugging_face_and_back(monkeypatch, capsys, tmp_path):
    config = Qwen2VLConfig.tiny()
    save_model(Qwen2VL.init(config, dtype="float32"), tmp_path / "orbax")
    call(monkeypatch, "convert", tmp_path / "orbax", tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").is_file()
    call(monkeypatch, "convert", tmp_path / "hf", tmp_path / "back", "--dtype", "float32")
    assert load_model(tmp_path / "back").config == config
    assert "->" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("convert", "missing/folder/x", "out"), "missing/folder/x"),
        (("demo", "--steps", "0", "--output", "out"), "steps must be at least 1, got 0"),
        (("demo", "--learning-rate", "-1", "--output", "out"), "learning_rate must be above 0"),
    ],
)
def test_mistakes_are_one_line_without_a_traceback(monkeypatch, tmp_path, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, *arguments)
    message = str(error.value)
    assert message.startswith("liger-jax: ") and told in message
    assert list(tmp_path.iterdir()) == []
