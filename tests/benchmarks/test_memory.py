"""Checks the memory estimates of docs/memory.md against the measured peaks."""

import json

import pytest

from benchmarks.environment import RESULTS
from benchmarks.memory import METHODS, count_weights, generation_gib, training_gib
from benchmarks.record import OURS
from liger_jax import QwenVLConfig

MEASURED = [
    result
    for result in json.loads((RESULTS / "model.json").read_text())
    if result["package"] == OURS and "peak_gib" in result and result.get("devices", 1) == 1 and "tokens" not in result
]


def config_of(result):
    return getattr(QwenVLConfig, result["model"].replace("-", "_").replace(".", "_"))()


@pytest.mark.parametrize(
    "result", [r for r in MEASURED if r["what"] == "train"], ids=lambda r: f"{r['model']} x{r['rows']} {r['remat']}"
)
def test_estimate_is_within_10_percent_of_each_measured_training_step(result):
    all_weights, master_weights, _, lora = METHODS
    method = lora if "lora" in result else master_weights if result.get("master_weights") else all_weights
    estimate = training_gib(config_of(result), method, rows=result["rows"], remat=result["remat"])
    assert estimate == pytest.approx(result["peak_gib"], rel=0.1)


@pytest.mark.parametrize(
    "result",
    [r for r in MEASURED if r["what"] == "generate" and "prompt_tokens" not in r],
    ids=lambda r: f"{r['model']} x{r['rows']}",
)
def test_estimate_is_within_16_percent_of_each_measured_generation(result):
    assert generation_gib(config_of(result), rows=result["rows"]) == pytest.approx(result["peak_gib"], rel=0.16)


def test_weights_of_the_7b():
    """transformers counts 8,291,375,616 parameters in Qwen2-VL-7B."""
    counts = count_weights(QwenVLConfig.qwen2_vl_7b())
    assert counts["vision"] + counts["merger"] + counts["text"] == 8_291_375_616
