"""Trains a LoRA adapter on a file of conversations, and saves it in PEFT's format.

python examples/lora.py Qwen/Qwen2.5-VL-3B-Instruct train.json --held-out test.json --output runs/lora --steps 200

The command `liger-jax finetune --lora 16` does the same. To resume an interrupted run, repeat the command.
"""

import argparse
from pathlib import Path

from convert import open_model, save_adapter
from liger_jax import Batching, Evaluation, Optimization, Processor, Saving, add_lora, finetune, read_conversations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/lora"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()

    model = add_lora(open_model(args.checkpoint), rank=16, alpha=32, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    state = finetune(
        model,
        Processor.from_pretrained(args.checkpoint),
        read_conversations(args.conversations),
        args.output,
        steps=args.steps,
        optimizer=Optimization(learning_rate=1e-4, freeze=("vision", "merger", "text")),  # leaves LoRA alone to train
        batching=Batching(batch_size=args.batch_size, group_by_length=True),
        saving=Saving(save_every=100),
        held_out=read_conversations(args.held_out),
        evaluation=Evaluation(eval_generate=2),  # answers.jsonl compares answers with the expected ones
    )
    save_adapter(state.model, args.output / "adapter", base_model=args.checkpoint)
    print(f"step {int(state.step)}: adapter in {args.output / 'adapter'}")


if __name__ == "__main__":
    main()
