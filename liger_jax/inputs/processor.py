"""Conversations with pictures and videos -> the numpy arrays of Hugging Face's Qwen2-VL layout, and tokens -> text."""

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from liger_jax.files import local_folder
from liger_jax.inputs.batch import IGNORE
from liger_jax.inputs.images import VisionSettings
from liger_jax.inputs.messages import KINDS, Conversation, Item, MediaReader, Message, as_batch

# transformers' limits for the frames of a video, where a checkpoint has none
VIDEO_DEFAULTS = {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28}
# Classes that are taken by name: AutoTokenizer imports all models, and PyTorch where it is installed, which takes seconds.
TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
TOKENIZER_FILES = ["tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
PROCESSOR_FILES = ["*processor_config.json", "chat_template.*", "config.json"]
# Private-use characters that mark where an answer begins and ends while the template is rendered.
BEGIN, END = "\ue0f0\ue0f1", "\ue0f2\ue0f3"


class Processor:
    """Turns conversations into model inputs, and generated tokens into text.

    Needs a tokenizer of transformers with Qwen2-VL's special tokens; a chat template that it lacks is filled in.

    Attributes:
        tokenizer: the tokenizer of transformers.
        image, video: `VisionSettings` of pictures and of the frames of videos.
        token_ids: the ids of the placeholders, {"image": ..., "video": ...}.

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
        self.image = image or VisionSettings()
        self.video = video or VisionSettings(**VIDEO_DEFAULTS)
        vocabulary = tokenizer.get_vocab()
        missing = [kind.token for kind in KINDS if kind.token not in vocabulary]
        if missing or tokenizer.pad_token_id is None:
            missing += ["padding token"] * (tokenizer.pad_token_id is None)
            raise ValueError(f"Not a tokenizer of Qwen2-VL: it has no {' and no '.join(missing)}")
        self.token_ids = {kind.name: vocabulary[kind.token] for kind in KINDS}
        if tokenizer.chat_template is None:
            tokenizer.chat_template = default_chat_template()

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, revision: str | None = None) -> Self:
        """Reads tokenizer, chat template and image settings from a folder or from the Hugging Face hub.

        All layouts on the hub are read: `preprocessor_config.json` (with or without `video_preprocessor_config.json`),
        both nested in `processor_config.json` (transformers 5), and a chat template in the tokenizer's files or in
        `chat_template.json`. A checkpoint without a template gets Qwen2-VL's.

        Args:
            path_or_repo_id: a folder, or a hub id such as "Qwen/Qwen2-VL-2B-Instruct".
            revision: branch, tag or commit; hub ids only.

        Raises:
            FileNotFoundError: neither a folder nor something the hub (or, offline, the cache) has, or it lacks the image
                settings.
            ValueError: the tokenizer has not Qwen2-VL's placeholders, or the settings ask for another preprocessing.
        """
        import transformers

        folder = local_folder(path_or_repo_id, TOKENIZER_FILES + PROCESSOR_FILES, revision=revision)
        nested = _read_json(folder / "processor_config.json")
        image = nested.get("image_processor") or _read_json(folder / "preprocessor_config.json")
        video = nested.get("video_processor") or _read_json(folder / "video_preprocessor_config.json") or image
        if not image:
            raise FileNotFoundError(
                f"No image settings in {folder}: expected preprocessor_config.json, or processor_config.json with "
                '"image_processor" in it'
            )
        name = _read_json(folder / "tokenizer_config.json").get("tokenizer_class")
        tokenizer_class = getattr(transformers, name if name in TOKENIZERS else "AutoTokenizer")
        tokenizer = tokenizer_class.from_pretrained(folder)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _read_json(folder / "chat_template.json").get("chat_template")
        return cls(tokenizer, VisionSettings.from_hf(image), VisionSettings.from_hf(video, **VIDEO_DEFAULTS))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a folder that `from_pretrained` here and in transformers reads."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        names = {"processor_class": "Qwen2VLProcessor"}
        image = names | {"image_processor_type": "Qwen2VLImageProcessor"} | self.image.to_hf()
        video = names | {"video_processor_type": "Qwen2VLVideoProcessor"} | self.video.to_hf()
        # transformers 5 prefers settings nested in processor_config.json: writing it keeps an older one from winning.
        files = {"preprocessor_config": image, "video_preprocessor_config": video, "processor_config": names}
        for name, values in files.items():
            (directory / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

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
    ) -> dict[str, np.ndarray]:
        """One conversation, or a batch of them, as arrays in Hugging Face's layout.

        A message is `{"role": ..., "content": ...}`; the content is a string or a list of parts, each
        `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` or `{"type": "video", "video": ...}`.
        A picture is a PIL image, a uint8 array [H, W, 3], a path, a `file://` or base64 `data:` URL, or encoded bytes;
        a video is its frames, [T, H, W, 3] or a list of pictures. A part without a value, such as `{"type": "image"}`,
        takes the next of `images` (or `videos`), and so does a placeholder `<|image_pad|>` written in a text. A part
        may set its own `min_pixels` and `max_pixels`.

        Args:
            messages: a conversation (list of messages) or a list of conversations.
            images, videos: what parts without a value stand for, in order, over the whole batch.
            add_generation_prompt: end with the opening of an assistant's turn, to generate its answer.
            add_vision_id: write "Picture 1: ", "Video 1: " before pictures and videos.
            labels: also return `labels`: the assistants' answers with their end token; everything else is -100.
            padding: where shorter rows of a batch are filled up; "left" is what transformers generates from.
            min_pixels, max_pixels: size limits for each picture and each frame, instead of the checkpoint's. If only
                one is given, the other follows where it would contradict it.

        Returns:
            input_ids, attention_mask, mm_token_type_ids (0 text, 1 image, 2 video), labels: int64 [B, L];
            pixel_values, pixel_values_videos: float32 [sum of t * h * w, 1176]; image_grid_thw, video_grid_thw: int64
            [items, 3]. Those of a kind that does not occur are left out.

        Raises:
            FileNotFoundError: an image file does not exist.
            ValueError: more or fewer placeholders than pictures or videos, a picture that cannot be decoded, has no
                pixels or is over 200 times longer than wide, contradictory limits, a malformed message, nothing to
                train on where labels are asked for.
        """
        if padding not in ("left", "right"):
            raise ValueError(f'padding must be "left" or "right", got {padding!r}')
        conversations = as_batch(messages)
        settings = {kind.name: getattr(self, kind.name).with_limits(min_pixels, max_pixels) for kind in KINDS}
        reader = MediaReader(images, videos, settings)
        cleaned, items = zip(*(reader.read(conversation) for conversation in conversations), strict=True)
        reader.check_all_used()

        options = {"add_generation_prompt": add_generation_prompt, "add_vision_id": add_vision_id}
        rows = self._tokenize(cleaned, labels, options)
        self._check_placeholders(rows, items)
        arrays, counts = {}, {}
        for kind in KINDS:
            done = [item.patches() for row in items for item in row[kind.name]]
            if done:
                pixel_values, grids = zip(*done, strict=True)
                arrays |= dict(zip(kind.arrays, (np.concatenate(pixel_values), np.array(grids, np.int64)), strict=True))
            merge_unit = settings[kind.name].merge_size ** 2
            counts[kind.name] = iter([t * h * w // merge_unit for _, (t, h, w) in done])
        return self._pad([self._expand(row, counts) for row in rows], padding) | arrays

    def prompt_ids(self, conversation: Conversation, grids: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Tokens [L] of a conversation whose pictures were processed before, up to where its next answer begins.

        Args:
            conversation: messages with `{"type": "image"}` or `{"type": "video"}` in the pictures' places.
            grids: the (t, h, w) of all of them in order, {"image": ..., "video": ...}.
        """
        row, *_ = self._tokenize([conversation], False, {"add_generation_prompt": True})
        self._check_placeholders([row], [grids])
        units = {kind.name: getattr(self, kind.name).merge_size ** 2 for kind in KINDS}
        counts = {name: iter([int(np.prod(grid)) // units[name] for grid in grids[name]]) for name in units}
        return self._expand(row, counts)["input_ids"]

    def measure(self, conversation: Conversation) -> tuple[int, int, int]:
        """How many tokens, patches and frames calling would make of a conversation.

        No picture is decoded: the heads of the files tell their sizes.

        Raises:
            FileNotFoundError, ValueError: as when called, but for pixels that are damaged.
        """
        settings = {kind.name: getattr(self, kind.name) for kind in KINDS}
        cleaned, items = MediaReader(None, None, settings).read(as_batch(conversation)[0])
        rows = self._tokenize([cleaned], False, {})
        self._check_placeholders(rows, [items])
        found = [item for kind in KINDS for item in items[kind.name]]
        grids = [item.grid() for item in found]
        added = sum(math.prod(grid) // item.settings.merge_size**2 - 1 for grid, item in zip(grids, found, strict=True))
        return len(rows[0]["input_ids"]) + added, sum(map(math.prod, grids)), sum(t for t, _, _ in grids)

    def decode(self, tokens: Any, *, skip_special_tokens: bool = True) -> str | list[str]:
        """Text of tokens [L] (a string) or [B, L] (a list of them). Negative tokens (ignored labels) are dropped.

        Example:
            >>> processor.decode(generate(model, batch, max_new_tokens=8))  # doctest: +SKIP
            ['A dog.', 'Two cats.']
        """
        tokens = np.asarray(tokens)
        if tokens.ndim not in (1, 2) or not (np.issubdtype(tokens.dtype, np.integer) or not tokens.size):
            raise ValueError(f"Tokens must be whole numbers [L] or [B, L], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.ndim == 2:
            return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in tokens]
        return self.tokenizer.decode(tokens[tokens >= 0].tolist(), skip_special_tokens=skip_special_tokens)

    def _render(self, conversation: Conversation, options: dict[str, bool]) -> str:
        return self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)

    def _tokenize(
        self, conversations: Sequence[Conversation], labels: bool, options: dict[str, bool]
    ) -> list[dict[str, np.ndarray]]:
        """Tokens of each conversation with one placeholder for each picture, and which of them are trained."""
        texts = [self._render(conversation, options) for conversation in conversations]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=labels)
        rows = [{"input_ids": np.array(ids, np.int64)} for ids in encoded["input_ids"]]
        if labels:
            for row, offsets, *rendered in zip(rows, encoded["offset_mapping"], conversations, texts, strict=True):
                spans = self._answer_spans(*rendered, options)
                row["labels"] = self._labels(row["input_ids"], np.array(offsets, np.int64).reshape(-1, 2), spans)
        return rows

    def _labels(self, input_ids: np.ndarray, offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
        """The tokens within the spans of text, and the special token that ends each; -100 elsewhere."""
        starts, ends = offsets.T
        special = np.isin(input_ids, self.tokenizer.all_special_ids)
        trained = np.zeros(len(input_ids), bool)
        for begin, end in spans:
            trained |= (starts >= begin) & (ends <= end) | special & (starts == end)
        trained &= ~np.isin(input_ids, list(self.token_ids.values()))
        return np.where(trained, input_ids, IGNORE)

    def _answer_spans(self, conversation: Conversation, text: str, options: dict[str, bool]) -> list[tuple[int, int]]:
        """Where in the rendered text the assistants' answers stand, found by rendering them between marks.

        This works with any template and is not deceived by a user who writes the template's own marks.
        """
        if any(mark in text for mark in (BEGIN, END)):
            raise ValueError(f"The text contains the characters {BEGIN!r} or {END!r}, with which answers are marked")
        if not any(message["role"] == "assistant" for message in conversation):
            raise ValueError("labels were asked for a conversation without an assistant's message: nothing to train on")
        marked = self._render([_mark(message) for message in conversation], options)
        if marked.replace(BEGIN, "").replace(END, "") != text:
            raise ValueError(
                "labels need a chat template that leaves the assistants' messages as they are; this one changes them"
            )
        spans, removed = [], 0
        for match in re.finditer(f"{BEGIN}(.*?){END}", marked, re.DOTALL):
            begin = match.start() - removed
            spans.append((begin, begin + len(match[1])))
            removed += len(BEGIN) + len(END)
        return spans

    def _check_placeholders(self, rows: list[dict[str, np.ndarray]], items: Sequence[dict[str, list[Item]]]) -> None:
        """Each conversation has as many placeholders as pictures; only a template of another model breaks this."""
        for index, (row, media) in enumerate(zip(rows, items, strict=True)):
            for kind in KINDS:
                found = int(np.sum(row["input_ids"] == self.token_ids[kind.name]))
                if found != len(media[kind.name]):
                    raise ValueError(
                        f"Conversation {index} has {len(media[kind.name])} {kind.argument}, but the chat template "
                        f"wrote {found} placeholders {kind.token} for them"
                    )

    def _expand(self, row: dict[str, np.ndarray], counts: dict[str, Iterator[int]]) -> dict[str, np.ndarray]:
        """Repeats each placeholder as often as its picture has tokens."""
        repeats = np.ones(len(row["input_ids"]), np.int64)
        types = np.zeros(len(row["input_ids"]), np.int64)
        for kind in KINDS:
            places = np.flatnonzero(row["input_ids"] == self.token_ids[kind.name])
            repeats[places] = [next(counts[kind.name]) for _ in places]
            types[places] = kind.type_id
        return {name: np.repeat(values, repeats) for name, values in (row | {"mm_token_type_ids": types}).items()}

    def _pad(self, rows: list[dict[str, np.ndarray]], padding: str) -> dict[str, np.ndarray]:
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
                columns = slice(length - len(row[name]), None) if padding == "left" else slice(len(row[name]))
                array[index, columns] = row[name]
        return padded


@functools.cache
def default_chat_template() -> str:
    """Qwen2-VL's chat template: renders what the published one renders."""
    return resources.files("liger_jax").joinpath("assets/chat_template.jinja").read_text(encoding="utf-8").strip()


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _mark(message: Message) -> Message:
    """The message with marks around its content if it is an assistant's."""
    if message["role"] != "assistant":
        return message
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": BEGIN + content + END}
    begin, end = ({"type": "text", "text": mark} for mark in (BEGIN, END))
    return {**message, "content": [begin, *content, end]}
