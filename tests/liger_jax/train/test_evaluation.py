"""Questions and answers out of conversations; what is measured with them is tested where a run does it."""

import pytest

from liger_jax import Qwen2VL, Qwen2VLConfig
from liger_jax.train.evaluation import evaluate, question


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="there are no batches"):
        evaluate(Qwen2VL.abstract(Qwen2VLConfig.tiny()), [])


def test_the_last_answer_is_asked_for():
    """Earlier turns are part of the question; an answer in parts is their text; what follows it is not used."""
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
    assert question(conversation) == (conversation[:4], "Eight")
