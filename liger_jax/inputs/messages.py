"""Checks chat messages, and extracts their images and videos."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from liger_jax.errors import UserError
from liger_jax.inputs.images import (
    VisionSettings,
    check_frames,
    image_size,
    load_frames,
    load_image,
    patch_grid,
    patchify,
)
from liger_jax.inputs.video import DEFAULT_FPS, VideoTime, check_fps, sample_video

Message = Mapping[str, Any]
Conversation = Sequence[Message]


class Kind(NamedTuple):
    """A kind of vision input: its names in messages, arguments and arrays, and the functions that read it."""

    name: str
    argument: str  # of Processor.__call__
    type_id: int  # in mm_token_type_ids
    keys: tuple[str, ...]  # of a message part, any of which may hold the source
    load: Callable[[Any], list[Image.Image]]
    size: Callable[[Any], tuple[tuple[int, int], int]]  # (width, height) and number of frames, without decoding
    arrays: tuple[str, str]  # names of the pixels and of the grids

    @property
    def token(self) -> str:
        return f"<|{self.name}_pad|>"

    def matches(self, part: Mapping[str, Any]) -> bool:
        """Returns whether a message part is of this kind."""
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

# Keys of an assistant's message that say whether it is trained.
LOSS_KEYS = ("loss", "weight", "train", "training", "trainable", "loss_scale")
# Settings of a message part, as in qwen-vl-utils; sample_fps is the rate of a video's frames.
PART_SETTINGS = ("min_pixels", "max_pixels", "sample_fps")
# Settings of a message part that qwen-vl-utils supports and this package does not.
UNSUPPORTED_SETTINGS = (
    *("resized_height", "resized_width", "total_pixels", "video_start", "video_end"),
    *("fps", "nframes", "min_frames", "max_frames"),
)


class ProcessedMedia(NamedTuple):
    """An image or a video as the model sees it."""

    kind: Kind
    grid: tuple[int, int, int]  # (t, h, w) in patches
    pixel_values: np.ndarray  # float32 [t * h * w, patch_values]
    time: VideoTime | None = None  # of a video


class MediaItem(NamedTuple):
    """An image or a video that has not been opened yet."""

    kind: Kind
    source: Any
    settings: VisionSettings
    time: VideoTime | None = None  # of a video

    def process(self) -> ProcessedMedia:
        """Opens the image or the frames and cuts them into patches, see `patchify`."""
        pixel_values, grid = patchify(self.kind.load(self.source), self.settings)
        return ProcessedMedia(self.kind, grid, pixel_values, self.time)

    def grid(self) -> tuple[int, int, int]:
        """Returns the grid without decoding pixels. If EXIF rotates the image, its h and w may be swapped."""
        return patch_grid(*self.kind.size(self.source), self.settings)


def as_conversations(messages: Any) -> list[Conversation]:
    """Returns one conversation or several as a list of conversations, after checking the form of every message.

    Raises:
        UserError: `messages` is empty, is not a list of messages or of such lists, or has a message without role or content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"messages is {messages!r:.100}; expected a list of messages, or a list of such lists")
    conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
    for conversation in conversations:
        if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
            raise UserError(f"conversation is {conversation!r:.100}; expected a non-empty list of messages")
        for message in conversation:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise UserError(f'message is {message!r:.100}; expected {{"role": ..., "content": ...}}')
            if not isinstance(message["role"], str):
                raise UserError(f"role is {message['role']!r:.60}; expected a text such as 'user'")
    return conversations


