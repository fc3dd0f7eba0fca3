"""The record of a run: equal data have equal fingerprints, whatever is different is named, and half a record is none."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from liger_jax.files import fingerprint
from liger_jax.train.run import RECORD, check_record, is_run, write_record


def ask(picture, text="Which?"):
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def test_fingerprints(tmp_path):
    """Texts, paths, bytes, pictures in memory: equal where they are, different where anything is."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    with Image.open(tmp_path / "red.png") as opened:
        pictures = ["a.png", b"a.png", red, blue, np.asarray(red), opened, red.convert("L"), None, "a"]
        found = [fingerprint(ask(picture)) for picture in pictures]
        assert found == [fingerprint(ask(picture)) for picture in pictures]
    assert len(set(found)) == len(found)
    assert (
        fingerprint(ask(Path("a.png")))
        == fingerprint(ask("a.png"))
        == fingerprint(json.loads(json.dumps(ask("a.png"))))
    )
    assert fingerprint(ask("a.png")) != fingerprint(ask("a.png", "Who?"))
    assert fingerprint(["a", "bc"]) != fingerprint(["ab", "c"]) != fingerprint([["ab"], "c"])


def test_records(tmp_path):
    """What was written is compared name by name; a record that was being written does not count."""
    folder, record = tmp_path / "run", {"seed": 0, "length": None}
    assert not is_run(folder)
    write_record(folder, record)
    assert is_run(folder) and [path.name for path in folder.iterdir()] == [RECORD]
    check_record(folder, record)
    with pytest.raises(
        ValueError, match=r"seed was 0 and is 1; length was None and is 64; pack was None and is 2\. Give"
    ):
        check_record(folder, {"seed": 1, "length": 64, "pack": 2})
    (tmp_path / f"{RECORD}.tmp").write_text("{")
    assert not is_run(tmp_path)
