"""`liger-jax finetune`: its flags, a run from files to a checkpoint, and its exit status."""

import base64
import io
import json
import os
import re
import signal
import sys

import pytest

import liger_jax.train.finetune as finetune_module
from convert import from_hf, load_adapter
from convert.load import convert_checkpoint
from liger_jax import Qwen2VL
from liger_jax.checkpoint import load_model, save_model
from liger_jax.model.lora import TARGETS, adapted_parts
from liger_jax.model.params import param_paths
from tests._support.command_line import FINETUNE_FLAGS, call
from tests._support.finetune_runs import logged, make_data
from tests._support.quiet import assert_quiet


def test_flags_of_finetune(monkeypatch, capsys):
    """Fields of the options are flags without prefixes; those that only the library needs are hidden."""
    with pytest.raises(SystemExit):
        call(monkeypatch, "finetune", "--help")
    flags = set(re.findall(r"--([a-z][a-z-]*)", capsys.readouterr().out))
    without_opposites = {flag for flag in flags if not flag.startswith("no-")} - {"help"}
    assert without_opposites == set(FINETUNE_FLAGS.split())


@pytest.mark.parametrize(
    "flags",
    [
        ("--lora-alpha", "4"),
        ("--lora-targets", "q_proj"),
        ("--lora", "4", "--freeze", "vision"),
        ("--lora", "4", "--vision-learning-rate", "1e-5"),
        ("--lora", "4", "--master-weights"),
    ],
    ids=" ".join,
)
def test_contradictory_lora_flags(monkeypatch, flags):
    with pytest.raises(SystemExit, match="--lora"):
        call(monkeypatch, "finetune", "m", "data.json", *flags)


def test_command(config, processor, tmp_path, monkeypatch, capsys):
    """`liger-jax finetune`, from files to a checkpoint.

    With base64 images, packing, a frozen part, bfloat16 with master weights, two devices and a skipped record.
    """
    from liger_jax.cli import main

    def as_record(messages):
        *_, user, answer = messages
        images, text = [], ""
        for part in user["content"]:
            if part["type"] == "image":
                file = io.BytesIO()
                part["image"].save(file, "PNG")
                images.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
                text += "<image>"
            else:
                text += part["text"]
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer["content"]}]
        return {"image": images, "conversations": turns}

    records = [*map(as_record, make_data()), {"image": "gone.png", "conversations": []}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    save_model(Qwen2VL.init(config, dtype="float32"), tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [1], "repetition_penalty": 1.1}')
    arguments = [
        "finetune",
        *(str(tmp_path / name) for name in ("model", "data.json")),
        "--output",
        str(tmp_path / "out"),
    ]
    options = (
        f"--steps 2 --batch-size 2 --freeze vision --skip-broken --held-out {tmp_path / 'data.json'} --pack 96 "
        "--dtype bfloat16 --master-weights --workers 0 --remat none --unroll all --fsdp 2"
    )
    monkeypatch.setattr(sys, "argv", ["liger-jax", *arguments, *options.split()])
    main()
    printed = capsys.readouterr()
    assert printed.out == f"step 2 of 2: checkpoint and metrics.jsonl in {tmp_path / 'out'}\n"
    assert "step 2: held_out_loss " in printed.err
    assert_quiet(printed.err, "left out 1 of 8 records")  # once, though the file is also the held-out one
    assert "held_out_loss" in (tmp_path / "out/metrics.jsonl").read_text()
    assert all(line["token_utilisation"] > 0.5 for line in logged(tmp_path / "out"))
    assert "repetition_penalty" in (tmp_path / "out/generation_config.json").read_text()
    before, after = (param_paths(load_model(tmp_path / name, dtype="bfloat16")) for name in ("model", "out"))
    assert (before["visual/patch_embed/kernel"] == after["visual/patch_embed/kernel"]).all()
    assert (before["visual/merger/fc1/kernel"] != after["visual/merger/fc1/kernel"]).any()

    # LoRA: the base weights do not change, the adapter is written for PEFT, and conversion merges it into the weights
    arguments[-1] = str(tmp_path / "lora")
    options = "--steps 2 --batch-size 2 --skip-broken --workers 0 --remat none --learning-rate 0.1"
    for contradiction in ("--lora-alpha 4", "--lora 4 --freeze vision", "--lora 4 --master-weights"):
        monkeypatch.setattr(sys, "argv", ["liger-jax", *arguments, *options.split(), *contradiction.split()])
        with pytest.raises(SystemExit, match="lora"):
            main()
    monkeypatch.setattr(
        sys, "argv", ["liger-jax", *arguments, *options.split(), *["--lora", "4", "--lora-targets", "v_proj", "fc2"]]
    )
    main()
    printed = capsys.readouterr()
    assert "step 2 of 2: checkpoint, adapter and metrics.jsonl in " in printed.out
    assert_quiet(printed.err, "left out 1 of 8 records")
    model = load_model(tmp_path / "lora")
    assert adapted_parts(model) == {"text", "vision"}
    after = param_paths(model)
    before = param_paths(load_model(tmp_path / "model"))
    assert all((before[path] == after[path]).all() for path in before)
    reloaded = param_paths(load_adapter(load_model(tmp_path / "model"), tmp_path / "lora/adapter"))
    assert all((reloaded[path] == after[path]).all() for path in after)
    convert_checkpoint(tmp_path / "lora", tmp_path / "merged", dtype="float32")
    merged = param_paths(from_hf(tmp_path / "merged", dtype="float32"))
    changed = {path for path in before if (before[path] != merged[path]).any()}
    assert changed == {f"{TARGETS[name]}/kernel" for name in ("v_proj", "fc2")}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_status_of_a_run_that_a_signal_ends(config, processor, tmp_path, monkeypatch, number, status):
    """128 plus the number of the signal, as shells and supervisors expect: an unfinished run is not a success."""
    from liger_jax.cli import main

    save_model(Qwen2VL.init(config, dtype="float32"), tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns}]))

    def fit(state, *_, **options):
        os.kill(os.getpid(), number)
        assert options["stop_requested"]()
        return state

    monkeypatch.setattr(finetune_module, "fit", fit)
    with pytest.raises(SystemExit) as error:
        main(
            ["finetune", *(str(tmp_path / name) for name in ("model", "data.json")), "--output", str(tmp_path / "out")]
        )
    assert error.value.code == status
