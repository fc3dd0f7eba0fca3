"""`liger-jax bench`: its cases and formulas are right; what it measures ends in a file, a plot and the README."""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import liger_jax.cli as cli
from benchmarks import cases, mixed, model, ops, peers, start, tables, work
from liger_jax import Qwen2VLConfig

SMALL = [
    cases.norm("rms_norm", 6, 32),
    cases.norm("add_rms_norm", 6, 32),
    cases.norm("layer_norm", 6, 32),
    cases.rotation(2, 5, 4, 2, 8),
    cases.rotation(2, 5, 4, 2, 8, (1, 2, 1)),
    cases.gate("swiglu", 6, 32),
    cases.gate("geglu", 6, 32),
    cases.gate("quick_gelu", 6, 32),
    cases.token_loss("cross_entropy", 8, 0, 50, ignored=0.4),
    cases.token_loss("linear_cross_entropy", 8, 16, 50, ignored=0.4),
    cases.text_attention(2, 8, 4, 2, 16),
    cases.image_attention(2, 2, 16, (4, 4), 2, "two images a row"),
    cases.image_attention(1, 2, 16, (2, 6, 4), 4, "images of mixed sizes"),
]
of_each_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)


def test_the_cases_cover_every_operation_and_build():
    import pallas_kernels

    assert {case.op for case in cases.CASES} == set(cases.FORMULAS)
    # decode_attention works in place, on a cache: it is measured with all of generation
    assert set(cases.FORMULAS) == set(pallas_kernels.__all__) - {"Segments", "find_segments", "decode_attention"}
    every = [*cases.CASES, *(case for *_, case in cases.sweep())]
    for group in (cases.CASES, [case for *_, case in cases.sweep()]):
        assert len({case.name for case in group}) == len(group)
    for case in {case.name: case for case in every}.values():
        operands = {name: jax.ShapeDtypeStruct(normal.shape, jnp.bfloat16) for name, normal in case.arrays.items()}
        operands |= case.constants()
        formula = functools.partial(cases.FORMULAS[case.op], **case.options)
        ours, plain = (jax.eval_shape(f, **operands) for f in (ops.implementations(case)["ours"], formula))
        assert [out.shape for out in jax.tree.leaves(ours)] == [out.shape for out in jax.tree.leaves(plain)]
    assert sum(cases.IMAGES) == 16_384 and all(length % 4 == 0 for length in cases.IMAGES)


@of_each_case
def test_values_agree_with_the_plain_formula(case):
    """The operation against the formula in float32, results and gradients; and the formula in the inputs' own bfloat16."""
    given = ops.inputs(case)
    expected = ops.reference(case, *given)
    functions = ops.implementations(case)
    names = [name for name in ("ours", "xla", "jnp") if name in functions]
    for name in names:
        found = jax.jit(ops.program(functions[name], "both"))(*given)
        assert found.keys() == expected.keys() == {*expected, *(f"d{array}" for array in case.arrays)}
        assert all(error < 1e-2 for error in ops.errors(found, expected).values()), name


IN_TURNS = [cases.decode_linear(op, 2, 64, 48) for op in ("norm_linear", "norm_swiglu", "linear_add")]


@pytest.mark.parametrize("case", IN_TURNS, ids=lambda case: case.name)
def test_operations_of_generation_agree_with_the_plain_formula(case, monkeypatch):
    """And the time is that of one call of many, each on inputs of its own."""
    monkeypatch.setattr(ops, "kernel_us", lambda compiled, *args: (compiled(*args), [1e3 * len(args[0])] * 2))
    monkeypatch.setattr(ops, "PAST_ALL_CACHES", 0)
    found = ops.measure(case, ops.implementations(case))
    assert found.keys() == {"ours", "jnp"}
    for result in found.values():
        assert all(error < 1e-2 for error in result["errors"].values())
        assert result["forward_us"]["median"] == 1e3


