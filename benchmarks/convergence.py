"""Whether training goes the way it does in transformers: the same weights, batches and AdamW, step by step.

python benchmarks/convergence.py            # needs torch and transformers; writes results/convergence_<device>.json and .png

A model of four layers a tower with the real vocabulary of 151936 learns the demo's questions about pictures of several
sizes: with this project's kernels and linear cross-entropy, and with transformers and torch.optim.AdamW, in float32 and in
bfloat16. The curves are compared as means over WINDOW steps. The learning rate rises and falls as `liger-jax finetune` has
it: held at its peak, it lets differences of rounding grow a thousandfold every hundred steps, in float32 too, and the curves
part as those of one program do that adds up in another order.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import optax
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convert import from_hf, to_hf
from liger_jax import Processor, Qwen2VL, Qwen2VLConfig, TrainState, make_train_step, prepare
from liger_jax.config import TextConfig, VisionConfig
from liger_jax.demo.data import Digits, conversations, load_digits
from liger_jax.demo.run import LENGTH, PATCHES, make_config, make_processor
from liger_jax.train.optimizer import warmup_cosine

WINDOW = 20
PEAK, WARMUP = 2e-4, 0.05  # learning rate, share of the steps until it is reached
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
RESULTS = pathlib.Path(__file__).parent / "results"
DTYPES = ("float32", "bfloat16")


def real_vocabulary(processor: Processor) -> Qwen2VLConfig:
    """The demo's configuration, with four layers a tower, wider, and the vocabulary of the 2B."""
    small = make_config(processor)
    text = TextConfig(
        vocab_size=151936,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        mrope_section=(8, 12, 12),
        max_position_embeddings=4096,
        initializer_range=0.06,
    )
    vision = VisionConfig(depth=4, embed_dim=128, num_heads=4, hidden_size=text.hidden_size)
    return dataclasses.replace(small, text=text, vision=vision)


def batches(processor: Processor, digits: Digits, steps: int, rows: int) -> Iterator[dict]:
    """The steps' batches in Hugging Face's layout."""
    for index in range(steps):
        endless = conversations(digits, np.random.default_rng((0, index)))
        yield processor(list(itertools.islice(endless, rows)), labels=True)


def ours(checkpoint: str, dtype: str, work: list[dict]) -> list[float]:
    optimizer = optax.adamw(warmup_cosine(PEAK, len(work), WARMUP), **ADAMW)
    state = TrainState.create(from_hf(checkpoint, dtype=dtype), optimizer)
    step, losses = make_train_step(), []
    for arrays in work:
        state, metrics = step(state, prepare(state.model.config, **arrays, length=LENGTH, patches=PATCHES))
        losses.append(metrics["loss"])
    return [float(loss) for loss in losses]


def theirs(checkpoint: str, dtype: str, work: list[dict]) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    model = model.to(device).train()
    options = {"betas": (ADAMW["b1"], ADAMW["b2"])} | {name: ADAMW[name] for name in ("eps", "weight_decay")}
    optimizer, losses = torch.optim.AdamW(model.parameters(), **options), []
    schedule = warmup_cosine(PEAK, len(work), WARMUP)
    for index, arrays in enumerate(work):
        optimizer.param_groups[0]["lr"] = float(schedule(index))
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        loss = model(**tensors).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def smooth(losses: list[float]) -> np.ndarray:
    """Means over WINDOW steps, one for each window."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def compare(curves: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Largest distance of the smoothed curves: to transformers at the same dtype, and of its own two dtypes."""
    ours, theirs = ({dtype: smooth(losses) for dtype, losses in curves[who].items()} for who in ("ours", "theirs"))
    apart = np.abs(ours["float32"] / theirs["float32"] - 1)
    return {
        "float32: steps before the curves are 1 % apart": int(np.argmax(np.append(apart, 1.0) > 0.01)),
        "float32: largest relative distance": float(np.max(apart)),
        "bfloat16: largest distance": float(np.max(np.abs(ours["bfloat16"] - theirs["bfloat16"]))),
        "transformers: bfloat16 from float32": float(np.max(np.abs(theirs["bfloat16"] - theirs["float32"]))),
        "ours: bfloat16 from float32": float(np.max(np.abs(ours["bfloat16"] - ours["float32"]))),
    }


def plot(path: pathlib.Path, curves: dict[str, dict[str, list[float]]], title: str) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), DTYPES, strict=True):
        axes.plot(smooth(curves["theirs"][dtype]), color="tab:orange", linewidth=4, alpha=0.5, label="transformers")
        axes.plot(smooth(curves["ours"][dtype]), color="tab:blue", linewidth=1.2, label="liger-jax")
        axes.set(title=dtype, xlabel="step", ylabel=f"loss, mean over {WINDOW} steps")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    jax.config.update("jax_default_matmul_precision", "highest")
    digits, _ = load_digits()
    processor = make_processor(digits)
    work = list(batches(processor, digits, args.steps, args.rows))
    curves: dict[str, dict[str, list[float]]] = {"ours": {}, "theirs": {}}
    with tempfile.TemporaryDirectory() as checkpoint:
        to_hf(Qwen2VL.init(real_vocabulary(processor), dtype="float32"), checkpoint)
        for dtype in DTYPES:
            curves["ours"][dtype] = ours(checkpoint, dtype, work)
            curves["theirs"][dtype] = theirs(checkpoint, dtype, work)
    found = compare(curves)
    print(json.dumps(found, indent=1))
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    about = {"device": jax.devices()[0].device_kind, "versions": versions, "date": datetime.date.today().isoformat()}
    args.results.mkdir(parents=True, exist_ok=True)
    work_done = {"steps": args.steps, "rows": args.rows, "peak": PEAK, "warmup": WARMUP, "adamw": ADAMW}
    name = f"convergence_{about['device'].lower().replace(' ', '_')}"
    text = json.dumps({**about, **work_done, "found": found, "losses": curves})
    (args.results / f"{name}.json").write_text(text + "\n")
    plot(args.results / f"{name}.png", curves, f"{about['device']}, {args.rows} conversations a step, AdamW")


if __name__ == "__main__":
    main()