class MediaReader:
    """Extracts the media of conversations. A part without a source takes the next of `images` or `videos`.

    Args:
        images, videos: the sources.
        settings: by kind.
        fps: the rate of the frames of all videos, or of each video in order.
        target_fps: the rate at which videos are sampled; None keeps all frames.
    """

    def __init__(
        self,
        images: Any,
        videos: Any,
        settings: Mapping[str, VisionSettings],
        fps: float | Sequence[float] = DEFAULT_FPS,
        target_fps: float | None = None,
    ):
        self.settings = settings
        self.arguments = {"image": as_list(images), "video": as_list(videos)}
        self.used = dict.fromkeys(self.arguments, 0)
        self.fps: float | list[float]
        if isinstance(fps, list | tuple | np.ndarray):
            self.fps = [check_fps("fps", rate) for rate in fps]
        else:
            self.fps = check_fps("fps", fps)
        self.videos = 0  # number of videos that have been read
        self.target_fps = None if target_fps is None else check_fps("target_fps", target_fps)

    def read(self, conversation: Conversation) -> tuple[list[Message], list[MediaItem]]:
        """Returns the conversation without its media, as a chat template expects it, and the media in order."""
        items: list[MediaItem] = []
        return [self._message(message, items) for message in conversation], items

    def check_all_used(self) -> None:
        """Raises UserError if there are more images or videos than placeholders for them."""
        for kind in KINDS:
            count, used = len(self.arguments[kind.name]), self.used[kind.name]
            if used < count:
                raise UserError(
                    f"{kind.argument} has length {count}; expected {used}, one for each placeholder in the messages"
                )
        if isinstance(self.fps, list) and len(self.fps) != self.videos:
            raise UserError(f"fps has length {len(self.fps)}; expected {self.videos}, one rate for each video")

    def _message(self, message: Message, items: list[MediaItem]) -> Message:
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": self._text(content, items)}
        if not isinstance(content, Sequence):
            raise UserError(f"content is {content!r:.100}; expected a string or a list of parts")
        return {**message, "content": [self._part(part, items) for part in content]}

    def _text(self, text: str, items: list[MediaItem]) -> str:
        """Returns the text unchanged, after assigning an image or video to each placeholder token in it."""
        check_text(text)
        kinds = {kind.token: kind for kind in KINDS}
        for token in re.findall("|".join(map(re.escape, kinds)), text):
            kind = kinds[token]
            items.append(self._item(kind, self._next(kind), self.settings[kind.name]))
        return text

    def _part(self, part: Any, items: list[MediaItem]) -> dict[str, Any]:
        if not isinstance(part, Mapping):
            raise UserError(
                f'part of a message is {part!r:.100}; expected {{"type": "text", "text": ...}} or a media part'
            )
        if isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            return {"type": "text", "text": self._text(part["text"], items)}
        for kind in KINDS:
            if kind.matches(part):
                items.append(self._part_item(kind, part))
                return {"type": kind.name}
        raise UserError(
            f'part of a message is {part!r:.100}; expected the type "text", "image" or "video", and its value'
        )

    def _part_item(self, kind: Kind, part: Mapping[str, Any]) -> MediaItem:
        check_media_part(part)
        values = [part[key] for key in kind.keys if part.get(key) is not None]
        source = values[0] if values else self._next(kind)
        if isinstance(source, Mapping) and "url" in source:  # OpenAI's {"image_url": {"url": ...}}
            source = source["url"]
        settings = self.settings[kind.name].with_limits(part.get("min_pixels"), part.get("max_pixels"))
        return self._item(kind, source, settings, part.get("sample_fps"))

    def _item(self, kind: Kind, source: Any, settings: VisionSettings, part_fps: Any = None) -> MediaItem:
        if kind.name != "video":
            return MediaItem(kind, source, settings)
        fps = self._next_fps() if part_fps is None else check_fps("sample_fps", part_fps)
        self.videos += 1
        frames, time = sample_video(check_frames(source), settings, fps, self.target_fps)
        return MediaItem(kind, frames, settings, time)

    def _next_fps(self) -> float:
        if not isinstance(self.fps, list):
            return self.fps
        return self.fps[self.videos] if self.videos < len(self.fps) else DEFAULT_FPS  # check_all_used reports it

    def _next(self, kind: Kind) -> Any:
        entries, used = self.arguments[kind.name], self.used[kind.name]
        if used == len(entries):
            raise UserError(
                f"{kind.argument} has length {len(entries)}; expected at least {used + 1}, one for each placeholder "
                f"without its own {kind.name}"
            )
        self.used[kind.name] += 1
        return entries[used]


def is_trained(message: Message) -> bool:
    """Returns whether a message is trained: one of the assistant's, unless one of its LOSS_KEYS is false or 0.

    Raises:
        UserError: a value other than true, 1, false, 0 and null, two keys that disagree, or a true value in a message that
            the assistant did not send.

    Example:
        >>> is_trained({"role": "assistant", "content": "7", "weight": 0})
        False
    """
    values = {key: message[key] for key in LOSS_KEYS if message.get(key) is not None}
    for key, value in values.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{key!r} is {value!r:.60}; expected true or 1 to train a turn, false or 0 not to train it")
    if len(set(map(bool, values.values()))) > 1:
        raise UserError(f"a turn has {values}; expected all of them to be true, or all of them to be false")
    if message["role"] != "assistant" and any(values.values()):
        raise UserError(f"a turn of the {message['role']} has {values}; expected false, since only answers are trained")
    return message["role"] == "assistant" and all(values.values())


def check_text(text: str) -> None:
    """Raises UserError for half of a surrogate pair, which JSON can hold but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text is {text[:60]!r}, in which {text[error.start]!r} is half of a surrogate pair; expected valid Unicode"
        ) from error


def check_media_part(part: Mapping[str, Any]) -> None:
    """Raises UserError if a media part also has a text, or settings that would change it but are not implemented."""
    if part.get("text"):
        raise UserError(f"part is {part!r:.100}, with both media and a text; expected a part for each")
    if unsupported := [name for name in UNSUPPORTED_SETTINGS if part.get(name) is not None]:
        raise UserError(
            f"part sets {', '.join(unsupported)}, which is not supported; expected one of {', '.join(PART_SETTINGS)}"
        )


def as_list(values: Any) -> list[Any]:
    """Returns `images=` or `videos=` as a list; a single value counts as a list of one."""
    if values is None:
        return []
    return list(values) if isinstance(values, list | tuple) else [values]
