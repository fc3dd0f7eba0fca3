"""`python -m benchmarks convergence`: compares training with transformers, on the same weights and batches with AdamW.

A model of four layers per tower with the real vocabulary of 151936 learns the demo's questions about images of several
sizes: with this project's kernels, linear cross-entropy and optimizer, and with transformers and torch.optim.AdamW, in
float32 and in bfloat16. The curves are compared as means over WINDOW steps. The learning rate rises and falls as in
`liger-jax finetune`. At a constant peak rate, rounding differences grow a thousandfold every hundred steps, even in float32:
the curves then diverge, just as those of two programs that differ only in the order of their sums.
"""

import dataclasses
import datetime
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.environment import RESULTS, file_name
from benchmarks.peer_model import model_class
from benchmarks.record import FAMILY_NAMES, OURS
from convert import from_hf, to_hf
from liger_jax import Processor, QwenVL, QwenVLConfig, TrainState, make_train_step, prepare
from liger_jax.demo.data import Digits, conversations, load_digits
from liger_jax.demo.run import LENGTH, PATCHES, make_config, make_processor
from liger_jax.errors import UserError
from liger_jax.model.params import param_paths
from liger_jax.train.optimizer import find_states, warmup_cosine
from liger_jax.train.stochastic_rounding import StochasticState, stochastic_adamw

try:
    import torch
    import transformers
except ModuleNotFoundError:  # `python -m benchmarks` imports this module for its options even without torch
    torch = None

PEER = "transformers"
WINDOW = 20
WARMUP = 0.05  # share of the steps in which the learning rate rises
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Convergence:
    """Compares loss curves with transformers in float32 and bfloat16. Needs torch and transformers.

    Writes convergence_<device>_<learning rate>.json and .png, for other families than Qwen2-VL with their name.
    """

    steps: int = 300
    """Training steps."""
    rows: int = 16
    """Conversations per step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    family: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] = "qwen2_vl"
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""
    results: Path = RESULTS
    """Folder of the result files."""

    def run(self) -> Path:
        if torch is None:
            raise UserError("torch is not installed; expected the extra `parity`")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch uses the same GPU's memory
        torch.backends.cuda.matmul.allow_tf32 = False
        jax.config.update("jax_default_matmul_precision", "highest")
        runs = train_all(self.steps, self.rows, self.learning_rate, self.family)
        curves = {package: {dtype: run.losses for dtype, run in by_dtype.items()} for package, by_dtype in runs.items()}
        findings = compare(curves) | compare_rounding(runs)
        print(json.dumps(findings, indent=1))
        device = jax.devices()[0].device_kind
        report = {
            "family": self.family,
            "device": device,
            "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "date": datetime.date.today().isoformat(),
            **{"steps": self.steps, "rows": self.rows, "peak": self.learning_rate, "warmup": WARMUP, "adamw": ADAMW},
            "findings": findings,
            "losses": curves,
        }
        self.results.mkdir(parents=True, exist_ok=True)
        rate = np.format_float_scientific(self.learning_rate, trim="-", exp_digits=1)
        prefix = "convergence" if self.family == "qwen2_vl" else f"convergence_{self.family}"
        file = self.results / f"{file_name(prefix, device)}_{rate}.json"
        file.write_text(json.dumps(report) + "\n")
        name = FAMILY_NAMES[self.family]
        plot(
            file.with_suffix(".png"),
            curves,
            f"{name}, {device}, {self.rows} conversations a step, AdamW, peak rate {rate}",
        )
        return file


class TrainingRun(NamedTuple):
    """The losses of a run, and how its rounding went."""

    losses: list[float]
    changed: float
    """Share of the weights that differ from where they started."""
    second_moments: Mapping[str, float] = {}
    """Mean over each tensor."""
    exact_second_moments: Mapping[str, float] = {}
    """The same, accumulated in float32 from the same gradients."""


def train_all(steps: int, rows: int, learning_rate: float, family: str) -> dict[str, dict[str, TrainingRun]]:
    """Returns the runs of both packages in both dtypes, from the same checkpoint and on the same batches."""
    digits, _ = load_digits()
    processor = make_processor(digits, family)
    batches = list(make_batches(processor, digits, steps, rows))
    schedule = warmup_cosine(learning_rate, steps, WARMUP)
    runs: dict[str, dict[str, TrainingRun]] = {OURS: {}, PEER: {}}
    with tempfile.TemporaryDirectory() as checkpoint:
        to_hf(QwenVL.init(make_model_config(processor), dtype="float32"), checkpoint)
        for dtype in DTYPES:
            runs[OURS][dtype] = train_liger_jax(checkpoint, dtype, batches, schedule)
            runs[PEER][dtype] = train_transformers(checkpoint, dtype, batches, schedule)
    return runs


def make_model_config(processor: Processor) -> QwenVLConfig:
    """Returns the demo's configuration with four wider layers per tower and the vocabulary of the published models.

    With windows, every second vision layer attends to whole images; with deepstack, half of the layers are tapped.
    """
    demo = make_config(processor)
    time, height, width = demo.text.mrope_section
    text = dataclasses.replace(
        demo.text,
        vocab_size=151936,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        head_dim=64,
        mrope_section=(2 * time, 2 * height, 2 * width),
        initializer_range=0.06,
    )
    vision = dataclasses.replace(
        demo.vision,
        depth=4,
        embed_dim=128,
        intermediate_size=512,
        hidden_size=text.hidden_size,
        full_attention_layers=(1, 3) if demo.vision.window_size else (),
        deepstack_layers=(0, 2) if demo.vision.deepstack_layers else (),
    )
    return dataclasses.replace(demo, text=text, vision=vision)


def make_batches(processor: Processor, digits: Digits, steps: int, rows: int) -> Iterator[dict]:
    """Yields one batch per step in Hugging Face's layout."""
    for index in range(steps):
        endless = conversations(digits, np.random.default_rng((0, index)), cell=processor.image.factor)
        yield processor(list(itertools.islice(endless, rows)), labels=True)


