"""Files: checkpoint folders from the disk or the hub, JSON, atomic writes, locks, and content fingerprints."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from liger_jax.errors import AlreadyExistsError, LigerWarning, NotFoundError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_ERRORS = (*FULL, errno.EACCES, errno.EROFS)
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"  # a checkpoint's settings, as the hub names them
LOCK = ".lock"  # in an output folder while a process writes to it
CHECKPOINT_SOURCE = "a checkpoint folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct"


def local_folder(
    path_or_repo_id: str | Path,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Returns the local folder of a checkpoint, downloaded from the hub to the cache if necessary.

    Files that are already in the cache are not downloaded again. `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and
    `HF_HUB_OFFLINE=1` work as in every program that uses huggingface_hub.

    Args:
        path_or_repo_id: a hub id, or a folder, which is returned unchanged.
        patterns: file name patterns of the files to download.
        revision: branch, tag or commit of the hub repository.
        cache_dir: download cache; None: huggingface_hub's own.

    Raises:
        NotFoundError: there is no such folder, and no such repository on the hub (or, offline, in the cache).
        UserError: a revision of a folder, which has none.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision is {revision!r}, and {path} is a folder; expected a hub id, or no revision")
        return path
    if path.exists():
        raise NotFoundError(f"{path} is a file; expected {CHECKPOINT_SOURCE}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo_id = str(path_or_repo_id)
    try:
        return Path(snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise NotFoundError(f"{repo_id} is neither a folder nor a hub id; expected {CHECKPOINT_SOURCE}") from error
    except OSError as error:  # the hub's errors, a cache without the files, no connection: all are OSErrors
        reason = str(error).strip().replace("\n", " ")
        at_revision = f" at revision {revision!r}" if revision else ""
        raise NotFoundError(
            f"{repo_id} is not a folder, and could not be downloaded from the hub{at_revision} ({reason}); expected "
            f"{CHECKPOINT_SOURCE}"
        ) from error


def make_folder(path: Path) -> Path:
    """Creates a folder and its parents unless they exist, and returns it.

    Raises:
        UserError: the path is a file, or the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if path.is_file():
            raise UserError(f"{path} is a file; expected a folder, or a path for a new one") from error
        raise UserError(f"{path} cannot be created ({error.strerror}); expected a writable location") from error
    return path


def is_empty_folder(path: Path) -> bool:
    """Returns whether a path is a folder without files, apart from the file that locks it."""
    return path.is_dir() and all(file.name == LOCK for file in path.iterdir())


def check_new_folder(path: Path, *, overwrite: bool) -> None:
    """Raises AlreadyExistsError if the path exists and is not an empty folder, unless `overwrite` is true."""
    if path.exists() and not overwrite and not is_empty_folder(path):
        raise AlreadyExistsError(
            f"{path} is not an empty folder; expected a new one, or overwrite=True (--overwrite) to replace its model"
        )


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to a folder while the context is open. Creates the folder if necessary.

    The kernel releases the lock when the process ends in any way, so a lock never outlives its process. A folder that was
    created for the lock and is still empty at the end is removed again.

    Raises:
        AlreadyExistsError: another process holds the lock.
        UserError: the folder cannot be created or written to, now or while the context is open.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with lock_folder(Path(parent) / "run"):
        ...         print([path.name for path in Path(parent, "run").iterdir()])
        ...     Path(parent, "run").exists()
        ['.lock']
        False
    """
    existed = folder.exists()
    with disk_errors(folder), _open_locked(make_folder(folder) / LOCK) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
                if not existed:
                    folder.rmdir()  # fails unless it is empty


def _open_locked(path: Path) -> TextIO:
    """Opens a file and locks it. Raises AlreadyExistsError with its content, which names the process that has locked it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read() or "another process"
            raise AlreadyExistsError(
                f"{path.parent} is in use by {holder}; expected an output folder to which no other process writes"
            ) from None
        except OSError as error:
            message = f"{path.parent} cannot be locked ({error.strerror}): do not start a second process on this folder"
            warnings.warn(message, LigerWarning, stacklevel=5)
        # the previous holder may have removed the file between the two calls
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        file.close()


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an error of a full or read-only disk into a UserError that names the folder and keeps the error's notes."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # TensorStore, which writes checkpoints, raises ValueErrors
        code = disk_error_code(error)
        file = getattr(error, "filename", None)
        if code is None or (file and folder.absolute() not in Path(file).absolute().parents):
            raise
        expected = "free space" if code in FULL else "a writable folder"
        problem = f"{folder} cannot be written ({os.strerror(code)}); expected {expected}"
        raise UserError(". ".join([problem, *getattr(error, "__notes__", ())])) from error


def disk_error_code(error: BaseException) -> int | None:
    """Returns the error number if an error is about a full or read-only disk, else None.

    Example:
        >>> os.strerror(disk_error_code(ValueError("Error writing local file: No space left on device")))
        'No space left on device'
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK_ERRORS else None
    return next((code for code in DISK_ERRORS if os.strerror(code) in str(error)), None)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Creates or replaces a file atomically: a reader sees either the old content or all of the new. Text is UTF-8.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write(Path(folder) / "a.txt", "complete")
        ...     (Path(folder) / "a.txt").read_text()
        'complete'
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file.

    Raises:
        NotFoundError: the file does not exist.
        UserError: the file is not JSON. The message says so if it is empty, a Git LFS pointer, or a web page.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder) / "a.json", {"eos_token_id": 7})
        ...     read_json(Path(folder) / "a.json")
        {'eos_token_id': 7}
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist; expected a JSON file") from error
    except (ValueError, RecursionError) as error:  # invalid JSON, invalid UTF-8, or brackets nested too deeply
        raise UserError(f"{path} is {wrong_content(path) or f'malformed ({error})'}; expected valid JSON") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises as `read_json` does, and for JSON that is not an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {value!r:.60}; expected a JSON object")
    return value


def wrong_content(path: Path) -> str | None:
    """Returns "empty", "a Git LFS pointer ..." or "a web page ..." if the first bytes of a file say so, else None."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (`git lfs pull` fetches the file itself)"
    if head.lstrip().startswith((b"<!", b"<html", b"<?xml")):
        return "a web page that was saved in place of the file"
    return None


def fingerprint(value: Any) -> str:
    """Returns a short hash of conversations: of their texts, file names, and in-memory images.

    Example:
        >>> fingerprint([{"role": "user", "content": "Hi"}])
        '7e4f4a41b7e8a0a8'
    """
    import numpy as np
    from PIL import Image

    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Mapping):
            value = list(value.items())
        if isinstance(value, Image.Image):  # an opened file is hashed by name: its pixels may not be loaded
            value = getattr(value, "filename", None) or (value.mode, np.asarray(value))
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            digest.update(f"{len(value)}[".encode())
            for item in value:
                feed(item)
        elif isinstance(value, bytes | str | int | float | bool | None):
            data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
            digest.update(f"{type(value).__name__}{len(data)}:".encode() + data)
        else:
            array = np.asarray(value)
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())

    feed(value)
    return digest.hexdigest()[:16]
