"""Checks the cases and formulas of `python -m benchmarks`, and the files, plots and tables that it writes."""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as benchmarks_cli
from benchmarks import cases, convergence, mixed, model, ops, peers, programs, record, start, tables, timing, work
from benchmarks.formulas import FORMULAS
from benchmarks.generate import Generate
from benchmarks.implementations import jax_implementations
from benchmarks.record import FAMILY_NAMES, OURS, record_result
from benchmarks.train import Train
from liger_jax import QwenVLConfig
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_processor
from liger_jax.errors import UserError
from pallas_kernels.registry import OPERATIONS

SMALL = [
    cases.row_case("rms_norm", 6, 32),
    cases.row_case("add_rms_norm", 6, 32),
    cases.row_case("layer_norm", 6, 32),
    cases.rope_case(2, 5, 4, 2, 8),
    cases.rope_case(2, 5, 4, 2, 8, (1, 2, 1)),
    cases.row_case("swiglu", 6, 32),
    cases.row_case("geglu", 6, 32),
    cases.row_case("quick_gelu", 6, 32),
    cases.loss_case("cross_entropy", 8, 0, 50, ignored=0.4),
    cases.loss_case("linear_cross_entropy", 8, 16, 50, ignored=0.4),
    cases.text_attention_case(2, 8, 4, 2, 16),
    cases.image_attention_case(2, 2, 16, (4, 4), 2, "two images a row"),
    cases.image_attention_case(1, 2, 16, (2, 6, 4), 4, "images of mixed sizes"),
    cases.rope_case(2, 5, 4, 2, 8, norm=True),
    cases.row_case("gelu_tanh", 6, 32),
]
each_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)


def test_cases_cover_every_operation_and_have_the_shapes_of_their_formula():
    # decode_attention updates a cache in place, so the generation benchmark measures it instead.
    assert {case.op for case in cases.CASES} == set(FORMULAS) - {"decode_attention"}
    assert set(FORMULAS) == set(OPERATIONS)
    every = [*cases.CASES, *(case for *_, case in cases.sweep())]
    for group in (cases.CASES, [case for *_, case in cases.sweep()]):
        assert len({case.name for case in group}) == len(group)
    for case in {case.name: case for case in every}.values():
        operands = {name: jax.ShapeDtypeStruct(normal.shape, jnp.bfloat16) for name, normal in case.arrays.items()}
        operands |= case.constants()
        formula = functools.partial(FORMULAS[case.op], **case.options)
        ours, plain = (jax.eval_shape(f, **operands) for f in (jax_implementations(case)["ours"], formula))
        assert [out.shape for out in jax.tree.leaves(ours)] == [out.shape for out in jax.tree.leaves(plain)]
    assert sum(cases.IMAGES) == 16_384 and all(length % 4 == 0 for length in cases.IMAGES)


@each_case
def test_values_agree_with_the_plain_formula(case):
    """Compares results and gradients of the operation, and of the formula in bfloat16, with the formula in float32."""
    inputs = programs.make_inputs(case)
    expected = programs.reference_values(case, *inputs)
    functions = jax_implementations(case)
    names = [name for name in ("ours", "xla", "jnp") if name in functions]
    for name in names:
        values = jax.jit(programs.make_program(functions[name], "both"))(*inputs)
        assert values.keys() == expected.keys() == {*expected, *(f"d{array}" for array in case.arrays)}
        assert all(error < 1e-2 for error in programs.relative_errors(values, expected).values()), name


DECODING = [cases.decode_linear_case(op, 2, 64, 48) for op in ("norm_linear", "norm_swiglu", "linear_add")]


@pytest.mark.parametrize("case", DECODING, ids=lambda case: case.name)
def test_decoding_operations_agree_with_the_plain_formula(case, monkeypatch):
    """The reported time is that of one call out of many, each on other inputs."""
    monkeypatch.setattr(timing, "kernel_us", lambda compiled, *args: (compiled(*args), [1e3 * len(args[0])] * 2))
    monkeypatch.setattr(timing, "PAST_ALL_CACHES", 0)
    results = timing.measure(case, jax_implementations(case))
    assert results.keys() == {"ours", "jnp"}
    for result in results.values():
        assert all(error < 1e-2 for error in result["errors"].values())
        assert result["forward_us"]["median"] == 1e3


