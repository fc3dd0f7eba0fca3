"""PEFT adapters: names, values and gradients equal PEFT's, and errors list all mismatches."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import from_hf, load_adapter, save_adapter, to_hf, to_hf_state
from convert.adapter import adapted_rows, adapter_table, read_adapter_config
from convert.table import SPELLING, current_name, table_of
from liger_jax import QwenVL, QwenVLConfig, loss_fn
from liger_jax.errors import UserError
from liger_jax.model.lora import TEXT_TARGETS, LoraOptions, add_lora, find_targets, lora_config, lora_leaves, merge_lora
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import param_shardings
from tests._support import family_parity, parity

PEFT = parity.REFERENCES / "adapter"  # written by PEFT 0.21: make_adapter.py
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALL_TARGETS = list(find_targets(QwenVL.abstract(QwenVLConfig.tiny())))

# PEFT's names of the modules of the model with 2 + 2 layers, and their (inputs, outputs).
TEXT = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 48),
    "mlp.up_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}
VISION = {"attn.qkv": (24, 72), "attn.proj": (24, 24), "mlp.fc1": (24, 96), "mlp.fc2": (96, 24)}
MODULES = {
    **{f"base_model.model.model.language_model.layers.{i}.{n}": size for i in range(2) for n, size in TEXT.items()},
    **{f"base_model.model.model.visual.blocks.{i}.{n}": size for i in range(2) for n, size in VISION.items()},
    "base_model.model.model.visual.merger.mlp.0": (96, 96),
    "base_model.model.model.visual.merger.mlp.2": (96, 32),
}


@functools.cache
def from_peft():
    return load_adapter(parity.model(), PEFT)


@pytest.fixture
def folder(tmp_path):
    """Returns a copy of PEFT's adapter."""
    return shutil.copytree(PEFT, tmp_path / "adapter")


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    return config


# ---- against PEFT


def test_every_adapted_weight_is_in_the_table():
    for family in SPELLING:
        rows, targets = adapted_rows(family), find_targets(QwenVL.abstract(QwenVLConfig.tiny(family=family)))
        assert set(targets.values()) <= set(rows) and len(adapter_table(family)) == 2 * len(rows)
        assert {row.path for row in rows.values()} <= {row.path for row in table_of(family)}


def test_logits_loss_and_gradients_equal_peft(tmp_path):
    """The adapter covers all linear layers; the input has one image; the tolerance is 2e-4."""
    model = from_peft()
    assert lora_config(model) == LoraOptions(rank=3, alpha=6, targets=ALL_TARGETS)
    batch, tokens, expected = parity.common(parity.batch("image")), parity.tokens("image"), parity.stored("adapter")
    logits = np.asarray(jax.jit(lambda model, batch: model(batch))(model, batch))
    logits = logits[: tokens.shape[0], : tokens.shape[1]]
    parity.assert_near(logits[tokens], expected["logits"][tokens], name="logits")
    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(model, batch)
    parity.assert_near(loss, expected["loss"], name="loss")
    save_adapter(grads, tmp_path)  # gradients have the structure of the model
    saved = load_file(tmp_path / WEIGHTS)
    assert saved.keys() == {key.removeprefix("grad/") for key in expected if key.startswith("grad/")}
    for name, value in saved.items():
        parity.assert_near(value, expected[f"grad/{name}"], name=name)


def test_saved_adapter_equals_pefts(tmp_path):
    """Names, shapes, dtypes and bits are equal; every option of the configuration has PEFT's value."""
    save_adapter(from_peft(), tmp_path / "new", base_model="Qwen/Qwen2-VL-2B-Instruct")
    saved, stored = load_file(tmp_path / "new" / WEIGHTS), load_file(PEFT / WEIGHTS)
    assert {name: (a.shape, a.dtype, a.tobytes()) for name, a in saved.items()} == {
        name: (a.shape, a.dtype, a.tobytes()) for name, a in stored.items()
    }
    expected = {f"{module}.lora_A.weight": (3, inputs) for module, (inputs, _) in MODULES.items()}
    expected |= {f"{module}.lora_B.weight": (outputs, 3) for module, (_, outputs) in MODULES.items()}
    assert {name: a.shape for name, a in saved.items()} == expected
    config, peft_config = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path / "new", PEFT))
    assert config.pop("base_model_name_or_path") == "Qwen/Qwen2-VL-2B-Instruct"
    assert config.pop("target_modules") == ALL_TARGETS
    assert config == {name: peft_config[name] for name in config}


