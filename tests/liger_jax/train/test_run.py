"""A run's record: equal data have equal fingerprints, all differences are named, and an incomplete record is ignored."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from liger_jax.errors import AlreadyExistsError, UserError
from liger_jax.files import fingerprint
from liger_jax.train.run import RECORD, check_record, is_run, open_run, write_record


def ask_about(image, text="Which?"):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def test_fingerprints(tmp_path):
    """Texts, paths, bytes and images in memory have equal fingerprints only if they are equal."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    with Image.open(tmp_path / "red.png") as opened:
        images = ["a.png", b"a.png", red, blue, np.asarray(red), opened, red.convert("L"), None, "a"]
        fingerprints = [fingerprint(ask_about(image)) for image in images]
        assert fingerprints == [fingerprint(ask_about(image)) for image in images]
    assert len(set(fingerprints)) == len(fingerprints)
    assert (
        fingerprint(ask_about(Path("a.png")))
        == fingerprint(ask_about("a.png"))
        == fingerprint(json.loads(json.dumps(ask_about("a.png"))))
    )
    assert fingerprint(ask_about("a.png")) != fingerprint(ask_about("a.png", "Who?"))
    assert fingerprint(["a", "bc"]) != fingerprint(["ab", "c"]) != fingerprint([["ab"], "c"])


def test_record_is_compared_by_name(tmp_path):
    folder, record = tmp_path / "run", {"data": "a", "batching": {"seed": 0, "length": None}}
    assert not is_run(folder)
    write_record(folder, record)
    assert is_run(folder) and [path.name for path in folder.iterdir()] == [RECORD]
    check_record(folder, record)
    other = {"batching": {"seed": 1, "length": 64, "pack_length": 2}}
    differences = (
        r"batching\.seed was 0 and is 1; batching\.length was None and is 64; "
        r"batching\.pack_length was None and is 2; data was 'a' and is None\. Use"
    )
    with pytest.raises(UserError, match=differences):
        check_record(folder, other)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 9},
        {"optimization": {"learning_rate": 1.0}},
        {"optimization": None},
        {"optimization": {"learning_rate": 0.1, "freeze": ["merger", "vision"]}},
        {"saving": {"save_every": 1}},
        {"execution": {"remat": "full"}},
        {"evaluation": {"eval_generate": 1}},
        *({"batching": {"seed": 0, name: 2}} for name in ("accumulate", "workers", "skip_broken")),
    ],
    ids=str,
)
def test_options_that_may_change(tmp_path, change):
    optimization = {"learning_rate": 0.1, "freeze": ["vision", "merger"]}
    record = {"steps": 3, "optimization": optimization, "batching": {"seed": 0, "workers": None}}
    write_record(tmp_path, record)
    check_record(tmp_path, record | change)


@pytest.mark.parametrize(("option", "before", "after"), [("freeze", [], ["vision"]), ("master_weights", True, False)])
def test_options_of_the_optimizer_that_decide_its_arrays_were_refused_by_the_names_of_arrays(
    tmp_path, option, before, after
):
    """The message was a list of all arrays of the optimizer. A user's own optimizer may have the same ones."""
    write_record(tmp_path, {"optimization": {option: before}})
    message = rf"optimization\.{option} was {re.escape(repr(before))} and is {re.escape(repr(after))}\. Use the same"
    with pytest.raises(UserError, match=message):
        check_record(tmp_path, {"optimization": {option: after}})
    check_record(tmp_path, {"optimization": None})


def test_damaged_record(tmp_path):
    for text, message in (
        ("{", r"is malformed .* expected valid JSON"),
        ("[1]", r"holds \[1\]; expected a JSON object"),
    ):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(UserError, match=rf"run\.json {message}"):
            check_record(tmp_path, {})


def test_incomplete_record_is_ignored(tmp_path):
    (tmp_path / f"{RECORD}.tmp").write_text("{")
    assert not is_run(tmp_path)


def test_open_run_rejects_folders_without_a_run(tmp_path):
    run = open_run(tmp_path / "new", {"steps": 1})
    assert (run.start, run.resumes) == (0, False) and not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(AlreadyExistsError, match="no training run"):
            open_run(path, {"steps": 1})
