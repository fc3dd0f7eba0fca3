"""A custom training loop: `loss_fn` plus a penalty, an optax optimizer, and a jitted step.

python examples/custom_training_loop.py Qwen/Qwen2-VL-2B-Instruct --steps 5 --dtype bfloat16

If the loss needs no change, `make_train_step` is shorter.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from PIL import Image

from convert import open_model
from liger_jax import Processor, loss_fn, make_optimizer, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()

    model, processor = open_model(args.checkpoint, dtype=args.dtype), Processor.from_pretrained(args.checkpoint)
    content = [{"type": "image", "image": Image.new("RGB", (56, 56), "white")}, {"type": "text", "text": "Digit?"}]
    conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]
    batch = prepare(model.config, **processor([conversation], labels=True))

    # Any optimizer suits float32 weights. Other optimizers than ours lose small updates of bfloat16 weights.
    clipped_adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    optimizer = clipped_adamw if args.dtype == "float32" else make_optimizer(1e-4)
    optimizer_state = optimizer.init(model)  # a model is a pytree of arrays

    def penalized_loss(model, batch):
        loss, metrics = loss_fn(model, batch, remat="dots")
        size = sum(jnp.sum(jnp.square(weight.astype(jnp.float32))) for weight in jax.tree.leaves(model))
        return loss + 1e-6 * size, metrics

    @jax.jit
    def step(model, optimizer_state, batch):
        (_, metrics), gradients = jax.value_and_grad(penalized_loss, has_aux=True)(model, batch)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, model)
        return optax.apply_updates(model, updates), optimizer_state, metrics

    for number in range(args.steps):
        model, optimizer_state, metrics = step(model, optimizer_state, batch)
        print(f"step {number + 1}: loss {float(metrics['loss']):.4f}")


if __name__ == "__main__":
    main()
