"""Reads files of conversations in the usual formats, and returns messages for the Processor.

    messages      {"messages": [{"role": "user", "content": ...}, ...], "images": [...], "videos": [...]}
    ShareGPT      {"conversations": [{"from": "human", "value": ...}, ...], "images": [...], "videos": [...]}
    LLaVA         like ShareGPT, but with "image" or "video": one source or a list

A file is a JSON list of such records, or JSON lines. `<image>` and `<video>` in a text are replaced by the record's next
image or video. Content may also be a list of parts; a part without its own image takes the record's next one.
A video is the list of its frames. A part may set `min_pixels`, `max_pixels`, and for a video `sample_fps`, the rate of its
frames per second (otherwise 2), as in qwen-vl-utils.

A turn of the assistant is not trained if it has one of `LOSS_KEYS` ("loss", "weight", ...) with false or 0. Keys of records,
turns and parts that are known to change their meaning, but are not supported, are refused by name. Other unknown keys are
reported, unless they hold the only image or video of a record: it is never trained without that.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from liger_jax.errors import LigerWarning, NotFoundError, UserError, list_some, warn_skipped
from liger_jax.inputs.messages import (
    KINDS,
    LOSS_KEYS,
    PART_SETTINGS,
    UNSUPPORTED_SETTINGS,
    Conversation,
    Message,
    check_media_part,
    check_text,
    is_trained,
)
from liger_jax.inputs.sources import resolve_source

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# A record's key for its turns, and a turn's keys for the speaker and the text.
FORMATS = {"messages": ("role", "content"), "conversations": ("from", "value")}
# Keys under which a record lists its images or videos.
MEDIA = {"image": ("images", "image"), "video": ("videos", "video")}
RECORD_KEYS = {*FORMATS, *MEDIA["image"], *MEDIA["video"], "system", "id", *LOSS_KEYS}
# Keys of records, turns and parts that would change what is trained, by their meaning.
REFUSED = {
    "preferences": {"chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "label"}
    | {"kto_tag", "preference", "preferred", "margin"},
    "tools": {"tools", "functions", "function_call", "tool_calls", "tool_call_id", "tool_choice"},
    "grounding": {"objects", "bbox", "bboxes", "bbox_type", "boxes", "ref", "refs", "polygons"},
    "audio": {"audio", "audios", "audio_path", "audio_url", "input_audio"},
    "masks of tokens": {"loss_mask", "mask", "masks", "masked", "train_detail", "training_detail", "train_on_turn"}
    | {"completion_mask", "assistant_masks", "output_with_loss", "loss_weight", "sample_weight"},
    "reasoning": {"reasoning_content", "thinking"},
}
TRAINING_ONLY = ("preferences", "masks of tokens", "reasoning")  # meanings that do not change a question
# Keys under which other programs list images and videos.
FOREIGN_MEDIA = {
    "image": {"image_path", "image_paths", "image_url", "image_urls", "image_file", "image_files", "image_base64"}
    | {"image_bytes", "image_data", "image_list", "img", "imgs", "img_path", "img_paths", "img_url"}
    | {"picture", "pictures", "photo", "photos", "pixel_values"},
    "video": {"video_path", "video_paths", "video_url", "video_urls", "video_file", "video_files", "frames"},
}
# Markers that nothing fills here: those of ms-swift, the placeholders of Qwen-VL and other models (also numbered ones), and
# the path of an image in the text, as the first Qwen-VL has it. Texts are split at `MARKER` first.
LEFT_OVER = re.compile(
    r"<(?:bbox|ref-object|audio)>"
    r"|<\|?(?:image|video)(?:[-_ ]?(?:pad|placeholder|here|\d+))?\|?>"
    r"|<img>[^<]*</img>",
    re.IGNORECASE,
)
# Values that are images or videos under any key.
MEDIA_VALUE = re.compile(
    r"data:(?:image|video)/.*|\S+\.(?:avif|bmp|gif|heic|jpe?g|png|tiff?|webp|avi|mkv|mov|mp4|webm)",
    re.IGNORECASE | re.DOTALL,
)
PART_KEYS = {"type", "text", *PART_SETTINGS, *UNSUPPORTED_SETTINGS}  # and the kind's own
MARKER = re.compile(r"\n?<(image|video)>\n?")  # the line breaks around a marker belong to it, as in LLaVA's own loader


def read_conversations(
    path: str | Path, *, media: str | Path | None = None, on_error: Literal["raise", "skip"] = "raise"
) -> list[Conversation]:
    """Reads and checks all records of a file. Images are located, but not opened.

    Args:
        path: a .json file with a list, or a file of JSON lines.
        media: folder that relative paths of images and videos refer to; None: the folder of `path`.
        on_error: treatment of broken records. "raise" stops at the first one; "skip" leaves them out, with one warning
            that names them.

    Returns:
        Conversations for `processor(conversations, labels=True)`: messages whose content is a text or a list of parts.
        Each image in it is an absolute path, a URL, or the bytes of a file.

    Raises:
        NotFoundError: the file does not exist.
        UserError: the file is not JSON or has no records, or a record is broken: unknown format or role, different numbers
            of markers and images, an image that does not exist, no answer to train, a key that would change its meaning
            and is not supported. The message names the record.

    Warns:
        UserWarning: records, turns or parts have other unknown keys; the warning counts each of them.

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
        raise UserError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
    # absolute, so that a run can be resumed from any working directory
    folder = (path.parent if media is None else Path(media)).absolute()
    conversations: list[Conversation] = []
    broken: list[str] = []
    ignored: Counter[str] = Counter()
    for name, record in read_records(path):
        try:
            conversations.append(_require_answer(parse_record(record, folder, ignored=ignored)))
        except UserError as error:
            if on_error == "raise":
                raise UserError(f"{path}, {name}: {error}") from error
            broken.append(f"{name}: {error}")
    if not conversations:
        raise UserError(
            f"{path} has no usable record ({'; '.join(broken[:3]) or 'it is empty'}); expected at least one"
        )
    total = len(conversations) + len(broken)
    warn_skipped(f"{path}: left out {len(broken)} of {total} records", broken)
    if ignored:
        listed = list_some([f"{name}: {count}" for name, count in ignored.most_common()], 20, separator=", ")
        warnings.warn(f"{path}: ignored unknown keys ({listed})", LigerWarning, stacklevel=2)
    return conversations


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields each record with a name for it: its number or line, and its id if it has one.

    For a line that is not JSON, yields the error in place of the record.

    Raises:
        NotFoundError: the file does not exist.
        UserError: the file cannot be read, is not UTF-8, or starts with "[" but is not a JSON list.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist; expected a file of conversations") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not readable as UTF-8 ({error}); expected a JSON list or JSON lines in UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file of conversations") from error
    records: list[tuple[int, Any]]
    if text.lstrip().startswith("["):
        try:
            unit, records = "record", list(enumerate(_parse_json(text), start=1))
        except (ValueError, RecursionError) as error:  # invalid JSON, or brackets nested too deeply
            raise UserError(f"{path} is malformed ({error}); expected a JSON list or JSON lines") from error
    else:
        unit, records = "line", []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append((number, _parse_json(line)))
                except (ValueError, RecursionError) as error:
                    if not records:
                        _refuse_one_object(path, text)
                    records.append((number, error))
    for number, record in records:
        name = record.get("id") if isinstance(record, Mapping) else None
        yield f"{unit} {number}" + ("" if name is None else f" (id {name!r:.60})"), record


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. Raises ValueError if it has a key twice: the earlier value would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {repeated!r:.60} twice: {values!r:.100}")
    return values


