"""Merges a LoRA adapter into its model, and writes a folder that transformers and vLLM load.

python examples/merge_and_export.py Qwen/Qwen2.5-VL-3B-Instruct runs/lora/adapter exported

The command `liger-jax convert RUN FOLDER --to hf` does the same for a run of `liger-jax finetune --lora`.
"""

import argparse
from pathlib import Path

from convert import load_adapter, open_model, to_hf
from liger_jax import Processor, merge_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="the model that the adapter was trained on")
    parser.add_argument("adapter", help="a folder in PEFT's format, or a hub id")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()

    model = load_adapter(open_model(args.checkpoint), args.adapter)
    to_hf(merge_lora(model), args.output)
    Processor.from_pretrained(args.checkpoint).save_pretrained(args.output)
    print(f"{args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")


if __name__ == "__main__":
    main()
