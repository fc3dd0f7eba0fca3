"""`python -m benchmarks convergence`: compares training with transformers, on the same weights and batches with AdamW.

A model of four layers per tower with the real vocabulary of 151936 learns the demo's questions about images of several
sizes: with this project's kernels and linear cross-entropy, and with transformers and torch.optim.AdamW, in float32 and in
bfloat16. The curves are compared as means over WINDOW steps. The learning rate rises and falls as in `liger-jax finetune`.
At a constant peak rate, rounding differences grow a thousandfold every hundred steps, even in float32: the curves then
diverge, just as those of two programs that differ only in the order of their sums.
"""

import dataclasses
import datetime
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.environment import RESULTS, file_name
from convert import from_hf, to_hf
from liger_jax import Processor, Qwen2VL, Qwen2VLConfig, TrainState, make_train_step, prepare
from liger_jax.config import TextConfig, VisionConfig
from liger_jax.demo.data import Digits, conversations, load_digits
from liger_jax.demo.run import LENGTH, PATCHES, make_config, make_processor
from liger_jax.errors import UserError
from liger_jax.train.optimizer import warmup_cosine

try:
    import torch
    import transformers
except ModuleNotFoundError:  # `python -m benchmarks` imports this module for its options even without torch
    torch = None

WINDOW = 20
PEAK, WARMUP = 2e-4, 0.05  # peak learning rate; share of the steps that warm up to it
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Convergence:
    """Compares loss curves with transformers in float32 and bfloat16. Needs torch and transformers.

    Writes convergence_<device>.json and .png.
    """

    steps: int = 300
    """Training steps."""
    rows: int = 16
    """Conversations per step."""
    results: Path = RESULTS
    """Folder of the result files."""

    def run(self) -> Path:
        if torch is None:
            raise UserError("torch is not installed; expected the extra `parity`")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch uses the same GPU's memory
        torch.backends.cuda.matmul.allow_tf32 = False
        jax.config.update("jax_default_matmul_precision", "highest")
        curves = train_all(self.steps, self.rows)
        distances = compare(curves)
        print(json.dumps(distances, indent=1))
        device = jax.devices()[0].device_kind
        report = {
            "device": device,
            "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "date": datetime.date.today().isoformat(),
            **{"steps": self.steps, "rows": self.rows, "peak": PEAK, "warmup": WARMUP, "adamw": ADAMW},
            "found": distances,
            "losses": curves,
        }
        self.results.mkdir(parents=True, exist_ok=True)
        file = self.results / f"{file_name('convergence', device)}.json"
        file.write_text(json.dumps(report) + "\n")
        plot(file.with_suffix(".png"), curves, f"{device}, {self.rows} conversations a step, AdamW")
        return file


def train_all(steps: int, rows: int) -> dict[str, dict[str, list[float]]]:
    """Returns the losses of both packages in both dtypes, from the same checkpoint and on the same batches."""
    digits, _ = load_digits()
    processor = make_processor(digits)
    batches = list(make_batches(processor, digits, steps, rows))
    curves: dict[str, dict[str, list[float]]] = {"ours": {}, "theirs": {}}
    with tempfile.TemporaryDirectory() as checkpoint:
        to_hf(Qwen2VL.init(make_model_config(processor), dtype="float32"), checkpoint)
        for dtype in DTYPES:
            curves["ours"][dtype] = train_liger_jax(checkpoint, dtype, batches)
            curves["theirs"][dtype] = train_transformers(checkpoint, dtype, batches)
    return curves


def make_model_config(processor: Processor) -> Qwen2VLConfig:
    """Returns the demo's configuration with four wider layers per tower and the 2B's vocabulary."""
    demo = make_config(processor)
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
    return dataclasses.replace(demo, text=text, vision=vision)


def make_batches(processor: Processor, digits: Digits, steps: int, rows: int) -> Iterator[dict]:
    """Yields one batch per step in Hugging Face's layout."""
    for index in range(steps):
        endless = conversations(digits, np.random.default_rng((0, index)))
        yield processor(list(itertools.islice(endless, rows)), labels=True)


def train_liger_jax(checkpoint: str, dtype: str, batches: list[dict]) -> list[float]:
    optimizer = optax.adamw(warmup_cosine(PEAK, len(batches), WARMUP), **ADAMW)
    state = TrainState.create(from_hf(checkpoint, dtype=dtype), optimizer)
    step, losses = make_train_step(), []
    for arrays in batches:
        state, metrics = step(state, prepare(state.model.config, **arrays, length=LENGTH, patches=PATCHES))
        losses.append(metrics["loss"])
    return [float(loss) for loss in losses]


def train_transformers(checkpoint: str, dtype: str, batches: list[dict]) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    model = model.to(device).train()
    options = {"betas": (ADAMW["b1"], ADAMW["b2"])} | {name: ADAMW[name] for name in ("eps", "weight_decay")}
    optimizer, losses = torch.optim.AdamW(model.parameters(), **options), []
    schedule = warmup_cosine(PEAK, len(batches), WARMUP)
    for index, arrays in enumerate(batches):
        optimizer.param_groups[0]["lr"] = float(schedule(index))
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        loss = model(**tensors).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def smooth(losses: list[float]) -> np.ndarray:
    """Returns the mean over each window of WINDOW steps."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def compare(curves: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Returns the largest distances of the smoothed curves: from transformers, and between the dtypes of each package."""
    liger_jax, transformers = (
        {dtype: smooth(losses) for dtype, losses in curves[package].items()} for package in ("ours", "theirs")
    )
    relative = np.abs(liger_jax["float32"] / transformers["float32"] - 1)
    return {
        "float32: steps before the curves are 1 % apart": int(np.argmax(np.append(relative, 1.0) > 0.01)),
        "float32: largest relative distance": float(np.max(relative)),
        "bfloat16: largest distance": float(np.max(np.abs(liger_jax["bfloat16"] - transformers["bfloat16"]))),
        "transformers: bfloat16 from float32": float(
            np.max(np.abs(transformers["bfloat16"] - transformers["float32"]))
        ),
        "ours: bfloat16 from float32": float(np.max(np.abs(liger_jax["bfloat16"] - liger_jax["float32"]))),
    }


def plot(path: Path, curves: dict[str, dict[str, list[float]]], title: str) -> None:
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
