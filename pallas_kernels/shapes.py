"""The sizes of the Qwen-VL models, for tests, tuning and benchmarks."""

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


TEXT = {  # Qwen2-VL
    "2b": TextSizes(hidden=1536, intermediate=8960, heads=12, kv_heads=2, vocab=151_936),
    "7b": TextSizes(hidden=3584, intermediate=18_944, heads=28, kv_heads=4, vocab=152_064),
    "72b": TextSizes(hidden=8192, intermediate=29_568, heads=64, kv_heads=8, vocab=152_064),
}


QWEN2_5_VL = {
    "3b": TextSizes(hidden=2048, intermediate=11_008, heads=16, kv_heads=2, vocab=151_936),
    "7b": TextSizes(hidden=3584, intermediate=18_944, heads=28, kv_heads=4, vocab=152_064),
    "32b": TextSizes(hidden=5120, intermediate=27_648, heads=40, kv_heads=8, vocab=152_064),
    "72b": TextSizes(hidden=8192, intermediate=29_568, heads=64, kv_heads=8, vocab=152_064),
}
_INTERLEAVED = (24, 20, 20)
QWEN3_VL = {  # with RMSNorm of the query and key heads
    "2b": TextSizes(hidden=2048, intermediate=6144, heads=16, kv_heads=8, vocab=151_936, sections=_INTERLEAVED),
    "4b": TextSizes(hidden=2560, intermediate=9728, heads=32, kv_heads=8, vocab=151_936, sections=_INTERLEAVED),
    "8b": TextSizes(hidden=4096, intermediate=12_288, heads=32, kv_heads=8, vocab=151_936, sections=_INTERLEAVED),
    "32b": TextSizes(hidden=5120, intermediate=25_600, heads=64, kv_heads=8, vocab=151_936, sections=_INTERLEAVED),
}


@dataclasses.dataclass(frozen=True)
class VisionSizes:
    """The sizes of a vision tower. The defaults are those of Qwen2-VL, which are the same in all its models."""

    embed: int = 1280
    intermediate: int = 5120
    heads: int = 16
    head_dim: int = 80


VISION = VisionSizes()
QWEN2_5_VISION = {  # with RMSNorm and SwiGLU, and attention in windows of 64 patches
    "7b": VisionSizes(intermediate=3420),  # also in 3B
    "32b": VisionSizes(intermediate=3456),  # also in 72B
}
QWEN3_VISION = {  # the mergers normalize rows of `embed`, and of 4 * `embed`
    "2b": VisionSizes(embed=1024, intermediate=4096, heads=16, head_dim=64),  # also in 4B
    "8b": VisionSizes(embed=1152, intermediate=4304, heads=16, head_dim=72),  # also in 32B
}
TEXT_ROWS = (512, 2048, 8192, 32_768)  # tokens
VISION_ROWS = (4096, 16_384)  # patches
