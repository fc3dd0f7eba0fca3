"""A demo of two steps writes usable results, and its data are as documented."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from liger_jax import Processor
from liger_jax.checkpoint import load_model
from liger_jax.demo.data import CELL, conversations, load_digits
from liger_jax.demo.run import LENGTH, PATCHES, RESULTS, SIZES, make_config, make_processor, run_demo, training_batch
from liger_jax.errors import AlreadyExistsError, UserError
from liger_jax.files import lock_folder

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
    with Image.open(finished.digit) as image:
        assert image.mode == "RGB" and set(image.size) <= {CELL, 2 * CELL} and np.std(image) > 10


def test_metrics_have_a_line_per_step_and_the_result(finished):
    *steps, last = [json.loads(line) for line in finished.metrics.read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert np.isfinite(line["loss"]) and line["num_tokens"] > 0 and line["tokens_per_second"] > 0
    assert last["held_out_accuracy"] == finished.accuracy


def test_checkpoint_holds_model_and_processor(finished):
    model, processor = load_model(finished.checkpoint), Processor.from_pretrained(finished.checkpoint)
    assert model.config.image_token_id == processor.token_ids["image"]
    assert model.config.text.vocab_size >= len(processor.tokenizer)


def test_output_of_an_earlier_demo_is_replaced_and_other_files_are_kept(finished, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(AlreadyExistsError, match=r"thesis\.tex"):
        run_demo(tmp_path, **SHORT)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    again = run_demo(finished.metrics.parent, **SHORT)
    assert len(again.metrics.read_text().splitlines()) == 3


def test_folder_of_another_process_is_refused(tmp_path):
    with lock_folder(tmp_path / "out"), pytest.raises(AlreadyExistsError, match="out is in use by process"):
        run_demo(tmp_path / "out", **SHORT)


@pytest.mark.parametrize("name", ["steps", "batch_size", "held_out", "learning_rate"])
def test_invalid_arguments_are_rejected_before_anything_is_written(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is 0; expected"):
        run_demo(tmp_path / "out", **(SHORT | {name: 0}))
    assert not (tmp_path / "out").exists()


def test_held_out_digits_are_never_trained_on():
    train, held_out = load_digits()
    assert len(train.labels) + len(held_out.labels) == 1797
    train_images = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in train_images for image in held_out.images)
    assert set(held_out.labels.tolist()) == set(range(10))


def test_conversations_vary_in_images_and_sizes():
    """A batch mixes grids and numbers of images, and equal seeds give equal conversations."""
    train, _ = load_digits()
    first, second = (list(itertools.islice(conversations(train, np.random.default_rng(5)), 40)) for _ in range(2))
    inputs = make_processor(train)(first, labels=True, add_vision_id=True)
    assert len(np.unique(inputs["image_grid_thw"], axis=0)) > 2
    image_counts = {sum(part["type"] == "image" for part in question["content"]) for _, question, _ in first}
    assert image_counts == {1, 2, 3}
    answers = [answer for *_, answer in first]
    assert answers == [answer for *_, answer in second]
    assert all(answer["role"] == "assistant" and set(answer["content"]) <= set("0123456789, ") for answer in answers)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_demo_of_other_families_writes_a_usable_checkpoint(tmp_path, family):
    report = run_demo(tmp_path, **(SHORT | {"steps": 1, "held_out": 1, "family": family}))
    model, processor = load_model(report.checkpoint), Processor.from_pretrained(report.checkpoint)
    assert model.config.family == processor.family == family
    assert 0 <= report.accuracy <= 1 and len(report.metrics.read_text().splitlines()) == 2


@pytest.mark.parametrize("family", SIZES)
def test_a_cell_is_one_token_of_every_family_and_batches_have_one_shape(family):
    train, _ = load_digits()
    processor = make_processor(train, family)
    config = make_config(processor)
    batches = [training_batch(processor, config, train, 0, 48, index) for index in range(3)]
    for batch in batches:
        assert batch.shape == (48, LENGTH) and batch.vision.pixel_values.shape[1] == PATCHES
    stream = conversations(train, np.random.default_rng(2), cell=processor.image.factor)
    (image,) = next(messages for messages in stream if len(messages[1]["content"]) == 2)[1]["content"][:1]
    inputs = processor([{"role": "user", "content": [image]}])
    cells = image["image"].width * image["image"].height // processor.image.factor**2
    assert (inputs["input_ids"] == config.image_token_id).sum() == cells


def test_unknown_family_is_refused(tmp_path):
    with pytest.raises(UserError, match="family is 'qwen3_5'; expected one of"):
        run_demo(tmp_path / "out", **SHORT, family="qwen3_5")
    assert not (tmp_path / "out").exists()
