"""Checkpoints and adapters in Hugging Face's format: every mismatch and every damaged file is a UserError."""

import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import example
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from convert import from_hf, load_adapter
from tests._support import hub_layout, parity
from tests._support.fuzzing import ODD_TEXTS, damaged, damaged_bytes, fuzz, json_values, only_user_errors, pick
from tests.fuzz.test_configs import keys_of

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TENSORS = hub_layout.tensors()
SINGLE = save(TENSORS, metadata={"format": "pt"})
NAMES = [*TENSORS, *map(hub_layout.new_name, TENSORS), "model.layers.9.mlp.up_proj.weight", "a.qweight", "x"]


def check_model(folder) -> None:
    """Loads a checkpoint, and checks that its model has finite weights of the shapes in its configuration."""
    with only_user_errors():
        model = from_hf(folder, dtype="float32")
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))


@pytest.fixture
def folder(tmp_path_factory):
    """Returns the one folder that all examples write."""
    folder = tmp_path_factory.getbasetemp() / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    return hub_layout.write(folder, TENSORS)


@example(hub=hub_layout.CONFIG | {"num_hidden_layers": 9999})  # the error named every tensor of every layer
@fuzz(hub=damaged(st.just(hub_layout.CONFIG | {"tie_word_embeddings": False}), keys_of(hub_layout.CONFIG)))
def test_checkpoint_configs(hub, folder):
    """Valid tensors with a damaged config.json."""
    (folder / CONFIG).write_text(json.dumps(hub))
    check_model(folder)


@st.composite
def changed_tensors(draw, tensors, names):
    """Draws tensors with up to three changes: missing, renamed, extra, or of another shape, dtype or value."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(pick(list(tensors)))
        change = draw(st.sampled_from(["remove", "rename", "extra", "shape", "dtype", "value", "all"]))
        array = tensors[name]
        if change == "remove" and len(tensors) > 1:
            del tensors[name]
        elif change == "rename":
            tensors[draw(pick(names))] = tensors.pop(name)
        elif change == "extra":
            tensors[draw(pick(names))] = array
        elif change == "shape":
            tensors[name] = draw(st.sampled_from([array[:1], array[None], array.ravel(), array.T.copy(), array[:0]]))
        elif change == "value" and array.size and array.dtype.kind == "f":
            array = array.copy()
            array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from([np.nan, np.inf, 3e38, -0.0]))
            tensors[name] = array
        else:
            dtype = draw(st.sampled_from(["f2", "f8", "i4", "u1", "?"]))
            chosen = tensors if change == "all" else [name]
            with np.errstate(all="ignore"):
                tensors |= {key: tensors[key].astype(dtype) for key in chosen}
    return tensors


@fuzz(tensors=changed_tensors(TENSORS, NAMES), tied=st.booleans())
def test_checkpoint_tensors(tensors, tied, folder):
    """A valid config.json with other tensors."""
    hub_layout.write(folder, tensors, tied=tied)
    check_model(folder)


@fuzz(content=damaged_bytes(st.just(SINGLE)) | damaged_bytes(st.just(b"version https://git-lfs")))
def test_weight_files(content, folder):
    """A weight file with damaged bytes, most of them in its header."""
    (folder / WEIGHTS).write_bytes(content)
    check_model(folder)


FAMILIES = {family: parity.REFERENCES / f"model_{family}" for family in ("qwen2_5_vl", "qwen3_vl")}
FAMILY_CONFIGS = {family: json.loads((source / CONFIG).read_text()) for family, source in FAMILIES.items()}
FAMILY_TENSORS = {family: load_file(source / WEIGHTS) for family, source in FAMILIES.items()}


@st.composite
def damaged_checkpoints(draw):
    """Draws a config.json and tensors, one of them changed; names may be those of another family."""
    family = draw(pick(list(FAMILIES)))
    config, tensors = FAMILY_CONFIGS[family], FAMILY_TENSORS[family]
    if draw(st.booleans()):
        return draw(damaged(st.just(config), keys_of(*FAMILY_CONFIGS.values()))), tensors
    names = [*(name for tensors in FAMILY_TENSORS.values() for name in tensors), *NAMES[-3:]]
    return config, draw(changed_tensors(tensors, names))


@fuzz(checkpoint=damaged_checkpoints())
def test_checkpoints_of_newer_families(checkpoint, folder):
    """A checkpoint of Qwen2.5-VL or Qwen3-VL with a damaged config.json, or with other tensors."""
    config, tensors = checkpoint
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / WEIGHTS)
    check_model(folder)


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WEIGHT_MAP = {name: SHARDS[i % 2] for i, name in enumerate(TENSORS)}
FILE_NAMES = pick([*SHARDS, "config.json", "model-00003-of-00002.safetensors", *ODD_TEXTS])


@fuzz(
    index=damaged(
        st.just({"metadata": {"total_size": 1}, "weight_map": WEIGHT_MAP}),
        pick([*NAMES, "weight_map", "metadata"]),
        FILE_NAMES | json_values(),
    )
)
def test_indexes(index, folder):
    """Two valid shards with a damaged index."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    for shard in SHARDS:
        save_file({name: TENSORS[name] for name in TENSORS if WEIGHT_MAP[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps(index))
    check_model(folder)


ADAPTER = parity.REFERENCES / "adapter"
ADAPTER_OPTIONS = json.loads((ADAPTER / ADAPTER_CONFIG).read_text())


@fuzz(
    options=damaged(st.just(ADAPTER_OPTIONS), keys_of(ADAPTER_OPTIONS)),
    content=st.none() | damaged_bytes(st.just((ADAPTER / ADAPTER_WEIGHTS).read_bytes())),
)
def test_adapters(options, content, tmp_path_factory):
    """An adapter with damaged options, and sometimes also damaged weights."""
    folder = tmp_path_factory.getbasetemp() / "adapter"
    shutil.copytree(ADAPTER, folder, dirs_exist_ok=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(options))
    if content is not None:
        (folder / ADAPTER_WEIGHTS).write_bytes(content)
    with only_user_errors():
        model = load_adapter(parity.model(), folder)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))
