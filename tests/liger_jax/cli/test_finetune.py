"""`liger-jax finetune`: its flags, a run from files to a checkpoint, and its exit status."""

import re

import pytest

from tests._support.command_line import FINETUNE_FLAGS, call


def test_flags_of_finetune(monkeypatch, capsys):
    """Fields of the options are flags without prefixes; those that only the library needs are hidden."""
    with pytest.raises(SystemExit):
        call(monkeypatch, "finetune", "--help")
    flags = set(re.findall(r"--([a-z][a-z-]*)", capsys.readouterr().out))
    without_opposites = {flag for flag in flags if not flag.startswith("no-")} - {"help"}
    assert without_opposites == set(FINETUNE_FLAGS.split())


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