@pytest.mark.live
@of_each_case
def test_the_formulas_of_torch_are_the_same(case):
    torch = pytest.importorskip("torch", reason="needs torch, see the extra `parity`")
    arrays, constants, cotangents = jax.tree.map(np.asarray, ops.inputs(case))
    arrays, cotangents = jax.tree.map(lambda a: a.astype(np.float32), (arrays, cotangents))
    _, constants_of_torch = peers.inputs(case, "cpu")
    if case.op in ("rope", "mrope"):  # torch's tables are rounded to bfloat16, and hold each angle twice
        constants = {n: table.float().numpy()[..., : table.shape[-1] // 2] for n, table in constants_of_torch.items()}
    expected = ops.reference(case, arrays, constants, cotangents)

    given, weights = jax.tree.map(lambda a: torch.from_numpy(a.copy()), (arrays, cotangents))
    found = peers.reference(case, given, constants_of_torch, weights)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture
def on_a_pretended_gpu(monkeypatch):
    """Everything but the clock, and few small cases."""
    monkeypatch.setattr(ops, "device_kind", lambda: "Pretended GPU")
    monkeypatch.setattr(ops, "kernel_us", lambda compiled, *args: (compiled(*args), [3000.0, 1000.0, 2000.0]))
    monkeypatch.setattr(ops.cases, "CASES", (SMALL[0], SMALL[9]))
    monkeypatch.setattr(ops.cases, "sweep", lambda: [("2b", 6, SMALL[0]), ("vision", 6, SMALL[7])])


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["liger-jax", "bench", "ops", *map(str, arguments)])
    cli.main()


def test_results_are_kept_and_replaced_by_case(on_a_pretended_gpu, monkeypatch, tmp_path, capsys):
    command(monkeypatch, "--no-peers", "--results", tmp_path)
    file = tmp_path / "ops_pretended_gpu.json"
    told = capsys.readouterr().out
    assert "rms_norm 6 x 32: ours 2000.0 / 2000.0 | xla 2000.0" in told and str(file) in told and "WARNING" not in told
    norm, loss = json.loads(file.read_text())
    assert (norm["op"], norm["case"], norm["device"]) == ("rms_norm", "rms_norm 6 x 32", "Pretended GPU")
    assert norm["shapes"] == {"x": [6, 32], "weight": [32]} and "jax" in norm["versions"]
    assert set(norm["results"]) == {"ours", "xla", "jnp", "copy"} and "copy" not in loss["results"]
    assert norm["results"]["copy"] == {"forward_us": {"median": 2000.0, "min": 1000.0, "max": 3000.0}}
    assert norm["results"]["ours"]["both_us"] == {"median": 2000.0, "min": 1000.0, "max": 3000.0}
    assert set(norm["results"]["jnp"]["errors"]) == {"out", "dx", "dweight"}
    assert loss["results"]["ours"]["temp_bytes"] > 0

    loss["results"] = {"liger": {"error": "kept"}, "ours": {"error": "replaced"}}
    file.write_text(json.dumps([loss]))
    command(monkeypatch, "--only", "linear_cross_entropy", "--no-peers", "--results", tmp_path)
    (loss,) = json.loads(file.read_text())
    assert loss["results"]["liger"] == {"error": "kept"} and "both_us" in loss["results"]["ours"]


def test_what_fails_or_is_far_off_is_told(on_a_pretended_gpu):
    def absent(x, weight):
        raise NotImplementedError("first line\nsecond line")

    found = ops.measure(SMALL[0], {"absent": absent, "wrong": lambda x, weight: 1.1 * x * weight})
    assert found["absent"] == {"error": "NotImplementedError: first line"}
    assert found["wrong"]["errors"]["out"] > ops.LARGE_ERROR
    first, second = ops.line(SMALL[0], found).splitlines()
    assert "absent NotImplementedError: first line" in first
    assert second.startswith("  WARNING: wrong is far from float32: ") and " out 2." in second


def test_the_sweep_ends_in_a_plot_and_a_table(on_a_pretended_gpu, monkeypatch, tmp_path):
    command(monkeypatch, "--sweep", "--results", tmp_path)
    entries = json.loads((tmp_path / "ops_sweep_pretended_gpu.json").read_text())
    assert [(entry["model"], entry["rows"], entry["op"]) for entry in entries] == [
        ("2b", 6, "rms_norm"),
        ("vision", 6, "quick_gelu"),
    ]
    assert entries[0]["results"].keys() == {"ours", "jnp"} and entries[0]["results"]["ours"].keys() == {"both_us"}
    assert (tmp_path / "ops_sweep_pretended_gpu.png").stat().st_size > 10_000
    table = (tmp_path / "ops_sweep_pretended_gpu.md").read_text().splitlines()
    assert (
        table[0] == "| ours / jnp, us | 6 |" and table[2] == "| 2b `rms_norm` | 2000.0 / 2000.0 |" and len(table) == 4
    )


@pytest.mark.parametrize("options", [(), ("--sweep",)])
def test_an_unknown_name_is_refused_with_the_names_there_are(monkeypatch, tmp_path, options):
    with pytest.raises(SystemExit) as error:
        command(monkeypatch, "--only", "rms_nrom", "--results", tmp_path, *options)
    told = str(error.value)
    assert told.startswith("liger-jax: bench ops: there is no 'rms_nrom'; choose from: rms_norm; ")
    assert "linear_cross_entropy" in told and "rms_norm 8192 x 1536" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no GPU found"):
        command(monkeypatch, "--no-peers", "--results", tmp_path)
    with pytest.raises(ValueError, match="no GPU found"):
        model.run_train("2b", [4], tmp_path, from_hf=None)
    assert not list(tmp_path.iterdir())


def measured(forward, both, error=1e-3, **more):
    times = {f"{name}_us": {"median": us, "min": us, "max": us} for name, us in (("forward", forward), ("both", both))}
    return times | {"errors": {"out": error}} | more


def test_the_table_is_made_from_the_results(monkeypatch, tmp_path):
    readme = "<!-- table: ops -->\nold\n<!-- end -->"
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.with_tables(readme) == "<!-- table: ops -->\nnot measured yet\n<!-- end -->"

    common = {"device": "Pretended GPU", "versions": {"jax": "1"}, "date": "2026-01-01"}
    norm = {"ours": measured(14.2, 42), "jnp": measured(19.21, 154), "liger": measured(16.9, 91.8)}
    norm |= {
        "copy": {"forward_us": {"median": 9.5}},
        "torch": measured(18, 80.0),
        "torch.compile": measured(18, 54.6),
        "tokamax": {"error": "no"},
    }
    loss = {"ours": measured(5000, 17_000, temp_bytes=2**30), "cut": measured(7000, 22_600, 0.5, temp_bytes=2**28)}
    images = {"ours": measured(5, 9.5), "cudnn": measured(6, 10)}
    added = {n: {"forward_us": {"median": t}} for n, t in {"ours": 6.8, "jnp": 9.9}.items()}
    entries = [
        {"op": "rms_norm", "size": "8 x 16", "results": norm},
        {"op": "linear_cross_entropy", "size": "8 x 16 x 32", "results": loss},
        {"op": "attention", "size": "4 x 8", "results": images},
        {"op": "linear_add", "size": "1 x 8 x 16", "results": added},
    ]
    (tmp_path / "ops_pretended_gpu.json").write_text(json.dumps([common | entry for entry in entries]))
    (tmp_path / "ops_sweep_pretended_gpu.json").write_text("[]")
    table = tables.with_tables(readme)
    assert "| `rms_norm` 8 x 16 | 14.2 / 42.0 | 19.2 / 154 | 16.9 / 91.8 | torch.compile 18.0 / 54.6 | 9.50 |" in table
    wide = "| `linear_cross_entropy` 8 x 16 x 32 | 5.00 / 17.0, 1.00 GiB |  |  | cut 7.00 / 22.6*, 0.25 GiB |  |"
    assert wide in table
    assert "| `attention` 4 x 8 | 5.00 / 9.50 | 6.00 / 10.0 |  |  |  |" in table
    assert "| `linear_add` 1 x 8 x 16 | 6.80 | 9.90 |  |  |  |" in table
    assert "Pretended GPU, bfloat16, jax 1, 2026-01-01." in table


def small_rows(config, count, length=8):
    """Two tokens of text or more around a picture of 4 x 4 patches."""
    ids = np.full((count, length), 7)
    ids[:, 1:7] = [config["vision_start_token_id"], *[config["image_token_id"]] * 4, config["vision_end_token_id"]]
    pixels = np.zeros((16 * count, 1176), np.float32)
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels, "image_grid_thw": np.array([[1, 4, 4]] * count)}


