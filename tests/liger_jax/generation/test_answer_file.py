"""Answers to a file of questions equal those to each question alone, in any batch, interrupted or not."""

import base64
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

import liger_jax.generation.answer_file
from liger_jax import Chat, generate, prepare
from liger_jax.errors import NotFoundError, UserError
from liger_jax.generation.answer_file import answer_file
from liger_jax.generation.generate import generate_with
from liger_jax.generation.options import GenerationOptions
from tests._support.demo_model import model_and_processor

OPTIONS = GenerationOptions(max_new_tokens=6, do_sample=True, temperature=2.0, seed=5)


def encode_image(width):
    pixels = np.random.default_rng(width).integers(0, 256, (28, width, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def make_records():
    """Returns records with text and images of several sizes, with and without answers and ids."""
    records = []
    for number in range(7):
        text = f"Which digit is {number}?\u2028" + " And?" * (30 if number == 5 else 1)
        record = {"messages": [{"role": "user", "content": text}]}
        if number % 3 == 1:
            record["messages"][0]["content"] = "<image>" + text
            record["image"] = encode_image(28 * number)
        if number == 2:
            record["messages"].append({"role": "assistant", "content": "7"})
        records.append(record | ({"id": f"q{number}"} if number % 2 else {}))
    return records


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def run(data, output, **options):
    defaults = {"options": OPTIONS, "batch_size": 2, "progress": False}
    return answer_file(*model_and_processor(), data, output, **defaults | options)


def read(output):
    return {line["record"]: line for line in map(json.loads, output.read_bytes().splitlines())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    data = write(folder / "in.jsonl", make_records())
    assert run(data, folder / "out.jsonl") == 7
    return data, folder / "out.jsonl"


def test_answers_match_each_question_alone(finished):
    model, processor = model_and_processor()
    answers = read(finished[1])
    for number in (1, 2, 3, 5):
        message = dict(make_records()[number - 1]["messages"][0])
        if "<image>" in message["content"]:
            source = make_records()[number - 1]["image"]
            text = {"type": "text", "text": message["content"].removeprefix("<image>")}
            message["content"] = [{"type": "image", "image": source}, text]
        batch = prepare(model.config, **processor([message], add_generation_prompt=True))
        tokens = generate(model, batch, **vars(OPTIONS) | {"seed": [5 + number]})
        assert answers[number]["answer"] == processor.decode(tokens)[0]
    assert {number: line.get("id") for number, line in answers.items()} == {
        number: f"q{number - 1}" if number % 2 == 0 else None for number in range(1, 8)
    }


def test_resumed_run_matches_uninterrupted_run(finished, tmp_path):
    """Interrupted after some answers and half a line. Nothing is answered twice."""
    data, complete = finished
    lines = complete.read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:17])
    assert run(data, tmp_path / "out.jsonl") == 7
    assert read(tmp_path / "out.jsonl") == read(complete)
    assert (tmp_path / "out.jsonl").read_bytes().startswith(b"".join(lines[:3]))
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(data, tmp_path / "out.jsonl") == 7  # nothing is left to do
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_answers_do_not_depend_on_the_waiting_limit(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(liger_jax.generation.answer_file, "MAX_WAITING", 0.5)
    run(finished[0], tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == read(finished[1])


BROKEN = {
    2: ({"messages": [{"role": "robot", "content": "Hello"}]}, "'role' is 'robot'"),
    3: ({"messages": [{"role": "assistant", "content": "7"}]}, "has no question"),
    4: ({"messages": [{"role": "user", "content": "<image>?"}], "image": "data:image/png;base64,AAAA"}, "image"),
    5: ({"messages": [{"role": "user", "content": "long " * 5000}]}, "max_position_embeddings"),
}


@pytest.mark.parametrize("end", ["stop string", "end token"])
def test_padding_after_the_end_was_part_of_an_answer(end, tmp_path):
    """Without a padding token, rows end with the first end token or 0, which is "!": either may be text."""
    model, processor = model_and_processor()
    config = dataclasses.replace(model.config, eos_token_ids=(), pad_token_id=None)
    model = jax.tree.map(lambda weights: weights, model)
    model.config = config
    questions = [[{"role": "user", "content": text}] for text in ("Which?", "And now?")]
    options = GenerationOptions(max_new_tokens=20, repetition_penalty=1.5)
    batch = prepare(config, **processor(questions[0], add_generation_prompt=True))
    tokens = generate_with(model, batch, options)[0]
    ends = {"stop string": {"stop_strings": processor.decode(tokens[5:7])}, "end token": {"eos_token_id": tokens[6]}}
    ended = dataclasses.replace(options, **ends[end])
    data = write(tmp_path / "in.jsonl", [{"messages": question} for question in questions])
    answer_file(model, processor, data, tmp_path / "out.jsonl", options=ended, batch_size=2, progress=False)
    answers = {record: line["answer"] for record, line in read(tmp_path / "out.jsonl").items()}
    assert answers[1] == Chat(model, processor, **vars(ended)).ask("Which?")
    assert len(answers[1]) < len(processor.decode(tokens))


def test_broken_records_are_skipped_on_request(tmp_path):
    data = write(tmp_path / "in.jsonl", [make_records()[0], *(record for record, _ in BROKEN.values())])
    with pytest.warns(UserWarning, match="skipped 4 of 5 records: line 2: "):
        assert run(data, tmp_path / "out.jsonl", skip_broken=True) == 1
    lines = read(tmp_path / "out.jsonl")
    for number, (_, message) in BROKEN.items():
        assert message in lines[number]["error"]
    with pytest.raises(UserError, match="line 2"):  # every run retries them
        run(data, tmp_path / "out.jsonl")
    assert list(read(tmp_path / "out.jsonl")) == [1]


@pytest.mark.parametrize("number", BROKEN)
def test_error_names_the_broken_record(number, tmp_path):
    record, message = BROKEN[number]
    data = write(tmp_path / "in.jsonl", [make_records()[0], record | {"id": "that one"}])
    with pytest.raises(UserError, match=r"line 2 \(id 'that one'\).*" + message):
        run(data, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").exists() == (number in (4, 5))  # formats are checked before anything is written


def test_output_of_other_data_is_rejected(finished, tmp_path):
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
        with pytest.raises(UserError, match=r"out\.jsonl, line 1 is"):
            run(finished[0], output)
        assert output.read_bytes() == before


def test_output_that_cannot_be_written(finished, tmp_path):
    """Regression: a traceback, or the operating system's message alone."""
    data = finished[0]
    with pytest.raises(UserError, match=r"/answers is a folder; expected a file for the answers"):
        (tmp_path / "answers").mkdir()
        run(data, tmp_path / "answers")
    with pytest.raises(UserError, match=r"/file is a file; expected a folder"):
        (tmp_path / "file").touch()
        run(data, tmp_path / "file" / "answers.jsonl")


def test_invalid_arguments(finished, tmp_path):
    with pytest.raises(UserError, match="batch_size is 0"):
        run(finished[0], tmp_path / "out", batch_size=0)
    with pytest.raises(UserError, match="logprobs is 1; expected None"):
        run(finished[0], tmp_path / "out", options=GenerationOptions(logprobs=1))
    with pytest.raises(NotFoundError):
        run(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(UserError, match=r"in\.jsonl has 0 records; expected at least 1"):
        run(write(tmp_path / "in.jsonl", []), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
