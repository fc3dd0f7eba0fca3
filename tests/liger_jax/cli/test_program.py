"""Help is quick and complete, only this project's messages are printed, and a user's mistake is reported in one line."""

import errno
import importlib.machinery
import json
import logging
import os
import re
import subprocess
import sys
import time
import types
import warnings

import jax.numpy as jnp
import pytest

import liger_jax
import liger_jax.cli as cli
import pallas_kernels as pk
from liger_jax.cli.program import BUG_HINT
from liger_jax.errors import LigerWarning, UserError
from pallas_kernels import _fa4, _fa4_cache
from tests._support.command_line import CALL, ROOT, call, run_process
from tests._support.quiet import assert_quiet


def test_help_names_every_command():
    result = run_process(CALL, "--help")
    assert result.returncode == 0, result.stderr
    assert "{demo,finetune,generate,chat,plan,convert,tune,env,completion}" in result.stdout


@pytest.mark.parametrize("module", ["liger_jax", "liger_jax.cli"])
def test_running_the_package_as_a_module_did_nothing(module):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "{demo,finetune,generate,chat,plan,convert,tune,env,completion}" in result.stdout


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"liger-jax {liger_jax.__version__}\n"


def test_help_takes_less_than_one_and_a_half_seconds():
    """Measures CPU time, which does not depend on other processes. The first of two runs may fill caches."""
    resource = pytest.importorskip("resource")
    times = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_process(CALL, "finetune", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.5


def test_help_imports_no_heavy_package():
    code = "import liger_jax.cli.program, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "jax",
        "numpy",
        "PIL",
        "flax",
        "transformers",
        "orbax.checkpoint",
        "matplotlib",
        "convert",
        "liger_jax.demo.run",
        "safetensors",
    ]
    result = run_process(code, *heavy)
    assert result.stdout.strip() == "[]", result.stderr


