"""`liger-jax env`."""

from importlib import metadata

import pytest

import liger_jax.cli as cli
from tests._support.command_line import call
from tests._support.quiet import assert_quiet


def test_env_shows_versions_and_devices(monkeypatch, capsys):
    call(monkeypatch, "env")
    output = capsys.readouterr()
    for line in ("python ", "jax ", "flax ", "platform ", "device 0 "):
        assert line in output.out
    assert_quiet(output.err)


def test_env_lists_packages_for_gpus_where_they_are_installed(monkeypatch, capsys):
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.0" if name == "fa4-jax" else installed(name))
    call(monkeypatch, "env")
    lines = capsys.readouterr().out.splitlines()
    assert "fa4-jax 0.1.0" in lines and not any("not installed" in line for line in lines)


def test_env_check_ends_with_the_status_of_the_kernels(monkeypatch, capsys):
    for status in (0, 1):
        monkeypatch.setattr("pallas_kernels.check.main", lambda status=status: status)
        with pytest.raises(SystemExit) as exit_error:
            cli.main(["env", "--check"])
        assert exit_error.value.code == status and "device 0 " in capsys.readouterr().out
