"""Runs the demo, from images to answers, with the same functions as any other training run."""

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

from liger_jax import Batch, Processor, QwenVL, QwenVLConfig, TrainState, make_train_step, prepare
from liger_jax.checkpoint import load_model, save_state
from liger_jax.data.loader import load_batches
from liger_jax.demo.data import Digits, conversations, draw_image, load_digits
from liger_jax.demo.plots import plot_answers, plot_loss
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.errors import AlreadyExistsError, UserError
from liger_jax.files import LOCK, lock_folder
from liger_jax.inputs.families import FAMILIES
from liger_jax.train.evaluation import compare_answers
from liger_jax.train.loop import fit
from liger_jax.train.metrics import RunLog
from liger_jax.train.run import METRICS

# Positions and slots for patches per row: the same in every batch, so that one program trains on all of them.
LENGTH, PATCHES = 48, 48
# Numbers of digits in the training conversations. Three are the hardest and teach the most, and a step costs no more.
COUNTS = (1, 2, 2, 3, 3, 3)
MAX_ANSWER = 8  # tokens
EVALUATION_BATCH = 64  # questions answered together
SHOWN = 10  # answers in the plot
# The text and vision values that are not the same in every family. A window has 2 x 2 cells, and a slot per patch.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ({"mrope_section": (4, 6, 6)}, {}),
    "qwen2_5_vl": ({"mrope_section": (4, 6, 6)}, {"window_size": 56, "full_attention_layers": (1,)}),
    "qwen3_vl": ({"mrope_section": (6, 5, 5)}, {"position_table_side": 8, "deepstack_layers": (0,)}),
}
RESULTS = ("checkpoint", METRICS, "loss.png", "answers.png", "digit.png")


class Report(NamedTuple):
    """The result of the demo, and the paths of its files."""

    accuracy: float  # fraction of the held-out questions answered exactly
    seconds: float
    checkpoint: Path
    answers: Path
    loss: Path
    metrics: Path
    digit: Path  # an image of a held-out digit, to ask about


def run_demo(
    output: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    held_out: int,
    family: str = "qwen2_vl",
    progress: bool = True,
) -> Report:
    """Trains a model, saves it, loads it again, asks it about held-out digits, and plots the results.

    Args:
        output: folder for all results; replaces those of an earlier demo.
        steps: training steps.
        batch_size: conversations per step.
        learning_rate: peak learning rate.
        seed: seed for the weights and the order of the images.
        held_out: number of questions about held-out digits.
        family: "qwen2_vl", "qwen2_5_vl" or "qwen3_vl".
        progress: show a progress bar.

    Returns:
        The accuracy, the duration, and the paths of the results.

    Raises:
        UserError: an argument is out of range, or `output` cannot be written to.
        AlreadyExistsError: `output` holds files that are not results of the demo, or another process writes to it.
    """
    started = time.perf_counter()
    for name, value in {"steps": steps, "batch_size": batch_size, "held_out": held_out}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
    if not learning_rate > 0:
        raise UserError(f"learning_rate is {learning_rate}; expected above 0")
    if family not in SIZES:
        raise UserError(f"family is {family!r:.60}; expected one of {list(SIZES)}")
    with lock_folder(output):
        clear_output(output)
        train, unseen = load_digits()
        processor = make_processor(train, family)
        config = make_config(processor)
        batches = load_batches(
            functools.partial(training_batch, processor, config, train, seed, batch_size), range(steps)
        )
        model = QwenVL.init(config, seed=seed, dtype="float32")
        state = TrainState.create(model, make_optimizer(learning_rate, steps))
        with (
            contextlib.closing(batches),
            RunLog(output / METRICS, begin=0, steps=steps, progress=progress) as log,
        ):
            log.note("compiling the training step")
            state = fit(state, batches, make_train_step(remat="none"), log)

        checkpoint = output / "checkpoint"
        processor.save_pretrained(checkpoint)
        save_state(checkpoint, state)
        model, processor = load_model(checkpoint), Processor.from_pretrained(checkpoint)

        if progress:
            print(f"answering {held_out} questions about unseen digits", file=sys.stderr)
        stream = conversations(unseen, np.random.default_rng(1), cell=processor.image.factor)
        questions = list(itertools.islice(stream, held_out))
        shape = {"batch_size": EVALUATION_BATCH, "length": LENGTH, "patches": PATCHES}
        answers = compare_answers(model, processor, questions, max_new_tokens=MAX_ANSWER, **shape)
        accuracy = float(np.mean([answer["exact"] for answer in answers]))
        with (output / METRICS).open("a") as file:
            print(json.dumps({"step": steps, "held_out_accuracy": accuracy, "held_out": held_out}), file=file)
        plot_loss(
            output / "loss.png", [line["loss"] for line in log.history], [line["accuracy"] for line in log.history]
        )
        plot_answers(output / "answers.png", questions[:SHOWN], answers[:SHOWN])
        draw_image(unseen.images[:1], np.random.default_rng(0), processor.image.factor).save(output / "digit.png")
        paths = [output / name for name in ("checkpoint", "answers.png", "loss.png", METRICS, "digit.png")]
        return Report(accuracy, time.perf_counter() - started, *paths)


