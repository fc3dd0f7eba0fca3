"""How good a model is on conversations that it was not trained on: loss of their answers, and answers of its own."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from liger_jax.generation.generate import generate
from liger_jax.inputs.batch import Batch, prepare
from liger_jax.inputs.messages import Conversation
from liger_jax.inputs.processor import Processor
from liger_jax.model import Qwen2VL
from liger_jax.model.sharding import get_mesh, mesh_context, shard_batch
from liger_jax.train.step import loss_fn


def evaluate(model: Qwen2VL, batches: Iterable[Batch]) -> dict[str, float]:
    """{"loss", "accuracy"} per trained token over all batches, and "num_tokens", how many there are.

    Raises:
        ValueError: a batch has no labels, or there are no batches.

    Example:
        >>> import numpy as np
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, prepare
        >>> from liger_jax.train.evaluation import evaluate
        >>> model, ids = Qwen2VL.init(Qwen2VLConfig.tiny(), dtype="float32"), np.array([[5, 6, 7]])
        >>> evaluate(model, [prepare(model.config, input_ids=ids, labels=ids)])["num_tokens"]
        2
    """
    mesh = get_mesh(model)
    sums, counts = dict.fromkeys(("loss", "accuracy"), 0.0), []
    for batch in batches:
        with mesh_context(mesh):
            metrics = _metrics(model, shard_batch(batch, mesh))
        counts.append(int(metrics["num_tokens"]))
        sums = {name: total + counts[-1] * float(metrics[name]) for name, total in sums.items()}
    if not counts:
        raise ValueError("evaluate: there are no batches; expected at least one")
    tokens = sum(counts)
    return {name: total / max(tokens, 1) for name, total in sums.items()} | {"num_tokens": tokens}


@jax.jit
def _metrics(model: Qwen2VL, batch: Batch) -> dict[str, jax.Array]:
    return loss_fn(model, batch)[1]


def answer(
    model: Qwen2VL,
    processor: Processor,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
    length: int | None = None,
    patches: int | None = None,
) -> list[str]:
    """The model's most likely answers to conversations that end with a question, `batch_size` of them at a time.

    Args:
        length, patches: of a row, see `prepare`.
    """
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        filled = chunk + chunk[:1] * (batch_size - len(chunk))  # one program for all, the shorter last chunk too
        inputs = processor(filled, add_generation_prompt=True)
        batch = prepare(model.config, **inputs, length=length, patches=patches)
        answers += processor.decode(generate(model, batch, max_new_tokens=max_new_tokens))[: len(chunk)]
    return answers


def question(conversation: Conversation) -> tuple[Conversation, str]:
    """A conversation up to the assistant's last answer, and the text of that answer.

    >>> question([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
    ([{'role': 'user', 'content': '1 + 1?'}], '2')
    """
    last = max(i for i, message in enumerate(conversation) if message["role"] == "assistant")
    content = conversation[last]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return conversation[:last], text


def compare_answers(
    model: Qwen2VL,
    processor: Processor,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """The last answer of each conversation beside the model's own.

    Returns:
        For each {"expected": text, "answer": text, "exact": whether they are the same but for white space around them}.
    """
    prompts, expected = zip(*map(question, conversations), strict=True)
    answers = answer(model, processor, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [
        {"expected": wanted, "answer": found, "exact": wanted.strip() == found.strip()}
        for wanted, found in zip(expected, answers, strict=True)
    ]
