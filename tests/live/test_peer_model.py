"""The checkpoint that `liger-jax bench train | generate --peers` gives to both libraries."""

import jax
import pytest

from convert import from_hf
from liger_jax import Qwen2VLConfig

pytest.importorskip("torch", reason="needs torch, see the extra `parity`")

from benchmarks import peer_model

pytestmark = pytest.mark.live


def test_the_checkpoint_of_the_peers_is_the_model_that_is_measured(tmp_path, monkeypatch):
    """It could not be written once, for a field of a table that was renamed."""
    expected = Qwen2VLConfig.tiny()
    monkeypatch.setattr(Qwen2VLConfig, "qwen2_vl_2b", Qwen2VLConfig.tiny)
    peer_model.write("2b", str(tmp_path))
    model = from_hf(tmp_path)
    assert (model.config.text, model.config.vision) == (expected.text, expected.vision)
    weights = jax.tree.leaves(model)
    assert all(weight.dtype == "bfloat16" for weight in weights)
    assert float(abs(model.head).max()) > 0
