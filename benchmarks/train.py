"""`python -m benchmarks train`: a training step of a model of real size, compared with transformers with Liger's kernels.

A step is timed from the call until its results are ready.
"""

import dataclasses
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax

from benchmarks import work
from benchmarks.environment import RESULTS
from benchmarks.mixed import mixed_batches
from benchmarks.model import ModelCase, Size, device_peak, place_batch
from benchmarks.profile import write_profile
from liger_jax import Batch, QwenVL, QwenVLConfig, TrainState, make_train_step, prepare
from liger_jax.errors import UserError
from liger_jax.inputs.batch import IGNORE
from liger_jax.model.lora import adapted_parts, add_lora
from liger_jax.model.params import PARTS
from liger_jax.options import LayerExecution, Unroll
from liger_jax.train.master_weights import with_master_weights
from liger_jax.train.metrics import batch_work, step_rates
from liger_jax.train.optimizer import make_optimizer
from liger_jax.train.stochastic_rounding import stochastic_adamw


@dataclasses.dataclass(frozen=True)
class Train:
    """Measures a training step: sequences of 2048 tokens with an image of 64 x 64 patches each, AdamW, bfloat16.

    Writes model.json.
    """

    size: Size = "2b"
    """The model: 2b and 7b are Qwen2-VL. Its weights are random."""
    rows: tuple[int, ...] = (4,)
    """Batch sizes. Each is one measurement."""
    peers: bool = True
    """Also measure transformers with Liger's kernels on the same weights and batches, if torch is installed. Ignored with
    --mixed, --lora and --master-weights, which have no peer."""
    mixed: bool = False
    """Pack conversations with images of 224 to 1344 pixels a side. Tokens per second do not count padding."""
    length: int | None = None
    """Tokens of a sequence, at most the model's number of positions (32768 for Qwen2-VL); 2048 by default."""
    lora: int | None = None
    """Train only LoRA matrices, of this rank."""
    master_weights: bool = False
    """Also keep float32 copies of the weights, and float32 moments."""
    remat: Literal["auto", "none", "dots", "narrow", "attention", "full"] = "auto"
    """Activations that the backward pass recomputes. "auto" takes the fastest policy that fits in memory."""
    unroll: Unroll = "auto"
    """Layers to unroll instead of scanning over them. "auto" is the default of `make_train_step`."""
    mesh: tuple[str, ...] = ()
    """Axes of a mesh of several GPUs, such as fsdp=2, without peers. The rows are those of all GPUs together."""
    profile: bool = False
    """Also write what a step spends its time on to profile_<size>_<options>_x<batch size>.json and .md."""
    checkpoints: Path | None = None
    """Folder that keeps the checkpoint with random weights for other measurements of the same size."""
    results: Path = RESULTS
    """Folder of the result files."""

    def run(self) -> Path:
        if self.lora is not None and self.master_weights:
            raise UserError(
                "lora and master_weights are both set; expected one, because LoRA's matrices are float32 already"
            )
        if self.length is not None and self.mixed:
            raise UserError(
                f"length is {self.length} and mixed is set; expected one, because mixed packs to {work.LENGTH}"
            )
        shortest = work.IMAGE_TOKENS + work.TEXT_TOKENS
        if self.length is not None and self.length < shortest:
            raise UserError(f"length is {self.length}; expected at least {shortest}, for the image and its answer")
        labels: dict = {"lora": self.lora} if self.lora is not None else {}
        labels |= {"master_weights": True} if self.master_weights else {}
        peers = self.peers and not labels and not self.mixed
        labels |= {"tokens": self.length} if self.length is not None else {}
        case = ModelCase(
            "train mixed" if self.mixed else "train",
            self.size,
            self.rows,
            self.results,
            labels,
            peers=peers,
            length=self.length,
            mesh=self.mesh,
            checkpoints=self.checkpoints,
            consumes_model=True,
        )
        return case.run(self._measure)

    def _measure(self, model: QwenVL, batch_size: int) -> dict:
        optimizer, frozen = stochastic_adamw(work.LEARNING_RATE, weight_decay=1e-4), ()
        if self.master_weights:
            optimizer = with_master_weights(optax.adamw(work.LEARNING_RATE))
        if self.lora is not None:
            optimizer, frozen = make_optimizer(work.LEARNING_RATE, freeze=PARTS), PARTS
            model = add_lora(model, rank=self.lora, alpha=2 * self.lora)
        if self.mixed:
            batches = mixed_batches(model.config, batch_size, work.MIXED_BATCHES)
        else:
            batches = [uniform_batch(model.config, batch_size, self.length)]
        options = {"remat": self.remat, "unroll": self.unroll}
        profile = self._profile_file(batch_size) if self.profile else None
        return time_steps(model, batches, optimizer=optimizer, frozen=frozen, profile=profile, **options)

    def _profile_file(self, batch_size: int) -> Path:
        options = [str(self.length)] * (self.length is not None)
        options += ["mixed"] * self.mixed + ["lora"] * (self.lora is not None)
        options += ["master_weights"] * self.master_weights
        options += [self.remat] * (self.remat != "auto") + [f"unroll_{self.unroll}"] * (self.unroll != "auto")
        options += [axis.replace("=", "") for axis in self.mesh]
        return self.results / f"profile_{'_'.join([self.size, *options])}_x{batch_size}"


