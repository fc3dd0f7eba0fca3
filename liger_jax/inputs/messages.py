"""Messages in the chat format: checked, and their pictures and videos taken out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from liger_jax.inputs.images import VisionSettings, check_frames, grid_of, image_size, load_frames, load_image, patchify

Message = Mapping[str, Any]
Conversation = Sequence[Message]


class Kind(NamedTuple):
    """A kind of vision input: how it is named in messages, arguments and arrays, and how it is read."""

    name: str
    argument: str
    type_id: int  # in mm_token_type_ids
    keys: tuple[str, ...]  # of a part, that hold its value
    load: Callable[[Any], list[Image.Image]]
    size: Callable[[Any], tuple[tuple[int, int], int]]  # (width, height) and number of frames, without decoding any
    arrays: tuple[str, str]

    @property
    def token(self) -> str:
        return f"<|{self.name}_pad|>"

    def takes(self, part: Mapping[str, Any]) -> bool:
        """Whether a part of a message is of this kind."""
        return part.get("type") in (self.name, f"{self.name}_url") or ("type" not in part and self.keys[0] in part)


KINDS = (
    Kind(
        name="image",
        argument="images",
        type_id=1,
        keys=("image", "image_url", "url", "path"),
        load=lambda source: [load_image(source)],
        size=lambda source: (image_size(source), 1),
        arrays=("pixel_values", "image_grid_thw"),
    ),
    Kind(
        name="video",
        argument="videos",
        type_id=2,
        keys=("video", "video_url", "url", "path"),
        load=load_frames,
        size=lambda source: (image_size(check_frames(source)[0]), len(source)),
        arrays=("pixel_values_videos", "video_grid_thw"),
    ),
)


NOT_DONE = ("resized_height", "resized_width", "total_pixels", "video_start", "video_end")  # as qwen-vl-utils has them


class Item(NamedTuple):
    """A picture or a video, not opened yet."""

    kind: Kind
    source: Any
    settings: VisionSettings

    def patches(self) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Its patches and their grid, see `patchify`."""
        return patchify(self.kind.load(self.source), self.settings)

    def grid(self) -> tuple[int, int, int]:
        """The grid alone, for which nothing is decoded; height and width change places if the picture is to be turned."""
        return grid_of(*self.kind.size(self.source), self.settings)


def as_batch(messages: Any) -> list[Conversation]:
    """One conversation or several as a list of conversations; every message checked.

    Raises:
        ValueError: not a list of messages or of such lists, something empty, or a message without role or content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list of messages, or a list of such lists, got {messages!r:.100}")
    conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
    for conversation in conversations:
        if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
            raise ValueError(f"A conversation must be a non-empty list of messages, got {conversation!r:.100}")
        for message in conversation:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise ValueError(f'A message must be {{"role": ..., "content": ...}}, got {message!r:.100}')
    return conversations


class MediaReader:
    """Reads conversations one after the other, handing out `images` and `videos` in order to parts without a value."""

    def __init__(self, images: Any, videos: Any, settings: Mapping[str, VisionSettings]):
        self.settings = settings
        self.given = {"image": as_list(images), "video": as_list(videos)}
        self.used = dict.fromkeys(self.given, 0)

    def read(self, conversation: Conversation) -> tuple[list[Message], dict[str, list[Item]]]:
        """The conversation as a chat template wants it, without the pictures, and the pictures by kind, in order."""
        items: dict[str, list[Item]] = {kind.name: [] for kind in KINDS}
        return [self._message(message, items) for message in conversation], items

    def check_all_used(self) -> None:
        for kind in KINDS:
            given, used = len(self.given[kind.name]), self.used[kind.name]
            if used < given:
                raise ValueError(
                    f"{given} {kind.argument} were given, but the messages have {used} placeholders for them"
                )

    def _message(self, message: Message, items: dict[str, list[Item]]) -> Message:
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": self._text(content, items)}
        if not isinstance(content, Sequence):
            raise ValueError(f"A message's content must be a string or a list of parts, got {content!r:.100}")
        return {**message, "content": [self._part(part, items) for part in content]}

    def _text(self, text: str, items: dict[str, list[Item]]) -> str:
        """Placeholders written out in a text stand for given pictures, too."""
        check_text(text)
        for kind in KINDS:
            for _ in range(text.count(kind.token)):
                items[kind.name].append(Item(kind, self._next(kind), self.settings[kind.name]))
        return text

    def _part(self, part: Any, items: dict[str, list[Item]]) -> dict[str, Any]:
        if not isinstance(part, Mapping):
            raise ValueError(f'A part of a message must be like {{"type": "text", "text": ...}}, got {part!r:.100}')
        if isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            return {"type": "text", "text": self._text(part["text"], items)}
        for kind in KINDS:
            if kind.takes(part):
                items[kind.name].append(self._item(kind, part))
                return {"type": kind.name}
        raise ValueError(
            f'A part of a message must be of type "text", "image" or "video" and hold it, got {part!r:.100}'
        )

    def _item(self, kind: Kind, part: Mapping[str, Any]) -> Item:
        check_settings(part)
        values = [part[key] for key in kind.keys if part.get(key) is not None]
        source = values[0] if values else self._next(kind)
        if isinstance(source, Mapping) and "url" in source:  # OpenAI's {"image_url": {"url": ...}}
            source = source["url"]
        settings = self.settings[kind.name].with_limits(part.get("min_pixels"), part.get("max_pixels"))
        return Item(kind, source, settings)

    def _next(self, kind: Kind) -> Any:
        given, used = self.given[kind.name], self.used[kind.name]
        if used == len(given):
            raise ValueError(
                f"The messages have more placeholders for {kind.argument} than {kind.argument}= holds ({len(given)}); "
                f"number {used + 1} has neither a value of its own nor one there"
            )
        self.used[kind.name] += 1
        return given[used]


def check_text(text: str) -> None:
    """Raises ValueError for half of a character, as JSON may hold one, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The text {text[:60]!r} holds {text[error.start]!r}, half of a surrogate pair") from None


def check_settings(part: Mapping[str, Any]) -> None:
    """Raises ValueError for what would change a picture and is not done here."""
    if asked := [name for name in NOT_DONE if part.get(name) is not None]:
        raise ValueError(
            f"A picture's part asks for {', '.join(asked)}, which is not supported; expected min_pixels and max_pixels"
        )


def as_list(values: Any) -> list[Any]:
    """`images=` or `videos=` as a list; one that is not in a list counts as one."""
    if values is None:
        return []
    return list(values) if isinstance(values, list | tuple) else [values]
