"""Files: local or downloaded checkpoint folders, atomic writes, content fingerprints."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a file, or replaces it, all of it or nothing. Text as UTF-8.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write(Path(folder) / "a.txt", "whole")
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    half = path.with_name(f"{path.name}.tmp")
    half.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(half, path)


def local_folder(
    path_or_repo_id: str | Path,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder itself, or the files of a hub repository that match `patterns`, downloaded to the local cache.

    What is in the cache already is not downloaded again. `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE=1`
    work as they do for every program that uses huggingface_hub.

    Raises:
        FileNotFoundError: neither a folder nor something the hub (or, offline, the cache) has.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(
            f"{path} is a file; expected the folder of a checkpoint, or a hub id such as Qwen/Qwen2-VL-2B-Instruct"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo_id = str(path_or_repo_id)
    try:
        return Path(snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns)))
    except HFValidationError:
        raise FileNotFoundError(f"{repo_id}: no such folder, and not a hub id (owner/name)") from None
    except OSError as error:  # what the hub answers, what the cache lacks, no connection: all are OSErrors
        reason = str(error).strip().replace("\n", " ")
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(f"{repo_id}: no such folder, and the hub does not give it{at}: {reason}") from error


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
