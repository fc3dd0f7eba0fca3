"""Evaluates a model on held-out conversations: the loss of their answers, and how often generated answers equal them."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from liger_jax.data.share import RowShare, place_batches
from liger_jax.errors import UserError, warn_skipped
from liger_jax.generation.answer import answer_conversations
from liger_jax.generation.options import GenerationOptions
from liger_jax.inputs.batch import Batch
from liger_jax.inputs.messages import Conversation, is_trained
from liger_jax.inputs.processor import Processor
from liger_jax.model import QwenVL
from liger_jax.model.sharding import get_mesh, mesh_context, shard_batch
from liger_jax.train.loss import loss_fn


def evaluate(model: QwenVL, batches: Iterable[Batch], *, share: RowShare | None = None) -> dict[str, float]:
    """Returns the loss and accuracy over all batches.

    Args:
        model: the model.
        batches: batches with labels.
        share: in several processes, which rows of each batch `batches` has.

    Returns:
        "loss" and "accuracy", means over all trained tokens, and "num_tokens", the number of these tokens.

    Raises:
        UserError: a batch has no labels, or there are no batches.

    Example:
        >>> import numpy as np
        >>> from liger_jax import QwenVL, QwenVLConfig, prepare
        >>> from liger_jax.train.evaluation import evaluate
        >>> model, ids = QwenVL.init(QwenVLConfig.tiny(), dtype="float32"), np.array([[5, 6, 7]])
        >>> evaluate(model, [prepare(model.config, input_ids=ids, labels=ids)])["num_tokens"]
        2
    """
    mesh = get_mesh(model)
    sums, counts = dict.fromkeys(("loss", "accuracy"), 0.0), []
    for batch, _ in place_batches(iter(batches), share):
        with mesh_context(mesh):
            metrics = _compute_metrics(model, shard_batch(batch, mesh))
        counts.append(int(metrics["num_tokens"]))
        sums = {name: total + counts[-1] * float(metrics[name]) for name, total in sums.items()}
    if not counts:
        raise UserError("batches is empty; expected at least one batch to evaluate")
    num_tokens = sum(counts)
    return {name: total / max(num_tokens, 1) for name, total in sums.items()} | {"num_tokens": num_tokens}


@jax.jit
def _compute_metrics(model: QwenVL, batch: Batch) -> dict[str, jax.Array]:
    return loss_fn(model, batch)[1]


def compare_answers(
    model: QwenVL,
    processor: Processor,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    length: int | None = None,
    patches: int | None = None,
) -> list[dict[str, Any]]:
    """Compares the last answer of each conversation with the model's most likely answer.

    An answer whose logits are NaN or infinite counts as wrong, with a warning: a training run that diverges for a while
    can still be evaluated.

    Args:
        model: the model.
        processor: the model's processor.
        conversations: conversations that end with an answer.
        max_new_tokens: maximum length of an answer, in tokens.
        batch_size: number of conversations answered together.
        length: positions per row, see `prepare`.
        patches: image patches per row, see `prepare`.

    Returns:
        A dict per conversation: "expected", the conversation's answer; "answer", the model's; "exact", whether the two are
        equal apart from surrounding white space.
    """
    prompts, expected_answers = zip(*map(split_last_answer, conversations), strict=True)
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    answers = answer_conversations(
        model, processor, prompts, options, batch_size=batch_size, length=length, patches=patches
    )
    errors = [f"conversation {i}: {answer}" for i, answer in enumerate(answers) if isinstance(answer, UserError)]
    warn_skipped(f"{len(errors)} of {len(answers)} answers count as wrong", errors)
    texts = [None if isinstance(answer, UserError) else answer for answer in answers]
    return [
        {"expected": expected, "answer": text or "", "exact": text is not None and expected.strip() == text.strip()}
        for expected, text in zip(expected_answers, texts, strict=True)
    ]


def split_last_answer(conversation: Conversation) -> tuple[Conversation, str]:
    """Returns a conversation up to the assistant's last answer that is trained, and the text of that answer.

    Example:
        >>> split_last_answer([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
        ([{'role': 'user', 'content': '1 + 1?'}], '2')
    """
    last = max(i for i, message in enumerate(conversation) if is_trained(message))
    content = conversation[last]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return conversation[:last], text
