"""Opens encoded images, and resolves the sources of images in records.

An encoded image is a path, a `file://` URL, a base64 `data:` URL, or the bytes of a file. Records may also hold plain
base64, and paths relative to the records' folder. Nothing is downloaded.
"""

import base64
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlparse

from liger_jax.errors import NotFoundError, UserError

ENCODED = (str, Path, bytes)
SHORTEST_BASE64 = 60  # length for a one-pixel image; a shorter string that names no file is a mistyped path
WEB_URL = re.compile(r"(?!file:)\w\w+:/", re.IGNORECASE)  # one slash, because Path turns // into /
EXPECTED = "a path, a file:// or data: URL, or base64"


def open_encoded(source: str | Path | bytes) -> tuple[BinaryIO, str]:
    """Opens an encoded image for reading.

    Returns:
        The open file, and a name for error messages.

    Raises:
        NotFoundError: the file does not exist.
        UserError: a web URL, a malformed URL, or a file that cannot be opened.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source), f"({len(source)} bytes)"
    text = str(source)
    if _has_scheme(text, "data"):
        header, comma, body = text.partition(",")
        header = "".join(header.split())  # a data URL may be broken into lines anywhere
        if not comma or not header.endswith(";base64"):
            raise UserError(f"image is {text[:60]!r}; expected a data URL like data:image/<type>;base64,<data>")
        return io.BytesIO(_decode_base64(unquote(body), f"image ({header} URL) is not valid base64")), f"({header} URL)"
    _refuse_web_url(text)
    path = _file_url_path(text) if _has_scheme(text, "file") else text
    if not os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        raise NotFoundError(
            f"image is {text[:300]!r}, which is not an existing file; expected the path of an image file"
        )
    try:
        return open(path, "rb"), repr(str(path))
    except OSError as error:
        raise UserError(
            f"image is {text[:300]!r}, which cannot be opened ({error}); expected a readable file"
        ) from error


def resolve_source(value: Any, folder: Path) -> str | bytes:
    """Returns the source of an image in a record, in a form that does not depend on the working directory.

    Args:
        value: a path, a file:// or data: URL, base64, or {"path": ...}, {"url": ...}, {"bytes": ...} with one of them.
            A path next to bytes is ignored: it only records their origin.
        folder: absolute folder that relative paths refer to.

    Returns:
        URLs unchanged, paths as absolute paths, base64 as bytes.

    Raises:
        NotFoundError: the file does not exist.
        UserError: any other value.

    Example:
        >>> resolve_source("data:image/png;base64,iVBORw0KGgo=", Path("/data"))
        'data:image/png;base64,iVBORw0KGgo='
        >>> resolve_source({"bytes": "iVBORw0KGgo=", "path": "a.png"}, Path("/data"))
        b'\\x89PNG\\r\\n\\x1a\\n'
    """
    if isinstance(value, Mapping) and value.get("bytes"):
        content = value["bytes"]
        return content if isinstance(content, bytes) else _decode_base64(str(content), "bytes is not valid base64")
    if isinstance(value, Mapping):
        return resolve_source(next((value[key] for key in ("path", "url") if value.get(key)), None), folder)
    if not isinstance(value, str) or not value:
        raise UserError(f"image is {value!r:.60}; expected {EXPECTED}")
    if _has_scheme(value, "data"):
        return value
    if _has_scheme(value, "file"):
        if not os.path.isfile(_file_url_path(value)):
            raise NotFoundError(f"image is {value!r:.120}, which does not exist; expected {EXPECTED}")
        return value
    _refuse_web_url(value)
    path = folder / value
    if os.path.isfile(path):
        return str(path)
    if len(value) < SHORTEST_BASE64:
        reason = "is not a file" if os.path.exists(path) else "does not exist"
        raise NotFoundError(f"image is {str(path)!r}, which {reason}; expected {EXPECTED}")
    return _decode_base64(value, f"image is {str(path)[:120]!r}, which does not exist and is not valid base64")


def _has_scheme(text: str, scheme: str) -> bool:
    return text.lstrip()[: len(scheme) + 1].lower() == f"{scheme}:"


def _file_url_path(url: str) -> str:
    try:
        return unquote(urlparse(url.strip()).path)
    except ValueError as error:  # such as file://[
        raise UserError(f"image is {url!r:.200}, a malformed URL ({error}); expected {EXPECTED}") from error


def _refuse_web_url(text: str) -> None:
    if WEB_URL.match(text):
        raise UserError(f"image is {text!r:.200}, which would have to be downloaded; expected {EXPECTED}")


def _decode_base64(text: str, complaint: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:  # binascii.Error, or characters outside ASCII
        raise UserError(f"{complaint} ({error}); expected {EXPECTED}") from error
