"""from_hf loads all layouts of checkpoints, and its errors name damaged files."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert.assemble
from convert import from_hf
from liger_jax import Qwen2VL, QwenVL, QwenVLConfig, save_model
from liger_jax.errors import NotFoundError, UserError
from liger_jax.model.params import param_paths
from tests._support import hub_layout as hub
from tests._support import parity
from tests._support.scripts import run_script


def parameters(model: Qwen2VL) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in param_paths(model).items()}


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)


# ---- valid checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("rename", [str, hub.new_name])
def test_all_names_and_shardings_load(tmp_path, tied, shards, rename):
    state = hub.tensors(tied=tied)
    hub.write(tmp_path, {rename(name): array for name, array in state.items()}, shards=shards, tied=tied)
    model = from_hf(str(tmp_path), dtype="float32")
    assert_equal(parameters(model), hub.expected_parameters(state))
    assert jax.tree.structure(model) == jax.tree.structure(Qwen2VL.abstract(model.config, dtype="float32"))


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float64", "float32"), ("float16", "bfloat16"), ("bfloat16", "float32")]
)
def test_dtypes_are_converted(tmp_path, stored, dtype):
    state = hub.tensors(jnp.dtype(stored))
    model = from_hf(hub.write(tmp_path, state), dtype=dtype)
    assert_equal(
        {path: array.astype(np.float32) for path, array in parameters(model).items()},
        {
            path: array.astype(np.float32).astype(dtype).astype(np.float32)
            for path, array in hub.expected_parameters(state).items()
        },
    )
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {dtype}


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_checkpoints_of_transformers_load(name):
    """The stored checkpoints were written by save_pretrained."""
    from safetensors.numpy import load_file

    from convert import to_hf_state

    folder = parity.REFERENCES / f"model_{name}"
    assert_equal(to_hf_state(from_hf(folder, dtype="float32")), load_file(folder / "model.safetensors"))


def test_tied_checkpoint_may_hold_an_equal_head(tmp_path):
    state = hub.tensors()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
    assert from_hf(hub.write(tmp_path / "equal", state, tied=True)).lm_head is None
    state["lm_head.weight"][-1, -1] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        from_hf(hub.write(tmp_path / "different", state, tied=True))
    state["lm_head.weight"] = state["lm_head.weight"][1:]
    with pytest.raises(ValueError, match="differs"):
        from_hf(hub.write(tmp_path / "shorter", state, tied=True))
    state["lm_head.weight"] = np.array(1, np.float32)  # was an IndexError
    with pytest.raises(ValueError, match="differs"):
        from_hf(hub.write(tmp_path / "number", state, tied=True))


def test_tied_float8_head_ended_in_an_attribute_error(tmp_path):
    import ml_dtypes

    state = hub.tensors()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        from_hf(hub.write(tmp_path, state, tied=True))


@pytest.mark.parametrize(("stored", "dtype"), [("float64", "float32"), ("float32", "bfloat16")])
def test_large_parameters_are_rearranged_on_the_device(tmp_path, monkeypatch, stored, dtype):
    """Loads the same bits when no parameter counts as small and tensors are sent in pieces that do not divide them."""
    hub.write(tmp_path, hub.tensors(stored), shards=2)
    small = from_hf(tmp_path, dtype=dtype)
    monkeypatch.setattr(convert.assemble, "SMALL_BYTES", 0)
    monkeypatch.setattr(convert.assemble, "PIECE_BYTES", 5000)
    assert_equal(parameters(from_hf(tmp_path, dtype=dtype)), parameters(small))


def test_mesh(tmp_path):
    """Loads the same weights on a mesh of 4 devices, split by the model's own rules."""
    hub.write(tmp_path, hub.tensors())
    run_script(
        """
        import os, sys
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax, numpy as np
        import convert.assemble
        from convert import from_hf
        from liger_jax.model.sharding import param_shardings
        mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
        one = from_hf(sys.argv[1])
        expected = jax.tree.leaves(param_shardings(one, mesh))
        for convert.assemble.SMALL_BYTES in (2**24, 0):  # rearranged on the host, on the devices
            four = from_hf(sys.argv[1], mesh=mesh)
            split = 0
            for a, b, sharding in zip(jax.tree.leaves(one), jax.tree.leaves(four), expected, strict=True):
                np.testing.assert_array_equal(a, b)
                assert b.sharding.is_equivalent_to(sharding, b.ndim), (b.sharding, sharding)
                split += not b.sharding.is_fully_replicated
            assert split > 10
        """,
        tmp_path,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory with Linux's /proc")
def test_host_memory(tmp_path):
    """Beyond the model itself, loading 208 MB needs host memory for at most five tensors of 11.5 MB, writing for three.

    Loading takes 2.4 to 3.6 of them, depending on when JAX frees its temporary arrays; a second copy would be eighteen.
    The peak is measured from a point after a small model has been loaded in the same way: JAX and its compiler take memory
    of their own at first use. ru_maxrss would not do, because a process inherits it from its parent. glibc returns each
    freed tensor to the system at once, as the setting below says: by default, every thread keeps some.
    """
    output = run_script(
        """
        import json, math, re, sys
        from pathlib import Path
        import convert.assemble
        from convert import from_hf, to_hf
        from tests._support import hub_layout as hub
        folder = Path(sys.argv[1])
        hub.write(folder / "small", hub.tensors("bfloat16"))
        default = convert.assemble.SMALL_BYTES
        for convert.assemble.SMALL_BYTES in (0, default):  # on the device, on the host
            to_hf(from_hf(folder / "small"), folder / "small2")
        layers, hidden, inner = 6, 1024, 5600
        shapes = {}
        for name, shape in hub.SHAPES.items():
            for i in range(layers if ".layers.0." in name else 1):
                shape = tuple({hub.H: hidden, hub.F: inner}.get(n, n) for n in shape)
                shapes[name.replace(".layers.0.", f".layers.{i}.")] = shape
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        hub.write(folder / "big", {}, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                  num_attention_heads=hidden // hub.D,
                  vision_config=hub.CONFIG["vision_config"] | {"hidden_size": hidden})
        text = json.dumps(header).encode()
        with (folder / "big" / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)  # zeros

        def memory(name):
            return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6

        def peak(run):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the current size
            before = memory("VmRSS")
            result = run()
            return memory("VmHWM") - before, result

        loading, model = peak(lambda: from_hf(folder / "big"))
        writing, _ = peak(lambda: to_hf(model, folder / "written"))
        print(json.dumps([end / 1e6, loading, writing]))
        """,
        tmp_path,
        environment={"MALLOC_MMAP_THRESHOLD_": "1048576"},
    )
    size, loading, writing = json.loads(output)
    assert size > 200
    tensor = 2 * 1024 * 5600 / 1e6
    assert size < loading < size + 5 * tensor
    assert writing < 3 * tensor


# ---- damaged checkpoints --------------------------------------------------------------------------------------------


def test_one_error_lists_all_mismatches(tmp_path):
    """Missing, unexpected, misshapen and integer tensors are listed before anything is placed on a device."""
    state = hub.tensors()
    for name in ("model.layers.1.mlp.up_proj.weight", "visual.merger.ln_q.bias"):
        del state[name]
    state["model.layers.3.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    state["visual.extra"] = np.zeros(2, np.float32)
    state["model.norm.weight"] = np.zeros(hub.H + 1, np.float32)
    state["model.layers.0.mlp.down_proj.weight"] = np.zeros((hub.H, hub.F), np.int8)
    hub.write(tmp_path, state, shards=2)
    before = len(jax.live_arrays())
    with pytest.raises(ValueError) as raised:
        from_hf(tmp_path)
    text = str(raised.value)
    assert len(jax.live_arrays()) == before
    for line in (
        "missing: model.layers.1.mlp.up_proj.weight; visual.merger.ln_q.bias",
        "unexpected: model.layers.3.mlp.up_proj.weight; visual.extra",
        "wrong shape: model.norm.weight [81], expected [80]",
        "not floating point: model.layers.0.mlp.down_proj.weight I8, expected one of",
        str(tmp_path),
    ):
        assert line in text


def quantized_state(*suffixes):
    """Returns the weights with those of the layers' linear modules replaced by these integer tensors."""
    state = {}
    for name, array in hub.tensors("float16").items():
        if "layers." in name and name.endswith("proj.weight"):
            state |= {name.removesuffix("weight") + suffix: np.zeros((2, 2), np.int32) for suffix in suffixes}
        else:
            state[name] = array
    return state


@pytest.mark.parametrize(
    ("suffixes", "settings", "method"),
    [
        (("qweight", "qzeros", "scales"), {"quant_method": "awq", "bits": 4}, "awq"),
        (("weight",), {"quant_method": "fp8"}, "fp8"),
        (("weight",), {"load_in_4bit": True}, "an unnamed method"),
        (("qweight", "qzeros", "scales"), None, "AWQ or GPTQ"),
        (("weight", "weight.absmax", "weight.quant_map"), None, "bitsandbytes"),
        (("weight", "SCB"), None, "bitsandbytes"),
        (("weight_packed", "weight_scale"), None, "compressed-tensors or FP8"),
    ],
)
def test_quantized_checkpoint_was_refused_with_a_list_of_tensors(tmp_path, suffixes, settings, method):
    """One sentence names the method, with quantization_config and without."""
    hub.write(tmp_path, quantized_state(*suffixes), quantization_config=settings)
    with pytest.raises(UserError, match=f"quantized with {method}; expected unquantized weights") as raised:
        from_hf(tmp_path)
    assert len(str(raised.value)) < 350 + len(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_gguf_is_refused_by_name(tmp_path):
    hub.write(tmp_path, {"blk.0.attn_q.weight": np.zeros((2, 2), np.int8)})
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight: the checkpoint is quantized with GGUF"):
        from_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "q4.gguf")
    with pytest.raises(UserError, match=r"only as GGUF \['q4\.gguf'\]; expected unquantized weights"):
        from_hf(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_checkpoint_was_loaded(tmp_path, dtype, value):
    state = hub.tensors(jnp.dtype(dtype))
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][-1, -1] = value
    hub.write(tmp_path, state)
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} holds NaN or infinity"):
        from_hf(tmp_path, dtype="float32")
    model = from_hf(tmp_path, dtype="float32", allow_non_finite=True)
    loaded = parameters(model)["language_model/layers/mlp/up_proj/kernel"]
    np.testing.assert_array_equal(loaded[1, -1, -1], np.float32(value))


def test_overflowing_checkpoint_was_loaded_with_infinite_weights(tmp_path):
    """Weights that float16 cannot hold are refused by name instead of becoming infinite."""
    state = hub.tensors(jnp.dtype("bfloat16"))
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][-1, -1] = -70144
    hub.write(tmp_path, state)
    message = rf"model\.safetensors: {name} holds 70144, which overflows float16; expected dtype bfloat16 or float32"
    with pytest.raises(UserError, match=message):
        from_hf(tmp_path, dtype="float16")
    loaded = parameters(from_hf(tmp_path, dtype="float16", allow_non_finite=True))
    assert loaded["language_model/layers/mlp/up_proj/kernel"][1, -1, -1] == -np.inf