def test_commands_printed_warnings_of_other_packages(checkpoint, tmp_path):
    """A command without torch, in a process of its own, prints lines of its progress on stderr and nothing else."""
    hide_torch = (
        "import importlib.util as util; find = util.find_spec; "
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); "
    )
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "What?"}]}))
    files = ("--data", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    quiet = run_process(hide_torch + CALL, "generate", checkpoint / "orbax", *files, "--max-new-tokens", "1")
    assert quiet.returncode == 0 and "answers in" in quiet.stdout and quiet.stdout.endswith(": 1\n"), quiet.stderr
    assert_quiet(quiet.stderr)
    assert "PyTorch was not found" in run_process(hide_torch + "import transformers").stderr


def test_warnings_are_one_line_without_source(monkeypatch, capsys):
    """Only this project's warnings are printed, and the filters and log levels of the process are left as they were."""

    def warn():
        warnings.warn("data.json:\n  left out 1 of 2", LigerWarning, stacklevel=1)
        warnings.warn("of another package", FutureWarning, stacklevel=1)
        logging.getLogger("absl").warning("of another package")
        return "cpu"

    monkeypatch.setattr("jax.default_backend", warn)
    filters, level = list(warnings.filters), logging.root.manager.disable
    call(monkeypatch, "env")
    assert_quiet(capsys.readouterr().err, "warning: data.json: left out 1 of 2")
    assert (list(warnings.filters), logging.root.manager.disable) == (filters, level)


def use_broken_fa4(folder):
    """Meets an installed fa4-jax that cannot be imported."""
    _fa4.import_problem.cache_clear()
    q = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    pk.attention(q, q, q)
    _fa4.import_problem.cache_clear()


def build_in_read_only_folder(folder):
    """Builds a kernel, which fails until the cache of kernels is disabled."""
    failures = [OSError("Read-only file system")]

    def build():
        if failures:
            raise failures.pop()

    _fa4_cache._build_anyway(folder, build)


@pytest.mark.parametrize(
    "problem, message",
    [
        (use_broken_fa4, "fa4-jax is installed and cannot be used"),
        (build_in_read_only_folder, "FlashAttention-4's kernels cannot be kept in"),
    ],
)
def test_warnings_of_pallas_kernels_are_printed(problem, message, tmp_path, monkeypatch, capsys):
    fa4_jax, cutejax = types.ModuleType("fa4_jax"), types.ModuleType("cutejax")
    fa4_jax.__spec__ = importlib.machinery.ModuleSpec("fa4_jax", None)
    vars(cutejax).update(CompileTimeout=TimeoutError, configure_cache=lambda enabled: None)
    for package in (fa4_jax, cutejax):
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(_fa4._pallas, "compute_capability", lambda: 9.0)
    monkeypatch.setattr("jax.default_backend", lambda: problem(tmp_path) or "cpu")
    call(monkeypatch, "env")
    assert_quiet(capsys.readouterr().err, message)


def failing_env(monkeypatch, error):
    """Runs `liger-jax env`, which raises an error."""

    def fail():
        raise error

    monkeypatch.setattr("jax.default_backend", fail)
    call(monkeypatch, "env")


def test_ctrl_c_ends_a_command_with_one_line_and_status_130(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_error:
        failing_env(monkeypatch, KeyboardInterrupt())
    assert exit_error.value.code == 130
    assert capsys.readouterr().err == "liger-jax: interrupted\n"


def test_ctrl_c_during_garbage_collection_was_lost(monkeypatch, capsys):
    """Python only prints an exception of a finalizer or callback of the collector, where a signal may arrive too."""

    class Interrupted:
        def __del__(self):
            raise KeyboardInterrupt

    def interrupt():
        Interrupted()
        time.sleep(10)

    monkeypatch.setattr("jax.default_backend", interrupt)
    with pytest.raises(SystemExit) as exit_error:
        call(monkeypatch, "env")
    assert exit_error.value.code == 130
    assert capsys.readouterr().err == "liger-jax: interrupted\n"


@pytest.mark.parametrize("name", ["convert", "pallas_kernels"])
def test_module_of_the_same_name_is_named(monkeypatch, tmp_path, name):
    """A script in the folder of the program is imported in place of the package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.py").touch()
    result = run_process(CALL, "env")
    expected = f"{name} is {tmp_path / name}.py; expected {ROOT / name}, which liger-jax installs. Rename or remove "
    assert result.returncode == 1 and expected in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected_message"),
    [
        (("generate", "m"), "expected a question, or --data and --output"),
        (("generate", "m", "What?", "--data", "x", "--output", "y"), "expected a question, or --data and --output"),
        (("generate", "m", "--data", "x"), "expected a question, or --data and --output"),
        (("generate", "m", "--images", "dog.jpg", "What?"), "(the question goes before --images)"),
        (("generate", "m", "--data", "x", "--output", "y"), "x does not exist; expected a file of questions"),
        (
            ("generate", "m", "--data", "x", "--output", "y", "--images", "z"),
            "--images set; expected only with a single",
        ),
        (("generate", "m", "What?", "--batch-size", "0"), "--batch-size set; expected only with --data"),
        (("generate", "m", "What?", "--skip-broken"), "--skip-broken set; expected only with --data"),
        (("generate", "m", "What?", "--images", "dog.jpg"), "['dog.jpg'], which do not exist; expected image files"),
        (("generate", "missing/folder/x", "What?"), "missing/folder/x"),
        (("chat", "missing/folder/x"), "missing/folder/x"),
        (("convert", "missing/folder/x", "out"), "missing/folder/x"),
        (("demo", "--steps", "0", "--output", "out"), "steps is 0; expected at least 1"),
        (("demo", "--learning-rate", "-1", "--output", "out"), "learning_rate is -1.0; expected above 0"),
    ],
)
def test_mistakes_are_one_line_without_a_traceback(monkeypatch, tmp_path, arguments, expected_message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, *arguments)
    message = str(error.value)
    assert message.startswith("liger-jax: ") and expected_message in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["chat"], ["generate", "Hello"], ["finetune", "data.json"], ["convert", "new"]])
def test_unsupported_model_is_named_before_its_files_are_read(monkeypatch, tmp_path, command):
    """A folder without tokenizer and weights."""
    monkeypatch.chdir(tmp_path)
    record = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, command[0], ".", *command[1:])
    assert re.search(r"^liger-jax: .*model_type is 'qwen3_5'; .* \(Qwen3\.5 is not supported\)$", str(error.value))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "out"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system", "out"),
        ValueError('RESOURCE_EXHAUSTED: Error writing "params.kernel/0.0": No space left on device'),  # TensorStore's
        UserError("steps is 0;\n  expected at least 1"),
    ],
    ids=str,
)
def test_errors_that_the_user_can_fix_are_one_line(monkeypatch, error):
    """Includes an operating system error about a path, and a message of several lines."""
    with pytest.raises(SystemExit) as exit_error:
        failing_env(monkeypatch, error)
    message = exit_error.value.code  # printed on stderr, with exit status 1
    assert message == f"liger-jax: {' '.join(str(error).split())}"


@pytest.mark.parametrize(
    "error", [ValueError("odd"), RuntimeError("odd"), OSError("odd"), FileNotFoundError(errno.ENOENT, "odd", "ours")]
)
def test_other_errors_are_not_caught(monkeypatch, error):
    with pytest.raises(type(error)) as caught:
        failing_env(monkeypatch, error)
    assert caught.value.__notes__ == [BUG_HINT]


def test_traceback_of_a_bug_ends_with_a_hint():
    code = (
        "import jax; from liger_jax.cli import main\n"
        "def fail(): raise ValueError('a bug')\n"
        "jax.default_backend = fail\n"
        "main(['env'])"
    )
    result = run_process(code)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-2:] == ["ValueError: a bug", BUG_HINT]
