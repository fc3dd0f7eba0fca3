"""What a run was made of, kept beside its checkpoints, so that it goes on with the same data or not at all."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from liger_jax.files import write_whole

RECORD = "run.json"


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json, all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")


def is_run(folder: Path) -> bool:
    """Whether a run was begun in a folder, perhaps without coming to a checkpoint."""
    return (folder / RECORD).is_file()


def check_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Compares with the record of the run in a folder.

    Raises:
        ValueError: they differ; names all differences.
    """
    try:
        stored = json.loads((folder / RECORD).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is damaged: {error}") from error
    record = json.loads(json.dumps(record))
    names = [*record, *(name for name in stored if name not in record)]
    different = [
        f"{name} was {stored.get(name)!r} and is {record.get(name)!r}"
        for name in names
        if stored.get(name) != record.get(name)
    ]
    if different:
        raise ValueError(
            f"The run in {folder} was made with other settings, so it cannot go on: {'; '.join(different)}. "
            "Give the same ones, or another output"
        )


def fingerprint(value: Any) -> str:
    """A short hash of conversations: of texts, names of files, and pictures that are in memory.

    >>> fingerprint([{"role": "user", "content": "Hi"}])
    '7e4f4a41b7e8a0a8'
    """
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, Image.Image):  # one that was opened from a file has its name, and perhaps no pixels yet
        value = getattr(value, "filename", None) or (value.mode, np.asarray(value))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        digest.update(f"{len(value)}[".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, bytes | str | int | float | bool | None):
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        digest.update(f"{type(value).__name__}{len(data)}:".encode() + data)
    else:
        array = np.asarray(value)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
