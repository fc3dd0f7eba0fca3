"""Splitting conversations into questions and answers. Evaluation during a run is tested in test_finetune."""

import pytest

from liger_jax import Qwen2VL, Qwen2VLConfig
from liger_jax.errors import UserError
from liger_jax.train.evaluation import evaluate, split_last_answer


def test_evaluate_needs_batches():
    with pytest.raises(UserError, match="batches is empty"):
        evaluate(Qwen2VL.abstract(Qwen2VLConfig.tiny()), [])


def test_split_last_answer():
    """Earlier turns belong to the question, the parts of an answer are joined, and later turns are dropped."""
    turns = [
        "Read.",
        "Which?",
        "7",
        "And this?",
        [{"type": "text", "text": "Ei"}, {"type": "text", "text": "ght"}],
        "Thanks",
    ]
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    conversation = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=True)]
    assert split_last_answer(conversation) == (conversation[:4], "Eight")
    conversation[4]["loss"] = False  # not the right answer
    assert split_last_answer(conversation) == (conversation[:2], "7")