@pytest.mark.live
@each_case
def test_torch_formulas_agree_with_the_jax_formulas(case):
    torch = pytest.importorskip("torch", reason="needs torch, see the extra `parity`")
    arrays, constants, cotangents = jax.tree.map(np.asarray, programs.make_inputs(case))
    arrays, cotangents = jax.tree.map(lambda a: a.astype(np.float32), (arrays, cotangents))
    _, torch_constants = peers.make_inputs(case, "cpu")
    if case.op in ("rope", "mrope", "qk_norm_rope"):  # torch's tables are rounded to bfloat16 and hold each angle twice
        constants = {n: table.float().numpy()[..., : table.shape[-1] // 2] for n, table in torch_constants.items()}
    expected = programs.reference_values(case, arrays, constants, cotangents)

    tensors, tensor_cotangents = jax.tree.map(lambda a: torch.from_numpy(a.copy()), (arrays, cotangents))
    values = peers.reference_values(case, tensors, torch_constants, tensor_cotangents)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Replaces the GPU's name and profiler by fakes, and the cases by a few small ones."""
    monkeypatch.setattr(ops, "device_kind", lambda: "Pretended GPU")
    monkeypatch.setattr(timing, "kernel_us", lambda compiled, *args: (compiled(*args), [3000.0, 1000.0, 2000.0]))
    monkeypatch.setattr(cases, "CASES", (SMALL[0], SMALL[9]))
    monkeypatch.setattr(cases, "sweep", lambda: [("2b", 6, SMALL[0]), ("vision", 6, SMALL[7])])


def run_ops(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "ops", *map(str, arguments)])
    benchmarks_cli.main()


def test_results_are_stored_and_replaced_by_case(pretended_gpu, monkeypatch, tmp_path, capsys):
    run_ops(monkeypatch, "--no-peers", "--results", tmp_path)
    file = tmp_path / "ops_pretended_gpu.json"
    output = capsys.readouterr().out
    assert (
        "rms_norm 6 x 32: ours 2000.0 / 2000.0 | xla 2000.0" in output
        and str(file) in output
        and "WARNING" not in output
    )
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
    run_ops(monkeypatch, "--only", "linear_cross_entropy", "--no-peers", "--results", tmp_path)
    (loss,) = json.loads(file.read_text())
    assert loss["results"]["liger"] == {"error": "kept"} and "both_us" in loss["results"]["ours"]


def test_failures_and_large_errors_are_reported(pretended_gpu):
    def absent(x, weight):
        raise NotImplementedError("first line\nsecond line")

    results = timing.measure(SMALL[0], {"absent": absent, "wrong": lambda x, weight: 1.1 * x * weight})
    assert results["absent"] == {"error": "NotImplementedError: first line"}
    assert results["wrong"]["errors"]["out"] > programs.LARGE_ERROR
    first, second = ops.summary(SMALL[0], results).splitlines()
    assert "absent NotImplementedError: first line" in first
    assert second.startswith("  WARNING: wrong is far from float32: ") and " out 2." in second


def test_sweep_writes_a_plot_and_a_table(pretended_gpu, monkeypatch, tmp_path):
    run_ops(monkeypatch, "--sweep", "--results", tmp_path)
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
def test_unknown_case_is_refused_with_the_known_names(monkeypatch, tmp_path, options):
    with pytest.raises(SystemExit) as error:
        run_ops(monkeypatch, "--only", "rms_nrom", "--results", tmp_path, *options)
    message = str(error.value)
    assert message.startswith("benchmarks: only is 'rms_nrom'; expected an operation or a case: rms_norm; ")
    assert "linear_cross_entropy" in message and "rms_norm 8192 x 1536" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_missing_gpu_raises_a_user_error(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="device is not a GPU; expected an NVIDIA GPU"):
        run_ops(monkeypatch, "--no-peers", "--results", tmp_path)
    with pytest.raises(UserError, match="device is not a GPU"):
        Train(peers=False, results=tmp_path).run()
    assert not list(tmp_path.iterdir())


def measured(forward, both, error=1e-3, **fields):
    times = {f"{name}_us": {"median": us, "min": us, "max": us} for name, us in (("forward", forward), ("both", both))}
    return times | {"errors": {"out": error}} | fields


def test_ops_table_is_built_from_the_results(tmp_path):
    page = "<!-- table: ops -->\nold\n<!-- end -->"
    assert tables.with_tables(page, tmp_path) == "<!-- table: ops -->\nnot measured yet\n<!-- end -->"

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
    table = tables.with_tables(page, tmp_path)
    assert "| `rms_norm` 8 x 16 | 14.2 / 42.0 | 19.2 / 154 | 16.9 / 91.8 | torch.compile 18.0 / 54.6 | 9.50 |" in table
    loss_row = "| `linear_cross_entropy` 8 x 16 x 32 | 5.00 / 17.0, 1.00 GiB |  |  | cut 7.00 / 22.6*, 0.25 GiB |  |"
    assert loss_row in table
    assert "| `attention` 4 x 8 | 5.00 / 9.50 | 6.00 / 10.0 |  |  |  |" in table
    assert "| `linear_add` 1 x 8 x 16 | 6.80 | 9.90 |  |  |  |" in table
    assert "Pretended GPU, bfloat16, jax 1, 2026-01-01." in table


def small_sequences(config, count, length=8):
    """Returns sequences of two or more text tokens around an image of 4 x 4 patches."""
    ids = np.full((count, length), 7)
    ids[:, 1:7] = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    pixels = np.zeros((16 * count, config.vision.patch_values), np.float32)
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels, "image_grid_thw": np.array([[1, 4, 4]] * count)}


