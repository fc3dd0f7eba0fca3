"""Turns conversations with images and videos into numpy arrays in Hugging Face's layout, and tokens into text."""

import copy
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from liger_jax.errors import NotFoundError, UserError
from liger_jax.files import CONFIG, local_folder, make_folder, read_json_object, write_json
from liger_jax.inputs.batch import IGNORE
from liger_jax.inputs.families import FAMILIES, ProcessorFamily
from liger_jax.inputs.images import VisionSettings
from liger_jax.inputs.messages import (
    KINDS,
    Conversation,
    MediaItem,
    MediaReader,
    Message,
    ProcessedMedia,
    as_conversations,
    check_text,
    is_trained,
)
from liger_jax.inputs.video import DEFAULT_FPS, VideoTime

VISION_START, VISION_END, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
# The part of a prompt that the timestamped frames of a video replace, by the version of transformers.
VIDEO_PROMPTS = {
    "4.57": re.compile(f"({re.escape(VISION_START + VIDEO_PAD + VISION_END)}|{re.escape(VIDEO_PAD)})"),
    "hf5": re.compile(re.escape(VIDEO_PAD)),
}
TIMED_FRAME = f"<{{:.1f}} seconds>{VISION_START}{VIDEO_PAD}{VISION_END}"
# A video in a prompt with timestamps, in both forms.
TIMED_VIDEO = re.compile(
    "({0})?(<[0-9.]+ seconds>{0}{1}{2})+({2})?".format(*map(re.escape, (VISION_START, VIDEO_PAD, VISION_END)))
)
# Tokenizers that are loaded by class name. AutoTokenizer imports all models, and PyTorch if installed: that takes seconds.
TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
TOKENIZER_FILES = ["tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
PROCESSOR_FILES = ["*processor_config.json", "chat_template.*", CONFIG]
# Private-use characters that mark the start and end of an answer in a rendered template.
BEGIN, END = "\ue0f0\ue0f1", "\ue0f2\ue0f3"


class Processor:
    """Turns conversations into model inputs, and generated tokens into text.

    Needs a transformers tokenizer with Qwen-VL's special tokens. Without a chat template, it gets that of the family.

    Args:
        tokenizer: the transformers tokenizer.
        image: settings of images; None: those of the family.
        video: settings of videos; None: those of the family.
        family: "qwen2_vl", "qwen2_5_vl" or "qwen3_vl".

    Attributes:
        tokenizer: the argument, or a copy of it with the family's chat template if it had none.
        image: settings of images.
        video: settings of videos.
        family: the argument.
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
        *,
        family: str = "qwen2_vl",
    ):
        if not isinstance(family, str) or family not in FAMILIES:
            raise UserError(f"family is {family!r:.60}; expected one of {list(FAMILIES)}")
        self.family = family
        self._origin = ""  # start of messages about the chat template
        self.image = image or self._member.image
        self.video = video or self._member.video
        vocabulary = tokenizer.get_vocab()
        tokens = [kind.token for kind in KINDS]
        tokens += [VISION_START, VISION_END] if self._member.video_time == "text" else []
        missing = [token for token in tokens if token not in vocabulary]
        if missing or tokenizer.pad_token_id is None:
            missing += ["padding token"] * (tokenizer.pad_token_id is None)
            raise UserError(f"tokenizer has no {' and no '.join(missing)}; expected Qwen-VL's tokenizer")
        self.token_ids = {kind.name: vocabulary[kind.token] for kind in KINDS}
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            self.tokenizer = copy.copy(tokenizer)  # the caller's may serve other members of the family
            self.tokenizer.chat_template = self._member.default_chat_template

    @property
    def _member(self) -> ProcessorFamily:
        return FAMILIES[self.family]

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, revision: str | None = None) -> Self:
        """Loads the tokenizer, chat template and image settings from a folder or from the Hugging Face hub.

        Supports every layout on the hub: `preprocessor_config.json` (with or without `video_preprocessor_config.json`),
        both nested in `processor_config.json` (transformers 5). The chat template is the one that transformers 5.24 uses:
        that of `processor_config.json`, `chat_template.json`, `chat_template.jinja`, or else of `tokenizer_config.json`.
        A checkpoint without a template gets that of its family, which follows from `processor_class` in these files and from
        `model_type` in `config.json`.

        Args:
            path_or_repo_id: a folder, or a hub id such as "Qwen/Qwen2-VL-2B-Instruct".
            revision: branch, tag or commit; hub ids only.

        Raises:
            NotFoundError: there is no such folder, and no such repository on the hub (or, offline, in the cache), or it has
                no image settings.
            UserError: a file is damaged, the tokenizer lacks Qwen-VL's placeholders, or the settings ask for preprocessing
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
                f"{folder}: the tokenizer cannot be loaded ({reason:.300}); expected Qwen-VL's tokenizer files"
            ) from error
        template = nested.get("chat_template") or _read_optional(folder / "chat_template.json").get("chat_template")
        if template is not None:  # the tokenizer itself prefers chat_template.jinja to tokenizer_config.json
            tokenizer.chat_template = _default_template(template, folder)
        family = _read_family(folder, nested, image, video)
        defaults = FAMILIES[family].image, FAMILIES[family].video
        try:
            settings = [
                type(default).from_hf(values, **vars(default))
                for values, default in zip((image, video), defaults, strict=True)
            ]
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        processor = cls(tokenizer, *settings, family=family)
        processor._origin = f"{folder}: "
        return processor

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a folder that `from_pretrained` loads, here and in transformers."""
        directory = make_folder(Path(directory))
        self.tokenizer.save_pretrained(directory)
        # an older file would take precedence over the template just written
        (directory / "chat_template.json").unlink(missing_ok=True)
        names = {"processor_class": self._member.processor_class}
        image = names | {"image_processor_type": "Qwen2VLImageProcessor"} | self.image.to_hf()
        video = names | {"video_processor_type": self._member.video_processor_class} | self.video.to_hf()
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
        fps: float | Sequence[float] = DEFAULT_FPS,
        target_fps: float | None = None,
        video_prompt: Literal["4.57", "hf5"] = "4.57",
    ) -> dict[str, Any]:
        """Returns one conversation, or a batch of them, as arrays in Hugging Face's layout.

        A message is `{"role": ..., "content": ...}`. Its content is a string or a list of parts, each of the form
        `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` or `{"type": "video", "video": ...}`.
        An image is a PIL image, an array [H, W, 3] (see `load_image`), a path, a `file://` or base64 `data:` URL, or
        encoded bytes.
        A video is its frames: an array [frames, H, W, 3] or a list of images. A part without a source, such as
        `{"type": "image"}`, takes the next of `images` (or `videos`), and so does a placeholder `<|image_pad|>` in the
        text. A part may set its own `min_pixels` and `max_pixels`, and, for a video, the rate of its frames, `sample_fps`.

        The times of a video's frames enter Qwen2.5-VL as positions, and Qwen3-VL as text in the prompt.

        Args:
            messages: a conversation (list of messages) or a list of conversations.
            images: sources for the image parts without one, in order over the whole batch.
            videos: sources for the video parts without one, likewise.
            add_generation_prompt: append the opening of an assistant turn, to generate an answer.
            add_vision_id: write "Picture 1: ", "Video 1: " before images and videos.
            labels: also return `labels`: the assistant's answers with their end token, and -100 elsewhere. An answer is what
                the chat template renders after the generation prompt, with any reasoning that it keeps. An answer with
                `"loss": False` (or weight, train, training, trainable or loss_scale 0) is not trained.
            padding: side on which shorter rows of a batch are padded. transformers needs "left" for generation.
            min_pixels: lower limit of the size of each image and frame (Qwen3-VL: of all frames of a video together), in
                place of the checkpoint's. A limit that is not passed is adjusted if it conflicts with the other.
            max_pixels: upper limit, likewise.
            fps: the rate of the given frames, in frames per second: one for all videos, or one for each.
            target_fps: sample the given frames at this rate, by the rule of the family, within the checkpoint's min_frames
                and max_frames; None uses all frames.
            video_prompt: how Qwen3-VL's prompts have videos. "4.57": the timestamped frames replace the template's
                `<|vision_start|><|video_pad|><|vision_end|>`, as in transformers 4.57, vLLM and training. "hf5": they
                replace `<|video_pad|>` alone, as in transformers 5.

        Returns:
            input_ids, attention_mask, mm_token_type_ids (0 text, 1 image, 2 video), labels: int64 [B, T];
            pixel_values, pixel_values_videos: float32 [sum of t * h * w, patch values]; image_grid_thw, video_grid_thw:
            int64 [items, 3]; second_per_grid_ts (Qwen2.5-VL): float64 [videos]. Arrays of media that do not occur are left
            out.

        Raises:
            NotFoundError: an image file does not exist.
            UserError: the numbers of placeholders and images or videos differ; an image cannot be decoded, has no pixels, or
                has an aspect ratio over 200; the limits conflict; a rate is not positive; a message is malformed; or, with
                `labels`, there is no answer.
        """
        if padding not in ("left", "right"):
            raise UserError(f"padding is {padding!r}; expected 'left' or 'right'")
        conversations = as_conversations(messages)
        settings = {kind.name: getattr(self, kind.name).with_limits(min_pixels, max_pixels) for kind in KINDS}
        reader = MediaReader(images, videos, settings, fps, target_fps)
        cleaned, items = zip(*(reader.read(conversation) for conversation in conversations), strict=True)
        reader.check_all_used()

        options = {"add_generation_prompt": add_generation_prompt, "add_vision_id": add_vision_id}
        rows = self._tokenize(cleaned, items, labels, options, video_prompt)
        media = [[item.process() for item in row] for row in items]
        expanded = [self._expand(row, row_media) for row, row_media in zip(rows, media, strict=True)]
        return self._pad(expanded, padding) | self.media_arrays([item for row in media for item in row])

    def load_media(
        self, conversation: Conversation, *, fps: float | Sequence[float] = DEFAULT_FPS
    ) -> list[ProcessedMedia]:
        """Returns the images and videos of a conversation, in order, as `__call__` processes them."""
        return [item.process() for item in self._read(conversation, fps)[1]]

    def media_arrays(self, media: Sequence[ProcessedMedia], *, pixels: bool = True) -> dict[str, np.ndarray]:
        """Returns the arrays of images and videos that `__call__` returns; without pixels, only their grids and times."""
        arrays: dict[str, np.ndarray] = {}
        for kind in KINDS:
            items = [item for item in media if item.kind is kind]
            if not items:
                continue
            pixels_name, grids_name = kind.arrays
            if pixels:
                arrays[pixels_name] = np.concatenate([item.pixel_values for item in items])
            arrays[grids_name] = np.array([item.grid for item in items], np.int64)
        if self._member.video_time == "seconds" and (times := [item.time for item in media if item.time]):
            arrays["second_per_grid_ts"] = np.array([time.second_per_grid for time in times])
        return arrays

    def prompt_ids(
        self, conversation: Conversation, media: Sequence[ProcessedMedia], *, video_prompt: str = "4.57"
    ) -> np.ndarray:
        """Returns the tokens [T] of a prompt whose media have already been processed, with the opening of the answer.

        Args:
            conversation: messages with `{"type": "image"}` or `{"type": "video"}` in place of the media.
            media: all images and videos in order, from `load_media`.
            video_prompt: see `__call__`.
        """
        row, *_ = self._tokenize([conversation], [media], False, {"add_generation_prompt": True}, video_prompt)
        return self._expand(row, media)["input_ids"]

    def measure(self, conversation: Conversation) -> tuple[int, list[tuple[int, int, int]]]:
        """Returns the number of tokens of a conversation, and the grids of its images and videos in order.

        Nothing is processed: only the headers of image files are read, for their sizes.

        Raises:
            NotFoundError, UserError: as `__call__`, except for damaged pixels.
        """
        cleaned, items = self._read(conversation)
        rows = self._tokenize([cleaned], [items], False, {})
        grids = [item.grid() for item in items]
        tokens = len(rows[0]["input_ids"])
        for item, grid in zip(items, grids, strict=True):
            tokens += math.prod(grid) // item.settings.merge_size**2 - self._runs(item)
        return tokens, grids

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

    def _read(
        self, conversation: Conversation, fps: float | Sequence[float] = DEFAULT_FPS
    ) -> tuple[list[Message], list[MediaItem]]:
        """Separates a conversation that has all its media: returns the messages without them, and the media in order."""
        reader = MediaReader(None, None, {kind.name: getattr(self, kind.name) for kind in KINDS}, fps)
        cleaned, items = reader.read(as_conversations(conversation)[0])
        reader.check_all_used()
        return cleaned, items

    def _runs(self, item: MediaItem | ProcessedMedia) -> int:
        """Returns the number of runs of placeholders, one for each image or video."""
        return len(item.time.timestamps) if item.time and self._member.video_time == "text" else 1

    def _render(
        self, conversation: Conversation, times: Sequence[VideoTime], options: dict[str, bool], video_prompt: str
    ) -> str:
        """Returns the prompt of a conversation, with one placeholder for each run of them."""
        try:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        except Exception as error:  # of the template: jinja2's, or TypeError, ... if it does not support such messages
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{self._origin}the chat template refuses the conversation ({reason:.300}); expected one that it supports, "
                "or another template"
            ) from error
        check_text(text)
        if self._member.video_time == "text":
            videos = iter("".join(map(TIMED_FRAME.format, video.timestamps)) for video in times)
            text = VIDEO_PROMPTS[video_prompt].sub(lambda match: next(videos, match[0]), text)
        return text

    def _tokenize(
        self,
        conversations: Sequence[Conversation],
        media: Sequence[Sequence[MediaItem | ProcessedMedia]],
        labels: bool,
        options: dict[str, bool],
        video_prompt: str = "4.57",
    ) -> list[dict[str, np.ndarray]]:
        """Returns the input_ids (and labels) of each conversation, with one placeholder for each run of them."""
        if not isinstance(video_prompt, str) or video_prompt not in VIDEO_PROMPTS:
            raise UserError(f"video_prompt is {video_prompt!r:.60}; expected one of {list(VIDEO_PROMPTS)}")
        renderers = [
            functools.partial(
                self._render,
                times=[item.time for item in items if item.time],
                options=options,
                video_prompt=video_prompt,
            )
            for items in media
        ]
        texts = [render(conversation) for render, conversation in zip(renderers, conversations, strict=True)]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=labels)
        rows = [{"input_ids": np.array(ids, np.int64)} for ids in encoded["input_ids"]]
        if labels:
            offset_mapping = encoded["offset_mapping"]
            for row, offsets, conversation, text, render in zip(
                rows, offset_mapping, conversations, texts, renderers, strict=True
            ):
                spans = self._answer_spans(conversation, text, render, options)
                videos = [match.span() for match in TIMED_VIDEO.finditer(text)]
                offsets = np.array(offsets, np.int64).reshape(-1, 2)
                row["labels"] = self._labels(row["input_ids"], offsets, spans, videos)
        self._check_placeholders(rows, media)
        return rows

    def _labels(
        self,
        input_ids: np.ndarray,
        offsets: np.ndarray,
        answers: list[tuple[int, int]],
        timed_videos: list[tuple[int, int]],
    ) -> np.ndarray:
        """Returns the tokens in these answers and the special token after each; -100 elsewhere.

        Args:
            input_ids: [T].
            offsets: [T, 2], the (begin, end) of each token in the text.
            answers: the (begin, end) of each answer.
            timed_videos: likewise of videos with timestamps. They are not trained; of others, only the placeholders are not.
        """
        starts, ends = offsets.T
        special = np.isin(input_ids, self.tokenizer.all_special_ids)
        trained = np.zeros(len(input_ids), bool)
        for begin, end in answers:
            trained |= (starts >= begin) & (ends <= end) | special & (starts == end)
        for begin, end in timed_videos:
            trained &= (ends <= begin) | (starts >= end)
        trained &= ~np.isin(input_ids, list(self.token_ids.values()))
        return np.where(trained, input_ids, IGNORE)

    def _answer_spans(
        self, conversation: Conversation, text: str, render: Callable[..., str], options: dict[str, bool]
    ) -> list[tuple[int, int]]:
        """Returns the (begin, end) of each trained answer of the assistant in the rendered text.

        Renders the conversation again, with marks around the answers. This works with any template, even if a user's text
        contains the template's own control tokens.

        An answer begins after the generation prompt of its turn, so the reasoning that a template writes before the content
        is trained, also if it is empty. A turn that is rendered without its reasoning begins with its content; so does one
        that follows no other, or one of the assistant's own.
        """
        if any(mark in text for mark in (BEGIN, END)):
            raise UserError(f"text contains {BEGIN!r} or {END!r}; expected neither, since they mark answers internally")
        if not any(message["role"] == "assistant" for message in conversation):
            raise UserError("conversation has no assistant message; expected one, since labels=True")
        roles = [message["role"] for message in conversation]
        trained = [index for index, message in enumerate(conversation) if is_trained(message)]
        if not trained:
            raise UserError("no assistant message is trained; expected one without loss false or weight 0")
        marked = render([_mark(message) if index in trained else message for index, message in enumerate(conversation)])
        answers = marked.split(END)[:-1]  # each after the text before it
        if marked.replace(BEGIN, "").replace(END, "") != text:
            raise UserError(
                "the chat template changes the assistant's messages; expected one that copies them, since labels=True"
            )
        if len(answers) != len(trained) or not all(BEGIN in answer for answer in answers):
            raise UserError(
                f"the chat template renders {sum(BEGIN in answer for answer in answers)} whole answers of {len(trained)} "
                "trained messages; expected one of each, since labels=True"
            )

        def prompt(index: int, *, opened: bool = True) -> str:
            return render(conversation[:index], options={**options, "add_generation_prompt": opened})

        prompted = [index for index in trained if index and roles[index - 1] != "assistant"]
        opening = prompt(prompted[0]).removeprefix(prompt(prompted[0], opened=False)) if prompted else ""
        spans, end = [], 0
        for index, answer in zip(trained, answers, strict=True):
            begin = end + answer.index(BEGIN)
            end += len(answer.replace(BEGIN, ""))
            if index in prompted and not text.endswith(opening, 0, begin) and text.startswith(before := prompt(index)):
                begin = min(begin, len(before))
            spans.append((begin, end))
        return spans

    def _check_placeholders(
        self, rows: list[dict[str, np.ndarray]], media: Sequence[Sequence[MediaItem | ProcessedMedia]]
    ) -> None:
        """Raises UserError unless the template wrote one placeholder for each image and video."""
        for index, (row, items) in enumerate(zip(rows, media, strict=True)):
            for kind in KINDS:
                placeholders = int(np.sum(row["input_ids"] == self.token_ids[kind.name]))
                expected = sum(self._runs(item) for item in items if item.kind is kind)
                if placeholders != expected:
                    raise UserError(
                        f"conversation {index}: the chat template wrote {placeholders} placeholders {kind.token}; expected "
                        f"{expected} for its {kind.argument}"
                    )

    def _expand(self, row: dict[str, np.ndarray], media: Sequence[ProcessedMedia]) -> dict[str, np.ndarray]:
        """Returns the row with each placeholder repeated once per token of its image or video, and mm_token_type_ids."""
        repeats = np.ones(len(row["input_ids"]), np.int64)
        types = np.zeros(len(row["input_ids"]), np.int64)
        for kind in KINDS:
            unit = getattr(self, kind.name).merge_size ** 2
            placeholders = row["input_ids"] == self.token_ids[kind.name]
            runs = [(math.prod(item.grid) // unit, self._runs(item)) for item in media if item.kind is kind]
            repeats[placeholders] = [tokens // count for tokens, count in runs for _ in range(count)]
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


def _read_optional(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty dict if the file does not exist."""
    return read_json_object(path) if path.is_file() else {}


