"""`liger-jax finetune`: the flags that are no options of the library, and what they name."""

import dataclasses
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from liger_jax import runtime
from liger_jax.cli.app import ModelArgument
from liger_jax.cli.opening import open_processor
from liger_jax.errors import UserError
from liger_jax.options import Batching, Evaluation, LayerExecution, Optimization, Saving

if TYPE_CHECKING:
    from liger_jax.model.lora import LoraOptions

TERMINATED = 143  # exit status of a process that SIGTERM ends, as shells report it


def flags(options: type, **names: str | None) -> Any:
    """Returns a tyro annotation for an options dataclass. It renames the flags of the named fields, or hides them (None)."""
    types = typing.get_type_hints(options)
    markers = {name: tyro.conf.Suppress if flag is None else tyro.conf.arg(name=flag) for name, flag in names.items()}
    fields = [
        (field.name, Annotated[types[field.name], markers[field.name]], dataclasses.field(default=field.default))
        for field in dataclasses.fields(options)
        if field.name in names
    ]
    flagged = dataclasses.make_dataclass(options.__name__, fields, bases=(options,), frozen=True)
    flagged.__doc__ = options.__doc__
    return tyro.conf.arg(constructor=flagged)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Conversations to train and evaluate on."""

    conversations: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File of conversations in LLaVA, ShareGPT or messages format: a JSON list, or JSON lines."""
    held_out: Path | None = None
    """File of conversations on which loss and accuracy are measured at each checkpoint."""
    media: Path | None = None
    """Base folder of relative image paths; by default the folder of the conversations."""
    max_pixels: int | None = None
    """Maximum number of pixels per image; by default the model's limit."""


@dataclasses.dataclass(frozen=True)
class LoraFlags:
    """LoRA: train low-rank matrices instead of the weights."""

    lora: int | None = None
    """Train only LoRA matrices of this rank. They are also written to adapter/ in PEFT's format."""
    lora_alpha: float | None = None
    """LoRA updates are scaled by alpha / rank; by default alpha is 2 * rank."""
    lora_targets: tuple[str, ...] = ()
    """PEFT's names for the layers that get LoRA, or all-linear; by default the linear layers of the text model."""

    def resolve(self, optimization: Optimization) -> "LoraOptions | None":
        """Returns LoRA's options, or None if the weights are trained instead.

        Raises:
            UserError: contradictory flags, or unknown targets.
        """
        if self.lora is None:
            if self.lora_alpha is not None or self.lora_targets:
                raise UserError("--lora is missing; expected --lora RANK together with --lora-alpha or --lora-targets")
            return None
        part_rates = (optimization.vision_learning_rate, optimization.merger_learning_rate)
        if optimization.freeze or part_rates != (None, None):
            raise UserError(
                "--lora is set; expected no --freeze or learning rate of a part, since only LoRA is trained"
            )
        if optimization.master_weights:
            raise UserError("--lora is set; expected no --master-weights, since LoRA matrices are float32 already")
        from liger_jax.model.lora import TEXT_TARGETS, LoraOptions

        targets = "all-linear" if self.lora_targets == ("all-linear",) else self.lora_targets or tuple(TEXT_TARGETS)
        alpha = 2 * self.lora if self.lora_alpha is None else self.lora_alpha
        return LoraOptions(rank=self.lora, alpha=alpha, targets=targets)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices to train on."""

    data: int = 1
    """Devices that each hold all weights and split the batch."""
    fsdp: int = 1
    """Devices that split the weights and the batch."""
    sequence: int = 1
    """Devices that split the tokens of each sequence, for long videos, and the weights."""
    tensor: int = 1
    """Devices that split attention heads and MLPs."""


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
    """Several processes that train together: each one runs the same command, with its own --process."""

    coordinator: str | None = None
    """HOST:PORT of process 0; auto: SLURM, Open MPI or Kubernetes tell the address and the two numbers."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices and processes."""

    mesh: MeshShape = MeshShape()
    processes: ProcessFlags = ProcessFlags()


