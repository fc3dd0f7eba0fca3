"""The command line: help is quick and complete, commands work, and a user's mistake is reported in one line."""

import errno
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
from PIL import Image

import liger_jax
import liger_jax.cli as cli
from liger_jax import Chat, Processor, Qwen2VL, Qwen2VLConfig, runtime, suggestions
from liger_jax.checkpoint import load_model, save_model
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import Report, make_config, make_processor
from liger_jax.errors import LigerWarning, UserError
from liger_jax.generation.options import GenerationOptions
from tests._support.quiet import assert_quiet

ROOT = Path(__file__).parents[2]
CALL = "import sys; from liger_jax.cli import main; sys.argv[0] = 'liger-jax'; main()"


def run_process(code, *arguments, **environment):
    """Runs Python code in a new process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}  # set by cli.main
    environment = own | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def call(monkeypatch, *arguments):
    """Runs `liger-jax ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["liger-jax", *map(str, arguments)])
    cli.main()


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


# ---- what commands print ---------------------------------------------------------------------------------------------


def test_commands_printed_warnings_of_other_packages(checkpoint, tmp_path):
    """A command without torch, in a process of its own, prints lines of its progress on stderr and nothing else."""
    hide_torch = (
        "import importlib.util as util; find = util.find_spec; "
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); "
    )
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "What?"}]}))
    files = ("--data", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    quiet = run_process(hide_torch + CALL, "generate", checkpoint / "orbax", *files, "--max-new-tokens", "1")
    assert quiet.returncode == 0 and "1 answers in" in quiet.stdout, quiet.stderr
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


def test_unused_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    config = types.SimpleNamespace(jax_platforms=None)
    monkeypatch.setattr("jax.config", config)
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    with pytest.warns(LigerWarning, match="JAX runs on the CPU, although this machine has an NVIDIA GPU"):
        runtime.warn_if_gpu_is_unused()
    config.jax_platforms = "cpu"
    runtime.warn_if_gpu_is_unused()


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


FINETUNE_FLAGS = """
    output held-out eval-generate max-new-tokens media skip-broken steps batch-size learning-rate vision-learning-rate
    merger-learning-rate freeze lora lora-alpha lora-targets weight-decay warmup dtype master-weights stochastic-rounding
    pack group-by-length max-pixels accumulate remat unroll save-every keep workers data fsdp tensor sequence seed
    max-skipped-updates coordinator processes process
"""


def test_flags_of_finetune(monkeypatch, capsys):
    """Fields of the options are flags without prefixes; those that only the library needs are hidden."""
    with pytest.raises(SystemExit):
        call(monkeypatch, "finetune", "--help")
    flags = set(re.findall(r"--([a-z][a-z-]*)", capsys.readouterr().out))
    without_opposites = {flag for flag in flags if not flag.startswith("no-")} - {"help"}
    assert without_opposites == set(FINETUNE_FLAGS.split())


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"liger-jax {liger_jax.__version__}\n"


def test_unknown_command_is_one_line_with_the_closest_one(capsys):
    for command, end in (("finetun", "; did you mean finetune?\n"), ("serve", "completion\n")):
        with pytest.raises(SystemExit) as exit_error:
            cli.main([command, "a", "b"])
        error = capsys.readouterr().err
        assert exit_error.value.code == 2 and error.endswith(end) and error.count("\n") == 1
        assert error.startswith(f"liger-jax: command is '{command}'; expected one of demo, finetune, ")


def test_flags_of_other_trainers_are_translated(capsys):
    """The names on the right are flags or arguments of `liger-jax finetune`."""
    with pytest.raises(SystemExit) as exit_error:
        cli.main(["finetune", "m", "d", "--lr", "1", "--num_train_epochs=3"])
    error = capsys.readouterr().err
    assert exit_error.value.code == 2 and "Unrecognized options: --lr, 1, --num_train_epochs=3" in error
    assert error.splitlines()[-2:] == [
        "liger-jax: --lr is --learning-rate here",
        "liger-jax: --num_train_epochs is --steps (records / batch size steps make an epoch) here",
    ]
    for flag, ours in suggestions.FLAGS_OF_OTHERS.items():
        named = re.findall(r"--([a-z-]+)|argument ([A-Z]+)", ours)
        assert named and {name for name, _ in named if name} <= set(FINETUNE_FLAGS.split()), flag
        assert {argument for _, argument in named if argument} <= {"MODEL", "DATA"}, flag


def test_bash_completes_commands_and_flags(tmp_path, capsys):
    """The printed script is valid, and completes a command and a flag."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    with pytest.raises(SystemExit) as end:
        cli.main(["completion", "bash"])
    assert not end.value.code
    script = tmp_path / "liger-jax"
    script.write_text(capsys.readouterr().out)
    complete = """
        source "$1"; shift
        COMP_WORDS=(liger-jax "$@"); COMP_CWORD=$#
        $(complete -p liger-jax | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s ' "${COMPREPLY[@]}"
    """

    def completions(*words):
        result = subprocess.run([bash, "-c", complete, "bash", script, *words], capture_output=True, text=True)
        return result.stdout.split()

    assert completions("fin") == ["finetune"]
    assert completions("finetune", "--learning") == ["--learning-rate"]


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
    code = "import liger_jax.cli, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
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


def test_env_shows_versions_and_devices(monkeypatch, capsys):
    call(monkeypatch, "env")
    output = capsys.readouterr()
    for line in ("python ", "jax ", "flax ", "platform ", "device 0 "):
        assert line in output.out
    assert_quiet(output.err)


def test_env_check_ends_with_the_status_of_the_kernels(monkeypatch, capsys):
    for status in (0, 1):
        monkeypatch.setattr("pallas_kernels.check.main", lambda status=status: status)
        with pytest.raises(SystemExit) as exit_error:
            cli.main(["env", "--check"])
        assert exit_error.value.code == status and "device 0 " in capsys.readouterr().out


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
    for name in ("open_processor", "open_for_answers"):
        monkeypatch.setattr(cli, name, lambda model, *options: opened.append(model) or sys.exit("opened"))
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


@pytest.mark.parametrize("name", ["convert", "pallas_kernels"])
def test_module_of_the_same_name_is_named(monkeypatch, tmp_path, name):
    """A script in the folder of the program is imported in place of the package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.py").touch()
    result = run_process(CALL, "env")
    expected = f"{name} is {tmp_path / name}.py; expected {ROOT / name}, which liger-jax installs. Rename or remove "
    assert result.returncode == 1 and expected in result.stderr.splitlines()[-1]


def test_convert_to_hugging_face_and_back(monkeypatch, capsys, tmp_path):
    config = Qwen2VLConfig.tiny()
    save_model(Qwen2VL.init(config, dtype="float32"), tmp_path / "orbax")
    call(monkeypatch, "convert", tmp_path / "orbax", tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").is_file()
    call(monkeypatch, "convert", tmp_path / "hf", tmp_path / "back", "--dtype", "float32")
    assert load_model(tmp_path / "back").config == config
    printed = capsys.readouterr()
    assert "->" in printed.out
    assert_quiet(printed.err)


# ---- generate and chat -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a folder with a random model, its processor, and an image."""
    folder = tmp_path_factory.mktemp("model")
    processor = make_processor(load_digits()[0])
    save_model(Qwen2VL.init(make_config(processor), seed=1, dtype="float32"), folder / "orbax")
    processor.save_pretrained(folder / "orbax")
    stored = json.loads((folder / "orbax/generation_config.json").read_text())
    greedy = stored | {"repetition_penalty": 1.5, "do_sample": True, "top_k": 1, "max_new_tokens": 9}
    (folder / "orbax/generation_config.json").write_text(json.dumps(greedy))
    Image.new("RGB", (56, 28), "white").save(folder / "dog.png")
    return folder


def expected(checkpoint, question, images=(), **options):
    model, processor = load_model(checkpoint / "orbax"), Processor.from_pretrained(checkpoint / "orbax")
    options = vars(GenerationOptions.from_hf(checkpoint / "orbax")) | options
    return Chat(model, processor, **options).ask(question, images=images)


def test_generate_answers_a_question(checkpoint, monkeypatch, capsys):
    """A question about images with the checkpoint's generation options; then with flags, which enable sampling."""
    image = checkpoint / "dog.png"
    call(monkeypatch, "generate", checkpoint / "orbax", "What is this?", "--images", image, image)
    greedy = expected(checkpoint, "What is this?", [image, image])
    printed = capsys.readouterr()
    assert printed.out == greedy + "\n"
    assert_quiet(printed.err)
    flags = ("--temperature", "2", "--seed", "4", "--max-new-tokens", "7", "--stop", "never", "--max-pixels", "784")
    call(monkeypatch, "generate", checkpoint / "orbax", "What is this?", *flags)
    sampled = {"temperature": 2.0, "seed": 4, "max_new_tokens": 7, "top_k": None}
    assert capsys.readouterr().out == expected(checkpoint, "What is this?", **sampled) + "\n"
    call(monkeypatch, "generate", checkpoint / "orbax", "What is this?", "--temperature", "0", "--top-p", "0.5")
    assert capsys.readouterr().out == expected(checkpoint, "What is this?", do_sample=False) + "\n"


def test_generate_answers_a_file(checkpoint, monkeypatch, capsys, tmp_path):
    question = {"messages": [{"role": "user", "content": "<image>What is this?"}], "images": ["dog.png"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(question))
    paths = ("--data", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--media", checkpoint)
    call(monkeypatch, "generate", checkpoint / "orbax", *paths, "--batch-size", "1")
    answer = expected(checkpoint, "What is this?", [checkpoint / "dog.png"])
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line == {"record": 1, "content": line["content"], "answer": answer}
    printed = capsys.readouterr()
    assert "1 answers in" in printed.out and "100% 1/1 [" in printed.err
    assert_quiet(printed.err)


def test_chat(checkpoint, monkeypatch, capsys):
    """Images are given by path, errors do not end the chat, /reset starts again, and /quit or Ctrl-D end it."""
    image = checkpoint / "dog.png"
    for last in ("/quit", None):
        typed = iter([f"/image {image}", "What is this?", "/image missing.png", "/help", "", "/reset", "Hello", last])

        def type_next(prompt):
            line = next(typed)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", type_next)
        call(monkeypatch, "chat", checkpoint / "orbax")
        output, errors = capsys.readouterr()
        assert_quiet(errors)
        assert output.startswith(expected(checkpoint, "What is this?", [image]) + "\n! ")
        assert "missing.png" in output and "expected a question, /image PATH, /reset or /quit" in output
        assert output.rstrip("\n").endswith("\n" + expected(checkpoint, "Hello"))


def test_ctrl_c_stops_an_answer_but_not_the_chat(checkpoint, monkeypatch, capsys):
    typed = iter(["What is this?", "/reset", "Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    print_stream = cli.print_stream

    def interrupted(pieces):
        print(next(iter(pieces)), end="")
        monkeypatch.setattr(cli, "print_stream", print_stream)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "print_stream", interrupted)
    call(monkeypatch, "chat", checkpoint / "orbax")
    assert capsys.readouterr().out.endswith("\n" + expected(checkpoint, "Hello") + "\n")


def test_compilation_cache(tmp_path):
    """The cache is in the user's cache folder by default. The environment can choose another folder or disable it."""
    code = (
        "import jax; from liger_jax import runtime; runtime.enable_compilation_cache(); "
        "from pallas_kernels import _fa4; print(jax.config.jax_compilation_cache_dir, _fa4._kernel_folder)"
    )

    def cache_folder(**variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | variables
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        return result.stdout.strip() or result.stderr

    assert cache_folder() == f"{tmp_path}/liger-jax {tmp_path}/liger-jax/kernels"
    assert cache_folder(JAX_COMPILATION_CACHE_DIR="mine") == "mine mine/kernels"
    assert cache_folder(JAX_ENABLE_COMPILATION_CACHE="false") == "None None"


# ---- errors ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "flags",
    [
        ("--lora-alpha", "4"),
        ("--lora-targets", "q_proj"),
        ("--lora", "4", "--freeze", "vision"),
        ("--lora", "4", "--vision-learning-rate", "1e-5"),
        ("--lora", "4", "--master-weights"),
    ],
    ids=" ".join,
)
def test_contradictory_lora_flags(monkeypatch, flags):
    with pytest.raises(SystemExit, match="--lora"):
        call(monkeypatch, "finetune", "m", "data.json", *flags)


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


def failing_env(monkeypatch, error):
    """Runs `liger-jax env`, which raises an error."""

    def fail():
        raise error

    monkeypatch.setattr("jax.default_backend", fail)
    call(monkeypatch, "env")


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
    assert caught.value.__notes__ == [cli.BUG_HINT]


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
    assert result.stderr.splitlines()[-2:] == ["ValueError: a bug", cli.BUG_HINT]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_permission_denied(checkpoint, monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit, match=r"liger-jax: .*Permission denied"):
        call(monkeypatch, "convert", checkpoint / "orbax", tmp_path / "out")
