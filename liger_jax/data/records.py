"""Files of conversations, in the formats that people have, as messages for the Processor.

    messages      {"messages": [{"role": "user", "content": ...}, ...], "images": [...], "videos": [...]}
    ShareGPT      {"conversations": [{"from": "human", "value": ...}, ...], "images": [...], "videos": [...]}
    LLaVA         the same with "image" or "video", one or a list

A file is a JSON list of such records, or has one a line. In a text `<image>` and `<video>` stand for the next picture or
video of the record, and so does a part of a content that is a list, unless it has its own. A video is the list of its
frames.
"""

import base64
import binascii
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlparse

from liger_jax.inputs.messages import KINDS, Conversation, Message, check_settings, check_text

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# What a record calls its turns, and in a turn the speaker and the text.
TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
MEDIA = {"image": ("images", "image"), "video": ("videos", "video")}
LIMITS = {"min_pixels", "max_pixels"}  # that a part may set for its picture
MARKER = re.compile(r"\n?<(image|video)>\n?")  # the line breaks around a marker belong to it, as in LLaVA's own loader
URL = re.compile(r"(file|data):", re.IGNORECASE)
SHORTEST_BASE64 = 60  # of a picture of one pixel; what is shorter and no file is a path with a mistake
FILE = re.compile(r"file:", re.IGNORECASE)
WEB = re.compile(r"\w+://")


def read_conversations(
    path: str | Path, *, media: str | Path | None = None, on_error: Literal["raise", "skip"] = "raise"
) -> list[Conversation]:
    """Reads and checks all records of a file; pictures are named, not opened.

    Args:
        path: a .json file with a list, or a file with a JSON record a line.
        media: folder that relative paths of pictures and videos start from; None: the file's own.
        on_error: what a broken record does: "raise" stops at the first one, "skip" leaves all of them out, with one
            warning that names them.

    Returns:
        Conversations for `Processor(conversations, labels=True)`: messages whose content is a text, or a list of parts in
        which each picture is an absolute path, a URL or the bytes of a file.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is no JSON or has no records, or a record is broken: unknown format or role, markers that are
            not as many as the record's pictures, a picture that does not exist, no answer. The message names the record.

    Example:
        >>> import json, tempfile
        >>> from liger_jax.data.records import read_conversations
        >>> turns = [{"from": "human", "value": "<image>\\nWhich digit?"}, {"from": "gpt", "value": "7"}]
        >>> record = {"image": "data:image/png;base64,", "conversations": turns}
        >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        ...     print(json.dumps([record]), file=file, flush=True)
        ...     read_conversations(file.name)[0][0]["content"][1]
        {'type': 'text', 'text': 'Which digit?'}
    """
    path = Path(path)
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
    folder = (path.parent if media is None else Path(media)).absolute()  # a run goes on from any working directory
    found: list[Conversation] = []
    broken: list[str] = []
    for name, record in read_records(path):
        try:
            found.append(_answered(conversation_of(record, folder)))
        except (ValueError, OSError) as error:
            if on_error == "raise":
                raise ValueError(f"{path}, {name}: {error}") from error
            broken.append(f"{name}: {error}")
    if not found:
        raise ValueError(f"{path} has no usable record{': ' if broken else ''}{'; '.join(broken[:3])}")
    if broken:
        shown = "; ".join(broken[:10]) + ("; ..." if len(broken) > 10 else "")
        warnings.warn(f"{path}: left out {len(broken)} of {len(found) + len(broken)} records: {shown}", stacklevel=2)
    return found


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record with a name for it: where it stands, and its id if it has one. Of a line that is no JSON, the error."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if text.lstrip().startswith("["):
        try:
            records = list(enumerate(json.loads(text), start=1))
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON list: {error}") from error
        what = "record"
    else:
        records, what = [], "line"
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append((number, json.loads(line)))
                except ValueError as error:
                    records.append((number, error))
    for number, record in records:
        name = record.get("id") if isinstance(record, Mapping) else None
        yield f"{what} {number}" + ("" if name is None else f" (id {name!r})"), record


def _answered(conversation: Conversation) -> Conversation:
    if not any(message["role"] == "assistant" and message["content"] for message in conversation):
        raise ValueError("no answer: expected a turn of the assistant")
    return conversation


def conversation_of(record: Any, folder: Path) -> Conversation:
    """A record as messages; relative paths start from `folder`. Raises ValueError for a broken one."""
    if isinstance(record, ValueError):
        raise ValueError(f"not JSON: {record}")
    kinds = [kind for kind in TURNS if isinstance(record, Mapping) and kind in record]
    if len(kinds) != 1:
        keys = sorted(record) if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(f"found {keys}; expected a record with one of {sorted(TURNS)}")
    turns = record[kinds[0]]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(f"{kinds[0]!r} is {turns!r:.60}; expected a list of turns")
    media = {kind: _media(record, kind, folder) for kind in MEDIA}
    given = {kind: len(items) for kind, items in media.items()}
    messages = [_message(turn, *TURNS[kinds[0]], media, folder) for turn in turns]
    if record.get("system"):  # LLaMA-Factory's place for it
        if messages[0]["role"] == "system":
            raise ValueError("a system message both in the record and in its turns; expected one of them")
        messages.insert(0, _message({"role": "system", "content": record["system"]}, "role", "content", media, folder))
    for kind, left in media.items():
        if left:
            raise ValueError(f"{given[kind]} {kind}s, but {given[kind] - len(left)} markers <{kind}> in its texts")
    return messages


def _media(record: Mapping, kind: str, folder: Path) -> list[Any]:
    """The pictures or videos that a record lists, in order; a video that is a list is its frames."""
    listed = [record[key] for key in MEDIA[kind] if record.get(key) is not None]
    if len(listed) > 1:
        raise ValueError(f"both {' and '.join(map(repr, MEDIA[kind]))}; expected one of them")
    values = listed[0] if listed else []
    if not isinstance(values, list):
        values = [values]
    return [_medium(kind, value, folder) for value in values]


def _medium(kind: str, value: Any, folder: Path) -> Any:
    """A picture's source, or those of a video's frames."""
    frames = isinstance(value, list) and value and not any(isinstance(frame, list) for frame in value)
    if kind == "video" and not frames:
        raise ValueError(f"the video {value!r:.60}; expected a list of its frames: ['1.png', '2.png']")
    if kind == "image" and isinstance(value, list):
        raise ValueError(f"the picture {value!r:.60}; expected a path, a URL or base64")
    return _source(value, folder)


def _source(value: Any, folder: Path) -> Any:
    """A URL as it is, a path from the folder on, base64 as bytes; each of a list."""
    if isinstance(value, list):
        return [_source(item, folder) for item in value]
    if isinstance(value, Mapping) and value.get("bytes"):  # a path beside them is where they once came from
        return _decoded(value["bytes"], "bytes")
    if isinstance(value, Mapping):
        return _source(next((value[key] for key in ("path", "url") if value.get(key)), None), folder)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r:.60} is no picture or video; expected a path, a URL or base64")
    if FILE.match(value) and not os.path.isfile(unquote(urlparse(value).path)):
        raise ValueError(f"{value!r:.120} does not exist")
    if URL.match(value):
        return value
    if WEB.match(value):
        raise ValueError(
            f"{value!r:.60} would have to be downloaded; expected a path, a file:// or data: URL or base64"
        )
    path = folder / value
    if os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        return str(path)
    if len(value) < SHORTEST_BASE64:
        raise ValueError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    return _decoded(value, f"{str(path)[:120]!r} does not exist, and")