def _refuse_one_object(path: Path, text: str) -> None:
    """Raises UserError if the file is one JSON object over several lines: the splits of a dataset, or one record."""
    try:
        keys = sorted(_parse_json(text))
    except (ValueError, TypeError, RecursionError):
        return
    raise UserError(f"{path} is one object with the keys {keys!r:.300}; expected a JSON list or JSON lines")


def _require_answer(conversation: Conversation) -> Conversation:
    """Returns the conversation unchanged. Raises UserError if the assistant says nothing in it, or nothing to train."""
    answers = [message for message in conversation if message["role"] == "assistant" and not _is_silent(message)]
    if not answers:
        raise UserError("the record has no answer; expected an assistant turn")
    if not any(map(is_trained, answers)):
        raise UserError("the record has no answer to train; expected an assistant turn without loss false or weight 0")
    return conversation


def _is_silent(message: Message) -> bool:
    content = message["content"]
    return not content if isinstance(content, str) else all(part.get("text") == "" for part in content)


# ---- one record ------------------------------------------------------------------------------------------------------


def parse_record(
    record: Any, folder: Path, *, training: bool = True, ignored: Counter[str] | None = None
) -> Conversation:
    """Returns a record as messages. An answer that is not trained has `"loss": False`.

    Args:
        record: parsed JSON, or the error of a line that is not JSON.
        folder: absolute folder that relative paths refer to.
        training: check masks and preferences, which only training uses.
        ignored: counts the unknown keys of records, turns and parts.

    Raises:
        UserError: the record is broken.
    """
    ignored = Counter() if ignored is None else ignored
    if isinstance(record, Exception):
        raise UserError(f"the line is not JSON ({record}); expected a record")
    formats = [key for key in FORMATS if isinstance(record, Mapping) and record.get(key) is not None]
    if len(formats) > 1:  # a table may have an empty column
        formats = [key for key in formats if record[key] != []]
    if len(formats) != 1:
        problem = f"has the keys {sorted(record)!r:.300}" if isinstance(record, Mapping) else f"is {record!r:.60}"
        raise UserError(f"the record {problem}; expected a record with one of {sorted(FORMATS)}")
    (turns_key,) = formats
    turns = record[turns_key]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise UserError(f"{turns_key!r} is {turns!r:.60}; expected a list of turns")
    if training and not all(_mask_value(record, key) for key in LOSS_KEYS):
        raise UserError("the record itself has a mask that is false or 0; expected masks in its turns")
    _check_all_keys(record, turns_key, training, ignored)
    media = {kind: _record_media(record, kind, folder) for kind in MEDIA}
    listed = {kind: len(sources) for kind, sources in media.items()}
    messages = [_message(turn, *FORMATS[turns_key], media, folder) for turn in turns]
    if training:
        messages = [_apply_mask(message, turn) for message, turn in zip(messages, turns, strict=True)]
    if record.get("system"):  # LLaMA-Factory's key
        if messages[0]["role"] == "system":
            raise UserError("the record has a system message in 'system' and in its turns; expected one of them")
        messages.insert(0, _message({"role": "system", "system": record["system"]}, "role", "system", media, folder))
    for kind, unused in media.items():
        if unused:
            raise UserError(
                f"the record has {listed[kind]} {kind}s, but {listed[kind] - len(unused)} markers <{kind}> in its texts; "
                "expected a marker for each"
            )
    if not any(listed.values()):
        _refuse_unread_media(record, turns_key, messages)
    return messages