@pytest.fixture
def tiny_2b(monkeypatch):
    """A tiny model and small rows in the place of the 2B."""
    monkeypatch.setattr(Qwen2VLConfig, "qwen2_vl_2b", Qwen2VLConfig.tiny)
    monkeypatch.setattr(work, "rows", small_rows)
    small = {"NEW_TOKENS": 3, "WARM": 1, "TIMED": 2, "LENGTH": 32, "GRID": (1, 8, 8), "IMAGE_TOKENS": 4, "MIXES": 3}
    for name, value in (small | {"WORDS": (1, 300)}).items():
        monkeypatch.setattr(work, name, value)
    monkeypatch.setattr(mixed, "SIDES", (28, 112))
    monkeypatch.setattr(mixed, "CONVERSATIONS", 60)
    monkeypatch.setattr(model, "device_kind", lambda: "Pretended GPU")


def test_a_model_is_measured_and_kept_by_case(tiny_2b, tmp_path, capsys):
    """Training and generation: one entry a case, replaced when measured again."""
    common = {"directory": tmp_path, "from_hf": None}
    file = model.run_train("2b", [1], **common, remat="dots", profile=True)
    work.keep(file, json.loads(file.read_text())[0])
    model.run_train("2b", [1], **common, remat="attention", unroll=True)
    model.run_generate("2b", [2], **common, length=30)
    results = json.loads(file.read_text())
    assert [(r["what"], r["rows"], r.get("remat"), r.get("prompt_tokens")) for r in results] == [
        ("train", 1, "dots", None),
        ("train", 1, "attention", None),
        ("generate", 2, None, 27),
    ]
    np.testing.assert_allclose(results[0]["losses"], results[1]["losses"], rtol=1e-2)
    assert (tmp_path / "profile_2b_dots_x1.md").read_text().count("| ms | calls |") == 1
    peer = {**results[0], "package": "transformers + Liger", "step_ms": 123.4, "remat": "full"}
    lines = tables.model_table([*results, peer, {**peer, "remat": "none", "error": "out of memory"}]).splitlines()
    assert "123 ms" in lines[2] and "(Liger, checkpointing)" in lines[2] and 'remat "attention", unrolled' in lines[3]
    assert "generation, 2 x 27 tokens" in lines[4]
    assert "liger-jax: train qwen2-vl-2b x 1: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="length is 26; expected at least 27"):
        model.run_generate("2b", [1], **common, length=26)


