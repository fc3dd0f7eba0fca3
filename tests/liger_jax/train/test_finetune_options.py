"""Options of finetune that are rejected before anything is written, and the layers that it unrolls."""

import pytest

from liger_jax.errors import UserError
from liger_jax.options import Batching, LayerExecution, Optimization
from liger_jax.train.finetune import choose_unroll
from tests._support.finetune_runs import make_data, run

REJECTED = {
    **{name: ({name: 0}, f"{name} is 0; expected at least 1") for name in ("steps", "batch_size", "save_every")},
    "max_to_keep": ({"max_to_keep": 0}, "max_to_keep is 0; expected at least 1"),
    "max_new_tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
    "eval_generate": (
        {"held_out": make_data()[:3], "eval_generate": 4},
        "eval_generate is 4; expected 0 to 3, the number of held_out conversations",
    ),
    "remat": ({"remat": "some"}, "remat is 'some'; expected one of"),
    "learning rate": ({"optimizer": Optimization(learning_rate=-1.0)}, "learning_rate is -1.0; expected 0 or more"),
    "accumulate": ({"accumulate": 0}, "accumulate is 0; expected at least 1"),
    "patches": ({"patches": 62}, "patches is 62; expected a multiple of 4"),
    "seed": ({"seed": -1}, "seed is -1; expected at least 0"),
    "workers": ({"workers": -1}, "workers is -1; expected at least 0"),
    "question without text": (
        {"held_out": [[{"role": "assistant", "content": "7"}]], "eval_generate": 1},
        "held-out data: conversation 0 cannot be answered",
    ),
    "no room for an answer": (
        {"held_out": make_data()[:1], "eval_generate": 1, "max_new_tokens": 10**6},
        "held-out data: conversation 0 cannot be answered.*reach position",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_before_anything_is_written(config, processor, data, tmp_path, case):
    options, message = REJECTED[case]
    with pytest.raises(UserError, match=message):
        run(config, processor, data, tmp_path / "run", **({"steps": 1} | options))
    assert not (tmp_path / "run").exists()


def test_no_conversations(config, processor, tmp_path):
    with pytest.raises(UserError, match="conversations is 0"):
        run(config, processor, [], tmp_path / "new", steps=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "unroll, steps, options, chosen",
    [
        ("auto", 2000, {"pack_length": 64}, "all"),
        ("auto", 2000, {"length": 64, "patches": 64}, "all"),
        ("auto", 1999, {"pack_length": 64}, "auto"),
        ("auto", 2000, {"length": 64}, "auto"),
        ("none", 2000, {"pack_length": 64}, "none"),
    ],
)
def test_long_runs_with_one_program_unroll_all_layers(unroll, steps, options, chosen):
    """A run whose batches have several shapes compiles several programs, for which "auto" only unrolls the vision tower."""
    assert choose_unroll(LayerExecution(unroll=unroll), steps, Batching(**options)) == chosen
    least_memory = LayerExecution("full", unroll)
    assert choose_unroll(least_memory, steps, Batching(**options)) == unroll
    assert least_memory.unrolled == "none"
