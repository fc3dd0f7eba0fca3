"""The command line: `liger-jax demo | finetune | generate | chat | plan | convert | tune | env | completion`.

Each command parses its arguments, loads what it needs and calls the library. Heavy packages are imported inside the
commands, so that --help is quick.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import shlex
import sys
import typing
import warnings
from collections.abc import Generator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from liger_jax import __version__, names, runtime, suggestions
from liger_jax.errors import NotFoundError, UserError
from liger_jax.files import DISK_ERRORS, disk_error_code
from liger_jax.generation.options import AnswerOptions
from liger_jax.options import Batching, Evaluation, LayerExecution, Optimization, PlanOptions, Saving

if TYPE_CHECKING:
    from liger_jax import Chat, GenerationOptions, Processor, QwenVL
    from liger_jax.model.lora import LoraOptions

PACKAGES = ("liger-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "pillow")
# Operating system errors that the user can fix: about a disk, and about a path.
SYSTEM_ERRORS = (*DISK_ERRORS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EPIPE)
USAGE = 2  # exit status for an unknown command or flag
INTERRUPTED, TERMINATED = 130, 143  # exit status of a process that SIGINT or SIGTERM ends, as shells report it
BUG_HINT = "This looks like a bug in liger-jax. Please report it with this traceback and the output of `liger-jax env`."

DESCRIPTION = (
    "Qwen2-VL, Qwen2.5-VL and Qwen3-VL for JAX: fine-tune, ask questions, convert checkpoints. "
    "`liger-jax COMMAND --help` lists the flags of a command, `liger-jax --version` prints the version."
)
NEXT_STEPS = """
Try next:
  liger-jax generate {checkpoint} "Which digit is shown?" --images {digit}
  liger-jax chat {checkpoint}      # /image {digit} adds an image