def test_variants_of_training_stand_beside_the_plain_step(tiny_2b, tmp_path):
    """Mixed pictures, LoRA and master weights are cases of their own, which no peer is compared with."""
    common = {"directory": tmp_path, "from_hf": None, "remat": "none"}
    for variant in ({"mixed": True}, {"lora": 4}, {"master_weights": True}):
        file = model.run_train("2b", [2], **common, **variant, peers=True)
    packed, lora, master = json.loads(file.read_text())
    assert (packed["what"], packed["compilations"]) == ("train mixed", 1) and packed["images"] > 2
    assert 0.5 < packed["token_utilisation"] < 1 and packed["trained_tokens_per_s"] < packed["tokens_per_s"]
    assert (lora["lora"], master["master_weights"]) == (4, True)
    peer = {**packed, "what": "train", "package": "transformers", "lora": None}
    table = tables.model_table([packed, lora, master, peer])
    assert "LoRA of rank 4" in table and "float32 master weights" in table and table.count("(") == 0
    with pytest.raises(ValueError, match="expected --lora or --master-weights"):
        model.run_train("2b", [2], **common, lora=4, master_weights=True)


def test_mixed_batches_are_what_they_are_compared_as():
    """Of the 2B: the shapes of the uniform rows, as many patches a token of text, 30 % trained, hardly any padding."""
    config = Qwen2VLConfig.qwen2_vl_2b()
    made = mixed.conversations(config)
    patches, text = sum(one.patches for one in made), sum(one.text for one in made)
    assert patches / text == pytest.approx(4, rel=0.05) and len({one.grid for one in made}) > 100
    assert {max(one.grid) * 14 for one in made} >= {224, 1344}
    first, second = mixed.batches(config, 2, 2)
    assert first.vision.pixel_values.shape == (2, 4096, 1176) and first.shape == (2, 2048)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert (first.input_ids != second.input_ids).any()
    for batch in (first, second):
        assert np.mean(batch.segment_ids > 0) > 0.9 and np.mean(batch.vision.segment_ids > 0) > 0.9
        assert 0.25 < np.mean(batch.labels >= 0) < 0.35


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_without_a_gpu_no_checkpoint_is_written_for_peers(monkeypatch):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: "torch is there")
    with pytest.raises(ValueError, match="no GPU found"), model.checkpoint_of("2b", peers=True):
        raise AssertionError("a checkpoint was written")


def test_the_start_of_a_process_is_measured_part_by_part(monkeypatch, tmp_path):
    """An answer in a process of its own; its programs are where the next one looks for them."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    start.write("tiny", tmp_path / "orbax")
    cold = start.answer_in_new_process(tmp_path / "orbax", tmp_path / "cache")
    assert any("prefill" in file.name for file in (tmp_path / "cache/liger-jax").iterdir())
    assert sum(cold["parts"].values()) == pytest.approx(cold["seconds"])
    assert list(cold["parts"]) == ["imports", "device", "tokenizer", "weights", "picture", "first token"]
    assert sum(cold["first_token_parts"].values()) < cold["parts"]["first token"]
    about = {"package": work.OURS, "model": "qwen2-vl-2b", "what": "start", "weights": "Orbax", "devices": 1}
    table = tables.model_table([about | cold | {"programs": "cold", "date": "2026-01-01"}])
    assert "2B: from the start of a process to the first token, weights in Orbax, cold compilation cache | " in table
