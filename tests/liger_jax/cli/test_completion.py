"""`liger-jax completion`."""

import shutil
import subprocess

import pytest

import liger_jax.cli as cli


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
