"""`liger-jax convert`."""

import os

import pytest

from liger_jax import Qwen2VL, Qwen2VLConfig
from liger_jax.checkpoint import load_model, save_model
from tests._support.command_line import call
from tests._support.quiet import assert_quiet


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


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_permission_denied(checkpoint, monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit, match=r"liger-jax: .*Permission denied"):
        call(monkeypatch, "convert", checkpoint / "orbax", tmp_path / "out")
