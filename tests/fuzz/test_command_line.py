"""Command lines of any options: a usage error or one line, before anything is trained or generated."""

import contextlib
import functools
import io
import json
import re

import huggingface_hub
import pytest
from hypothesis import example
from hypothesis import strategies as st

import convert.load
import liger_jax.cli as cli
import liger_jax.demo.run
import liger_jax.generation.answer_file
import liger_jax.plan
import liger_jax.train.finetune
import pallas_kernels.check
import pallas_kernels.tune
from liger_jax import Processor, Qwen2VL, Qwen2VLConfig
from liger_jax.demo.tokenizer import train_tokenizer
from tests._support.fuzzing import ODD_NUMBERS, ODD_TEXTS, fuzz, mostly, pick

COMMANDS = ("demo", "finetune", "generate", "chat", "convert", "tune", "env")
VALID = {
    "finetune": ["model", "data.json"],
    "generate": ["model", "Which digit?"],
    "chat": ["model"],
    "convert": ["model", "new"],
}
ANYTHING = st.one_of(
    pick([str(number) for number in ODD_NUMBERS]),
    pick([text for text in ODD_TEXTS if len(text) < 1000 and text.isprintable() and text != "/"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
)
# Values of a flag by the type in its help text; a word in braces is a choice.
BY_TYPE = {
    "INT": st.integers(-2, 300).map(str) | pick([str(number) for number in ODD_NUMBERS if isinstance(number, int)]),
    "FLOAT": st.floats(-0.5, 2).map(str) | pick([str(number) for number in ODD_NUMBERS]),
    "PATH": pick(["model", "data.json", "a.png", "out", "missing", "data.json/x", "model/tokenizer.json"]),
    "STR": pick(
        ["float32", "bfloat16", "int8", "hf", "5GB", "1KB", "q_proj", "all-linear", "main", ".", "system text"]
    ),
}


def read_flags(command: str) -> dict[str, st.SearchStrategy]:
    """Returns each flag in a command's help text, with a strategy of its values."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        cli.main([command, "--help"])
    flags = {}
    for flag, off, kind in re.findall(r"(--[a-z][a-z-]+)(, --no-[a-z-]+)?(?: (\S+))?", output.getvalue()):
        words = re.findall(r"[A-Z]+|[a-z0-9_]{2,}", kind)
        values = BY_TYPE.get(words[-1], pick(words)) if words and not off else st.nothing()
        flags[flag] = st.lists(mostly(values, ANYTHING), min_size=1, max_size=1) if words and not off else st.just([])
    return flags


FLAGS = {command: read_flags(command) for command in COMMANDS}
ALL_FLAGS = {flag: values for flags in FLAGS.values() for flag, values in flags.items() if flag != "--help"}


@st.composite
def command_lines(draw):
    """Draws the arguments of a command: valid positional ones and flags with values, and sometimes anything."""
    command = draw(st.sampled_from([*COMMANDS, *["finetune"] * 6, *["generate"] * 4, "convert", "convert"]))
    arguments = list(VALID.get(command, []))
    for _ in range(draw(st.integers(0, 4))):
        flags = draw(mostly(st.just(FLAGS[command]), st.just(ALL_FLAGS)))
        flag = draw(pick(list(flags)))
        arguments += [flag, *draw(mostly(flags[flag], st.lists(ANYTHING, max_size=2)))]
    if arguments and draw(st.integers(0, 9)) == 9:
        del arguments[draw(st.integers(0, len(arguments) - 1))]
    return draw(mostly(st.just([command, *arguments]), st.lists(ANYTHING | st.just(command), max_size=5)))


class Reached(Exception):
    """Raised where a command would start to compute."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Changes to a folder with data, an image and a model; no command computes anything or uses the network."""
    folder = tmp_path_factory.mktemp("commands")
    Processor(train_tokenizer([])).save_pretrained(folder / "model")
    turns = [{"from": "human", "value": "Which digit?"}, {"from": "gpt", "value": "7"}]
    (folder / "data.json").write_text(json.dumps([{"conversations": turns}]))
    (folder / "a.png").write_bytes(b"not read")
    model = Qwen2VL.init(Qwen2VLConfig.tiny(270))

    def reach(*args, **kwargs):
        raise Reached

    offline = functools.partial(huggingface_hub.snapshot_download, local_files_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(huggingface_hub, "snapshot_download", offline)
        patch.setattr(convert, "open_model", lambda *args, **kwargs: model)
        patch.setattr(liger_jax, "add_lora", lambda model, **options: model)
        for module, name in (
            (convert.load, "from_hf"),
            (liger_jax, "Chat"),
            (liger_jax.demo.run, "run_demo"),
            (liger_jax.generation.answer_file, "answer_file"),
            (liger_jax.train.finetune, "open_state"),
            (liger_jax.plan, "make_plans"),
            (pallas_kernels.check, "main"),
            (pallas_kernels.tune, "main"),
        ):
            patch.setattr(module, name, reach)
        yield folder


@example(arguments=["finetune", "model", "data.json", "--steps", str(10**400)])  # OverflowError in the schedule
@example(arguments=["finetune", "model", "data.json", "--pack", str(10**400)])  # OverflowError in the packing
@fuzz(arguments=command_lines())
def test_command_lines(arguments, folder):
    """A command reaches its computation, prints help, or ends with one line or a usage error."""
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            cli.main(arguments)
    except Reached:
        pass
    except SystemExit as end:
        if end.code == 2:
            assert errors.getvalue().strip(), "a usage error without a message"
        elif end.code not in (None, 0):
            assert isinstance(end.code, str) and end.code.startswith("liger-jax: ") and "\n" not in end.code
        else:
            assert output.getvalue().strip(), "nothing was printed"