def test_many_missing_tensors_are_listed_by_layer(tmp_path):
    state = {name: array for name, array in hub.tensors().items() if "mlp" not in name and "attn" not in name}
    with pytest.raises(ValueError, match=r"model\.layers\.\{0,1,2\}\.mlp\.up_proj\.weight"):
        from_hf(hub.write(tmp_path, state))


def test_untied_checkpoint_needs_its_head(tmp_path):
    message = r"(?s)set tie_word_embeddings to true in config\.json\).*missing: lm_head\.weight"
    for tied in (False, None):  # null: neither the root nor text_config says it
        with pytest.raises(UserError, match=message):
            from_hf(hub.write(tmp_path, hub.tensors(tied=True), tied=tied))


def test_tensor_under_two_names_is_refused(tmp_path):
    state = hub.tensors()
    state["model.language_model.norm.weight"] = state["model.norm.weight"]
    with pytest.raises(ValueError, match=r"stored twice: model\.(language_model\.)?norm\.weight"):
        from_hf(hub.write(tmp_path, state))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: data[:-100], "damaged, or its download was cut short"),
        (lambda data: data[:200], "damaged, or its download was cut short"),
        (lambda data: b"\xff" * 500, "damaged"),
        (lambda data: b"", "is empty; expected a safetensors file"),
        (lambda data: b"<!DOCTYPE html><html>not found</html>" + b" " * 500, "is a web page"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    ],
    ids=["truncated", "header_truncated", "garbage", "empty", "html", "lfs"],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_error_names_the_damaged_file(tmp_path, content, message, shards):
    hub.write(tmp_path, hub.tensors(), shards=shards)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as raised:
        from_hf(tmp_path)
    assert str(file) in str(raised.value)


