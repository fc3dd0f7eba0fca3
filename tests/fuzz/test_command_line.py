"""Command lines of any options: a usage error or one line, before anything is trained or generated."""

import contextlib
import io
import json
import re

import pytest
from hypothesis import strategies as st

import convert
import liger_jax.cli as cli
import liger_jax.demo.run
import pallas_kernels.tune
from liger_jax import Processor
from liger_jax.demo.tokenizer import train_tokenizer
from tests._support.fuzzing import ODD_NUMBERS, ODD_TEXTS, fuzz, pick

COMMANDS = ("demo", "finetune", "generate", "chat", "convert", "tune", "env")
VALUES = st.one_of(
    pick([str(number) for number in ODD_NUMBERS if not (isinstance(number, int) and number > 10**300)]),
    pick([text.replace("\0", "") for text in ODD_TEXTS if len(text) < 1000 and text.isprintable()]),
    st.sampled_from(
        ["model", "data.json", "a.png", "out", "bfloat16", "float32", "hf", "orbax", "vision", "q_proj", "auto"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
    st.integers(-5, 100).map(str),
    st.floats(0, 1).map(str),
)
VALID = {
    "finetune": ["model", "data.json"],
    "generate": ["model", "Which digit?"],
    "chat": ["model"],
    "convert": ["model", "new"],
}


def flags_of(command: str) -> list[str]:
    """Returns the flags in a command's help text."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return sorted(set(re.findall(r"--[a-z][a-z0-9-]+", output.getvalue())))


FLAGS = {command: flags_of(command) for command in COMMANDS}
ALL_FLAGS = [flag for flags in FLAGS.values() for flag in flags]


@st.composite
def command_lines(draw):
    """Draws the arguments of a command: valid positional ones and flags with values, or anything."""
    command = draw(st.sampled_from(COMMANDS))
    if draw(st.integers(0, 9)) == 0:
        return draw(st.lists(VALUES | st.just(command), max_size=5))
    arguments = list(VALID.get(command, []))
    for _ in range(draw(st.integers(0, 4))):
        flag = draw(pick(FLAGS[command]) | pick(ALL_FLAGS))
        arguments += [flag, *draw(st.lists(VALUES, min_size=0, max_size=2))]
    if arguments and draw(st.integers(0, 3)) == 0:
        del arguments[draw(st.integers(0, len(arguments) - 1))]
    return [command, *arguments]


class Reached(Exception):
    """Raised where a command would start to compute."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Changes to a folder with data, an image and a model without weights; no command trains, tunes or loads a model."""
    folder = tmp_path_factory.mktemp("commands")
    Processor(train_tokenizer([])).save_pretrained(folder / "model")
    turns = [{"from": "human", "value": "Which digit?"}, {"from": "gpt", "value": "7"}]
    (folder / "data.json").write_text(json.dumps([{"conversations": turns}]))
    (folder / "a.png").write_bytes(b"not read")

    def reach(*args, **kwargs):
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(convert, "open_model", reach)
        patch.setattr(convert.load, "from_hf", reach)
        patch.setattr(liger_jax.demo.run, "run_demo", reach)
        patch.setattr(pallas_kernels.tune, "main", reach)
        yield folder


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
