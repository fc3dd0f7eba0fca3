"""Options of finetune that are rejected before anything is written, and which runs are long."""

import pytest

from liger_jax.errors import UserError
from liger_jax.options import Optimization
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
    "steps, options, is_long",
    [
        (2000, {"pack_length": 64}, True),
        (2000, {"length": 64, "patches": 64}, True),
        (1999, {"pack_length": 64}, False),
        (2000, {"length": 64}, False),
    ],
)
def test_step_of_a_long_run(config, processor, data, tmp_path, monkeypatch, steps, options, is_long):
    """A run whose batches have several shapes compiles several programs, for which a longer compilation does not pay."""

    def make_train_step(*, long_run, **_):
        raise UserError(f"long_run is {long_run}")

    monkeypatch.setattr("liger_jax.train.finetune.make_train_step", make_train_step)
    with pytest.raises(UserError, match=f"long_run is {is_long}"):
        run(config, processor, data, tmp_path / "run", steps=steps, **({"length": None, "patches": None} | options))
