"""Writes a Qwen2-VL of real size with random weights, by transformers, as the hub has it (sharded safetensors).

python benchmarks/hf_checkpoint.py 2b /tmp/qwen2-vl-2b        # needs torch; a GPU makes it fast
"""

import argparse

import torch
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

TEXT = {
    "2b": dict(
        hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, vocab_size=151936
    ),
    "7b": dict(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
    ),
}


def hf_config(size: str) -> Qwen2VLConfig:
    text, tied = TEXT[size], size == "2b"
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    return Qwen2VLConfig(
        text_config=dict(
            **text,
            num_hidden_layers=28,
            max_position_embeddings=32768,
            max_window_layers=28,
            rms_norm_eps=1e-6,
            rope_parameters=rope,
            tie_word_embeddings=tied,
        ),
        vision_config=dict(hidden_size=text["hidden_size"], depth=32, embed_dim=1280, num_heads=16),
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=tied,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=TEXT)
    parser.add_argument("directory")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration._from_config(hf_config(args.size))
    model.generation_config = GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643)
    model.save_pretrained(args.directory, max_shard_size="4GB")
    print(f"{args.directory}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