def uniform_batch(config: QwenVLConfig, batch_size: int, length: int | None = None) -> Batch:
    return prepare(config, **work.sequences(config, batch_size, length or work.LENGTH))


def time_steps(
    model: QwenVL,
    batches: Sequence[Batch],
    *,
    optimizer: optax.GradientTransformation,
    frozen: Collection[str] = (),
    remat: str = "auto",
    unroll: Unroll = "auto",
    profile: Path | None = None,
) -> dict:
    """Times steps on the batches in turn. Donates the model's arrays."""
    works = [batch_work(model.config, batch, frozen=frozen, adapted=adapted_parts(model)) for batch in batches]
    trained = [int(np.count_nonzero(batch.labels != IGNORE)) for batch in batches]
    mean_work = {name: float(np.mean([batch[name] for batch in works])) for name in works[0]}
    state = TrainState.create(model, optimizer)
    step = make_train_step(remat=remat, unroll=unroll)
    placed = [place_batch(model, batch) for batch in batches]
    seconds, losses = [], []
    for number in range(work.WARMUP_STEPS + work.TIMED_STEPS):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, placed[number % len(placed)]))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    if profile is not None:
        with tempfile.TemporaryDirectory() as trace:
            with jax.profiler.trace(trace):
                state, _ = jax.block_until_ready(step(state, placed[0]))
            program = next(iter(step.compiled.values()))  # the first batch's
            write_profile(profile, Path(trace), program.as_text(), jax.devices()[0].device_kind)
    timed = range(work.WARMUP_STEPS, len(seconds))
    by_batch = [[seconds[i] for i in timed if i % len(placed) == number] for number in range(len(placed))]
    step_s = float(np.mean([np.median(times) for times in by_batch if times]))
    devices = sorted(state.step.devices(), key=lambda device: device.id)
    rates = step_rates(mean_work, float(np.mean(trained)), step_s, devices)
    return {
        "remat": step.chosen_remat,
        "unroll": LayerExecution(step.chosen_remat, unroll).unrolled,
        "step_ms": step_s * 1e3,
        "tokens_per_s": rates["tokens_per_second"],
        "trained_tokens_per_s": rates["trained_tokens_per_second"],
        "images": mean_work["images"],
        "token_utilisation": rates["token_utilisation"],
        **{name: value for name, value in rates.items() if name == "model_flops_utilisation"},
        "peak_gib": device_peak(),
        "compile_s": seconds[0] - step_s,
        "compilations": len(step.compiled),
        "losses": losses[:3],
    }