@pytest.fixture
def tiny_models(monkeypatch):
    """Replaces Qwen2-VL 2B, Qwen2.5-VL 3B and Qwen3-VL 4B by tiny models with short sequences."""
    monkeypatch.setattr(QwenVLConfig, "qwen2_vl_2b", QwenVLConfig.tiny)
    for name in ("qwen2_5_vl_3b", "qwen3_vl_4b"):
        tiny = QwenVLConfig.tiny(family=name.rpartition("_")[0])
        monkeypatch.setattr(QwenVLConfig, name, functools.partial(lambda config: config, tiny))
    monkeypatch.setattr(work, "sequences", small_sequences)
    sizes = {"NEW_TOKENS": 3, "WARMUP_STEPS": 1, "TIMED_STEPS": 2, "LENGTH": 32, "GRID": (1, 8, 8), "IMAGE_TOKENS": 4}
    for name, value in (sizes | {"MIXED_BATCHES": 3, "PLAIN_IDS": (1, 300)}).items():
        monkeypatch.setattr(work, name, value)
    monkeypatch.setattr(mixed, "SIDES", (28, 112))
    monkeypatch.setattr(mixed, "CONVERSATIONS", 60)
    monkeypatch.setattr(model, "device_kind", lambda: "Pretended GPU")


