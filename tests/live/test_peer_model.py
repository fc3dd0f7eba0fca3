"""The peers of `python -m benchmarks train | generate`: the checkpoint that both libraries load, and their losses."""

import jax
import numpy as np
import optax
import pytest

from benchmarks import work
from benchmarks.train import time_steps, uniform_batch
from convert import from_hf
from liger_jax import QwenVLConfig
from liger_jax.errors import LigerWarning

pytest.importorskip("torch", reason="needs torch, see the extra `parity`")

from benchmarks import peer_model

pytestmark = pytest.mark.live
PRESETS = {"2b": "qwen2_vl_2b", "qwen2_5_vl_3b": "qwen2_5_vl_3b", "qwen3_vl_4b": "qwen3_vl_4b"}


@pytest.fixture
def small_work(monkeypatch):
    """Sequences of 64 tokens with an image of 8 x 12 patches; few steps."""
    values = {"LENGTH": 64, "GRID": (1, 8, 12), "IMAGE_TOKENS": 24, "PLAIN_IDS": (1, 300), "NEW_TOKENS": 3}
    for name, value in (values | {"WARMUP_STEPS": 1, "TIMED_STEPS": 2}).items():
        monkeypatch.setattr(work, name, value)


@pytest.mark.parametrize("size", PRESETS)
def test_peer_has_the_weights_inputs_and_losses_of_the_benchmarked_model(tmp_path, monkeypatch, small_work, size):
    """Regression: a renamed field of convert's table once broke the writing of this checkpoint."""
    expected = QwenVLConfig.tiny(family=PRESETS[size].rpartition("_")[0])
    monkeypatch.setattr(QwenVLConfig, PRESETS[size], lambda: expected)
    peer_model.write(size, str(tmp_path))
    model = from_hf(tmp_path)
    assert (model.config.text, model.config.vision) == (expected.text, expected.vision)
    assert all(weight.dtype == "bfloat16" for weight in jax.tree.leaves(model))
    assert float(abs(model.head).max()) > 0

    peer, arrays = peer_model.load(tmp_path), peer_model.make_inputs(expected, 2)
    generated = peer_model.time_generation(peer, arrays, "dynamic")
    assert generated["prefill_ms"] > 0
    peer_losses = peer_model.time_steps(peer, arrays)["losses"]
    optimizer = optax.adamw(work.LEARNING_RATE, weight_decay=1e-4)  # rounds to the nearest, as torch does
    with pytest.warns(LigerWarning, match="rounds them to the nearest"):
        results = time_steps(model, [uniform_batch(expected, 2)], optimizer=optimizer, remat="none", unroll="none")
    losses = results["losses"]
    np.testing.assert_allclose(losses, peer_losses, atol=1e-2)