On a GPU, with a released model and your own images:
  liger-jax env --check
  liger-jax generate Qwen/Qwen3-VL-2B-Instruct "What is in this image?" --images dog.jpg
  liger-jax finetune Qwen/Qwen3-VL-2B-Instruct train.json --media images --lora 16 --output runs/first"""

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
ModelArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]

app = tyro.extras.SubcommandApp()


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


# ---- demo ------------------------------------------------------------------------------------------------------------


@app.command
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


# ---- finetune --------------------------------------------------------------------------------------------------------


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


@app.command
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


# ---- generate, chat --------------------------------------------------------------------------------------------------


@app.command
def generate(
    model: ModelArgument,
    question: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[QUESTION]")] = None,
    images: tuple[Path, ...] = (),
    system: str | None = None,
    data: Path | None = None,
    output: Path | None = None,
    media: Path | None = None,
    batch_size: int | None = None,
    skip_broken: bool = False,
    max_pixels: int | None = None,
    answers: AnswerOptions = AnswerOptions(),
) -> None:
    """Answer one question, with or without images, or all questions of a file.

    If a file of questions is interrupted, repeat the command to resume.

    Args:
        model: An Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        question: The question; its answer is streamed.
        images: Images to ask the question about.
        system: System message for the question.
        data: File of questions in LLaVA, ShareGPT or messages format: a JSON list, or JSON lines.
        output: File for the answers to --data, in JSON lines.
        media: Base folder of relative image paths in --data; by default the folder of the data.
        batch_size: Number of questions of --data to answer together; default 8.
        skip_broken: Skip broken records of --data with a warning instead of stopping.
        max_pixels: Maximum number of pixels per image; by default the model's limit.
    """
    if (question is None) == (data is None) or (data is None) != (output is None):
        raise UserError(
            "expected a question, or --data and --output" + (" (the question goes before --images)" if images else "")
        )
    unused: dict[str, Any]
    if data is None:
        unused = {"--media": media, "--batch-size": batch_size, "--skip-broken": skip_broken or None}
    else:
        unused = {"--images": images or None, "--system": system}
    if names := [name for name, value in unused.items() if value is not None]:
        other = "a single question" if data else "--data"
        raise UserError(f"{' and '.join(names)} set; expected only with {other}")
    if data is not None and not data.is_file():
        raise NotFoundError(f"{data} does not exist; expected a file of questions")
    if missing := [str(path) for path in images if not path.is_file()]:
        raise NotFoundError(f"--images has {missing}, which do not exist; expected image files")
    weights, processor, options = open_for_answers(model, answers, max_pixels)
    if question is not None:
        from liger_jax import Chat

        print_stream(Chat(weights, processor, system=system, **vars(options)).stream(question, images=images))
    elif data is not None and output is not None:
        from liger_jax.generation.answer_file import answer_file

        count = answer_file(
            weights,
            processor,
            data,
            output,
            options=options,
            batch_size=8 if batch_size is None else batch_size,
            media=media,
            skip_broken=skip_broken,
        )
        print(f"{count} answers in {output}")


@app.command
def chat(
    model: ModelArgument,
    system: str | None = None,
    max_pixels: int | None = None,
    answers: AnswerOptions = AnswerOptions(),
) -> None:
    """Chat with a model about text and images, in the terminal.

    Type `/image PATH` to add an image to the next question, `/reset` to start a new chat, and `/quit` to end. Ctrl-C stops
    an answer.

    Args:
        model: An Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        system: System message.
        max_pixels: Maximum number of pixels per image; by default the model's limit.
    """
    from liger_jax import Chat

    weights, processor, options = open_for_answers(model, answers, max_pixels)
    session = Chat(weights, processor, system=system, **vars(options))
    images: list[Any] = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        try:
            images = respond(session, line, images)
        except UserError as error:
            print(f"! {error}")
        except KeyboardInterrupt:
            print()


def respond(session: "Chat", line: str, images: list[Any]) -> list[Any]:
    """Runs a chat command or prints the answer to a question. Returns the images for the next question."""
    from liger_jax.inputs.images import load_image

    command, _, argument = line.partition(" ")
    if command == "/reset":
        session.reset()
        return []
    if command == "/image":
        return [*images, load_image(argument.strip().strip("'\""))]
    if command.startswith("/"):
        print("expected a question, /image PATH, /reset or /quit")
    elif line:
        print_stream(session.stream(line, images=images))
        return []
    return images


def print_stream(pieces: Generator[str, None, None]) -> None:
    """Prints an answer piece by piece."""
    with contextlib.closing(pieces):  # frees the session's copy of the weights if Ctrl-C stops the answer
        for piece in pieces:
            print(piece, end="", flush=True)
    print()


def open_for_answers(
    model: str, answers: AnswerOptions, max_pixels: int | None
) -> tuple["QwenVL", "Processor", "GenerationOptions"]:
    """Returns the model, its processor, and the generation options of the flags and the checkpoint."""
    from convert import open_model
    from liger_jax.files import GENERATION_CONFIG, local_folder

    runtime.enable_compilation_cache()
    runtime.warn_if_gpu_is_unused()
    options = answers.resolve(local_folder(model, [GENERATION_CONFIG]))
    processor = open_processor(model, max_pixels)
    return open_model(model), processor, options


def open_processor(model: str, max_pixels: int | None) -> "Processor":
    """Returns the processor of a checkpoint, with a limit on the size of images.

    Raises UserError for models that are not supported, by name, before any file of theirs is read.
    """
    from liger_jax import Processor, QwenVLConfig
    from liger_jax.files import CONFIG, local_folder

    config_file = local_folder(model, [CONFIG]) / CONFIG
    if config_file.is_file():
        QwenVLConfig.from_hf(config_file)
    processor = Processor.from_pretrained(model)
    processor.image = processor.image.with_limits(None, max_pixels)
    return processor


# ---- plan ------------------------------------------------------------------------------------------------------------


@app.command
def plan(
    model: ModelArgument,
    run: PlanOptions = PlanOptions(),
    compile: bool = False,
) -> None:
    """Estimate memory, communication and speed of a training run on GPUs that need not be here.

    Args:
        model: A preset such as qwen2_vl_7b, or an Orbax folder, a Hugging Face folder or a hub id; only config.json is read.
        compile: Also compile the step for the best mesh, for its exact memory; needs jax[cuda12], but no GPU.
    """
    runtime.compile_without_gpus()
    from liger_jax import plan as planner

    config = planner.read_config(model)
    plans = planner.make_plans(config, run)
    print(planner.report(run, plans))
    if compile:
        print(planner.compiled_report(config, run, plans[0]))


# ---- convert, tune, env, completion -----------------------------------------------------------------------------------


@app.command
def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    to: Literal["orbax", "hf"] | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    allow_pickle: bool = False,
    allow_non_finite: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a Hugging Face checkpoint to an Orbax folder, or back.

    Args:
        source: An Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        target: Folder to write.
        to: Format to write; by default, orbax for a Hugging Face source and hf for an Orbax source.
        dtype: bfloat16, float16 or float32; by default bfloat16 for a Hugging Face source, the stored one for Orbax.
        max_shard_size: Maximum size of a Hugging Face weight file.
        revision: Branch, tag or commit on the hub.
        allow_pickle: Also read pytorch_model*.bin files, which can execute code.
        allow_non_finite: Also convert weights that hold NaN or infinity, or that overflow the dtype.
        overwrite: Write even if the folder has files.
    """
    from convert.load import convert_checkpoint

    summary = convert_checkpoint(
        source,
        target,
        to=to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        revision=revision,
        allow_pickle=allow_pickle,
        allow_non_finite=allow_non_finite,
        overwrite=overwrite,
    )
    print(summary)