def test_index_that_disagrees_with_its_shards(tmp_path):
    index = hub.write(tmp_path, hub.tensors(), shards=2) / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def load(**changes):
        index.write_text(json.dumps(good | changes))
        return from_hf(tmp_path)

    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    moved = next(name for name, file in good["weight_map"].items() if file == first)
    with pytest.raises(ValueError, match=f"{moved} is not in {second}; {moved} in {first} is not in the index"):
        load(weight_map=good["weight_map"] | {moved: second})
    for odd in ("", True, [first]):  # found by fuzzing
        with pytest.raises(UserError, match="names files outside its folder"):
            load(weight_map=good["weight_map"] | {moved: odd})
    with pytest.raises(ValueError, match="names files that do not exist"):
        load(weight_map=good["weight_map"] | {moved: "x" * 5000})
    with pytest.raises(ValueError, match=f"{moved} in {first} is not in the index"):
        load(weight_map={name: file for name, file in good["weight_map"].items() if name != moved})
    with pytest.raises(ValueError, match=r"outside its folder, \['\.\./elsewhere"):
        load(weight_map=good["weight_map"] | {moved: "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match=r"weight_map is \{\}"):
        load(weight_map={})
    (tmp_path / second).unlink()
    with pytest.raises(FileNotFoundError, match=second):
        load()
    index.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"index\.json is a Git LFS pointer .*expected valid JSON"):
        from_hf(tmp_path)
    index.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no weights, only \[.*\]; expected model\.safetensors or .*index\.json"
    ):
        from_hf(tmp_path)