def train_liger_jax(checkpoint: str, dtype: str, batches: list[dict], schedule: optax.Schedule) -> TrainingRun:
    optimizer = optax.chain(accumulate_second_moments(ADAMW["b2"]), stochastic_adamw(schedule, **ADAMW))
    model = from_hf(checkpoint, dtype=dtype)
    start = {path: np.asarray(weight) for path, weight in param_paths(model).items()}
    state = TrainState.create(model, optimizer)
    step, losses = make_train_step(), []
    for arrays in batches:
        state, metrics = step(state, prepare(state.model.config, **arrays, length=LENGTH, patches=PATCHES))
        losses.append(metrics["loss"])
    changed = [np.asarray(weight) != start[path] for path, weight in param_paths(state.model).items()]
    exact, optimizer_state = state.opt_state
    (adam,) = find_states(optimizer_state, (StochasticState, optax.ScaleByAdamState))
    return TrainingRun(
        [float(loss) for loss in losses], share_of_true(changed), tensor_means(adam.nu), tensor_means(exact)
    )


def accumulate_second_moments(b2: float) -> optax.GradientTransformation:
    """Returns a transformation whose state is Adam's second moments in float32. It leaves the gradients unchanged."""

    def init(params):
        return jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), params)

    def update(grads, state, params=None):
        return grads, jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g.astype(jnp.float32) ** 2, state, grads)

    return optax.GradientTransformation(init, update)


def tensor_means(tree: Any) -> dict[str, float]:
    return {path: float(jnp.mean(leaf, dtype=jnp.float32)) for path, leaf in param_paths(tree).items()}


def share_of_true(arrays: list[np.ndarray]) -> float:
    return sum(int(array.sum()) for array in arrays) / sum(array.size for array in arrays)


def train_transformers(checkpoint: str, dtype: str, batches: list[dict], schedule: optax.Schedule) -> TrainingRun:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_class(checkpoint).from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    model = model.to(device).train()
    start = [weight.detach().clone() for weight in model.parameters()]
    options = {"betas": (ADAMW["b1"], ADAMW["b2"])} | {name: ADAMW[name] for name in ("eps", "weight_decay")}
    optimizer, losses = torch.optim.AdamW(model.parameters(), **options), []
    for index, arrays in enumerate(batches):
        optimizer.param_groups[0]["lr"] = float(schedule(index))
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        loss = model(**tensors).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    changed = [(weight != old).cpu().numpy() for weight, old in zip(model.parameters(), start, strict=True)]
    return TrainingRun([float(loss) for loss in losses], share_of_true(changed))


def smooth(losses: list[float]) -> np.ndarray:
    """Returns the mean over each window of WINDOW steps."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def compare(curves: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Returns the largest distances of the smoothed curves: from transformers, and between the dtypes of each package."""
    liger_jax, transformers = (
        {dtype: smooth(losses) for dtype, losses in curves[package].items()} for package in (OURS, PEER)
    )
    relative = np.abs(liger_jax["float32"] / transformers["float32"] - 1)
    return {
        "float32: steps before the curves are 1 % apart": int(np.argmax(np.append(relative, 1.0) > 0.01)),
        "float32: largest relative distance": float(np.max(relative)),
        "bfloat16: largest distance": float(np.max(np.abs(liger_jax["bfloat16"] - transformers["bfloat16"]))),
        "transformers: bfloat16 from float32": float(
            np.max(np.abs(transformers["bfloat16"] - transformers["float32"]))
        ),
        "liger-jax: bfloat16 from float32": float(np.max(np.abs(liger_jax["bfloat16"] - liger_jax["float32"]))),
    }


def compare_rounding(runs: dict[str, dict[str, TrainingRun]]) -> dict[str, float]:
    """Returns how close training in bfloat16 comes to the same package's float32, and whether our second moments are."""

    def drop(run: TrainingRun) -> float:
        return run.losses[0] - float(smooth(run.losses)[-1])

    def distance(moments: Mapping[str, float], exact: Mapping[str, float]) -> float:
        return max(abs(moments[path] / mean - 1) for path, mean in exact.items() if mean)

    findings = {}
    for package in (OURS, PEER):
        float32, bfloat16 = (runs[package][dtype] for dtype in DTYPES)
        findings[f"{package}: loss drop in bfloat16, share of float32's"] = drop(bfloat16) / drop(float32)
        findings[f"{package}: share of bfloat16 weights changed from the start"] = bfloat16.changed
    float32, bfloat16 = (runs[OURS][dtype] for dtype in DTYPES)
    moments = bfloat16.second_moments
    findings["second moments, mean of a tensor: largest relative distance to float32 sums of the same gradients"] = (
        distance(moments, bfloat16.exact_second_moments)
    )
    findings["second moments, mean of a tensor: largest relative distance to the float32 run"] = distance(
        moments, float32.second_moments
    )
    return findings


def plot(path: Path, curves: dict[str, dict[str, list[float]]], title: str) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), DTYPES, strict=True):
        axes.plot(smooth(curves[PEER][dtype]), color="tab:orange", linewidth=4, alpha=0.5, label="transformers")
        axes.plot(smooth(curves[OURS][dtype]), color="tab:blue", linewidth=1.2, label="liger-jax")
        if dtype == "bfloat16":
            axes.plot(smooth(curves[OURS]["float32"]), "k:", linewidth=1.2, label="liger-jax in float32")
        axes.set(title=dtype, xlabel="step", ylabel=f"loss, mean over {WINDOW} steps")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
