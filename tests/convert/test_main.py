"""`python -m convert`, both ways."""

import subprocess
import sys

import pytest

from convert import from_hf, to_hf_state
from convert.__main__ import main
from liger_jax.checkpoint import load_model
from tests._support import hub_layout as hub
from tests.convert.test_writer import assert_equal


@pytest.fixture
def source(tmp_path):
    folder = hub.write(tmp_path / "hf", hub.tensors(), shards=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 1}')
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "preprocessor_config.json").write_text('{"b": 2}')
    return folder


def test_there_and_back(source, capsys):
    orbax, back = source.with_name("orbax"), source.with_name("back")
    assert main([str(source), str(orbax), "--dtype", "float32"]) == 0
    told = capsys.readouterr().out
    assert "(hf) ->" in told
    assert f"{sum(array.size for array in hub.tensors().values()):,} parameters" in told
    assert "float32" in told
    assert_equal(to_hf_state(load_model(orbax)), hub.tensors())
    assert main([str(orbax), str(back)]) == 0
    assert "(orbax) ->" in capsys.readouterr().out
    again = from_hf(back, dtype="float32")
    assert_equal(to_hf_state(again), hub.tensors())
    assert again.config == from_hf(source).config
    for name in ("generation_config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (back / name).read_text() == (source / name).read_text()


def test_same_kind(source):
    """`--to hf` on a Hugging Face folder renames, casts and cuts it anew."""
    assert main([str(source), str(source.with_name("new")), "--to", "hf", "--dtype", "float32"]) == 0
    assert_equal(to_hf_state(from_hf(source.with_name("new"), dtype="float32")), hub.tensors())
    assert not list(source.with_name("new").glob("*.index.json"))


def test_keeps_what_is_there_unless_told(source, capsys):
    target = source.with_name("full")
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert main([str(source), str(target)]) == 1
    assert "not an empty folder; --overwrite" in capsys.readouterr().err
    assert [file.name for file in target.iterdir()] == ["notes.txt"]
    for _ in range(2):
        assert main([str(source), str(target), "--overwrite"]) == 0
    assert (target / "notes.txt").read_text() == "mine"
    assert load_model(target).config.text.hidden_size == hub.H


def test_the_other_kind_of_weights_makes_room(source, tmp_path, capsys):
    """A folder that is written over holds one model: what would be read in its place is gone."""
    target = tmp_path / "target"
    for kinds in (["orbax", "hf"], ["hf", "orbax"]):
        for to in kinds:
            assert main([str(source), str(target), "--to", to, "--overwrite"]) == 0
        assert (target / "params").exists() == (kinds[-1] == "orbax")
        assert bool(list(target.glob("model*.safetensors*"))) == (kinds[-1] == "hf")
    (target / "run.json").write_text("{}")
    capsys.readouterr()
    assert main([str(source), str(target), "--to", "hf", "--overwrite"]) == 1
    assert "holds a training run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors"),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").write_bytes(b"x" * 99),
            "is not a safetensors file",
        ),
        (lambda folder: hub.write(folder, dict(list(hub.tensors().items())[3:])), "missing: "),
    ],
)
def test_errors_are_one_line_and_write_nothing(source, capsys, spoil, message):
    spoil(source)
    assert main([str(source), str(source.with_name("new"))]) == 1
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not source.with_name("new").exists()


def test_same_folder_and_wrong_dtype(source, capsys):
    assert main([str(source), str(source), "--overwrite"]) == 1
    assert "the same folder" in capsys.readouterr().err
    assert main([str(source), str(source.with_name("new")), "--dtype", "float7"]) == 1
    assert "dtype is 'float7'" in capsys.readouterr().err


def test_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "convert", str(tmp_path / "no" / "thing"), str(tmp_path / "new")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
