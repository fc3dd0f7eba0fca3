"""Compares the list of tuned shapes, which pallas_kernels keeps without importing liger_jax, with the models."""

import pytest

from liger_jax import Qwen2VLConfig
from pallas_kernels import shapes


@pytest.mark.parametrize("size", shapes.TEXT)
def test_shapes_equal_the_presets(size):
    """The sizes of each model equal its preset's, and those of the vision tower equal every preset's."""
    config = getattr(Qwen2VLConfig, f"qwen2_vl_{size}")()
    text, vision = config.text, config.vision
    assert shapes.TEXT[size] == shapes.TextSizes(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocab=text.vocab_size,
        head_dim=text.head_dim,
        sections=tuple(text.mrope_section),
    )
    assert (
        shapes.VisionSizes(
            embed=vision.embed_dim,
            intermediate=vision.intermediate_size,
            heads=vision.num_heads,
            head_dim=vision.head_dim,
        )
        == shapes.VISION
    )
