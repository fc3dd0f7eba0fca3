"""The checkpoint that both libraries load in `python -m benchmarks train | generate`."""

import jax
import pytest

from convert import from_hf
from liger_jax import Qwen2VLConfig

pytest.importorskip("torch", reason="needs torch, see the extra `parity`")

from benchmarks import peer_model

pytestmark = pytest.mark.live


def test_peer_checkpoint_equals_the_benchmarked_model(tmp_path, monkeypatch):
    """Regression: a renamed field of convert's table once broke the writing of this checkpoint."""
    expected = Qwen2VLConfig.tiny()
    monkeypatch.setattr(Qwen2VLConfig, "qwen2_vl_2b", Qwen2VLConfig.tiny)
    peer_model.write("2b", str(tmp_path))
    model = from_hf(tmp_path)
    assert (model.config.text, model.config.vision) == (expected.text, expected.vision)
    weights = jax.tree.leaves(model)
    assert all(weight.dtype == "bfloat16" for weight in weights)
    assert float(abs(model.head).max()) > 0
