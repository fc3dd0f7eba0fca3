"""A custom training loop: `loss_fn` plus a penalty, any optax optimizer, and a jitted step.

python examples/custom_training_loop.py outputs/demo/checkpoint --steps 5

If the loss needs no change, `make_train_step` is shorter.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from PIL import Image

from convert import open_model
from liger_jax import Processor, loss_fn, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--penalty", type=float, default=1e-2, help="weight of the distance from the initial weights")
    args = parser.parse_args()

    model = open_model(args.checkpoint, dtype="float32")
    processor = Processor.from_pretrained(args.checkpoint)
    content = [{"type": "image", "image": Image.new("RGB", (56, 56), "white")}, {"type": "text", "text": "Digit?"}]
    conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]
    batch = prepare(model.config, **processor([conversation], labels=True))

    # float32 weights suit any optimizer; bfloat16 weights need liger_jax.make_optimizer, or small updates are lost
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    optimizer_state = optimizer.init(model)  # a model is a pytree of arrays

    initial_model = model

    def penalised_loss(model, batch):
        loss, metrics = loss_fn(model, batch, remat="dots")
        distances = jax.tree.map(lambda weight, initial: jnp.sum((weight - initial) ** 2), model, initial_model)
        return loss + args.penalty * sum(jax.tree.leaves(distances)), metrics

    @jax.jit
    def step(model, optimizer_state, batch):
        (_, metrics), gradients = jax.value_and_grad(penalised_loss, has_aux=True)(model, batch)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, model)
        return optax.apply_updates(model, updates), optimizer_state, metrics

    for number in range(args.steps):
        model, optimizer_state, metrics = step(model, optimizer_state, batch)
        print(f"step {number + 1}: loss {float(metrics['loss']):.4f}")


if __name__ == "__main__":
    main()