def _check_all_keys(record: Mapping[str, Any], turns_key: str, training: bool, ignored: Counter[str]) -> None:
    """Checks the keys of a record, of its turns and of their parts; see `_check_keys`."""
    _check_keys(record, "record", RECORD_KEYS, training, ignored)
    _, content_key = FORMATS[turns_key]
    for turn in record[turns_key]:
        if not isinstance(turn, Mapping):
            continue
        _check_keys(turn, "turn", {*FORMATS[turns_key], *LOSS_KEYS}, training, ignored)
        parts = turn.get(content_key)
        for part in parts if isinstance(parts, list) else []:
            if not isinstance(part, Mapping):
                continue
            is_text = _is_text(part)
            own_keys = () if is_text else next((kind.keys for kind in KINDS if kind.matches(part)), ())
            if is_text or own_keys:  # `_parse_part` refuses other types
                _check_keys(part, "part", {*PART_KEYS, *own_keys}, training, ignored)


def _refuse_unread_media(record: Mapping[str, Any], turns_key: str, messages: Sequence[Message]) -> None:
    """Raises UserError if a record without images and videos has one under a key that is not known."""
    contents = [message["content"] for message in messages]
    if any(part["type"] in MEDIA for content in contents if not isinstance(content, str) for part in content):
        return
    turns = [("turn", turn, FORMATS[turns_key]) for turn in record[turns_key]]
    for place, values, known in [("record", record, RECORD_KEYS), *turns]:
        for key, value in values.items():
            if key not in known and _holds_media(value):
                raise UserError(
                    f"the {place} has {key!r:.60} ({value!r:.60}), and no image or video is read from the record; expected "
                    "images under 'images' or 'image', and videos under 'videos' or 'video'"
                )


def _holds_media(value: Any) -> bool:
    """Returns whether a value is the source of an image or a video, or a list of them."""
    for source in value if isinstance(value, list) else [value]:
        path = source.get("path") if isinstance(source, Mapping) else source
        if isinstance(source, Mapping) and isinstance(source.get("bytes"), str):  # as exported from a table of images
            continue
        if not isinstance(path, str) or not MEDIA_VALUE.fullmatch(path):
            return False
    return value != []


def _check_keys(
    values: Mapping[str, Any], place: str, known: Collection[str], training: bool, ignored: Counter[str]
) -> None:
    """Counts the unknown keys of a record, turn or part. Raises UserError for those that would change its meaning."""
    for key, value in values.items():
        if key in known or _is_empty(value):
            continue
        for meaning, keys in REFUSED.items():
            is_meant = key in keys or (place == "part" and meaning == "masks of tokens" and key in LOSS_KEYS)
            if is_meant and (training or meaning not in TRAINING_ONLY):
                raise UserError(
                    f"the {place} has {key!r} ({value!r:.60}), which is not supported ({meaning}); expected none"
                )
        _check_media_key(key, place)
        ignored[f"{key!r:.60} of {place}s"] += 1


def _check_media_key(key: str, place: str) -> None:
    for kind, keys in FOREIGN_MEDIA.items():
        if key in keys or (place != "record" and key in MEDIA[kind]):
            expected = f"{kind!r} of a part" if place == "part" else f"{kind + 's'!r} or {kind!r} of the record"
            raise UserError(f"the {place} has {key!r}; expected its {kind}s under {expected}")


