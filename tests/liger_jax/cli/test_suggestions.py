"""An unknown command or flag ends with one line that names the right one."""

import re

import pytest

import liger_jax.cli as cli
from liger_jax.cli import suggestions
from tests._support.command_line import FINETUNE_FLAGS


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
    for flag, equivalent in suggestions.FLAGS_OF_OTHERS.items():
        named = re.findall(r"--([a-z-]+)|argument ([A-Z]+)", equivalent)
        assert named and {name for name, _ in named if name} <= set(FINETUNE_FLAGS.split()), flag
        assert {argument for _, argument in named if argument} <= {"MODEL", "DATA"}, flag
