"""The demo, shortened to two steps: every result is written and can be used; its data are what they claim to be."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from liger_jax import Processor
from liger_jax.checkpoint import load_model
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import RESULTS, make_processor, run_demo

SHORT = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 0, "held_out": 3, "progress": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "out", **SHORT)


def test_every_result_is_written(finished):
    assert 0 <= finished.accuracy <= 1
    assert {path.name for path in finished.metrics.parent.iterdir()} == set(RESULTS)
    for path in (finished.answers, finished.loss):
        with Image.open(path) as image:
            assert min(image.size) > 100


def test_metrics_have_a_line_for_each_step_and_the_result(finished):
    *steps, last = [json.loads(line) for line in finished.metrics.read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert np.isfinite(line["loss"]) and line["num_tokens"] > 0 and line["tokens_per_second"] > 0
    assert last["held_out_accuracy"] == finished.accuracy


def test_the_checkpoint_is_a_model_with_its_processor(finished):
    model, processor = load_model(finished.checkpoint), Processor.from_pretrained(finished.checkpoint)
    assert model.config.image_token_id == processor.token_ids["image"]
    assert model.config.text.vocab_size >= len(processor.tokenizer)


def test_an_earlier_demo_is_replaced_and_anything_else_is_not(finished, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        run_demo(tmp_path, **SHORT)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    again = run_demo(finished.metrics.parent, **SHORT)
    assert len(again.metrics.read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["steps", "batch_size", "held_out", "learning_rate"])
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be .* got 0"):
        run_demo(tmp_path / "out", **(SHORT | {name: 0}))
    assert not (tmp_path / "out").exists()


def test_held_out_digits_are_never_trained_on():
    train, held = load_digits()
    assert len(train.labels) + len(held.labels) == 1797
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in held.images)
    assert set(held.labels.tolist()) == set(range(10))


def test_conversations_have_several_pictures_and_sizes_and_true_answers():
    """A batch mixes grids and numbers of pictures, and equal seeds give equal conversations."""
    train, _ = load_digits()
    some, same = (list(itertools.islice(conversations(train, np.random.default_rng(5)), 40)) for _ in range(2))
    inputs = make_processor(train)(some, labels=True, add_vision_id=True)
    assert len(np.unique(inputs["image_grid_thw"], axis=0)) > 2
    pictures = [
        sum(part["type"] == "image" for m in c for part in m["content"] if isinstance(part, dict)) for c in some
    ]
    assert {1, 2, 3} <= set(pictures)
    for one, other in zip(some, same, strict=True):
        assert [m["content"] for m in one if m["role"] == "assistant"] == [
            m["content"] for m in other if m["role"] == "assistant"
        ]
    assert all(c[-1]["role"] == "assistant" and set(c[-1]["content"]) <= set("0123456789, ") for c in some)
