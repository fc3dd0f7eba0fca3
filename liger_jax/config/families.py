"""What each member of the family fixes, and how its config.json spells the rest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Fields whose key in a hub file has the same name.
TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
)
VISION_KEYS = ("depth", "num_heads", "patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels")
SPECIAL_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclasses.dataclass(frozen=True)
class Family:
    """What a member of the family fixes, and the keys of its config.json."""

    name: str
    architecture: str  # its class in transformers
    vision_activation: str  # hidden_act of its vision_config
    vision_keys: Mapping[str, str]  # key in vision_config -> field of VisionConfig, in addition to VISION_KEYS
    free_head_dim: bool = False  # transformers reads head_dim; else it is always hidden_size / num_attention_heads
    text: dict[str, Any] = dataclasses.field(default_factory=dict)  # the values of switches
    vision: dict[str, Any] = dataclasses.field(default_factory=dict)
    # values of all published checkpoints
    published_text: dict[str, Any] = dataclasses.field(default_factory=dict)
    published_vision: dict[str, Any] = dataclasses.field(default_factory=dict)
    # transformers' values for what a config.json may omit, where they are not the published ones; for vision by its keys
    omitted_text: dict[str, Any] = dataclasses.field(default_factory=dict)
    omitted_vision: dict[str, Any] = dataclasses.field(default_factory=dict)
    # keys with a fixed value
    text_keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    rope_keys: dict[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = {
    "qwen2_vl": Family(
        name="Qwen2-VL",
        architecture="Qwen2VLForConditionalGeneration",
        vision_activation="quick_gelu",
        vision_keys={"embed_dim": "embed_dim", "hidden_size": "hidden_size", "mlp_ratio": "intermediate_size"},
        omitted_text={"rms_norm_eps": 1e-5},
        omitted_vision={"mlp_ratio": 4},
        rope_keys={"type": "mrope"},
    ),
    "qwen2_5_vl": Family(
        name="Qwen2.5-VL",
        architecture="Qwen2_5_VLForConditionalGeneration",
        vision_activation="silu",
        vision_keys={
            "hidden_size": "embed_dim",
            "intermediate_size": "intermediate_size",
            "out_hidden_size": "hidden_size",
            "window_size": "window_size",
            "fullatt_block_indexes": "full_attention_layers",
            "tokens_per_second": "tokens_per_second",
        },
        vision={"norm": "rms_norm", "mlp": "swiglu", "video_time": "seconds"},
        published_text={"max_position_embeddings": 128_000},
        published_vision={
            "intermediate_size": 3420,
            "window_size": 112,
            "full_attention_layers": (7, 15, 23, 31),
            "tokens_per_second": 2,
        },
        omitted_text={"rms_norm_eps": 1e-5},
        # also a hidden_size of 3584, which no published checkpoint has: 1280 is far more likely
        omitted_vision={"tokens_per_second": 4},
        rope_keys={"type": "mrope"},
    ),
    "qwen3_vl": Family(
        name="Qwen3-VL",
        architecture="Qwen3VLForConditionalGeneration",
        vision_activation="gelu_pytorch_tanh",
        vision_keys={
            "hidden_size": "embed_dim",
            "intermediate_size": "intermediate_size",
            "out_hidden_size": "hidden_size",
            "num_position_embeddings": "position_table_side",
            "deepstack_visual_indexes": "deepstack_layers",
        },
        free_head_dim=True,
        text={"attention_bias": False, "qk_norm": True, "mrope_interleaved": True},
        vision={"mlp": "gelu_tanh", "patch_bias": True, "video_time": "text"},
        published_text={
            "num_key_value_heads": 8,
            "rope_theta": 5_000_000.0,
            "mrope_section": (24, 20, 20),
            "max_position_embeddings": 262_144,
        },
        published_vision={
            "depth": 27,
            "embed_dim": 1152,
            "intermediate_size": 4304,
            "patch_size": 16,
            "position_table_side": 48,
            "deepstack_layers": (8, 16, 24),
        },
        omitted_text={"head_dim": 128, "rope_theta": 500_000.0, "max_position_embeddings": 128_000},
        text_keys={"attention_bias": False},
        rope_keys={"mrope_interleaved": True},
    ),
}

# Members that are not supported, so that the error can name them: by the start of their model_type, which may be that of a
# part, such as "qwen2_5_omni_thinker". The first that matches counts.
UNSUPPORTED = {
    "qwen3_vl_moe": "Qwen3-VL with a mixture of experts",
    "qwen3_5_moe": "Qwen3.5 with a mixture of experts",
    "qwen3_5": "Qwen3.5",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen3_omni": "Qwen3-Omni",
}
