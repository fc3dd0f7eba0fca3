"""Answers many questions in batches of equal size, so that few programs are compiled."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from liger_jax.config import QwenVLConfig
from liger_jax.errors import UserError
from liger_jax.generation.generate import generate_with
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.session import NonFiniteLogitsError, check_prompts
from liger_jax.inputs.batch import Batch, prepare
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor
from liger_jax.model import QwenVL


def prepare_prompt(
    processor: Processor, config: QwenVLConfig, conversation: Conversation, max_new_tokens: int
) -> Batch:
    """Returns a conversation that ends with a question, as a batch of one row.

    Raises:
        UserError: the conversation is malformed, an image cannot be read, or prompt and answer exceed the model's positions.
    """
    batch = prepare(config, **processor(conversation, add_generation_prompt=True))
    check_prompts(config, batch, max_new_tokens)
    return batch


def answer_conversations(
    model: QwenVL,
    processor: Processor,
    conversations: Sequence[Conversation],
    options: GenerationOptions,
    *,
    batch_size: int,
    length: int | None = None,
    patches: int | None = None,
) -> list[str | UserError]:
    """Answers conversations that end with a question, `batch_size` of them at a time.

    Args:
        model: the model.
        processor: the model's processor.
        conversations: the conversations.
        options: generation options with a single seed; conversation i, counted from 0, samples with seed `options.seed` + i.
        batch_size: number of conversations answered together.
        length: positions per row, see `prepare`.
        patches: image patches per row, see `prepare`.

    Returns:
        One answer per conversation, or an error for a conversation whose logits are NaN or infinite.

    Raises:
        UserError: an option is out of range, a conversation is malformed, or an image cannot be read.
    """
    first_seed = options.single_seed()
    answers: list[str | UserError] = []
    for start in range(0, len(conversations), batch_size):
        chunk = list(conversations[start : start + batch_size])
        inputs = processor(chunk, add_generation_prompt=True)
        batch = prepare(model.config, **inputs, length=length, patches=patches)
        seeds = [first_seed + start + row for row in range(len(chunk))]
        answers += answer_batch(model, processor, batch, options, seeds=seeds, batch_size=batch_size)
    return answers


def answer_batch(
    model: QwenVL,
    processor: Processor,
    batch: Batch,
    options: GenerationOptions,
    *,
    seeds: Sequence[int],
    batch_size: int,
) -> list[str | UserError]:
    """Answers a batch of at most `batch_size` prompts.

    A smaller batch is padded with copies of its first prompt, so that it runs the same program as a full one.

    Args:
        model: the model.
        processor: the model's processor.
        batch: the prompts, one per row.
        options: generation options, except for the seed and the padding token.
        seeds: one seed per prompt.
        batch_size: rows of the padded batch.

    Returns:
        One answer per prompt, or an error for a prompt whose logits are NaN or infinite.
    """
    options.check_single_text()
    prompts = batch.shape[0]
    rows = [*range(prompts), *[0] * (batch_size - prompts)]
    padded = jax.tree.map(lambda array: np.asarray(array)[rows], batch)
    # decoding drops this token; that of the options may be text: "!" if no end token is known
    pad_token = processor.tokenizer.pad_token_id
    options = dataclasses.replace(options, seed=[seeds[row] for row in rows], pad_token_id=pad_token)
    try:
        tokens, failed = generate_with(model, padded, options, processor), {}
    except NonFiniteLogitsError as error:
        tokens, failed = error.generated.tokens, error.new_tokens
    answers: list[str | UserError] = list(processor.decode(tokens)[:prompts])
    for row, number in failed.items():
        if row < prompts:
            answers[row] = UserError(NonFiniteLogitsError.describe(number))
    return answers