def test_model_results_are_stored_by_case(tiny_models, tmp_path, capsys):
    """Training and generation: one entry per case, replaced when it is measured again."""
    common = {"peers": False, "results": tmp_path}
    file = Train(rows=(1,), remat="dots", profile=True, **common).run()
    record_result(file, json.loads(file.read_text())[0])
    Train(rows=(1,), remat="attention", unroll="all", **common).run()
    Train(rows=(1,), remat="attention", unroll="none", length=24, **common).run()
    Generate(rows=(2,), length=30, **common).run()
    results = json.loads(file.read_text())
    assert [(r["what"], r["rows"], r.get("remat"), r.get("tokens", r.get("prompt_tokens"))) for r in results] == [
        ("train", 1, "dots", None),
        ("train", 1, "attention", None),
        ("train", 1, "attention", 24),
        ("generate", 2, None, 27),
    ]
    np.testing.assert_allclose(results[0]["losses"], results[1]["losses"], rtol=1e-2)
    assert (tmp_path / "profile_2b_dots_x1.md").read_text().count("| ms | calls |") == 1
    peer = {**results[0], "package": "transformers + Liger", "step_ms": 123.4, "remat": "full"}
    lines = tables.model_table([*results, peer, {**peer, "remat": "none", "error": "out of memory"}]).splitlines()
    assert (
        "123 ms" in lines[2]
        and "(Liger, checkpointing)" in lines[2]
        and 'remat "attention", all layers unrolled' in lines[3]
    )
    assert 'batch 1, 24 tokens each, remat "attention", scanned' in lines[4] and lines[4].endswith("|  |")
    assert "generation, 2 x 27 tokens" in lines[5]
    assert "liger-jax: train qwen2-vl-2b x 1: " in capsys.readouterr().out
    with pytest.raises(UserError, match="length is 26; expected at least 27"):
        Generate(length=26, **common).run()


def test_variants_of_training_are_separate_cases(tiny_models, tmp_path):
    """Mixed images, LoRA and master weights are not compared with a peer."""
    common = {"rows": (2,), "results": tmp_path, "remat": "none"}
    for variant in ({"mixed": True}, {"lora": 4}, {"master_weights": True}):
        file = Train(**common, **variant, peers=True).run()
    packed, lora, master_weights = json.loads(file.read_text())
    assert (packed["what"], packed["compilations"]) == ("train mixed", 1) and packed["images"] > 2
    assert 0.5 < packed["token_utilisation"] < 1 and packed["trained_tokens_per_s"] < packed["tokens_per_s"]
    assert (lora["lora"], master_weights["master_weights"]) == (4, True)
    peer = {**packed, "what": "train", "package": "transformers", "lora": None}
    table = tables.model_table([packed, lora, master_weights, peer])
    assert "LoRA of rank 4" in table and "float32 master weights" in table and table.count("(") == 0
    with pytest.raises(UserError, match="lora and master_weights are both set; expected one"):
        Train(**common, lora=4, master_weights=True).run()


def test_meshes_are_separate_cases_without_peers(tiny_models, tmp_path):
    common = {"rows": (2,), "peers": True, "results": tmp_path}
    Train(mesh=("fsdp=2",), remat="none", **common).run()
    results = json.loads(Generate(mesh=("tensor=2",), **common).run().read_text())
    assert [(r["what"], r["mesh"], r["devices"]) for r in results] == [
        ("train", "fsdp=2", 2),
        ("generate", "tensor=2", 2),
    ]
    assert "batch 2, 2 GPUs (fsdp=2)" in tables.model_table(results)
    for mesh in (["fsdp2"], ["model=2"], ["data=0"]):
        with pytest.raises(UserError, match=r"mesh is .*; expected sizes of axes among .*, such as fsdp=2"):
            model.parse_mesh(mesh)


def test_a_lowered_limit_of_memory_is_a_separate_case(monkeypatch, tmp_path):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 3 * 2**30})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert model.memory_limit() == {}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert model.memory_limit() == {"memory_limit_gib": 3.0}
    usual = {"package": OURS, "what": "train", "model": "qwen2-vl-2b", "rows": 4, "step_ms": 1.0, "peak_gib": 1.0}
    usual |= {"versions": {"jax": "1"}, "device": "Pretended GPU"}
    for result in (usual, usual | model.memory_limit()):
        record_result(tmp_path / "model.json", result)
    results = json.loads((tmp_path / "model.json").read_text())
    assert tables.model_table(results).count("batch 4, limited to 3.0 GiB a GPU |") == 1 and len(results) == 2