def _is_empty(value: Any) -> bool:
    """Returns whether a value says nothing: null, "", [], {}, the same as JSON text, or a list or object of such values."""
    values = [value]
    for each in values:  # grows: a recursion would have a limit
        if isinstance(each, Mapping | list):
            values.extend(each.values() if isinstance(each, Mapping) else each)
        elif each is not None and each not in ("", "[]", "{}"):
            return False
    return True


def _mask_value(values: Mapping[str, Any], key: str) -> bool:
    return is_trained({"role": "assistant", key: values.get(key)})


def _apply_mask(message: Message, turn: Mapping[str, Any]) -> Message:
    """Returns the message of a turn, with `"loss": False` if it is an answer that is not trained."""
    masks = {key: turn.get(key) for key in LOSS_KEYS}
    if is_trained({**masks, "role": message["role"]}) or message["role"] != "assistant":
        return message
    return {**message, "loss": False}


def _record_media(record: Mapping, kind: str, folder: Path) -> list[Any]:
    """Returns the images or videos that a record lists, in order."""
    listed = [record[key] for key in MEDIA[kind] if not _is_empty(record.get(key))]
    if len(listed) > 1:
        raise UserError(f"the record has both {' and '.join(map(repr, MEDIA[kind]))}; expected one of them")
    values = listed[0] if listed else []
    if not isinstance(values, list):
        values = [values]
    return [_resolve_media(kind, value, folder) for value in values]


def _resolve_media(kind: str, value: Any, folder: Path) -> Any:
    """Returns the source of an image, or the list of sources of a video's frames; see `resolve_source`."""
    if kind == "video":
        if not isinstance(value, list) or not value or any(isinstance(frame, list) for frame in value):
            raise UserError(
                f"video is {value!r:.60}; expected a list of its frames, as in 'videos': [['1.png', '2.png']]"
            )
        return [resolve_source(frame, folder) for frame in value]
    return resolve_source(value, folder)


def _message(turn: Any, role_key: str, content_key: str, media: dict[str, list[Any]], folder: Path) -> Message:
    if not isinstance(turn, Mapping) or not {role_key, content_key} <= turn.keys():
        raise UserError(f"turn is {turn!r:.60}; expected {{{role_key!r}: ..., {content_key!r}: ...}}")
    role, content = turn[role_key], turn[content_key]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{role_key!r} is {role!r:.60}; expected one of {sorted(ROLES)}")
    if not isinstance(content, str | list):
        raise UserError(f"{content_key!r} is {content!r:.60}; expected a text or a list of parts")
    if isinstance(content, list):
        content = [parsed for part in content for parsed in _parse_part(part, media, folder)]
    else:
        content = _fill_markers(content, media)
    return {"role": ROLES[role], "content": content}


def _parse_part(part: Any, media: dict[str, list[Any]], folder: Path) -> list[dict[str, Any]]:
    """Returns one part of a message as parts for the Processor, with its own image or video or the record's next one."""
    if not isinstance(part, Mapping):
        raise UserError(f"part is {part!r:.60}; expected {{'type': 'text', 'text': ...}} or a part with an image")
    if _is_text(part):
        parts = _fill_markers(part["text"], media)
        return [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    for kind in KINDS:
        if not kind.matches(part):
            continue
        check_media_part(part)
        value = next((part[key] for key in kind.keys if part.get(key)), None)
        if value is None and not media[kind.name]:
            raise UserError(f"part is {part!r:.60}, and the record lists no more {kind.argument}; expected one for it")
        source = media[kind.name].pop(0) if value is None else _resolve_media(kind.name, value, folder)
        return [{**{name: part[name] for name in PART_SETTINGS if name in part}, "type": kind.name, kind.name: source}]
    raise UserError(f"part is {part!r:.60}; expected one of type 'text', 'image' or 'video'")


def _is_text(part: Mapping[str, Any]) -> bool:
    return isinstance(part.get("text"), str) and part.get("type", "text") == "text"


def _fill_markers(text: str, media: dict[str, list[Any]]) -> str | list[dict[str, Any]]:
    """Returns a text unchanged, or as parts: each of its markers takes the first image or video left in `media`."""
    check_text(text)
    pieces = MARKER.split(text)  # text, kind, text, kind, ..., text
    if left_over := next(filter(None, map(LEFT_OVER.search, pieces[::2])), None):
        raise UserError(
            f"a text has the marker {left_over[0]:.100}, which nothing fills; expected text, <image> or <video>"
        )
    if len(pieces) == 1:
        return text
    parts = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
        elif not media[piece]:
            keys = " or ".join(map(repr, MEDIA[piece]))
            raise UserError(f"the record has more markers <{piece}> than {piece}s; expected as many under {keys}")
        else:
            parts.append({"type": piece, piece: media[piece].pop(0)})
    return parts
