"""Files: JSON errors name the file, folders are created, fingerprints depend on content."""

import numpy as np
import pytest
from PIL import Image

from liger_jax.errors import NotFoundError, UserError
from liger_jax.files import fingerprint, local_folder, make_folder, read_json, read_json_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"a\.json is malformed \(.*line 1.*\); expected valid JSON"),
        ("", r"a\.json is empty"),
        ("<!DOCTYPE html>", r"a\.json is a web page"),
        ("version https://git-lfs.github.com/spec/v1\n", r"a\.json is a Git LFS pointer .*git lfs pull"),
        ("[1]", r"a\.json holds \[1\]; expected a JSON object"),
        (b"\xff", r"a\.json is malformed"),
    ],
)
def test_json_errors_name_the_file(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_json_object(tmp_path / "a.json")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(NotFoundError, match=r"b\.json does not exist"):
        read_json(tmp_path / "b.json")
    with pytest.raises(NotFoundError, match="neither a folder nor a hub id"):
        local_folder(tmp_path / "none", ["*.json"])
    assert local_folder(tmp_path, ["*.json"]) == tmp_path


def test_make_folder(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UserError, match=rf"{path}.*expected"):
            make_folder(path)


def test_fingerprint_depends_on_content(tmp_path):
    """Images in memory count by their pixels, opened files by their names; types and nesting matter."""
    image = Image.fromarray(np.zeros((2, 3, 3), np.uint8))
    image.save(tmp_path / "a.png")
    changed = image.copy()
    changed.putpixel((0, 0), (1, 0, 0))
    with Image.open(tmp_path / "a.png") as opened:
        values = [
            image,
            changed,
            opened,
            np.asarray(image),
            b"ab",
            "ab",
            ["ab"],
            ["a", "b"],
            {"a": "b"},
            1,
            "1",
            1.0,
            None,
        ]
        assert len({fingerprint([value]) for value in values}) == len(values)
        assert fingerprint([opened]) == fingerprint([str(tmp_path / "a.png")])
    assert fingerprint([image]) == fingerprint([image.copy()])
