"""The demo from pictures to answers, through the functions that any other training run uses."""

import functools
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax

from liger_jax import Batch, Processor, Qwen2VL, Qwen2VLConfig, TrainState, prepare
from liger_jax.checkpoint import load_model, save_state
from liger_jax.config import TextConfig, VisionConfig
from liger_jax.data.loader import load_batches
from liger_jax.demo.data import Digits, conversations, load_digits
from liger_jax.demo.plots import plot_answers, plot_loss
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.inputs.images import VisionSettings
from liger_jax.train.evaluation import answer
from liger_jax.train.finetune import METRICS, fit

# Every batch gets these shapes, tokens and patches of a conversation, so that one program trains on all of them.
LENGTH, PATCHES = 48, 48
# Digits in a conversation that is trained on. Three are the hardest, and teach most: a step costs the same for any.
COUNTS = (1, 2, 2, 3, 3, 3)
MAX_ANSWER = 8
EVALUATION_ROWS = 64
SHOWN = 10
RESULTS = ("checkpoint", METRICS, "loss.png", "answers.png")


class Report(NamedTuple):
    """What the demo found out: share of held-out questions answered exactly right, and where things lie."""

    accuracy: float
    seconds: float
    checkpoint: Path
    answers: Path
    loss: Path
    metrics: Path


def run_demo(
    output: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int, held_out: int, progress: bool = True
) -> Report:
    """Trains, saves, loads, answers, plots; see `liger-jax demo --help` for the arguments.

    Raises:
        ValueError: an argument that is out of range.
        FileExistsError: `output` holds files of something else.
    """
    started = time.perf_counter()
    for name, value in {"steps": steps, "batch_size": batch_size, "held_out": held_out}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
    clear_output(output)

    train, held = load_digits()
    processor = make_processor(train)
    config = make_config(processor)
    batches = load_batches(functools.partial(training_batch, processor, config, train, seed, batch_size), range(steps))
    model = Qwen2VL.init(config, seed=seed, dtype="float32")
    state = TrainState.create(model, make_optimizer(learning_rate, steps))
    state, history = fit(state, batches, output / METRICS, steps=steps, remat="none", progress=progress)

    checkpoint = output / "checkpoint"
    processor.save_pretrained(checkpoint)
    save_state(checkpoint, state)
    model, processor = load_model(checkpoint), Processor.from_pretrained(checkpoint)

    questions = list(itertools.islice(conversations(held, np.random.default_rng(1)), held_out))
    prompts, expected = [messages[:-1] for messages in questions], [messages[-1]["content"] for messages in questions]
    room = {"max_new_tokens": MAX_ANSWER, "batch_size": EVALUATION_ROWS, "length": LENGTH, "patches": PATCHES}
    answers = answer(model, processor, prompts, **room)
    accuracy = float(np.mean([a == e for a, e in zip(answers, expected, strict=True)]))
    with (output / METRICS).open("a") as file:
        print(json.dumps({"step": steps, "held_out_accuracy": accuracy, "held_out": held_out}), file=file)
    plot_loss(output / "loss.png", [line["loss"] for line in history], [line["accuracy"] for line in history])
    plot_answers(output / "answers.png", prompts[:SHOWN], answers[:SHOWN], expected[:SHOWN])
    paths = [output / name for name in ("checkpoint", "answers.png", "loss.png", METRICS)]
    return Report(accuracy, time.perf_counter() - started, *paths)


def clear_output(output: Path) -> None:
    """Makes the folder; an earlier demo's results in it go, anything else is an error."""
    if output.exists():
        strange = [str(output)] if not output.is_dir() else [p.name for p in output.iterdir() if p.name not in RESULTS]
        if strange:
            raise FileExistsError(
                f"{output} holds {strange[:5]}, which is no result of the demo: give another --output"
            )
        for name in RESULTS:
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)


def make_processor(digits: Digits) -> Processor:
    """A processor with a tokenizer made for the demo's own texts, and limits for small pictures."""
    plain = train_tokenizer([])
    sample = itertools.islice(conversations(digits, np.random.default_rng(0)), 200)
    texts = [plain.apply_chat_template(messages, tokenize=False) for messages in sample]
    return Processor(train_tokenizer(texts), VisionSettings(min_pixels=28 * 28, max_pixels=16 * 28 * 28))


def make_config(processor: Processor) -> Qwen2VLConfig:
    """A Qwen2-VL of a million parameters, for this tokenizer."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    text = TextConfig(
        vocab_size=-(-len(processor.tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mrope_section=(4, 6, 6),
        max_position_embeddings=4096,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); the usual 0.02 suits a model 20 times as wide
    )
    return Qwen2VLConfig(
        text=text,
        vision=VisionConfig(depth=2, embed_dim=64, num_heads=4, hidden_size=text.hidden_size),
        tie_word_embeddings=True,
        image_token_id=processor.token_ids["image"],
        video_token_id=processor.token_ids["video"],
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        eos_token_ids=(processor.tokenizer.eos_token_id,),
        pad_token_id=processor.tokenizer.pad_token_id,
    )


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients, a warm-up over a tenth of the steps, then a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, -(-steps // 10), steps, 0.05 * learning_rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.01))


def training_batch(
    processor: Processor, config: Qwen2VLConfig, digits: Digits, seed: int, batch_size: int, index: int
) -> Batch:
    """The batch of a step: the same one whoever makes it."""
    endless = conversations(digits, np.random.default_rng((seed, index)), counts=COUNTS)
    inputs = processor(list(itertools.islice(endless, batch_size)), labels=True)
    return prepare(config, **inputs, length=LENGTH, patches=PATCHES)
