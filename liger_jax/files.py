"""Small files that a run which is killed at any moment leaves whole."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, or replaces it, all of it or nothing. Text as UTF-8.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "a.txt", "whole")
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    half = path.with_name(f"{path.name}.tmp")
    half.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(half, path)
