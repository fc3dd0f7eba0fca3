"""Trains all weights on several GPUs: each holds a part of the weights and of every batch.

python examples/full_finetuning_on_a_mesh.py Qwen/Qwen2-VL-7B-Instruct train.json --fsdp 4 --output runs/full --steps 500

Without GPUs, XLA_FLAGS=--xla_force_host_platform_device_count=4 simulates four devices.
"""

import argparse
from pathlib import Path

import jax

from convert import from_hf
from liger_jax import Batching, Optimization, Processor, finetune, read_conversations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--fsdp", type=int, default=len(jax.devices()), help="GPUs that split weights and batch")
    parser.add_argument("--tensor", type=int, default=1, help="GPUs that split attention heads and MLPs")
    parser.add_argument("--output", type=Path, default=Path("runs/full"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8, help="packed sequences per step, over all GPUs")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a packed sequence")
    args = parser.parse_args()

    mesh = jax.make_mesh((args.fsdp, args.tensor), ("fsdp", "tensor"))
    model = from_hf(args.checkpoint, mesh=mesh)  # each GPU reads its part of the weights
    state = finetune(
        model,
        Processor.from_pretrained(args.checkpoint),
        read_conversations(args.conversations),
        args.output,
        steps=args.steps,
        optimizer=Optimization(learning_rate=1e-5, vision_learning_rate=2e-6, weight_decay=0.1),
        batching=Batching(batch_size=args.batch_size, pack_length=args.length),
    )
    print(f"step {int(state.step)}: checkpoint and metrics.jsonl in {args.output}")


if __name__ == "__main__":
    main()
