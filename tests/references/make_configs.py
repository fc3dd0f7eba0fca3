#!/usr/bin/env python
"""Writes configs.json: the four layouts of config.json in which Qwen2-VL checkpoints exist, for the 2B and the 7B.

Each of these releases of transformers writes a different layout: run this script with `pip install transformers==4.49.0`,
`4.57.6` and `5.17.0` (torch is not needed). Each run adds one layout to the file. The layout on the hub, "hub", was written
by 4.41 and is spelled out below.
"""

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


def main():
    layouts = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    for size, numbers in SIZES.items():
        hub = ROOT | TEXT | numbers | {"vision_config": VISION | {"hidden_size": numbers["hidden_size"]}}
        layouts.setdefault("hub", {})[size] = hub
        with tempfile.TemporaryDirectory() as folder:
            transformers.Qwen2VLConfig.from_dict(hub).save_pretrained(folder)
            saved = json.loads(Path(folder, "config.json").read_text())
        layouts.setdefault(transformers.__version__, {})[size] = saved
    TARGET.write_text(json.dumps(layouts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
