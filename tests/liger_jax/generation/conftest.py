import pytest

from liger_jax.model import decode_layout


@pytest.fixture(autouse=True)
def split_small_layers(monkeypatch):
    """Splits heads, columns and the vocabulary on meshes although the layers of the tests' models are small."""
    monkeypatch.setattr(decode_layout, "SMALLEST_SAVING", 0)
