"""`liger-jax demo`."""

import os
import shlex
from pathlib import Path
from typing import Literal

from liger_jax import runtime

NEXT_STEPS = """
Try next:
  liger-jax generate {checkpoint} "Which digit is shown?" --images {digit}
  liger-jax chat {checkpoint}      # /image {digit} adds an image
On a GPU, with a released model and your own images:
  liger-jax env --check
  liger-jax generate Qwen/Qwen3-VL-2B-Instruct "What is in this image?" --images dog.jpg
  liger-jax finetune Qwen/Qwen3-VL-2B-Instruct train.json --media images --lora 16 --output runs/first"""

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def demo(
    output: Path = Path("outputs/demo"),
    steps: int = 450,
    batch_size: int = 48,
    learning_rate: float = 3e-3,
    seed: int = 0,
    held_out: int = 256,
    family: Family = "qwen2_vl",
) -> None:
    """Train a small Qwen-VL model on images of handwritten digits, then ask it about digits that it has not seen.

    Takes three to five minutes on two CPU cores. Writes a checkpoint, plots of the loss and of answers, and metrics.jsonl.

    Args:
        output: Folder for the results; replaces those of an earlier demo.
        steps: Number of training steps.
        batch_size: Conversations per step.
        learning_rate: Peak learning rate, reached after warmup and followed by a cosine decay.
        seed: Seed for the weights and the order of the images.
        held_out: Number of questions about unseen digits, for the accuracy.
        family: Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
    """
    # Autotuning matmuls takes a third of the demo's time on a GPU and gains nothing for a model this small.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    from liger_jax.demo.run import run_demo

    runtime.enable_compilation_cache()
    runtime.warn_if_gpu_is_unused()
    report = run_demo(
        output,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        held_out=held_out,
        family=family,
    )
    print(f"{report.accuracy:.1%} of {held_out} questions about unseen digits answered exactly, {report.seconds:.0f} s")
    for name in ("answers", "loss", "metrics", "checkpoint"):
        print(f"{name:<11}{getattr(report, name)}")
    print(NEXT_STEPS.format(checkpoint=shlex.quote(str(report.checkpoint)), digit=shlex.quote(str(report.digit))))
