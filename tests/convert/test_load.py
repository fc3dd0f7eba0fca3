"""`convert_checkpoint` in both directions, and `python -m convert`."""

import json
import subprocess
import sys

import numpy as np
import pytest

from convert import from_hf, open_model, to_hf_state
from convert.__main__ import main
from convert.load import convert_checkpoint
from liger_jax import Qwen2VL, Qwen2VLConfig
from liger_jax.checkpoint import load_model, save_model
from liger_jax.errors import AlreadyExistsError, NotFoundError, UserError
from tests._support import hub_layout as hub
from tests.convert.test_writer import assert_equal


@pytest.fixture
def source(tmp_path):
    folder = hub.write(tmp_path / "hf", hub.tensors(), shards=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 1}')
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "preprocessor_config.json").write_text('{"b": 2}')
    return folder


def test_round_trip(source):
    orbax, hf = source.with_name("orbax"), source.with_name("back")
    summary = convert_checkpoint(str(source), orbax, dtype="float32")
    assert "(hf) ->" in summary
    assert f"{sum(array.size for array in hub.tensors().values()):,} parameters" in summary
    assert "float32" in summary
    assert_equal(to_hf_state(load_model(orbax)), hub.tensors())
    assert_equal(to_hf_state(open_model(orbax)), hub.tensors())
    assert "(orbax) ->" in convert_checkpoint(orbax, hf)
    loaded = from_hf(hf, dtype="float32")
    assert_equal(to_hf_state(loaded), hub.tensors())
    assert loaded.config == from_hf(source).config
    for name in ("generation_config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (hf / name).read_text() == (source / name).read_text()


@pytest.mark.parametrize("generation", [None, '{"top_k": 1}'])
def test_end_token_of_config_json_survives_conversion(tmp_path, generation):
    """A conversion there and back dropped an end token that only config.json named."""
    source = hub.write(tmp_path / "hf", hub.tensors(), eos_token_id=7)
    if generation:
        (source / "generation_config.json").write_text(generation)
    convert_checkpoint(source, tmp_path / "orbax")
    convert_checkpoint(tmp_path / "orbax", tmp_path / "back")
    for folder in (tmp_path / "orbax", tmp_path / "back"):
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings == json.loads(generation or "{}") | {"eos_token_id": [7]}
        assert json.loads((folder / "config.json").read_text())["text_config"]["eos_token_id"] == [7]


def test_non_finite_weights_need_a_flag(tmp_path):
    state = hub.tensors()
    state["model.norm.weight"][0] = np.nan
    source = hub.write(tmp_path / "hf", state)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinity.*--allow-non-finite"):
        convert_checkpoint(source, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()
    main([str(source), str(tmp_path / "orbax"), "--allow-non-finite"])
    name = "params: language_model/norm/weight"
    for load in (load_model, open_model, lambda folder: convert_checkpoint(folder, tmp_path / "back")):
        with pytest.raises(
            UserError, match=f"{name} holds NaN or infinity; expected finite numbers, or allow_non_finite"
        ):
            load(tmp_path / "orbax")
    assert not (tmp_path / "back").exists()
    for load in (load_model, open_model):
        norm = load(tmp_path / "orbax", allow_non_finite=True).language_model.norm.weight
        assert np.isnan(np.asarray(norm[0], np.float32))
    convert_checkpoint(tmp_path / "orbax", tmp_path / "back", allow_non_finite=True)


def test_orbax_weights_that_overflow_were_loaded_as_infinity(tmp_path):
    config = Qwen2VLConfig.tiny()
    model = Qwen2VL.init(config, dtype="float32")
    model.language_model.norm.weight = model.language_model.norm.weight.at[0].set(1e6)
    save_model(model, tmp_path)
    message = (
        "params: language_model/norm/weight holds 1e\\+06, which overflows float16; expected dtype bfloat16 or float32"
    )
    with pytest.raises(UserError, match=message):
        load_model(tmp_path, dtype="float16")
    assert load_model(tmp_path, dtype="bfloat16").head.dtype == "bfloat16"
    assert load_model(tmp_path, dtype="float16", allow_non_finite=True).language_model.norm.weight[0] == np.inf


def test_same_format(source):
    """`to="hf"` for a Hugging Face folder renames, casts and re-shards its tensors."""
    convert_checkpoint(source, source.with_name("new"), to="hf", dtype="float32")
    assert_equal(to_hf_state(from_hf(source.with_name("new"), dtype="float32")), hub.tensors())
    assert not list(source.with_name("new").glob("*.index.json"))


def test_files_in_the_target_are_kept(source):
    target = source.with_name("full")
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(AlreadyExistsError, match=r"not an empty folder; expected .*--overwrite"):
        convert_checkpoint(source, target)
    assert [file.name for file in target.iterdir()] == ["notes.txt"]
    for _ in range(2):
        convert_checkpoint(source, target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert load_model(target).config.text.hidden_size == hub.H


def test_overwriting_left_processor_files_that_take_precedence(source, tmp_path):
    """A template and settings of videos of an earlier checkpoint. A source without a tokenizer leaves the target's."""
    target = tmp_path / "target"
    target.mkdir()
    earlier = ("chat_template.json", "video_preprocessor_config.json", "processor_config.json", "notes.json")
    for name in earlier:
        (target / name).write_text("{}")
    convert_checkpoint(source, target, overwrite=True)
    assert [name for name in earlier if (target / name).exists()] == ["notes.json"]
    (source / "tokenizer.json").unlink()
    convert_checkpoint(source, target, overwrite=True)
    assert (target / "tokenizer.json").exists()


def test_overwriting_wrote_through_links(source, tmp_path):
    """Into the cache of the hub, or another checkpoint's tokenizer; a link to the source's own ended in a SameFileError."""
    target, blob = tmp_path / "target", tmp_path / "blob"
    target.mkdir()
    blob.write_text("cached")
    (target / "tokenizer.json").symlink_to(blob)
    (target / "preprocessor_config.json").symlink_to(source / "preprocessor_config.json")
    convert_checkpoint(source, target, overwrite=True)
    assert blob.read_text() == "cached"
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (target / name).read_text() == (source / name).read_text() and not (target / name).is_symlink()


def test_overwriting_removes_weights_of_the_other_format(source, tmp_path):
    """A folder holds one model: weights that would be loaded in its place are deleted."""
    target = tmp_path / "target"
    for formats in (["orbax", "hf"], ["hf", "orbax"]):
        for to in formats:
            convert_checkpoint(source, target, to=to, overwrite=True)
        assert (target / "params").exists() == (formats[-1] == "orbax")
        assert bool(list(target.glob("model*.safetensors*"))) == (formats[-1] == "hf")
    (target / "run.json").write_text("{}")
    with pytest.raises(AlreadyExistsError, match="holds a training run"):
        convert_checkpoint(source, target, to="hf", overwrite=True)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), NotFoundError, r"config\.json"),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
            NotFoundError,
            r"model-00002-of-00002\.safetensors",
        ),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").write_bytes(b"x" * 99),
            UserError,
            "expected a safetensors file",
        ),
        (lambda folder: hub.write(folder, dict(list(hub.tensors().items())[3:])), UserError, "missing: "),
    ],
    ids=["no config", "no shard", "damaged", "missing tensors"],
)
def test_errors_write_nothing(source, spoil, error, message):
    spoil(source)
    with pytest.raises(error, match=message):
        convert_checkpoint(source, source.with_name("new"))
    assert not source.with_name("new").exists()


def test_invalid_arguments(source):
    with pytest.raises(UserError, match="expected different folders"):
        convert_checkpoint(source, source, overwrite=True)
    with pytest.raises(UserError, match="dtype is 'float7'"):
        convert_checkpoint(source, source.with_name("new"), dtype="float7")
    with pytest.raises(UserError, match="to is 'gguf'"):
        convert_checkpoint(source, source.with_name("new"), to="gguf")


def run_module(*arguments):
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command(source, tmp_path):
    """`python -m convert` takes the flags of `liger-jax convert`, and prints a user's mistake as one line."""
    process = run_module(source, tmp_path / "new", "--dtype", "float32", "--max-shard-size", "20KB", "--to", "hf")
    assert process.returncode == 0, process.stderr
    assert "parameters" in process.stdout
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 3
    hub.write(source, dict(list(hub.tensors().items())[3:]))
    process = run_module(source, tmp_path / "other")
    assert process.returncode == 1
    assert process.stdout == ""
    assert "missing: " in process.stderr and process.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()
