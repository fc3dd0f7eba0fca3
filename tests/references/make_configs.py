#!/usr/bin/env python
"""Writes configs.json: the layouts of config.json in which checkpoints of the family exist, for some sizes of each member.

Each of these releases of transformers writes a different layout: run this script with `pip install transformers==4.49.0`,
`4.57.6`, `5.17.0` and `5.24.0` (torch is not needed). Each run adds one layout to the file; 5.17.0 was run for Qwen2-VL
only, and 4.49.0 has no Qwen3-VL. The layout on the hub, "hub", was written by 4.41 (Qwen2.5-VL) and 4.57 (Qwen3-VL), and is
spelled out below.
"""

import copy
import json
import tempfile
from pathlib import Path

import transformers

TARGET = Path(__file__).with_name("configs.json")
SIZES = {
    "2b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "tie_word_embeddings": False},
}
TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_cache": True,
    "use_sliding_window": False,
}
VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}
ROOT = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
}

VISION_2_5 = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
SIZES_2_5 = {
    "2.5-3b": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16}
    | {"num_hidden_layers": 36, "max_window_layers": 70, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "2.5-32b": {"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40}
    | {"num_hidden_layers": 64, "max_window_layers": 64, "num_key_value_heads": 8, "tie_word_embeddings": False},
}
TEXT_3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000,
    "use_cache": True,
    "vocab_size": 151936,
}
VISION_3 = {
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "initializer_range": 0.02,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SIZES_3 = {  # text, vision, tied
    "3-4b": (
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"tie_word_embeddings": True},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
        True,
    ),
    "3-32b": (
        {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
        False,
    ),
}


def hub_configs():
    """Yields the size, the name of transformers' class, and the hub's config.json."""
    for size, numbers in SIZES.items():
        yield (
            size,
            "Qwen2VLConfig",
            ROOT | TEXT | numbers | {"vision_config": VISION | {"hidden_size": numbers["hidden_size"]}},
        )
    root = ROOT | {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    for size, numbers in SIZES_2_5.items():
        vision = VISION_2_5 | {"out_hidden_size": numbers["hidden_size"]}
        vision |= {"intermediate_size": 3456} if size == "2.5-32b" else {}
        text = TEXT | {"max_position_embeddings": 128000}
        yield size, "Qwen2_5_VLConfig", root | text | numbers | {"vision_config": vision}
    root = {key: value for key, value in ROOT.items() if key.endswith("_id") and key != "vision_token_id"}
    root |= {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "transformers_version": "4.57.0.dev0",
    }
    for size, (text, vision, tied) in SIZES_3.items():
        vision = VISION_3 | vision | {"out_hidden_size": text["hidden_size"]}
        parts = {"text_config": TEXT_3 | text, "vision_config": vision, "tie_word_embeddings": tied}
        yield size, "Qwen3VLConfig", root | parts


def main():
    layouts = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    for size, name, hub in copy.deepcopy(list(hub_configs())):
        layouts.setdefault("hub", {})[size] = copy.deepcopy(hub)  # from_dict writes into its argument
        if not hasattr(transformers, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            getattr(transformers, name).from_dict(hub).save_pretrained(folder)
            saved = json.loads(Path(folder, "config.json").read_text())
        layouts.setdefault(transformers.__version__, {})[size] = saved
    TARGET.write_text(json.dumps(layouts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