@pytest.mark.parametrize(
    "size, name, title",
    [("qwen2_5_vl_3b", "qwen2.5-vl-3b", "Qwen2.5-VL 3B"), ("qwen3_vl_4b", "qwen3-vl-4b", "Qwen3-VL 4B")],
)
def test_other_families_are_measured_under_their_names(tiny_models, tmp_path, size, name, title):
    file = Generate(size=size, rows=(1,), peers=False, results=tmp_path).run()
    (result,) = json.loads(file.read_text())
    assert (result["model"], result["new_tokens"]) == (name, 3)
    peer = {name: value for name, value in result.items() if not name.startswith("ms_")}
    table = tables.model_table([result, peer | {"package": "transformers", "error": "out of memory"}])
    assert f"| {title}: generation, 1 x 2048 tokens" in table and "| out of memory |" in table


def test_peers_that_run_out_of_memory_are_measured_on_fewer_rows(monkeypatch, tmp_path):
    """Half the rows, and so on; every batch size that was tried is then measured with liger-jax."""
    tried = []

    def run_peer(benchmark, checkpoint, rows, options):
        tried.append((rows, "--checkpointing" in options))
        case = {"package": "transformers", "what": benchmark, "model": "qwen3-vl-8b", "rows": rows}
        case["remat"] = "full" if "--checkpointing" in options else "none"
        return [
            case
            | ({"error": "out of memory"} if rows > 2 or (rows == 2 and case["remat"] == "none") else {"losses": [1.0]})
        ]

    monkeypatch.setattr(model, "_run_peer", run_peer)
    losses = model.ModelCase("train", "qwen3_vl_8b", (8, 1), tmp_path)._run_peers(tmp_path, tmp_path / "model.json")
    assert losses == {8: [], 1: [1.0], 4: [], 2: [1.0]}
    assert tried == [(rows, full) for rows in (8, 1, 4, 2) for full in (False, True)]
    assert len(json.loads((tmp_path / "model.json").read_text())) == 8


def test_headline_has_the_other_families_that_are_measured():
    """With as many rows as have a peer; the fastest of several options."""
    common = {"what": "train", "model": "qwen3-vl-8b", "device": "Pretended GPU", "peak_gib": 9.0}
    ours = [common | {"package": OURS, "rows": rows, "step_ms": 100.0 * rows} for rows in (2, 4)]
    ours.append(ours[0] | {"step_ms": 150.0})
    peer = common | {"package": "transformers", "rows": 2, "step_ms": 400.0}
    assert tables._fastest([*ours, peer, peer | {"rows": 4, "error": "no"}], "train", "step_ms") == [ours[2]]
    assert tables._fastest(ours, "train", "step_ms") == [ours[1]]
    assert tables._fastest(ours, "generate", "ms_per_token") == []


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_convergence_trains_every_switch_of_a_family(family):
    """Four layers per tower, with windows in half of the vision layers, or two of them tapped; the real vocabulary."""
    config = convergence.make_model_config(make_processor(load_digits()[0], family))
    vision, published = config.vision, QwenVLConfig.tiny(family=family).vision
    assert (config.family, config.text.vocab_size, vision.depth) == (family, 151_936, 4)
    assert vision.full_attention_layers == published.full_attention_layers
    assert vision.deepstack_layers == published.deepstack_layers
    assert bool(vision.window_size) == bool(published.window_size)


def test_convergence_table_has_a_column_per_family_and_rate():
    findings = {
        f"{package}: {finding}": 0.5
        for package in (OURS, "transformers")
        for finding in ("loss drop in bfloat16, share of float32's", "share of bfloat16 weights changed from the start")
    }
    findings["float32: largest relative distance"] = 0.01
    moments = "second moments, mean of a tensor: largest relative distance to float32 sums of the same gradients"
    report = {
        "peak": 2e-4,
        "findings": findings | {moments: 0.25},
        "device": "GPU",
        "steps": 3,
        "versions": {"jax": "1"},
        "date": "x",
    }
    lines = tables.convergence_table([report | {"family": "qwen3_vl", "date": "y"}, report]).splitlines()
    assert lines[0] == "| | Qwen2-VL, peak rate 2e-4 | Qwen3-VL, peak rate 2e-4 |" and "| 25.00% | 25.00% |" in lines[7]
    assert lines[-1] == "Qwen2-VL: GPU, 3 steps, jax 1, x. Qwen3-VL: GPU, 3 steps, jax 1, y."
    assert tables.convergence_table([]) == "not measured yet"


