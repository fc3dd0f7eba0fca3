"""Compares the list of tuned shapes, which pallas_kernels keeps without importing liger_jax, with the models."""

import pytest

from liger_jax import Qwen2VLConfig
from pallas_kernels import shapes

# preset -> its sizes
TEXT = {
    f"{family}_{size}": text
    for family, sizes in (("qwen2_vl", shapes.TEXT), ("qwen2_5_vl", shapes.QWEN2_5_VL), ("qwen3_vl", shapes.QWEN3_VL))
    for size, text in sizes.items()
}
VISION = {preset: shapes.VISION for preset in TEXT if preset.startswith("qwen2_vl")} | {
    "qwen2_5_vl_3b": shapes.QWEN2_5_VISION["7b"],
    "qwen2_5_vl_7b": shapes.QWEN2_5_VISION["7b"],
    "qwen2_5_vl_32b": shapes.QWEN2_5_VISION["32b"],
    "qwen2_5_vl_72b": shapes.QWEN2_5_VISION["32b"],
    "qwen3_vl_2b": shapes.QWEN3_VISION["2b"],
    "qwen3_vl_4b": shapes.QWEN3_VISION["2b"],
    "qwen3_vl_8b": shapes.QWEN3_VISION["8b"],
    "qwen3_vl_32b": shapes.QWEN3_VISION["8b"],
}


@pytest.mark.parametrize("preset", TEXT)
def test_shapes_equal_the_presets(preset):
    """The sizes of each model and of its vision tower equal those of its preset."""
    config = getattr(Qwen2VLConfig, preset)()
    text, vision = config.text, config.vision
    assert TEXT[preset] == shapes.TextSizes(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocab=text.vocab_size,
        head_dim=text.head_dim,
        sections=tuple(text.mrope_section),
    )
    assert VISION[preset] == shapes.VisionSizes(
        embed=vision.embed_dim,
        intermediate=vision.intermediate_size,
        heads=vision.num_heads,
        head_dim=vision.head_dim,
    )