def test_merged_weights_follow_pefts_formula():
    """Each merged weight is W + alpha / r * lora_B @ lora_A, computed in float64."""
    merged, base, lora = to_hf_state(merge_lora(from_peft())), to_hf_state(parity.model()), load_file(PEFT / WEIGHTS)
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        prefix = "model.language_model." if name.startswith("model.") else "model."
        module = f"base_model.model.{prefix}{name.removeprefix('model.').removesuffix('.weight')}"
        if module in MODULES:
            a, b = (lora[f"{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
            weight = weight + 6 / 3 * b @ a
        parity.assert_near(merged[name], weight, tolerance=1e-6, name=name)


# ---- round trips


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["q_proj", "down_proj"], "rank": 1},
        {"targets": ["attn.proj", "mlp.2"], "rank": 5, "alpha": 2.5, "rslora": True},
    ],
)
def test_round_trip(tmp_path, options):
    """Some targets, odd ranks and rsLoRA keep their structure and bits."""
    model = add_lora(parity.model(), **options)
    save_adapter(model, tmp_path)
    loaded = load_adapter(parity.model(), tmp_path)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, loaded, model)


def test_dtypes(tmp_path):
    """A and B are written in their dtype, and loaded in the requested one for weights of any dtype."""
    plain = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parity.model())
    model = add_lora(plain, targets=["v_proj"], dtype="bfloat16")
    save_adapter(model, tmp_path)
    assert {a.dtype.name for a in load_file(tmp_path / WEIGHTS).values()} == {"bfloat16"}
    for dtype in ("float32", "bfloat16"):
        loaded = lora_leaves(load_adapter(plain, tmp_path, dtype=dtype))
        for path, leaf in lora_leaves(model).items():
            assert loaded[path].dtype == dtype
            np.testing.assert_array_equal(loaded[path], leaf)


def test_loads_onto_a_mesh():
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    base = from_hf(parity.REFERENCES / "model_untied", dtype="float32", mesh=mesh)
    loaded, expected = load_adapter(base, PEFT), from_peft()
    shardings = param_paths(param_shardings(expected, mesh))
    for path, leaf in param_paths(expected).items():
        assert param_paths(loaded)[path].sharding.is_equivalent_to(shardings[path], leaf.ndim), path
        np.testing.assert_array_equal(param_paths(loaded)[path], leaf)


def test_names_of_older_transformers(folder):
    """Adapters from before 4.52 have the names `model.layers.*` and `visual.*`."""
    tensors = {
        name.replace("model.language_model.", "model.").replace("model.model.visual.", "model.visual."): value
        for name, value in load_file(folder / WEIGHTS).items()
    }
    assert "base_model.model.visual.merger.mlp.0.lora_A.weight" in tensors
    assert "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight" in tensors
    save_file(tensors, folder / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(parity.model(), folder), from_peft())


@pytest.mark.parametrize(
    ("modules", "excluded", "targets"),
    [
        ("all-linear", None, ALL_TARGETS),
        ("all-linear", ["visual.merger.mlp.0", "2", "qkv", "fc1", "fc2", "attn.proj"], list(TEXT_TARGETS)),
        (r"^model\.language_model(?=\.).*\.(q_proj|v_proj)$", None, ["q_proj", "v_proj"]),  # as ms-swift writes it
        (r"^(?!.*visual).*(?:o_proj|proj).*", r".*mlp.*", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (["fc1", "mlp.0", "up_proj"], None, ["up_proj", "fc1", "mlp.0"]),
        (["visual.merger.mlp.2", "proj"], None, ["attn.proj", "mlp.2"]),
    ],
)
def test_target_modules(folder, modules, excluded, targets):
    change_config(folder, target_modules=modules, exclude_modules=excluded)
    assert read_adapter_config(folder / CONFIG, parity.model()).targets == tuple(targets)


def test_expression_counted_for_the_names_of_every_version(folder):
    """Under the names of older versions, "not language_model" holds for all layers. The tensors tell the version."""
    change_config(folder, target_modules=r"^(?!.*(?:language_model|patch_embed)).*(?:proj|qkv|fc1|fc2|mlp\.0|mlp\.2)$")
    save_file({n: v for n, v in load_file(folder / WEIGHTS).items() if "visual" in n}, folder / WEIGHTS)
    targets = lora_config(load_adapter(parity.model(), folder)).targets
    assert targets == ("qkv", "attn.proj", "fc1", "fc2", "mlp.0", "mlp.2")


# ---- errors


def test_one_error_lists_all_mismatches(folder):
    tensors = load_file(folder / WEIGHTS)
    layer = "base_model.model.model.language_model.layers.1."
    del tensors[layer + "mlp.up_proj.lora_B.weight"]
    tensors[layer + "mlp.down_proj.lora_A.weight"] = np.zeros((4, 48), np.float32)
    tensors[layer + "mlp.gate_proj.lora_A.weight"] = np.zeros((3, 32), np.int32)
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 32), np.float32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError) as caught:
        load_adapter(parity.model(), folder)
    assert str(caught.value).splitlines()[1:] == [
        f"  missing: {layer}mlp.up_proj.lora_B.weight",
        "  unexpected: base_model.model.lm_head.lora_A.weight",
        f"  wrong shape: {layer}mlp.down_proj.lora_A.weight [4, 48], expected [3, 48]",
        f"  not floating point: {layer}mlp.gate_proj.lora_A.weight I32, expected one of ['F64', 'F32', 'F16', 'BF16']",
    ]


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0, 1]},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 2]]},
        {"init_lora_weights": "pissa_niter_4"},
        {"an_option_of_the_future": "on"},
        {"peft_type": "IA3"},
        {"use_rslora": "false"},
        {"lora_alpha": True},
        {"r": None},
        {"r": 0},
        {"target_modules": "("},
        {"target_modules": ["lm_head"]},
        {"target_modules": 5},
        {"exclude_modules": [None]},
    ],
)
def test_unsupported_options_are_refused(folder, option):
    change_config(folder, **option)
    with pytest.raises(ValueError, match=rf"{CONFIG}: .*{next(iter(option))}"):
        load_adapter(parity.model(), folder)


