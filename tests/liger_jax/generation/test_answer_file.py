"""Answers to a file of questions: those of the questions one by one, whatever they are batched with, stopped or not."""

import base64
import functools
import io
import json

import numpy as np
import pytest
from PIL import Image

import liger_jax.generation.answer_file
from liger_jax import Qwen2VL, generate, prepare
from liger_jax.demo.data import load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.generation.answer_file import answer_file
from liger_jax.generation.options import GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=6, do_sample=True, temperature=2.0, seed=5)


@functools.cache
def parts():
    processor = make_processor(load_digits()[0])
    return Qwen2VL.init(make_config(processor), seed=1, dtype="float32"), processor


def picture(width):
    pixels = np.random.default_rng(width).integers(0, 256, (28, width, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def records():
    """Text and pictures of some sizes; with answers and without; ids or none."""
    found = []
    for number in range(7):
        text = f"Which digit is {number}?\u2028" + " And?" * (30 if number == 5 else 1)
        record = {"messages": [{"role": "user", "content": text}]}
        if number % 3 == 1:
            record["messages"][0]["content"] = "<image>" + text
            record["image"] = picture(28 * number)
        if number == 2:
            record["messages"].append({"role": "assistant", "content": "7"})
        found.append(record | ({"id": f"q{number}"} if number % 2 else {}))
    return found


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def run(data, output, **options):
    return answer_file(*parts(), data, output, **{"options": OPTIONS, "batch_size": 2, "progress": False} | options)


def read(output):
    return {line["record"]: line for line in map(json.loads, output.read_bytes().splitlines())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    data = write(folder / "in.jsonl", records())
    assert run(data, folder / "out.jsonl") == 7
    return data, folder / "out.jsonl"


def test_answers_are_those_of_each_question_alone(finished):
    model, processor = parts()
    answers = read(finished[1])
    for number in (1, 2, 3, 5):
        message = dict(records()[number - 1]["messages"][0])
        if "<image>" in message["content"]:
            source = records()[number - 1]["image"]
            text = {"type": "text", "text": message["content"].removeprefix("<image>")}
            message["content"] = [{"type": "image", "image": source}, text]
        batch = prepare(model.config, **processor([message], add_generation_prompt=True))
        tokens = generate(model, batch, **vars(OPTIONS) | {"seed": [5 + number]})
        assert answers[number]["answer"] == processor.decode(tokens)[0]
    assert {number: line.get("id") for number, line in answers.items()} == {
        number: f"q{number - 1}" if number % 2 == 0 else None for number in range(1, 8)
    }


def test_a_run_that_was_stopped_goes_on(finished, tmp_path):
    """After some answers and half a line of the next; nothing is answered twice, and all is as in one run."""
    data, whole = finished
    lines = whole.read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:17])
    assert run(data, tmp_path / "out.jsonl") == 7
    assert read(tmp_path / "out.jsonl") == read(whole)
    assert (tmp_path / "out.jsonl").read_bytes().startswith(b"".join(lines[:3]))
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(data, tmp_path / "out.jsonl") == 7  # nothing is left to do
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_few_may_wait(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(liger_jax.generation.answer_file, "WAITING", 0.5)
    run(finished[0], tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == read(finished[1])


BROKEN = {
    2: ({"messages": [{"role": "robot", "content": "Hello"}]}, "'role' is 'robot'"),
    3: ({"messages": [{"role": "assistant", "content": "7"}]}, "no question"),
    4: ({"messages": [{"role": "user", "content": "<image>?"}], "image": "data:image/png;base64,AAAA"}, "image"),
    5: ({"messages": [{"role": "user", "content": "long " * 5000}]}, "max_position_embeddings"),
}


def test_broken_records_are_left_out_if_asked(tmp_path):
    data = write(tmp_path / "in.jsonl", [records()[0], *(record for record, _ in BROKEN.values())])
    with pytest.warns(UserWarning, match="left out"):
        assert run(data, tmp_path / "out.jsonl", skip_broken=True) == 1
    lines = read(tmp_path / "out.jsonl")
    for number, (_, told) in BROKEN.items():
        assert told in lines[number]["error"]
    with pytest.raises(ValueError, match="line 2"):  # they are tried again, each time
        run(data, tmp_path / "out.jsonl")
    assert list(read(tmp_path / "out.jsonl")) == [1]


@pytest.mark.parametrize("number", BROKEN)
def test_a_broken_record_is_named(number, tmp_path):
    record, told = BROKEN[number]
    data = write(tmp_path / "in.jsonl", [records()[0], record | {"id": "that one"}])
    with pytest.raises(ValueError, match=r"line 2 \(id 'that one'\).*" + told):
        run(data, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").exists() == (number in (4, 5))  # a format is seen before anything is written


def test_an_output_of_other_data_is_refused(finished, tmp_path):
    for line in (
        {"record": 99, "answer": ""},
        {"record": 2, "id": "other", "answer": ""},
        {"record": 1, "content": "0123456789abcdef", "answer": ""},
        {"step": 1},
        {"record": 1},
        7,
    ):
        output = write(tmp_path / "out.jsonl", [line])
        before = output.read_bytes()
        with pytest.raises(ValueError, match=r"out\.jsonl, line 1 is"):
            run(finished[0], output)
        assert output.read_bytes() == before


def test_arguments_out_of_range(finished, tmp_path):
    with pytest.raises(ValueError, match="batch_size is 0"):
        run(finished[0], tmp_path / "out", batch_size=0)
    with pytest.raises(ValueError, match="one answer"):
        run(finished[0], tmp_path / "out", options=GenerationOptions(logprobs=1))
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "missing", tmp_path / "out")
    assert not list(tmp_path.iterdir())
