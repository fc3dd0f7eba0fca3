"""The sizes of the Qwen2-VL models, for tests, tuning and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TextSizes:
    """The sizes of one language model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 128
    sections: tuple[int, int, int] = (16, 24, 24)


TEXT = {
    "2b": TextSizes(hidden=1536, intermediate=8960, heads=12, kv_heads=2, vocab=151_936),
    "7b": TextSizes(hidden=3584, intermediate=18_944, heads=28, kv_heads=4, vocab=152_064),
    "72b": TextSizes(hidden=8192, intermediate=29_568, heads=64, kv_heads=8, vocab=152_064),
}


@dataclasses.dataclass(frozen=True)
class VisionSizes:
    """The sizes of the vision tower, which are the same in all models."""

    embed: int = 1280
    intermediate: int = 5120
    heads: int = 16
    head_dim: int = 80


VISION = VisionSizes()
TEXT_ROWS = (512, 2048, 8192, 32_768)  # tokens
VISION_ROWS = (4096, 16_384)  # patches