def test_mixed_batches_are_comparable_with_uniform_ones():
    """For the 2B: the same shapes, as many patches per text token, 30 % of the tokens trained, hardly any padding."""
    config = QwenVLConfig.qwen2_vl_2b()
    made = mixed.make_conversations(config)
    patches, text = sum(item.patches for item in made), sum(item.text for item in made)
    assert patches / text == pytest.approx(4, rel=0.05) and len({item.grid for item in made}) > 100
    assert {max(item.grid) * 14 for item in made} >= {224, 1344}
    first, second = mixed.mixed_batches(config, 2, 2)
    assert first.vision.pixel_values.shape == (2, 4096, 1176) and first.shape == (2, 2048)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert (first.input_ids != second.input_ids).any()
    for batch in (first, second):
        assert np.mean(batch.segment_ids > 0) > 0.9 and np.mean(batch.vision.segment_ids > 0) > 0.9
        assert 0.25 < np.mean(batch.labels >= 0) < 0.35


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_no_checkpoint_is_written_for_peers_without_a_gpu(monkeypatch):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: "torch is there")
    with pytest.raises(UserError, match="device is not a GPU"), model.peer_checkpoint("2b", peers=True):
        raise AssertionError("a checkpoint was written")


def test_start_up_is_measured_part_by_part(monkeypatch, tmp_path):
    """The answering process stores its compiled programs where the next one finds them."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    start.write("tiny", tmp_path / "orbax")
    cold = start.answer_in_new_process(tmp_path / "orbax", tmp_path / "cache")
    assert any("prefill" in file.name for file in (tmp_path / "cache/liger-jax").iterdir())
    assert sum(cold["parts"].values()) == pytest.approx(cold["seconds"])
    assert list(cold["parts"]) == ["imports", "device", "tokenizer", "weights", "image", "first token"]
    assert sum(cold["first_token_parts"].values()) < cold["parts"]["first token"]
    case = {"package": OURS, "model": "qwen2-vl-2b", "what": "start", "weights": "Orbax", "devices": 1}
    table = tables.model_table([case | cold | {"programs": "cold", "date": "2026-01-01"}])
    assert "2B: from process start to the first token, weights in Orbax, cold compilation cache | " in table


def test_scaling_table_marks_what_was_measured():
    """A plan's row shows the fastest measured step of the same work; a plan that does not fit shows its memory alone."""
    plan = {"model": "qwen2-vl-2b", "gpus": 2, "gpu": "H100", "mesh": {"fsdp": 2}, "remat": "dots", "fits": True}
    plan |= {"gib": 37.4, "step_ms": 430.2, "tokens_per_s": 38_060, "efficiency": 0.93}
    step = {
        "package": record.OURS,
        "what": "train",
        "model": "qwen2-vl-2b",
        "mesh": "fsdp=2",
        "rows": 8,
        "remat": "dots",
    }
    step |= {"step_ms": 440.0, "peak_gib": 38.2, "device": "NVIDIA H200"}
    others = [step | {"rows": 4, "step_ms": 1.0}, step | {"mesh": "data=2", "step_ms": 2.0}, step | {"step_ms": 450.0}]
    others += [step | {"peak_gib": 55.0, "step_ms": 3.0}]  # weights gathered at once, on GPUs with more memory
    large = plan | {"model": "qwen2-vl-72b", "fits": False, "gib": 318.0}
    lines = tables.scaling_table([plan, large], [*others, step]).splitlines()
    measured = "440 ms, 38.2 GiB on NVIDIA H200"
    assert lines[2] == f"| Qwen2-VL 2B | 2 | fsdp=2 | dots | 37 | 430 ms | 38k | 93% | {measured} |"
    assert lines[3] == "| Qwen2-VL 72B | 2 | does not fit |  | 318 |  |  |  |  |"
    assert "computed, for H100" in lines[-1]