def test_options_without_effect(folder):
    """Options that only affect training, and options that are off, do not change the adapter."""
    config = change_config(folder, lora_dropout=0.05, init_lora_weights="gaussian", an_option_of_the_future=None)
    assert config["inference_mode"] is True
    jax.tree.map(np.testing.assert_array_equal, load_adapter(parity.model(), folder), from_peft())


def test_adapter_of_some_layers_is_refused(folder):
    """If the target modules name single layers, the tensors of all other layers are missing."""
    change_config(folder, target_modules=["model.language_model.layers.0.mlp.up_proj"])
    name = "base_model.model.model.language_model.layers.{}.mlp.up_proj.lora_{}.weight"
    tensors = load_file(folder / WEIGHTS)
    save_file({n: tensors[n] for n in (name.format(0, "A"), name.format(0, "B"))}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"missing: .*layers\.1\.mlp\.up_proj\.lora_A"):
        load_adapter(parity.model(), folder)


@pytest.mark.parametrize("name", ["non_lora_state_dict.bin", "non_lora_trainables.bin"])
def test_fully_trained_weights_next_to_an_adapter_were_left_unread(folder, name):
    (folder / name).write_bytes(b"weights of the merger")
    with pytest.raises(UserError, match=f"has {name} next to the adapter: weights that were trained in full"):
        load_adapter(parity.model(), folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_adapter_was_loaded(folder, value):
    state = load_file(folder / WEIGHTS)
    name = sorted(state)[3]
    state[name][-1, -1] = value
    save_file(state, folder / WEIGHTS)
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity; expected finite numbers"):
        load_adapter(parity.model(), folder)
    load_adapter(parity.model(), folder, allow_non_finite=True)


def test_missing_or_damaged_files(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is damaged.*expected a safetensors file"):
        load_adapter(parity.model(), folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {WEIGHTS}, only \['{CONFIG}'\]"):
        load_adapter(parity.model(), folder)


def test_models_with_and_without_lora_are_refused(tmp_path):
    with pytest.raises(ValueError, match="already has LoRA"):
        load_adapter(from_peft(), PEFT)
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_adapter(parity.model(), tmp_path / "new")
    for write in (lambda: to_hf(from_peft(), tmp_path / "new"), lambda: to_hf_state(from_peft())):
        with pytest.raises(ValueError, match=r"has LoRA .*merge_lora.*save_adapter"):
            write()
    assert not (tmp_path / "new").exists()


def test_adapter_and_checkpoint_share_a_folder(tmp_path):
    to_hf(parity.model(), tmp_path)
    before = {file.name for file in tmp_path.iterdir()}
    save_adapter(from_peft(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == before | {WEIGHTS, CONFIG}


# ---- the families


def hub_modules(family):
    """Returns the names of all modules of transformers' model with a matrix, from a checkpoint that transformers wrote."""
    tensors = load_file(parity.REFERENCES / f"model_{family}" / "model.safetensors")
    names = [
        name.removesuffix(".weight") for name, value in tensors.items() if name.endswith(".weight") and value.ndim > 1
    ]
    return [current_name(name) for name in names if not name.endswith(("embed_tokens", "lm_head", "pos_embed"))]


def peft_adapts(target_modules, module):
    """PEFT's rule: a regular expression matches the whole name, a list is one of names or of their last parts."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in target_modules)


@pytest.mark.parametrize("family", family_parity.FAMILIES)
def test_families_equal_peft(family, tmp_path):
    """Logits, loss and gradients of A and B, and the saved tensors. PEFT finds gate_proj in both towers of Qwen2.5-VL."""
    source, expected = parity.REFERENCES / f"adapter_{family}", parity.stored(f"adapter_{family}")
    model = load_adapter(family_parity.model(family), source)
    text_and_vision = ("q_proj", "gate_proj", "visual.gate_proj")
    assert lora_config(model).targets == (text_and_vision if family == "qwen2_5_vl" else tuple(find_targets(model)))
    inputs = family_parity.inputs(family, "batch")
    batch, mask = family_parity.common(model.config, inputs), inputs["attention_mask"] > 0
    logits = np.asarray(jax.jit(lambda model, batch: model(batch))(model, batch))
    parity.assert_near(logits[:2, : mask.shape[1]][mask], expected["logits"][mask], name="logits")
    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(model, batch)
    parity.assert_near(loss, expected["loss"], name="loss")
    save_adapter(grads, tmp_path / "grads")  # gradients have the structure of the model
    saved = load_file(tmp_path / "grads" / WEIGHTS)
    assert saved.keys() == {key.removeprefix("grad/") for key in expected if key.startswith("grad/")}
    for name, value in saved.items():
        parity.assert_near(value, expected[f"grad/{name}"], name=name)
    save_adapter(model, tmp_path)
    written, stored = load_file(tmp_path / WEIGHTS), load_file(source / WEIGHTS)
    assert {name: value.tobytes() for name, value in written.items()} == {
        name: value.tobytes() for name, value in stored.items()
    }


@pytest.mark.parametrize(
    ("family", "targets", "modules"),
    [
        ("qwen2_5_vl", ["q_proj", "o_proj"], ["q_proj", "o_proj"]),
        ("qwen2_5_vl", ["up_proj", "visual.up_proj", "mlp.0"], ["up_proj", "mlp.0"]),
        ("qwen2_5_vl", ["gate_proj", "q_proj"], r".*\.(layers\.\d+\.self_attn\.q_proj|layers\.\d+\.mlp\.gate_proj)"),
        ("qwen2_5_vl", ["visual.down_proj"], r".*\.(blocks\.\d+\.mlp\.down_proj)"),
        ("qwen3_vl", ["linear_fc1", "v_proj"], ["v_proj", "linear_fc1"]),
        ("qwen3_vl", ["mlp.linear_fc2", "merger.linear_fc1"], ["mlp.linear_fc2", "merger.linear_fc1"]),
        ("qwen3_vl", ["deepstack.fc1"], r".*\.(visual\.deepstack_merger_list\.\d+\.linear_fc1)"),
        ("qwen3_vl", "all-linear", None),
    ],
)
def test_target_modules_of_families(family, targets, modules, tmp_path):
    """PEFT adapts exactly the modules whose tensors are written, and `read_adapter_config` reads the same layers."""
    model = add_lora(family_parity.model(family), rank=2, targets=targets)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert modules is None or written == modules
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in load_file(tmp_path / WEIGHTS)}
    assert {module for module in hub_modules(family) if peft_adapts(written, module)} == adapted
    assert read_adapter_config(tmp_path / CONFIG, family_parity.model(family)) == lora_config(model)


@pytest.mark.parametrize(("family", "layer"), [("qwen2_5_vl", "blocks/mlp/gate_proj"), ("qwen3_vl", "deepstack/fc2")])
def test_merging_into_stacks_of_the_tower(family, layer):
    """Each merged kernel is W + alpha / r * A B, computed in float64, for every layer or merger of the stack."""
    model = load_adapter(family_parity.model(family), parity.REFERENCES / f"adapter_{family}")
    before, after = param_paths(model), param_paths(merge_lora(model))
    a, b = (np.asarray(before[f"visual/{layer}/lora/{half}"], np.float64) for half in "ab")
    expected = np.asarray(before[f"visual/{layer}/kernel"], np.float64) + 6 / 3 * a @ b
    parity.assert_near(after[f"visual/{layer}/kernel"], expected, tolerance=1e-6)