def test_orbax_folder_is_named(tmp_path):
    save_model(QwenVL.init(QwenVLConfig.tiny()), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is an Orbax folder; expected .* convert\.open_model reads both"):
        from_hf(tmp_path)


def test_missing_or_damaged_configuration(tmp_path):
    config = hub.write(tmp_path, hub.tensors()) / "config.json"
    config.write_text('{"model_type": "qwen2_vl"')
    with pytest.raises(ValueError, match=r"config\.json is malformed .*expected valid JSON"):
        from_hf(tmp_path)
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'llama'; expected 'qwen2_vl'"):
        from_hf(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        from_hf(tmp_path)


def test_path_that_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a file; expected a checkpoint folder"):
        from_hf(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        from_hf(tmp_path / "nothing" / "here")


@pytest.mark.parametrize("dtype", ["int8", "float63", "float64"])
def test_dtype_must_be_floating_point(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; expected"):
        from_hf(tmp_path, dtype=dtype)


def test_pickles_need_permission(tmp_path, monkeypatch):
    state = hub.tensors()
    hub.write(tmp_path, state)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match=r"only as pickle files \['pytorch_model.bin'\].*allow_pickle=True"):
        from_hf(tmp_path)
    with monkeypatch.context() as without_torch:
        without_torch.setitem(sys.modules, "torch", None)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle.*expected torch to be installed"):
            from_hf(tmp_path, allow_pickle=True)
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is unreadable .*expected a pickle"):
        from_hf(tmp_path, allow_pickle=True)
    tensors = {name: torch.from_numpy(array).bfloat16() for name, array in state.items()}
    torch.save(tensors, file)
    assert_equal(
        parameters(from_hf(tmp_path, dtype="float32", allow_pickle=True)),
        hub.expected_parameters({name: tensor.float().numpy() for name, tensor in tensors.items()}),
    )
    file.unlink()
    parts = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    for part, name in zip(parts, names, strict=True):
        torch.save(part, tmp_path / name)
    weight_map = {tensor: name for part, name in zip(parts, names, strict=True) for tensor in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert from_hf(tmp_path, allow_pickle=True).config.text.hidden_size == hub.H


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda tensor: {"state_dict": {"a": tensor}},
            "holds 'state_dict' of type dict; expected {tensor name: tensor}",
        ),
        (lambda tensor: {"a": tensor, "step": 3}, "holds 'step' of type int"),
        (lambda tensor: {1: tensor}, "holds 1 of type Tensor"),
        (lambda tensor: [tensor], "holds list"),
        (lambda tensor: {"a": tensor.to_sparse()}, "holds 'a', which is sparse"),
        (lambda tensor: {"a": tensor.to("meta")}, "holds 'a', which is on the meta device"),
    ],
)
def test_pickles_of_other_contents_ended_in_an_attribute_error(tmp_path, content, message):
    torch = pytest.importorskip("torch")
    hub.write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    torch.save(content(torch.ones(2)), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"pytorch_model\.bin {message}"):
        from_hf(tmp_path, allow_pickle=True)


def test_pickled_parameters_ended_in_a_runtime_error(tmp_path):
    """A state_dict(keep_vars=True) holds parameters, which record gradients."""
    torch = pytest.importorskip("torch")
    state = hub.tensors()
    hub.write(tmp_path, state)
    (tmp_path / "model.safetensors").unlink()
    parameters_of = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in state.items()}
    torch.save(parameters_of, tmp_path / "pytorch_model.bin")
    assert_equal(
        parameters(from_hf(tmp_path, dtype="float32", allow_pickle=True)),
        hub.expected_parameters(state),
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["global_step9/", "scheduler.pt", "training_args.bin"], r"is a DeepSpeed checkpoint, \['global_step9'\]"),
        (["pytorch_model_fsdp_0/", "training_args.bin"], "is an FSDP checkpoint.*accelerate merge-weights"),
        ([".metadata", "__0_0.distcp"], "is a torch.distributed checkpoint.*accelerate merge-weights"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter; expected its base model"),
        (["checkpoint-20/", "checkpoint-9/"], r"has its weights in \['checkpoint-20', 'checkpoint-9'\]"),
        (["training_args.bin", "optimizer.pt"], r"has no weights, only .*; expected model\.safetensors"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_checkpoints_of_trainers_were_called_pickles(tmp_path, names, message, config):
    """training_args.bin and scheduler.pt hold no weights, so allow_pickle=True does not help."""
    hub.write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("{}")
    if not config:
        (tmp_path / "config.json").unlink()
        message = "config.json does not exist" if "has no weights" in message else message
    with pytest.raises(NotFoundError, match=message):
        from_hf(tmp_path)
