"""The work in a batch, throughput, and the log of a resumed run."""

import json
import types

import numpy as np
import pytest

from liger_jax import Qwen2VLConfig, prepare
from liger_jax.errors import UserError
from liger_jax.train.flops import step_flops
from liger_jax.train.metrics import RunLog, batch_work, step_rates, truncate_after

CONFIG = Qwen2VLConfig.tiny()


def batch_of_two_images_and_padding():
    ids = np.full((2, 20), 7)
    ids[0, 1:5] = ids[0, 8:12] = CONFIG.image_token_id
    mask = np.array([[1] * 20, [1] * 12 + [0] * 8])
    pixels = np.zeros((32, CONFIG.vision.patch_values), np.float32)
    grids = np.array([[1, 4, 4], [1, 4, 4]])
    return prepare(
        CONFIG, input_ids=ids, attention_mask=mask, labels=ids, pixel_values=pixels, image_grid_thw=grids
    ).pad_rows(4)


def test_batch_work():
    """Tokens are counted without padding and empty sequences, images over all sequences."""
    batch = batch_of_two_images_and_padding()
    work = batch_work(CONFIG, batch)
    assert work == {"tokens": 32, "positions": 4 * 64, "images": 2, "flops": step_flops(CONFIG, batch)}
    assert batch_work(CONFIG, prepare(CONFIG, input_ids=np.ones((1, 9), int)))["images"] == 0


def test_step_rates():
    """Utilisation is relative to all devices. Rates that need an unreported peak or memory are omitted."""
    device = types.SimpleNamespace(device_kind="NVIDIA H200", memory_stats=lambda: {"peak_bytes_in_use": 2**31})
    work = {"tokens": 100, "positions": 200, "images": 4, "flops": 989.4e12}
    rates = step_rates(work, 30, 0.5, [device] * 4)
    assert rates == {
        "tokens_per_second": 200,
        "trained_tokens_per_second": 60,
        "images_per_second": 8,
        "token_utilisation": 0.5,
        "model_flops_utilisation": pytest.approx(0.5),
        "peak_memory_gib": 2,
    }
    unknown = types.SimpleNamespace(device_kind="cpu", memory_stats=lambda: None)
    assert not {"model_flops_utilisation", "peak_memory_gib"} & step_rates(work, 30, 0.5, [unknown]).keys()


def test_log_is_json_even_without_finite_numbers(tmp_path):
    """NaN and infinity are null: JSON has neither, and other readers reject them."""
    file = tmp_path / "metrics.jsonl"
    with RunLog(file, begin=0, steps=1, tensorboard=tmp_path / "curves", progress=False) as log:
        log.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "accuracy": 0.5})
    assert file.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "accuracy": 0.5}\n'


def test_resumed_log_drops_later_steps(tmp_path):
    """Lines of later steps and an incomplete last line are removed; malformed lines are rejected."""
    file = tmp_path / "metrics.jsonl"
    for begin, end in ((0, 4), (2, 3)):
        with RunLog(file, begin=begin, steps=4, progress=False) as log:
            for step in range(begin, end):
                log.write(step + 1, {"loss": float(begin)})
    with file.open("a", encoding="utf-8") as log:
        log.write('{"step": 3, "loss": 5, "answer": "a\u2028b\x85c"}\n{"step": 3, "lo')
    truncate_after(file, 3)
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0), (2, 0), (3, 2), (3, 5)]
    assert lines[-1]["answer"] == "a\u2028b\x85c"
    file.write_bytes(file.read_bytes() + b"[1]\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 5 is b'\[1\]'; expected JSON with a step"):
        truncate_after(file, 3)


@pytest.mark.parametrize("progress", [True, False])
def test_notes_are_printed_with_the_progress_bar(progress, tmp_path, capsys):
    with RunLog(tmp_path / "metrics.jsonl", begin=0, steps=1, progress=progress) as log:
        log.note("compiled the training step")
        log.write_evaluation(1, {"held_out_loss": 2.5, "held_out_num_tokens": 1234567})
    printed = capsys.readouterr().err
    assert ("compiled the training step\n" in printed) == progress
    assert ("step 1: held_out_loss 2.5, held_out_num_tokens 1,234,567\n" in printed) == progress
