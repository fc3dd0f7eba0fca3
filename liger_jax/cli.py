"""The command line: `liger-jax demo | finetune | generate | chat | convert | tune | env`.

A command imports what it needs.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Generator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from liger_jax import runtime

if TYPE_CHECKING:
    from liger_jax import Processor, Qwen2VL
    from liger_jax.generation.options import GenerationOptions

PACKAGES = ("liger-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "pillow")

app = tyro.extras.SubcommandApp()


@app.command
def demo(
    output: Path = Path("outputs/demo"),
    steps: int = 450,
    batch_size: int = 48,
    learning_rate: float = 3e-3,
    seed: int = 0,
    held_out: int = 256,
) -> None:
    """Fine-tune a small Qwen2-VL on pictures of handwritten digits, then ask it about digits it has not seen.

    Two minutes on two CPU cores. Leaves behind a checkpoint, a curve of the loss, a picture of answers, and metrics.jsonl.

    Args:
        output: folder for all results; an earlier demo's results in it are replaced.
        steps: training steps.
        batch_size: conversations in a step.
        learning_rate: highest learning rate, after warming up and before falling along a cosine.
        seed: of the weights and of the order of pictures.
        held_out: questions about unseen digits to measure the accuracy with.
    """
    # Timing several ways of each product takes a third of a demo on a GPU, and gains nothing for a model this small.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    from liger_jax.demo.run import run_demo

    runtime.enable_compilation_cache()
    options = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    report = run_demo(output, **options, held_out=held_out)
    print(f"{report.accuracy:.1%} of {held_out} questions about unseen digits answered exactly, {report.seconds:.0f} s")
    for name in ("answers", "loss", "metrics", "checkpoint"):
        print(f"{name:<11}{getattr(report, name)}")


@app.command
def finetune(
    model: Annotated[str, tyro.conf.Positional],
    conversations: Annotated[Path, tyro.conf.Positional],
    output: Path = Path("outputs/finetune"),
    held_out: Path | None = None,
    eval_generate: int = 0,
    max_new_tokens: int = 64,
    media: Path | None = None,
    skip_broken: bool = False,
    steps: int = 1000,
    batch_size: int = 8,
    learning_rate: float = 1e-5,
    vision_learning_rate: float | None = None,
    merger_learning_rate: float | None = None,
    freeze: tuple[Literal["vision", "merger", "text"], ...] = (),
    lora: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: tuple[str, ...] = (),
    weight_decay: float = 0.0,
    warmup: float = 0.03,
    dtype: Literal["bfloat16", "float32"] | None = None,
    master_weights: bool = False,
    pack: int | None = None,
    group_by_length: bool = False,
    max_pixels: int | None = None,
    accumulate: int = 1,
    remat: Literal["auto", "none", "dots", "narrow", "attention", "full"] = "auto",
    unroll: bool = False,
    save_every: int = 500,
    keep: int = 3,
    workers: int | None = None,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    seed: int = 0,
) -> None:
    """Fine-tune a model on a file of conversations; run again with the same --output, it goes on where it was stopped.

    Args:
        model: an Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        conversations: a file in LLaVA, ShareGPT or messages format, a JSON list or a record a line.
        output: folder of checkpoints, metrics.jsonl, and curves for TensorBoard.
        held_out: such a file that is not trained, to measure loss and accuracy on at each checkpoint.
        eval_generate: how many of these the model also answers; answers.jsonl has its answers beside the right ones.
        max_new_tokens: longest of these answers.
        media: folder that relative paths of pictures start from; by default that of the conversations.
        skip_broken: leave out what is broken or too large, with a warning, instead of stopping.
        steps: training steps of the whole run.
        batch_size: conversations in a step; with --pack, rows.
        learning_rate: highest learning rate, after warming up and before falling along a cosine.
        vision_learning_rate: that of the vision tower.
        merger_learning_rate: that of the layers between vision tower and language model.
        freeze: parts that are not trained.
        lora: train matrices of this rank beside the weights, and nothing else; written to adapter/ in PEFT's format too.
        lora_alpha: they count alpha / rank times; by default twice.
        lora_targets: what gets them, by PEFT's names, or all-linear; by default the products of the text layers.
        weight_decay: of the weights of products and tables.
        warmup: share of the steps in which the learning rate rises.
        dtype: of weights and computation; by default bfloat16 from Hugging Face, and as they are from Orbax.
        master_weights: keep weights and moments in float32 too, and compute in bfloat16.
        pack: put several conversations into rows of so many tokens.
        group_by_length: put conversations of similar sizes into a batch.
        max_pixels: largest number of pixels of a picture; by default the model's.
        accumulate: parts that a batch is computed in, one after the other.
        remat: what the backward pass computes again; auto takes the fastest that fits the memory.
        unroll: a faster step for a longer compilation.
        save_every: steps between checkpoints.
        keep: checkpoints that stay.
        workers: processes that read pictures; by default some, where there are cores for them.
        data: devices that each have all weights, and split the rows of a batch.
        fsdp: devices that split the weights and the rows of a batch.
        tensor: devices that split heads and MLPs.
        seed: of the order of the data.
    """
    from convert import open_model, save_adapter
    from liger_jax import Processor
    from liger_jax.checkpoint import GENERATION
    from liger_jax.data.records import read_conversations
    from liger_jax.files import local_folder
    from liger_jax.model.lora import TEXT_TARGETS, add_lora
    from liger_jax.model.sharding import make_mesh
    from liger_jax.train.finetune import finetune as run
    from liger_jax.train.optimizer import BASE, make_optimizer, warmup_cosine

    if lora is None and (lora_alpha is not None or lora_targets):
        raise ValueError("lora_alpha and lora_targets are of --lora RANK, which is missing")
    if lora is not None and (freeze or vision_learning_rate is not None or merger_learning_rate is not None):
        raise ValueError("with --lora nothing else is trained; expected no --freeze and no learning rate of a part")
    if lora is not None and master_weights:
        raise ValueError("--lora trains float32 matrices, which need no --master-weights; expected one of the two")
    runtime.enable_compilation_cache()
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    on_error = "skip" if skip_broken else "raise"
    how = {"media": media, "on_error": on_error}
    seen, unseen = read_conversations(conversations, **how), held_out and read_conversations(held_out, **how)
    rates = {"vision": vision_learning_rate, "merger": merger_learning_rate}
    schedules = {part: rate if rate is None else warmup_cosine(rate, steps, warmup) for part, rate in rates.items()}
    optimizer = make_optimizer(
        warmup_cosine(learning_rate, steps, warmup),
        **schedules,
        freeze=freeze if lora is None else BASE,
        weight_decay=weight_decay,
        master_weights=master_weights,
    )
    processor = Processor.from_pretrained(model)
    processor.image = processor.image.with_limits(None, max_pixels)
    loaded = open_model(model, mesh=mesh, dtype=dtype)
    if lora is not None:
        targets = lora_targets if lora_targets != ("all-linear",) else "all-linear"
        alpha = 2 * lora if lora_alpha is None else lora_alpha
        loaded = add_lora(loaded, rank=lora, alpha=alpha, targets=targets or tuple(TEXT_TARGETS), seed=seed)
    state = run(
        loaded,
        processor,
        seen,
        output,
        generation_config=local_folder(model, [GENERATION]) / GENERATION,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        held_out=unseen or (),
        eval_generate=eval_generate,
        max_new_tokens=max_new_tokens,
        seed=seed,
        pack_length=pack,
        group_by_length=group_by_length,
        on_error=on_error,
        remat=remat,
        accumulate=accumulate,
        unroll=unroll,
        save_every=save_every,
        keep=keep,
        workers=workers,
        frozen=freeze if lora is None else BASE,
    )
    if lora is not None:
        save_adapter(state.model, output / "adapter", base_model=model)
    print(f"step {int(state.step)} of {steps}: checkpoint and metrics.jsonl in {output}")


@dataclasses.dataclass(frozen=True)
class AnswerFlags:
    """How answers are made. What is not given is as the checkpoint's generation_config.json has it."""

    max_new_tokens: int | None = None
    """Longest answer, in tokens; 512 where the checkpoint has none."""
    temperature: float | None = None
    """Draw answers, from a distribution so much flatter; by default as the checkpoint has it. Naming this, top_k, top_p or
    min_p switches drawing on and those that are not named off; 0 is the most likely token, always."""
    top_k: int | None = None
    """Draw from so many of the most likely tokens."""
    top_p: float | None = None
    """Draw from the most likely tokens that have this probability together."""
    min_p: float | None = None
    """Draw from the tokens that are at least so likely beside the most likely one."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens less likely that occurred, also in the question."""
    no_repeat_ngram_size: int | None = None
    """No run of so many tokens occurs twice."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    seed: int = 0
    """Of what is drawn."""

    def options(self, folder: Path) -> "GenerationOptions":
        from liger_jax.generation.options import GenerationOptions

        given = {name: value for name, value in vars(self).items() if value not in (None, ())}
        if self.stop:
            given["stop_strings"] = given.pop("stop")
        filters = ("temperature", "top_k", "top_p", "min_p")
        if self.temperature == 0:
            given = {name: value for name, value in given.items() if name not in filters} | {"do_sample": False}
        elif given.keys() & filters:
            given = {"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None} | given
        return GenerationOptions.from_hf(folder, **given)


@app.command
def generate(
    model: Annotated[str, tyro.conf.Positional],
    question: Annotated[str | None, tyro.conf.Positional] = None,
    images: tuple[Path, ...] = (),
    system: str | None = None,
    data: Path | None = None,
    output: Path | None = None,
    media: Path | None = None,
    batch_size: int | None = None,
    skip_broken: bool = False,
    max_pixels: int | None = None,
    answers: Annotated[AnswerFlags, tyro.conf.arg(name="")] = AnswerFlags(),
) -> None:
    """Answer one question, with pictures or without, or all questions of a file.

    Answering a file can be stopped at any moment; run again with the same --output, it goes on.

    Args:
        model: an Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        question: what to ask; the answer is printed as it comes.
        images: pictures to ask about.
        system: the system message of the question.
        data: instead of a question, a file of them in LLaVA, ShareGPT or messages format, a JSON list or a record a line.
        output: file of the answers, a JSON record a line.
        media: folder that relative paths of pictures in the data start from; by default that of the data.
        batch_size: questions of the data that are answered together, 8 if not given.
        skip_broken: leave broken records of the data out, with a warning, instead of stopping.
        max_pixels: largest number of pixels of a picture; by default the model's.
    """
    if (question is None) == (data is None) or (data is None) != (output is None):
        raise ValueError("expected a question, or --data and --output")
    given = {"--images": images, "--system": system}
    if data is None:
        given = {"--media": media, "--batch-size": batch_size, "--skip-broken": skip_broken}
    if useless := [name for name, value in given.items() if value or (value == 0 and value is not False)]:
        raise ValueError(f"{' and '.join(useless)} is not for {'a file of questions' if data else 'a single question'}")
    if data is not None and not data.is_file():
        raise FileNotFoundError(f"{data}: no such file of questions")
    if missing := [str(path) for path in images if not path.is_file()]:
        raise FileNotFoundError(f"{', '.join(missing)}: no such picture")
    from liger_jax import Chat
    from liger_jax.generation.answer_file import answer_file

    *both, options = open_for_answers(model, answers, max_pixels)
    if data is not None:
        how = {"batch_size": 8 if batch_size is None else batch_size, "media": media, "skip_broken": skip_broken}
        print(f"{answer_file(*both, data, output, options=options, **how)} answers in {output}")
    else:
        print_pieces(Chat(*both, system=system, **vars(options)).stream(question, images=images))


@app.command
def chat(
    model: Annotated[str, tyro.conf.Positional],
    system: str | None = None,
    max_pixels: int | None = None,
    answers: Annotated[AnswerFlags, tyro.conf.arg(name="")] = AnswerFlags(),
) -> None:
    """Talk with a model about texts and pictures, in the terminal.

    `/image PATH` shows a picture with the next question, `/reset` begins anew, `/quit` ends. Ctrl-C ends an answer.

    Args:
        model: an Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        system: the system message.
        max_pixels: largest number of pixels of a picture; by default the model's.
    """
    from liger_jax import Chat
    from liger_jax.inputs.images import load_image

    *both, options = open_for_answers(model, answers, max_pixels)
    talk, images = Chat(*both, system=system, **vars(options)), []
    while True:
        try:
            command, _, rest = (line := input("> ").strip()).partition(" ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if command == "/quit":
                return
            elif command == "/reset":
                talk.reset()
                images = []
            elif command == "/image":
                images.append(load_image(rest.strip().strip("'\"")))
            elif command.startswith("/"):
                print("expected a question, /image PATH, /reset or /quit")
            elif line:
                answer, images = talk.stream(line, images=images), []
                print_pieces(answer)
        except (ValueError, FileNotFoundError) as error:
            print(f"! {error}")
        except KeyboardInterrupt:
            print()


def print_pieces(pieces: Generator[str]) -> None:
    with contextlib.closing(pieces):  # or an answer that Ctrl-C ends would keep the decoder's copy of the weights
        for piece in pieces:
            print(piece, end="", flush=True)
    print()


def open_for_answers(
    name: str, flags: AnswerFlags, max_pixels: int | None
) -> tuple["Qwen2VL", "Processor", "GenerationOptions"]:
    from convert import open_model
    from liger_jax import Processor
    from liger_jax.files import local_folder

    runtime.enable_compilation_cache()
    options = flags.options(local_folder(name, ["generation_config.json"]))
    processor = Processor.from_pretrained(name)
    processor.image = processor.image.with_limits(None, max_pixels)
    return open_model(name), processor, options


@app.command
def convert(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    to: Literal["orbax", "hf"] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a Hugging Face checkpoint to an Orbax folder, or back.

    Args:
        source: an Orbax folder, a Hugging Face folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.
        target: the folder to write.
        to: format to write; by default the one that the source is not in.
        dtype: of the weights; by default bfloat16 from Hugging Face, and as they are from Orbax.
        max_shard_size: largest file of a Hugging Face checkpoint.
        revision: branch, tag or commit of the hub.
        allow_pickle: read pytorch_model*.bin files, which can run code.
        overwrite: write into a folder that has files in it.
    """
    from convert.__main__ import convert as run

    options = {"to": to, "dtype": dtype, "max_shard_size": max_shard_size, "revision": revision}
    print(run(source, target, **options, allow_pickle=allow_pickle, overwrite=overwrite))


@app.command
def tune(*only: str) -> None:
    """Time the candidate block sizes of the kernels on the GPU at hand and keep the fastest for it.

    Args:
        only: kernels by name; by default all.
    """
    from pallas_kernels.tune import main as tune_kernels

    tune_kernels(only)


@app.command
def env() -> None:
    """Show versions and devices, for a bug report."""
    import platform

    import jax

    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            print(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            print(package, "not installed as a package")
    print("platform", jax.default_backend())
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        print("device", device.id, device.device_kind, *([f"{memory / 2**30:.1f} GiB"] if memory else []))


def main() -> None:
    """Runs a command; what the user got wrong is one line on stderr, without a traceback."""
    try:
        app.cli(prog="liger-jax", description="Qwen2-VL for JAX: train, ask, convert, inspect.")
    except (ValueError, OSError) as error:
        sys.exit(f"liger-jax: {error}")
