"""Files: JSON errors name the file, folders are created, fingerprints depend on content."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

from liger_jax.errors import AlreadyExistsError, NotFoundError, UserError
from liger_jax.files import (
    LOCK,
    check_new_folder,
    disk_errors,
    fingerprint,
    local_folder,
    lock_folder,
    make_folder,
    read_json,
    read_json_object,
)
from tests._support.scripts import run_script


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


def test_revision_of_a_folder_was_ignored(tmp_path):
    with pytest.raises(UserError, match=r"revision is 'v2', and .* is a folder; expected a hub id, or no revision"):
        local_folder(tmp_path, ["*.json"], revision="v2")


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


def test_lock_is_released_by_a_killed_process(tmp_path):
    """Its file stays, does not count as a file of the folder, and does not keep the next process from locking it."""
    script = """
        import os, signal, subprocess, sys
        from pathlib import Path
        from liger_jax.files import lock_folder
        child = os.fork()
        if child == 0:
            with lock_folder(Path(sys.argv[1])):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        print(child)
    """
    child = run_script(script, tmp_path / "run").strip()
    assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {child} on ")
    check_new_folder(tmp_path / "run", overwrite=False)
    with lock_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(
            AlreadyExistsError, match=rf"run is in use by process {os.getpid()} on .*; expected an output"
        ):
            lock_folder(tmp_path / "run").__enter__()
    assert list((tmp_path / "run").iterdir()) == []  # it existed before
    (tmp_path / "run" / "a.txt").touch()
    with lock_folder(tmp_path / "run"):
        pass
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"run cannot be written \(No space left on device\); .*free space",
        ),
        (
            ValueError("writing: Read-only file system [source]"),
            r"run cannot be written \(Read-only.*; .*a writable folder",
        ),
    ],
)
def test_disk_errors_name_the_folder(tmp_path, error, message):
    error.add_note("The latest checkpoint is step 40")  # as `fit` does; regression: it was lost
    with (
        pytest.raises(UserError, match=rf"{message}\. The latest checkpoint is step 40$"),
        disk_errors(tmp_path / "run"),
    ):
        raise error


def test_errors_of_other_files_are_not_disk_errors(tmp_path):
    for error in (PermissionError(errno.EACCES, "Permission denied", "/data/a.png"), ValueError("other"), OSError()):
        with pytest.raises(type(error)) as raised, disk_errors(tmp_path / "run"):
            raise error
        assert raised.value is error