@app.command
def tune(*only: str) -> None:
    """Time candidate block sizes of the kernels on this GPU, and save the fastest.

    Args:
        only: Names of kernels to tune; by default all.
    """
    from pallas_kernels.tune import main as tune_kernels

    tune_kernels(only)


@app.command
def env(check: bool = False) -> None:
    """Show versions and devices, for a bug report; with --check, also test each kernel on this device.

    Args:
        check: Run each operation once, compare its kernels with XLA, and show which implementation it uses and why. Takes
            about a minute. The exit status is 1 if a kernel fails.
    """
    import platform

    import jax

    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            print(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            print(package, "not installed as a package")
    if others := names.other_distributions():
        print("warning: packages of liger-jax were also installed, and overwritten, by", ", ".join(others))
    print("platform", jax.default_backend())
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        print("device", device.id, device.device_kind, *([f"{memory / 2**30:.1f} GiB"] if memory else []))
    if check:
        from pallas_kernels.check import main as check_kernels

        sys.exit(check_kernels())


@app.command
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]) -> None:
    """Print a completion script for a shell.

    For bash, write it to ~/.local/share/bash-completion/completions/liger-jax; for zsh, to a file _liger-jax in a folder of
    $fpath; for fish, to ~/.config/fish/completions/liger-jax.fish. Create the folder if it does not exist. In bash,
    `source <(liger-jax completion bash)` completes in the current shell.

    Args:
        shell: The shell to complete commands and flags in.
    """
    app.cli(args=["--tyro-write-completion", shell, "-"], prog="liger-jax", config=(tyro.conf.OmitArgPrefixes,))


def main(arguments: Sequence[str] | None = None, prog: str = "liger-jax") -> None:
    """Runs a command. An error that the user can fix ends it with one line on stderr; other errors keep their traceback.

    Warnings of this project are printed as one line; other packages are silent. Ctrl-C ends a command with status 130. An
    unknown command or flag ends with status 2 and a suggestion.

    Args:
        arguments: the command and its arguments; by default those of the process.
        prog: name of the program in help texts.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print("liger-jax", __version__)
        return
    commands = list(app._subcommands)  # tyro has no public list
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        hint = suggestions.closest(arguments[0], commands)
        print(f"liger-jax: command is {arguments[0]!r}; expected one of {', '.join(commands)}{hint}", file=sys.stderr)
        sys.exit(USAGE)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        runtime.silence_packages()
        try:
            names.check_commands()
            app.cli(
                args=arguments,
                prog=prog,
                description=DESCRIPTION,
                config=(tyro.conf.OmitArgPrefixes,),
            )
        except SystemExit as error:
            for line in suggestions.flags_of_others(arguments) if error.code == USAGE else ():
                print(f"liger-jax: {line}", file=sys.stderr)
            raise
        except KeyboardInterrupt:
            print("liger-jax: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except Exception as error:
            if can_user_fix(error):
                if is_reported_elsewhere(error):
                    sys.exit(1)
                notes = () if isinstance(error, UserError) else getattr(error, "__notes__", ())  # what a run saved
                message = " ".join([str(error), *notes])
                sys.exit(f"liger-jax: {' '.join(message.split())}")
            error.add_note(BUG_HINT)  # printed after the traceback
            raise


def can_user_fix(error: Exception) -> bool:
    """Returns whether the user can fix an error: a mistake, or for example a full or read-only disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in SYSTEM_ERRORS
    # TensorStore, which writes checkpoints, reports disk errors as ValueErrors
    return isinstance(error, UserError) or (isinstance(error, ValueError) and disk_error_code(error) is not None)


def is_reported_elsewhere(error: Exception) -> bool:
    """Returns whether all of several processes have raised this error, and process 0, which is another one, prints it."""
    processes = sys.modules.get("liger_jax.processes")  # imported only by commands that may run in several processes
    return processes is not None and processes.is_agreed(error) and not processes.is_first()


if __name__ == "__main__":
    main()
