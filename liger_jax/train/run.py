"""What a run was made of, kept beside its checkpoints, so that it goes on with the same data or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liger_jax.files import atomic_write

RECORD = "run.json"


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json, all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / RECORD, json.dumps(record, indent=2) + "\n")


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