def _decoded(value: Any, what: str) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode("".join(str(value).split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{what} is no base64: {error}") from error


def _message(turn: Any, speaker: str, said: str, media: dict[str, list[Any]], folder: Path) -> Message:
    if not isinstance(turn, Mapping) or not {speaker, said} <= turn.keys():
        raise ValueError(f"turn {turn!r:.60}; expected {{{speaker!r}: ..., {said!r}: ...}}")
    if not isinstance(turn[speaker], str) or turn[speaker] not in ROLES:
        raise ValueError(f"{speaker!r} is {turn[speaker]!r:.60}; expected one of {sorted(ROLES)}")
    content = turn[said]
    if not isinstance(content, str | list):
        raise ValueError(f"{said!r} is {content!r:.60}; expected a text or a list of parts")
    if isinstance(content, list):
        content = [part for given in content for part in _given_part(given, media, folder)]
    else:
        content = _parts(content, media)
    return {"role": ROLES[turn[speaker]], "content": content}


def _given_part(part: Any, media: dict[str, list[Any]], folder: Path) -> list[dict[str, Any]]:
    """A part of a content that is a list: its picture or video from the part itself, or the record's next."""
    if not isinstance(part, Mapping):
        raise ValueError(f"the part {part!r:.60}; expected {{'type': 'text', 'text': ...}} or one of a picture")
    if isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        parts = _parts(part["text"], media)
        return [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    for kind in KINDS:
        if not kind.takes(part):
            continue
        check_settings(part)
        value = next((part[key] for key in kind.keys if part.get(key)), None)
        if value is None and not media[kind.name]:
            raise ValueError(f"a part of type {kind.name!r} without one, and the record lists no more of them")
        source = media[kind.name].pop(0) if value is None else _medium(kind.name, value, folder)
        return [{**{name: part[name] for name in LIMITS & part.keys()}, "type": kind.name, kind.name: source}]
    raise ValueError(f"the part {part!r:.60}; expected one of type 'text', 'image' or 'video'")


def _parts(text: str, media: dict[str, list[Any]]) -> str | list[dict[str, Any]]:
    """The text with its markers replaced by what they stand for, taken from the front of `media`."""
    check_text(text)
    pieces = MARKER.split(text)  # text, kind, text, kind, ..., text
    if len(pieces) == 1:
        return text
    parts = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
        elif not media[piece]:
            raise ValueError(f"more markers <{piece}> than {piece}s")
        else:
            parts.append({"type": piece, piece: media[piece].pop(0)})
    return parts
