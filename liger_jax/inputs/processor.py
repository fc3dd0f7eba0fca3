"""Turns conversations with images and videos into numpy arrays in Hugging Face's layout, and tokens into text."""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from liger_jax.errors import NotFoundError, UserError
from liger_jax.files import CONFIG, local_folder, make_folder, read_json_object, write_json
from liger_jax.inputs.batch import IGNORE
from liger_jax.inputs.images import VisionSettings
from liger_jax.inputs.messages import (
    KINDS,
    Conversation,
    MediaReader,
    Message,
    as_conversations,
    check_text,
    is_trained,
)

# transformers' size limits for video frames, used if the checkpoint has none
VIDEO_DEFAULTS: dict[str, Any] = {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28}
# Tokenizers that are loaded by class name. AutoTokenizer imports all models, and PyTorch if installed: that takes seconds.
TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
TOKENIZER_FILES = ["tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
PROCESSOR_FILES = ["*processor_config.json", "chat_template.*", CONFIG]
# Private-use characters that mark the start and end of an answer in a rendered template.
BEGIN, END = "\ue0f0\ue0f1", "\ue0f2\ue0f3"


class Processor:
    """Turns conversations into model inputs, and generated tokens into text.

    Needs a transformers tokenizer with Qwen2-VL's special tokens. A tokenizer without a chat template gets Qwen2-VL's.

    Attributes:
        tokenizer: the transformers tokenizer.
        image, video: `VisionSettings` of images and of the frames of videos.
        token_ids: ids of the placeholders, {"image": ..., "video": ...}.

    Example:
        >>> from liger_jax import Processor
        >>> processor = Processor.from_pretrained("Qwen/Qwen2-VL-2B-Instruct")  # doctest: +SKIP
        >>> content = [{"type": "image", "image": "dog.jpg"}, {"type": "text", "text": "What is this?"}]
        >>> inputs = processor([{"role": "user", "content": content}], add_generation_prompt=True)  # doctest: +SKIP
        >>> sorted(inputs)  # doctest: +SKIP
        ['attention_mask', 'image_grid_thw', 'input_ids', 'mm_token_type_ids', 'pixel_values']
    """

    def __init__(
        self,
        tokenizer: Any,
        image: VisionSettings | None = None,
        video: VisionSettings | None = None,
    ):
        self.tokenizer = tokenizer
        self._origin = ""  # start of messages about the chat template
        self.image = image or VisionSettings()
        self.video = video or VisionSettings(**VIDEO_DEFAULTS)
        vocabulary = tokenizer.get_vocab()
        missing = [kind.token for kind in KINDS if kind.token not in vocabulary]
        if missing or tokenizer.pad_token_id is None:
            missing += ["padding token"] * (tokenizer.pad_token_id is None)
            raise UserError(f"tokenizer has no {' and no '.join(missing)}; expected Qwen2-VL's tokenizer")
        self.token_ids = {kind.name: vocabulary[kind.token] for kind in KINDS}
        if tokenizer.chat_template is None:
            tokenizer.chat_template = default_chat_template()

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, revision: str | None = None) -> Self:
        """Loads the tokenizer, chat template and image settings from a folder or from the Hugging Face hub.

        Supports every layout on the hub: `preprocessor_config.json` (with or without `video_preprocessor_config.json`),
        both nested in `processor_config.json` (transformers 5). The chat template is the one that transformers 5.24 uses:
        that of `processor_config.json`, `chat_template.json`, `chat_template.jinja`, or else of `tokenizer_config.json`.
        A checkpoint without a template gets Qwen2-VL's.

        Args:
            path_or_repo_id: a folder, or a hub id such as "Qwen/Qwen2-VL-2B-Instruct".
            revision: branch, tag or commit; hub ids only.

        Raises:
            NotFoundError: there is no such folder, and no such repository on the hub (or, offline, in the cache), or it has
                no image settings.
            UserError: a file is damaged, the tokenizer lacks Qwen2-VL's placeholders, or the settings ask for preprocessing
                that is not implemented.
        """
        import transformers

        folder = local_folder(path_or_repo_id, TOKENIZER_FILES + PROCESSOR_FILES, revision=revision)
        nested = _read_optional(folder / "processor_config.json")
        image = nested.get("image_processor") or _read_optional(folder / "preprocessor_config.json")
        video = nested.get("video_processor") or _read_optional(folder / "video_preprocessor_config.json") or image
        if not image:
            is_adapter = (folder / "adapter_config.json").is_file()
            raise NotFoundError(
                f"{folder} is a PEFT adapter; expected its base model, to which convert.load_adapter adds the adapter"
                if is_adapter
                else f"{folder} has no image settings; expected preprocessor_config.json, or processor_config.json with "
                '"image_processor"'
            )
        name = _read_optional(folder / "tokenizer_config.json").get("tokenizer_class")
        tokenizer_class = getattr(transformers, name if name in TOKENIZERS else "AutoTokenizer")
        try:
            tokenizer = tokenizer_class.from_pretrained(folder)
            tokenizer("Hello")  # fails for settings of the wrong type
        except Exception as error:  # tokenizers raises bare Exceptions for damaged files, transformers many other kinds
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{folder}: the tokenizer cannot be loaded ({reason:.300}); expected Qwen2-VL's tokenizer files"
            ) from error
        template = nested.get("chat_template") or _read_optional(folder / "chat_template.json").get("chat_template")
        if template is not None:  # the tokenizer itself prefers chat_template.jinja to tokenizer_config.json
            tokenizer.chat_template = _default_template(template, folder)
        try:
            settings = VisionSettings.from_hf(image), VisionSettings.from_hf(video, **VIDEO_DEFAULTS)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        processor = cls(tokenizer, *settings)
        processor._origin = f"{folder}: "
        return processor

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a folder that `from_pretrained` loads, here and in transformers."""
        directory = make_folder(Path(directory))
        self.tokenizer.save_pretrained(directory)
        # an older file would take precedence over the template just written
        (directory / "chat_template.json").unlink(missing_ok=True)
        names = {"processor_class": "Qwen2VLProcessor"}
        image = names | {"image_processor_type": "Qwen2VLImageProcessor"} | self.image.to_hf()
        video = names | {"video_processor_type": "Qwen2VLVideoProcessor"} | self.video.to_hf()
        # transformers 5 prefers settings nested in processor_config.json: an older file with such settings must be replaced.
        files = {"preprocessor_config": image, "video_preprocessor_config": video, "processor_config": names}
        for name, values in files.items():
            write_json(directory / f"{name}.json", values)

    def __call__(
        self,
        messages: Conversation | Sequence[Conversation],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        add_vision_id: bool = False,
        labels: bool = False,
        padding: Literal["left", "right"] = "left",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> dict[str, Any]:
        """Returns one conversation, or a batch of them, as arrays in Hugging Face's layout.

        A message is `{"role": ..., "content": ...}`. Its content is a string or a list of parts, each of the form
        `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` or `{"type": "video", "video": ...}`.
        An image is a PIL image, an array [H, W, 3] (see `load_image`), a path, a `file://` or base64 `data:` URL, or
        encoded bytes.
        A video is its frames: an array [frames, H, W, 3] or a list of images. A part without a source, such as
        `{"type": "image"}`, takes the next of `images` (or `videos`), and so does a placeholder `<|image_pad|>` in the
        text. A part may set its own `min_pixels` and `max_pixels`.

        Args:
            messages: a conversation (list of messages) or a list of conversations.
            images, videos: sources for the parts without one, in order over the whole batch.
            add_generation_prompt: append the opening of an assistant turn, to generate an answer.
            add_vision_id: write "Picture 1: ", "Video 1: " before images and videos.
            labels: also return `labels`: the assistant's answers with their end token, and -100 elsewhere. An answer with
                `"loss": False` (or weight, train, trainable or loss_scale 0) is not trained.
            padding: side on which shorter rows of a batch are padded. transformers needs "left" for generation.
            min_pixels, max_pixels: size limits for each image and frame, in place of the checkpoint's. A limit that is not
                passed is adjusted if it conflicts with the other.

        Returns:
            input_ids, attention_mask, mm_token_type_ids (0 text, 1 image, 2 video), labels: int64 [B, T];
            pixel_values, pixel_values_videos: float32 [sum of t * h * w, 1176]; image_grid_thw, video_grid_thw: int64
            [items, 3]. Arrays of media that do not occur are left out.

        Raises:
            NotFoundError: an image file does not exist.
            UserError: the numbers of placeholders and images or videos differ; an image cannot be decoded, has no pixels, or
                has an aspect ratio over 200; the limits conflict; a message is malformed; or, with `labels`, there is no
                answer.
        """
        if padding not in ("left", "right"):
            raise UserError(f"padding is {padding!r}; expected 'left' or 'right'")
        conversations = as_conversations(messages)
        settings = {kind.name: getattr(self, kind.name).with_limits(min_pixels, max_pixels) for kind in KINDS}
        reader = MediaReader(images, videos, settings)
        cleaned, items = zip(*(reader.read(conversation) for conversation in conversations), strict=True)
        reader.check_all_used()

        options = {"add_generation_prompt": add_generation_prompt, "add_vision_id": add_vision_id}
        rows = self._tokenize(cleaned, labels, options)
        self._check_placeholders(rows, items)
        arrays: dict[str, np.ndarray] = {}
        counts: dict[str, Iterator[int]] = {}
        for kind in KINDS:
            patches = [item.patches() for row in items for item in row[kind.name]]
            if patches:
                pixel_values, grids = zip(*patches, strict=True)
                pixels_name, grids_name = kind.arrays
                arrays |= {pixels_name: np.concatenate(pixel_values), grids_name: np.array(grids, np.int64)}
            merge_unit = settings[kind.name].merge_size ** 2
            counts[kind.name] = iter([t * h * w // merge_unit for _, (t, h, w) in patches])
        return self._pad([self._expand(row, counts) for row in rows], padding) | arrays

    def prompt_ids(self, conversation: Conversation, grids: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Returns the tokens [T] of a prompt whose images have already been processed, with the opening of the answer.

        Args:
            conversation: messages with `{"type": "image"}` or `{"type": "video"}` in place of the media.
            grids: (t, h, w) of all images and videos in order, {"image": ..., "video": ...}.
        """
        row, *_ = self._tokenize([conversation], False, {"add_generation_prompt": True})
        self._check_placeholders([row], [grids])
        units = {kind.name: getattr(self, kind.name).merge_size ** 2 for kind in KINDS}
        counts = {name: iter([int(np.prod(grid)) // units[name] for grid in grids[name]]) for name in units}
        return self._expand(row, counts)["input_ids"]

    def measure(self, conversation: Conversation) -> tuple[int, int, int]:
        """Returns the numbers of tokens, patches and frames of a conversation, without processing it.

        Reads only the headers of image files, for their sizes.

        Raises:
            NotFoundError, UserError: as `__call__`, except for damaged pixels.
        """
        settings = {kind.name: getattr(self, kind.name) for kind in KINDS}
        cleaned, items = MediaReader(None, None, settings).read(as_conversations(conversation)[0])
        rows = self._tokenize([cleaned], False, {})
        self._check_placeholders(rows, [items])
        media = [item for kind in KINDS for item in items[kind.name]]
        grids = [item.grid() for item in media]
        added = sum(math.prod(grid) // item.settings.merge_size**2 - 1 for grid, item in zip(grids, media, strict=True))
        return len(rows[0]["input_ids"]) + added, sum(map(math.prod, grids)), sum(t for t, _, _ in grids)

    def decode(self, tokens: Any, *, skip_special_tokens: bool = True) -> str | list[str]:
        """Returns the text of tokens [T], or a list of texts for tokens [B, T]. Drops negative tokens (ignored labels).

        Example:
            >>> processor.decode(generate(model, batch, max_new_tokens=8))  # doctest: +SKIP
            ['A dog.', 'Two cats.']
        """
        tokens = np.asarray(tokens)
        if tokens.ndim not in (1, 2) or not (np.issubdtype(tokens.dtype, np.integer) or not tokens.size):
            raise UserError(
                f"tokens has dtype {tokens.dtype} and shape {list(tokens.shape)}; expected integers [T] or [B, T]"
            )
        rows = tokens if tokens.ndim == 2 else [tokens]
        texts = [self.tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=skip_special_tokens) for row in rows]
        return texts if tokens.ndim == 2 else texts[0]

    def _render(self, conversation: Conversation, options: dict[str, bool]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        except Exception as error:  # of the template: jinja2's, or TypeError, ... if it does not support such messages
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{self._origin}the chat template refuses the conversation ({reason:.300}); expected one that it supports, "
                "or another template"
            ) from error
        check_text(text)
        return text

    def _tokenize(
        self, conversations: Sequence[Conversation], labels: bool, options: dict[str, bool]
    ) -> list[dict[str, np.ndarray]]:
        """Returns the input_ids (and labels) of each conversation, with a single placeholder for each image or video."""
        texts = [self._render(conversation, options) for conversation in conversations]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=labels)
        rows = [{"input_ids": np.array(ids, np.int64)} for ids in encoded["input_ids"]]
        if labels:
            offset_mapping = encoded["offset_mapping"]
            for row, offsets, conversation, text in zip(rows, offset_mapping, conversations, texts, strict=True):
                spans = self._answer_spans(conversation, text, options)
                row["labels"] = self._labels(row["input_ids"], np.array(offsets, np.int64).reshape(-1, 2), spans)
        return rows

    def _labels(self, input_ids: np.ndarray, offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
        """Returns the tokens in these spans of the text and the special token after each span; -100 elsewhere."""
        starts, ends = offsets.T
        special = np.isin(input_ids, self.tokenizer.all_special_ids)
        trained = np.zeros(len(input_ids), bool)
        for begin, end in spans:
            trained |= (starts >= begin) & (ends <= end) | special & (starts == end)
        trained &= ~np.isin(input_ids, list(self.token_ids.values()))
        return np.where(trained, input_ids, IGNORE)

    def _answer_spans(self, conversation: Conversation, text: str, options: dict[str, bool]) -> list[tuple[int, int]]:
        """Returns the (begin, end) of each of the assistant's answers in the rendered text.

        Renders the conversation again, with marks around the answers. This works with any template, even if a user's text
        contains the template's own control tokens.
        """
        if any(mark in text for mark in (BEGIN, END)):
            raise UserError(f"text contains {BEGIN!r} or {END!r}; expected neither, since they mark answers internally")
        if not any(message["role"] == "assistant" for message in conversation):
            raise UserError("conversation has no assistant message; expected one, since labels=True")
        trained = [is_trained(message) for message in conversation]
        if not any(trained):
            raise UserError("no assistant message is trained; expected one without loss false or weight 0")
        marked = self._render(
            [_mark(message) if train else message for message, train in zip(conversation, trained, strict=True)],
            options,
        )
        if marked.replace(BEGIN, "").replace(END, "") != text:
            raise UserError(
                "the chat template changes the assistant's messages; expected one that copies them, since labels=True"
            )
        spans, removed = [], 0
        for match in re.finditer(f"{BEGIN}(.*?){END}", marked, re.DOTALL):
            begin = match.start() - removed
            spans.append((begin, begin + len(match[1])))
            removed += len(BEGIN) + len(END)
        return spans

    def _check_placeholders(
        self, rows: list[dict[str, np.ndarray]], items: Sequence[Mapping[str, Sequence[Any]]]
    ) -> None:
        """Raises UserError unless there is one placeholder per image or video, as Qwen2-VL's own template ensures."""
        for index, (row, media) in enumerate(zip(rows, items, strict=True)):
            for kind in KINDS:
                placeholders = int(np.sum(row["input_ids"] == self.token_ids[kind.name]))
                if placeholders != len(media[kind.name]):
                    raise UserError(
                        f"conversation {index}: the chat template wrote {placeholders} placeholders {kind.token}; expected "
                        f"{len(media[kind.name])}, one for each of its {kind.argument}"
                    )

    def _expand(self, row: dict[str, np.ndarray], counts: dict[str, Iterator[int]]) -> dict[str, np.ndarray]:
        """Returns the row with each placeholder repeated for every token of its image or video, and mm_token_type_ids."""
        repeats = np.ones(len(row["input_ids"]), np.int64)
        types = np.zeros(len(row["input_ids"]), np.int64)
        for kind in KINDS:
            placeholders = np.flatnonzero(row["input_ids"] == self.token_ids[kind.name])
            repeats[placeholders] = [next(counts[kind.name]) for _ in placeholders]
            types[placeholders] = kind.type_id
        return {name: np.repeat(values, repeats) for name, values in (row | {"mm_token_type_ids": types}).items()}

    def _pad(self, rows: list[dict[str, np.ndarray]], padding: str) -> dict[str, np.ndarray]:
        """Returns the rows with their attention_mask, padded and stacked: each array is [B, T]."""
        fill = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "mm_token_type_ids": 0,
            "labels": IGNORE,
        }
        length = max(len(row["input_ids"]) for row in rows)
        rows = [row | {"attention_mask": np.ones(len(row["input_ids"]), np.int64)} for row in rows]
        padded = {name: np.full((len(rows), length), fill[name], np.int64) for name in fill if name in rows[0]}
        for name, array in padded.items():
            for index, row in enumerate(rows):
                positions = slice(length - len(row[name]), None) if padding == "left" else slice(len(row[name]))
                array[index, positions] = row[name]
        return padded


@functools.cache
def default_chat_template() -> str:
    """Returns Qwen2-VL's chat template, which renders the same text as the published one."""
    return resources.files("liger_jax").joinpath("assets/chat_template.jinja").read_text(encoding="utf-8").strip()


def _read_optional(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty dict if the file does not exist."""
    return read_json_object(path) if path.is_file() else {}


def _default_template(template: Any, folder: Path) -> str:
    """Returns a chat template, or the one named "default" among several."""
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str):
        raise UserError(
            f"{folder}: chat_template is {template!r:.60}; expected a text, or texts with one named default"
        )
    return template


def _mark(message: Message) -> Message:
    """Returns the message with marks around its content."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": BEGIN + content + END}
    begin, end = ({"type": "text", "text": mark} for mark in (BEGIN, END))
    return {**message, "content": [begin, *content, end]}