def _read_family(folder: Path, *settings: Mapping[str, Any]) -> str:
    """Returns the family of a checkpoint's processor: the first that its processor_class or model_type names.

    "qwen2_vl" counts only if nothing else is named: later members may keep files of Qwen2-VL, but not the other way around.
    """
    families = {member.processor_class: family for family, member in FAMILIES.items()}
    sources = [*settings, _read_optional(folder / "tokenizer_config.json")]
    names = [values.get("processor_class") for values in sources if isinstance(values, Mapping)]
    named = [families[name] for name in names if isinstance(name, str) and name in families]
    model_type = _read_optional(folder / CONFIG).get("model_type")
    named += [model_type] if isinstance(model_type, str) and model_type in FAMILIES else []
    return next((family for family in named if family != "qwen2_vl"), "qwen2_vl")


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
    """Returns the message with marks around its content.

    Templates for reasoning may drop or move what precedes the content of <think> or the text after </think>, so these have a
    mark, too. The first mark that is rendered counts.
    """
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": BEGIN + _mark_reasoning(content) + END}
    begin, end = ({"type": "text", "text": mark} for mark in (BEGIN, END))
    parts = [{**part, "text": _mark_reasoning(part["text"])} if "text" in part else part for part in content]
    return {**message, "content": [begin, *parts, end]}


def _mark_reasoning(text: str) -> str:
    return re.sub("</?think>\\n*", lambda tag: tag[0] + BEGIN, text)  # after the newlines, which templates strip
