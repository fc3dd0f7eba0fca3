"""Checks the estimates of docs/memory.md: those of generation with the measured peaks, and that the file is current."""

import json

import pytest

from benchmarks.environment import RESULTS
from benchmarks.memory import BATCH_SIZES, METHODS, MODELS, REMATS, count_weights, generation_gib, training_gib
from benchmarks.record import OURS
from liger_jax import QwenVLConfig

STORED = json.loads((RESULTS / "memory.json").read_text())
MEASURED = [
    result
    for result in json.loads((RESULTS / "model.json").read_text())
    if result["package"] == OURS and "peak_gib" in result and result.get("devices", 1) == 1
    if result["what"] == "generate" and "tokens" not in result and "prompt_tokens" not in result
]


def config_of(result):
    return getattr(QwenVLConfig, result["model"].replace("-", "_").replace(".", "_"))()


@pytest.mark.parametrize("result", MEASURED, ids=lambda r: f"{r['model']} x{r['rows']}")
def test_estimate_is_within_7_percent_of_each_measured_generation(result):
    assert generation_gib(config_of(result), rows=result["rows"]) == pytest.approx(result["peak_gib"], rel=0.07)


def test_stored_estimates_are_those_of_the_planner():
    """The tables hold every model; one entry of each kind is computed again. If it differs: python -m benchmarks memory."""
    config = QwenVLConfig.qwen2_5_vl_3b()
    stored = {(r["model"], r["what"], r.get("remat"), r["rows"]): r["gib"] for r in STORED}
    assert len(stored) == len(STORED) == len(MODELS) * (len(METHODS) + 1 + len(REMATS) * len(BATCH_SIZES))
    assert stored["qwen2_5_vl_3b", "generate", None, 1] == generation_gib(config)
    lora = training_gib(config, rows=1, remat="full", lora=16)
    assert stored["qwen2_5_vl_3b", "`--lora 16`", "full", 1] == pytest.approx(lora, rel=1e-6)
    batch = training_gib(config, rows=16, remat="narrow")
    assert stored["qwen2_5_vl_3b", "batch", "narrow", 16] == pytest.approx(batch, rel=1e-6)


def test_weights_of_the_7b():
    """transformers counts 8,291,375,616 parameters in Qwen2-VL-7B."""
    counts = count_weights(QwenVLConfig.qwen2_vl_7b())
    assert counts["vision"] + counts["merger"] + counts["text"] == 8_291_375_616
