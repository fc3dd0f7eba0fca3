"""to_hf and to_hf_state: the hub's names, shapes and values; files appear together; transformers loads them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

import convert.writer
from convert import from_hf, to_hf, to_hf_state
from liger_jax import Qwen2VL, Qwen2VLConfig
from liger_jax.model.params import param_paths
from tests._support import hub_layout as hub
from tests._support import parity


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Qwen2VL:
    return from_hf(hub.write(tmp_path_factory.mktemp("source"), hub.tensors()), dtype="float32")


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def nested(tree) -> dict:
    """Returns the leaves as nested dicts."""
    result: dict = {}
    for path, leaf in param_paths(tree).items():
        *outer, name = path.split("/")
        inner = result
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[name] = leaf
    return result


# ---- to_hf_state -----------------------------------------------------------------------------------------------------


def test_state_of_a_model_and_of_its_gradients(model):
    state = hub.tensors()
    assert_equal(to_hf_state(model), state)
    gradients = jax.jit(jax.grad(lambda m: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(m))))(model)
    assert_equal(to_hf_state(gradients), {name: 2 * array for name, array in state.items()})


@pytest.mark.parametrize(
    "form", [nnx.state, lambda m: nnx.to_pure_dict(nnx.state(m)), nested], ids=["state", "pure", "dict"]
)
def test_state_of_other_trees(model, form):
    assert_equal(to_hf_state(form(model), config=model.config), hub.tensors())


def test_state_of_numpy_bfloat16(model):
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), nested(model))
    assert_equal(to_hf_state(tree, config=model.config), {k: v.astype(jnp.bfloat16) for k, v in hub.tensors().items()})


def test_state_of_some_parameters(model):
    part = {"language_model": {"norm": {"weight": np.ones(hub.H)}}}
    assert list(to_hf_state(part)) == ["model.norm.weight"]
    with pytest.raises(ValueError, match="language_model/adapter"):
        to_hf_state({"language_model": {"adapter": np.ones(2)}})
    with pytest.raises(ValueError, match="expected 1176 where it has 96"):  # patches of 4 x 4, without a config
        to_hf_state(nested(model))


# ---- to_hf -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(tmp_path, model, dtype):
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    to_hf(model, tmp_path / "new")
    state = load_file(tmp_path / "new" / "model.safetensors") if dtype == "float32" else to_hf_state(model)
    assert_equal(state, {name: array.astype(dtype) for name, array in hub.tensors().items()})
    with safe_open(tmp_path / "new" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == hub.SHAPES  # noqa: SIM118
    again = from_hf(tmp_path / "new", dtype=dtype)
    assert_equal(to_hf_state(again), to_hf_state(model))
    assert again.config == model.config
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_shards_and_index(tmp_path, model):
    to_hf(model, tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 3
    tensors = {}
    for file in files:
        state = load_file(file)
        assert len(state) == 1 or sum(array.nbytes for array in state.values()) <= 10_000
        assert {index["weight_map"][name] for name in state} == {file.name}
        tensors |= state
    assert_equal(tensors, hub.tensors())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert_equal(to_hf_state(from_hf(tmp_path, dtype="float32")), hub.tensors())


def test_tied_model_has_no_head(tmp_path):
    to_hf(from_hf(hub.write(tmp_path / "source", hub.tensors(tied=True), tied=True), dtype="float32"), tmp_path / "new")
    assert_equal(load_file(tmp_path / "new" / "model.safetensors"), hub.tensors(tied=True))
    assert from_hf(tmp_path / "new").config.tie_word_embeddings


def test_eos_and_padding_tokens_are_kept(tmp_path):
    source = hub.write(tmp_path / "source", hub.tensors())
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 8], "pad_token_id": 8, "top_k": 1}')
    to_hf(from_hf(source), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text()) == {
        "eos_token_id": [7, 8],
        "pad_token_id": 8,
    }
    assert Qwen2VLConfig.from_hf(tmp_path / "new") == Qwen2VLConfig.from_hf(source)


def test_failed_write_leaves_the_folder_unchanged(tmp_path, model, monkeypatch):
    to_hf(model, tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    fetch, calls = convert.writer._fetch, iter(range(1000))

    def fail(*arguments):
        if next(calls) % 10 == 9:
            raise OSError("disk full")
        return fetch(*arguments)

    monkeypatch.setattr(convert.writer, "_fetch", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            to_hf(jax.tree.map(jnp.zeros_like, model), tmp_path / name, max_shard_size="10KB")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before


def test_only_an_earlier_checkpoint_is_replaced(tmp_path, model):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "mine.txt").write_text("of another program")
    to_hf(model, tmp_path, max_shard_size="10KB")
    to_hf(model, tmp_path)
    files = ["config.json", "model.safetensors", "params", "tokenizer.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    assert (tmp_path / "params" / "mine.txt").exists()
    to_hf(model, tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_equal(to_hf_state(from_hf(tmp_path, dtype="float32")), hub.tensors())


def test_invalid_models_are_refused_before_writing(tmp_path, model):
    headless = jax.tree.map(lambda leaf: leaf, model)
    headless.lm_head = None
    with pytest.raises(ValueError, match=r"model lacks \['lm_head/weight'\]"):
        to_hf(headless, tmp_path / "new")
    with pytest.raises(ValueError, match=r"not floating point: .*int32"):
        to_hf(jax.tree.map(lambda leaf: leaf.astype(jnp.int32), model), tmp_path / "new")
    for size in ("5 apples", 0, "-1GB"):
        with pytest.raises(ValueError, match=f"max_shard_size is {size!r}"):
            to_hf(model, tmp_path / "new", max_shard_size=size)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        to_hf(model, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_large_parameters_are_rearranged_on_the_device(tmp_path, model, monkeypatch):
    """Writes the same bytes when no parameter counts as small."""
    to_hf(model, tmp_path / "host")
    monkeypatch.setattr(convert.writer, "SMALL_BYTES", 0)
    to_hf(model, tmp_path / "device")
    assert (tmp_path / "host" / "model.safetensors").read_bytes() == (
        tmp_path / "device" / "model.safetensors"
    ).read_bytes()


@pytest.mark.live
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_transformers_loads_the_checkpoint(tmp_path, name):
    """transformers finds every key, and gets the weights and logits of the model that it once saved."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = parity.REFERENCES / f"model_{name}"
    to_hf(from_hf(source, dtype="float32"), tmp_path, max_shard_size="50KB")
    load = transformers.Qwen2VLForConditionalGeneration.from_pretrained
    loaded, report = load(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    expected = load(source)
    assert loaded.dtype == expected.dtype == torch.float32
    assert loaded.generation_config.eos_token_id == expected.generation_config.eos_token_id
    state = expected.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