def clear_output(output: Path) -> None:
    """Removes an earlier demo's results from a folder. Raises AlreadyExistsError if it holds any other file."""
    if foreign := [path.name for path in output.iterdir() if path.name not in (*RESULTS, LOCK)]:
        raise AlreadyExistsError(
            f"{output} holds {foreign[:5]}; expected an empty folder or an earlier demo's results (see --output)"
        )
    for name in RESULTS:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def make_processor(digits: Digits, family: str = "qwen2_vl") -> Processor:
    """Returns a processor with a tokenizer trained on the demo's texts, and limits for small images."""
    byte_tokenizer = Processor(train_tokenizer([]), family=family).tokenizer
    sample = itertools.islice(conversations(digits, np.random.default_rng(0)), 200)
    texts = [str(byte_tokenizer.apply_chat_template(messages, tokenize=False)) for messages in sample]
    image = FAMILIES[family].image
    return Processor(train_tokenizer(texts), image.with_limits(image.factor**2, 16 * image.factor**2), family=family)


def make_config(processor: Processor) -> QwenVLConfig:
    """Returns the configuration of a model with a million parameters, of the processor's family and for its tokenizer."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    tiny = QwenVLConfig.tiny(family=processor.family)
    text_values, vision_values = SIZES[processor.family]
    text = dataclasses.replace(
        tiny.text,
        vocab_size=-(-len(processor.tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        head_dim=32,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); the usual 0.02 suits a model 20 times wider
        **text_values,
    )
    return QwenVLConfig(
        text=text,
        vision=dataclasses.replace(
            tiny.vision, depth=2, embed_dim=64, intermediate_size=256, hidden_size=text.hidden_size, **vision_values
        ),
        tie_word_embeddings=True,
        image_token_id=processor.token_ids["image"],
        video_token_id=processor.token_ids["video"],
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        eos_token_ids=(processor.tokenizer.eos_token_id,),
        pad_token_id=processor.tokenizer.pad_token_id,
        family=processor.family,
    )


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with gradient clipping, warmup over a tenth of the steps, and cosine decay."""
    warmup = min(-(-steps // 10), steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, 0.05 * learning_rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.01))


def training_batch(
    processor: Processor, config: QwenVLConfig, digits: Digits, seed: int, batch_size: int, index: int
) -> Batch:
    """Returns the batch for step `index`, which is the same in any process."""
    rng = np.random.default_rng((seed, index))
    stream = conversations(digits, rng, counts=COUNTS, cell=processor.image.factor)
    inputs = processor(list(itertools.islice(stream, batch_size)), labels=True)
    return prepare(config, **inputs, length=LENGTH, patches=PATCHES)
