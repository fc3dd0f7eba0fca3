"""The sizes and switches of the two towers."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Configuration of the vision tower. The defaults are those of Qwen2-VL 7B."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    intermediate_size: int = 5120
    hidden_size: int = 3584  # the merger's output width, equal to the text model's
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    rope_theta: float = 10_000.0
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    mlp: Literal["quick_gelu", "gelu_tanh", "swiglu"] = "quick_gelu"
    patch_bias: bool = False
    position_table_side: int = 0  # side of the square table of learned positions; 0: no table
    window_size: int = 0  # side in pixels of the windows in which patches attend; 0: no windows
    full_attention_layers: tuple[int, ...] = ()  # the layers without windows
    deepstack_layers: tuple[int, ...] = ()  # the layers whose outputs are also added to the first text layers
    # how the time of a video enters: one position per grid row; positions in proportion to seconds; as text in the prompt
    video_time: Literal["frames", "seconds", "text"] = "frames"
    tokens_per_second: int = 1  # positions per second of video, with video_time "seconds"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_values(self) -> int:
        """The number of values in a patch, a row of `pixel_values`: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """The number of patches that are merged into one token."""
        return self.spatial_merge_size**2

    @property
    def window_patches(self) -> int:
        """The number of patches in a whole window, or 0 without windows."""
        return (self.window_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Configuration of the language model. The defaults are those of Qwen2-VL 2B."""

    vocab_size: int = 151_936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02  # standard deviation of random weights
    attention_bias: bool = True  # of the query, key and value projections
    qk_norm: bool = False  # RMSNorm of each query and key head, before RoPE
    mrope_interleaved: bool = False

    @property
    def rotary_axes(self) -> tuple[int, ...]:
        """The position axis that drives each of the head_dim / 2 frequencies: 0 is time, 1 height, 2 width.

        In blocks of the sizes mrope_section (a, b, c), or interleaved: then frequency 3 j + 1 rotates with the height for
        j < b, frequency 3 j + 2 with the width for j < c, and every other frequency with the time.

        Example:
            >>> TextConfig(head_dim=16, mrope_section=(4, 2, 2)).rotary_axes
            (0, 0, 0, 0, 1, 1, 2, 2)
            >>> TextConfig(head_dim=16, mrope_section=(4, 2, 2), mrope_interleaved=True).rotary_axes
            (0, 1, 2, 0, 1, 2, 0, 0)
        """
        sections = self.mrope_section
        if not self.mrope_interleaved:
            return tuple(axis for axis, size in enumerate(sections) for _ in range(size))
        return tuple(i % 3 if i // 3 < sections[i % 3] else 0 for i in range(sum(sections)))
