"""The command line: `liger-jax demo | finetune | convert | tune | bench | env`. A command imports what it needs."""

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import tyro

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
    from liger_jax.demo.run import run_demo

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
    weight_decay: float = 0.0,
    warmup: float = 0.03,
    dtype: Literal["bfloat16", "float32"] | None = None,
    master_weights: bool = False,
    pack: int | None = None,
    group_by_length: bool = False,
    max_pixels: int | None = None,
    accumulate: int = 1,
    remat: Literal["auto", "none", "dots", "full"] = "auto",
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
        weight_decay: of the weights of products and tables.
        warmup: share of the steps in which the learning rate rises.
        dtype: of weights and computation; by default bfloat16 from Hugging Face, and as they are from Orbax.
        master_weights: keep weights and moments in float32 too, and compute in bfloat16.
        pack: put several conversations into rows of so many tokens.
        group_by_length: put conversations of similar sizes into a batch.
        max_pixels: largest number of pixels of a picture; by default the model's.
        accumulate: parts that a batch is computed in, one after the other.
        remat: what the backward pass computes again; auto takes the fastest that fits the memory.
        save_every: steps between checkpoints.
        keep: checkpoints that stay.
        workers: processes that read pictures; by default some, where there are cores for them.
        data: devices that each have all weights, and split the rows of a batch.
        fsdp: devices that split the weights and the rows of a batch.
        tensor: devices that split heads and MLPs.
        seed: of the order of the data.
    """
    from convert import from_hf
    from liger_jax import Processor
    from liger_jax.checkpoint import is_model, load_model
    from liger_jax.data import read_conversations
    from liger_jax.finetune import finetune as run
    from liger_jax.mesh import make_mesh
    from liger_jax.optimizer import make_optimizer, warmup_cosine

    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    on_error = "skip" if skip_broken else "raise"
    how = {"media": media, "on_error": on_error}
    seen, unseen = read_conversations(conversations, **how), held_out and read_conversations(held_out, **how)
    rates = {"vision": vision_learning_rate, "merger": merger_learning_rate}
    schedules = {part: rate if rate is None else warmup_cosine(rate, steps, warmup) for part, rate in rates.items()}
    optimizer = make_optimizer(
        warmup_cosine(learning_rate, steps, warmup),
        **schedules,
        freeze=freeze,
        weight_decay=weight_decay,
        master_weights=master_weights,
    )
    processor = Processor.from_pretrained(model)
    processor.image = processor.image.with_limits(None, max_pixels)
    loaded = (
        load_model(model, mesh=mesh, dtype=dtype)
        if is_model(model)
        else from_hf(model, mesh=mesh, dtype=dtype or "bfloat16")
    )
    state = run(
        loaded,
        processor,
        seen,
        output,
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
        save_every=save_every,
        keep=keep,
        workers=workers,
        frozen=freeze,
    )
    print(f"step {int(state.step)} of {steps}: checkpoint and metrics.jsonl in {output}")


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
def bench(
    what: Annotated[Literal["ops"], tyro.conf.Positional],
    only: tuple[str, ...] = (),
    peers: bool = True,
    sweep: bool = False,
    results: Path = Path("benchmarks/results"),
) -> None:
    """Measure on the GPU at hand: the operations of pallas_kernels, beside jitted jnp, cuDNN and other packages.

    ops takes kernel times, memory and errors, and writes ops_<device>.json anew after each case. A case that is in there
    already is replaced, so that a bench can be run in parts.

    Args:
        what: what to measure.
        only: operations, or single cases by name; by default all.
        peers: also measure other packages: Liger-Kernel, torch and cut-cross-entropy in a process of their own, tokamax.
        sweep: from few rows to many instead, against jitted jnp only; writes ops_sweep_<device>.json and a plot of it.
        results: folder of the files.
    """
    from liger_jax.bench import ops

    print(ops.run(only, peers=peers, sweep=sweep, directory=results))


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
        app.cli(prog="liger-jax", description="Qwen2-VL for JAX: train, convert, inspect.")
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"liger-jax: {error}")