def finetune(
    model: ModelArgument,
    data: TrainingData,
    output: Path = Path("outputs/finetune"),
    steps: int = 1000,
    dtype: Literal["bfloat16", "float32"] | None = None,
    batching: Annotated[Batching, flags(Batching, pack_length="pack", length=None, patches=None)] = Batching(),
    optimization: Optimization = Optimization(),
    lora: LoraFlags = LoraFlags(),
    execution: LayerExecution = LayerExecution(remat="auto", unroll="auto"),
    saving: Annotated[Saving, flags(Saving, max_to_keep="keep", asynchronous=None, generation_config=None)] = Saving(),
    evaluation: Evaluation = Evaluation(),
    devices: Devices = Devices(),
) -> None:
    """Fine-tune a model on a file of conversations. To resume an interrupted run, repeat the command.

    Args:
        model: An Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        output: Folder for checkpoints, metrics.jsonl, and TensorBoard curves.
        steps: Number of training steps of the whole run.
        dtype: Dtype of weights and computation; by default bfloat16 for Hugging Face, the stored one for Orbax.
    """
    from liger_jax import processes
    from liger_jax.model.params import PARTS
    from liger_jax.train.optimizer import build_optimizer

    lora_options = lora.resolve(optimization)
    if lora_options is not None:
        optimization = dataclasses.replace(optimization, freeze=PARTS)
    build_optimizer(optimization, steps)  # raises errors in the options before the model is loaded
    with processes.connected(**vars(devices.processes)):
        trained_steps = finetune_model(
            model,
            data,
            output,
            dtype=dtype,
            mesh_shape=devices.mesh,
            lora_options=lora_options,
            steps=steps,
            optimizer=optimization,
            batching=batching,
            execution=execution,
            saving=saving,
            evaluation=evaluation,
        )
    if processes.is_first():
        adapter = ", adapter" if lora_options else ""
        hint = "; repeat the command to resume" if trained_steps < steps else ""
        print(f"step {trained_steps} of {steps}: checkpoint{adapter} and metrics.jsonl in {output}{hint}")
    if trained_steps < steps:
        sys.exit(TERMINATED)


def finetune_model(
    model: str,
    data: TrainingData,
    output: Path,
    *,
    dtype: Literal["bfloat16", "float32"] | None,
    mesh_shape: MeshShape,
    lora_options: "LoraOptions | None",
    batching: Batching,
    saving: Saving,
    **options: Any,
) -> int:
    """Reads what the flags of `finetune` name, and trains. Returns the number of steps.

    Args:
        model, data, output, dtype, mesh_shape, batching, saving: as for `finetune`.
        lora_options: None to train the weights.
        options: the other arguments of `liger_jax.finetune`.
    """
    from convert import open_model, save_adapter
    from liger_jax import add_lora, processes, read_conversations
    from liger_jax import finetune as run_finetune
    from liger_jax.files import GENERATION_CONFIG, local_folder
    from liger_jax.model.sharding import make_mesh
    from liger_jax.train.run import lock_run

    with lock_run(output):
        pass  # a folder that another process uses or that is read-only is refused here, before the model is read
    runtime.enable_compilation_cache()
    runtime.warn_if_gpu_is_unused()
    mesh = make_mesh(**vars(mesh_shape))
    processes.check_mesh(mesh)

    def read(path: Path) -> list:
        return read_conversations(path, media=data.media, on_error="skip" if batching.skip_broken else "raise")

    conversations, held_out = read(data.conversations), read(data.held_out) if data.held_out else ()
    processor = open_processor(model, data.max_pixels)
    weights = open_model(model, mesh=mesh, dtype=dtype)
    if lora_options is not None:
        weights = add_lora(weights, **vars(lora_options), seed=batching.seed)
    generation_config = local_folder(model, [GENERATION_CONFIG]) / GENERATION_CONFIG
    state = run_finetune(
        weights,
        processor,
        conversations,
        output,
        batching=batching,
        saving=dataclasses.replace(saving, generation_config=generation_config),
        held_out=held_out,
        **options,
    )
    if lora_options is not None:
        save_adapter(state.model, output / "adapter", base_model=model)
    return int(state.step)
