"""Records, files of records and messages: each is read in full, or refused with a UserError."""

import base64
import io
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from liger_jax import Processor
from liger_jax.data.records import FORMATS, MARKER, MEDIA, parse_record, read_conversations
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.inputs.families import FAMILIES
from tests._support.fuzzing import ODD_TEXTS, damaged, damaged_bytes, fuzz, json_values, mostly, only_user_errors, pick


def image_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "orange").save(file, "PNG")
    return file.getvalue()


IMAGE = base64.b64encode(image_bytes()).decode()
URL = f"data:image/png;base64,{IMAGE}"
ANSWER = {"from": "gpt", "value": "A cat."}
RECORDS = (
    {"id": 7, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, ANSWER]},
    {"images": ["a.png", URL], "conversations": [{"from": "human", "value": "<image> or <image>?"}, ANSWER]},
    {"system": "Be brief.", "image": [], "conversations": [{"from": "human", "value": "Who?"}, ANSWER]},
    {"video": [["a.png", "a.png"]], "conversations": [{"from": "human", "value": "<video>When?"}, ANSWER]},
    {
        "messages": [
            {"role": "system", "content": "You see."},
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A dog."}], "weight": 0},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}, {"text": "And now?"}]},
            {"role": "assistant", "content": "A cat.", "loss": True},
        ],
    },
    {
        "images": [{"bytes": IMAGE, "path": None}, {"path": "a.png"}],
        "videos": [[{"path": "a.png"}, IMAGE]],
        "messages": [
            {"role": "user", "content": [{"type": "image", "max_pixels": 1568}, {"type": "image"}, {"type": "video"}]},
            {"role": "assistant", "content": "Two images and a video."},
        ],
    },
)  # fmt: skip
KEYS = st.sampled_from(
    [
        *("messages", "conversations", "images", "image", "videos", "video", "system", "id", "from", "value", "role"),
        *("content", "type", "text", "image_url", "url", "path", "bytes", "min_pixels", "max_pixels", "fps", "nframes"),
        "sample_fps",
        *("loss", "weight", "train", "training", "trainable", "loss_scale"),
        *("tools", "chosen", "objects", "audio", "img", "pics", "note"),
        *ODD_TEXTS,
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    (folder / "a.png").write_bytes(image_bytes())
    return folder


@pytest.fixture(scope="module")
def processors():
    """Returns processors of the family with limits of 4 tokens for an image, and for a frame or a clip of a video."""
    processors = {family: Processor(train_tokenizer([]), family=family) for family in FAMILIES}
    for processor in processors.values():
        token = processor.image.factor**2
        processor.image, processor.video = (
            settings.with_limits(token, 4 * token) for settings in (processor.image, processor.video)
        )
    return processors


@pytest.fixture(scope="module")
def processor(processors):
    return processors["qwen2_vl"]


def parts_of(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def texts_of(messages, content_key) -> str:
    """Returns all texts of turns, without markers and the line breaks around them."""
    return "".join(
        MARKER.sub("", part["text"])
        for message in messages
        for part in parts_of(message[content_key])
        if isinstance(part.get("text"), str) and part.get("type", "text") == "text"
    )


def is_empty(value) -> bool:
    """Returns whether a value holds nothing, at any depth."""
    if isinstance(value, dict | list):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value in (None, "", "[]", "{}")


def media_of(record, turns, content_key) -> Counter:
    """Returns the numbers of images and videos that a record holds, in its lists and in its parts."""
    media: Counter = Counter()
    for kind, keys in MEDIA.items():
        for value in (record[key] for key in keys if not is_empty(record.get(key))):
            media[kind] += len(value) if isinstance(value, list) else 1
        for part in (part for turn in turns for part in parts_of(turn[content_key])):
            if isinstance(part.get("text"), str) and part.get("type", "text") == "text":
                continue  # a text, whatever else it has
            own = any(part.get(key) for key in (kind, f"{kind}_url", "url", "path"))
            media[kind] += bool(own and part.get("type", kind) in (kind, f"{kind}_url"))
    return media


@fuzz(record=damaged(pick(RECORDS), KEYS), training=st.booleans(), family=st.sampled_from(sorted(FAMILIES)))
def test_records(record, training, family, folder, processors):
    """A record that is read keeps all its texts, images and videos, and the processor accepts or refuses it."""
    with only_user_errors():
        conversation = parse_record(record, folder, training=training)
        content_key = next(names[1] for key, names in FORMATS.items() if record.get(key))
        turns = next(record[key] for key in FORMATS if record.get(key))
        assert texts_of(conversation, "content") == (record.get("system") or "") + texts_of(turns, content_key)
        parts = [part for message in conversation for part in parts_of(message["content"])]
        kinds = Counter(part["type"] for part in parts if part["type"] != "text")
        assert kinds == +media_of(record, turns, content_key)
        check_arrays(processors[family], conversation, labels=training)


def check_arrays(processor, conversation, **options) -> None:
    """Processes a conversation, and checks the numbers of placeholders and patches against the grids."""
    arrays = processor([conversation], **options)
    assert len({arrays[name].shape for name in ("input_ids", "attention_mask", "mm_token_type_ids")}) == 1
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        patches = arrays[grids].prod(axis=1).sum() if grids in arrays else 0
        assert np.sum(arrays["input_ids"] == processor.token_ids[kind]) == patches // 4
        assert patches == (len(arrays[pixels]) if pixels in arrays else 0)
        assert patches == 0 or np.isfinite(arrays[pixels]).all()
    tokens, grids = processor.measure(conversation)
    assert (tokens, sum(map(math.prod, grids))) == (
        arrays["input_ids"].size,
        sum(len(arrays[name]) for name in ("pixel_values", "pixel_values_videos") if name in arrays),
    )
    if options.get("labels"):
        trained = arrays["labels"] != -100
        assert trained.any()
        np.testing.assert_array_equal(arrays["labels"][trained], arrays["input_ids"][trained])


FILES = pick(
    [
        *(json.dumps(RECORDS[:count], ensure_ascii=count % 2 == 0).encode() for count in (0, 1, 2, 6)),
        *("\n".join(map(json.dumps, RECORDS[:count])).encode() for count in (1, 3)),
        b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(),
        json.dumps(RECORDS).encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ]
)
SMALL_FILES = damaged(st.just(list(RECORDS[:3])), KEYS).map(lambda value: json.dumps(value).encode())


@fuzz(content=damaged_bytes(FILES) | SMALL_FILES, on_error=st.sampled_from(["raise", "skip"]))
def test_files_of_records(content, on_error, folder):
    """A file of records is read, or refused by name; its conversations have an answer to train."""
    path = folder / "data.json"
    path.write_bytes(content)
    with only_user_errors():
        for conversation in read_conversations(path, on_error=on_error):
            assert any(message["role"] == "assistant" for message in conversation)


MESSAGES = (
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}],
    [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image", "image": URL, "min_pixels": 784}, {"text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}], "loss": True},
    ],
    [
        {"role": "user", "content": [{"type": "video", "video": [URL, URL], "max_pixels": 4096}, {"type": "image"}]},
        {"role": "assistant", "content": "A video."},
    ],
    [{"role": "user", "content": [{"type": "video", "video": [URL] * 5, "sample_fps": 0.5}, {"text": "<|video_pad|>"}]}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<|image_pad|>"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}, {"image": URL}]}],
)  # fmt: skip
CALLS = {
    "images": mostly(st.sampled_from([None, [URL], URL, [URL, URL]]), json_values(KEYS)),
    "videos": mostly(st.sampled_from([None, [[URL]], [[URL, URL, URL]]]), json_values(KEYS)),
    "min_pixels": mostly(st.sampled_from([None, 784, 3136.0]), json_values(KEYS)),
    "max_pixels": mostly(st.sampled_from([None, 784, 100_000]), json_values(KEYS)),
    "padding": mostly(st.sampled_from(["left", "right"]), st.sampled_from(["both", None])),
    "labels": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "add_vision_id": st.booleans(),
    "fps": mostly(st.sampled_from([2.0, 1, [1.0], [0.5, 30.0]]), json_values(KEYS)),
    "target_fps": mostly(st.sampled_from([None, 1.0, 2.0]), json_values(KEYS)),
    "video_prompt": mostly(st.sampled_from(["4.57", "hf5"]), json_values(KEYS)),
}


@fuzz(
    messages=damaged(mostly(pick(MESSAGES), st.lists(pick(MESSAGES), max_size=3)), KEYS),
    options=st.fixed_dictionaries({}, optional=CALLS),
    family=st.sampled_from(sorted(FAMILIES)),
)
def test_messages(messages, options, family, processors):
    """A call of the processor gives arrays that fit each other, or a UserError."""
    processor = processors[family]
    with only_user_errors():
        arrays = processor(messages, **options)
        seconds = arrays.pop("second_per_grid_ts", None)
        assert seconds is None or (family == "qwen2_5_vl" and (seconds > 0).all())
        assert {name: array.dtype for name, array in arrays.items() if "pixel" not in name} == {
            name: np.int64 for name in arrays if "pixel" not in name
        }
        if not re.search("max_pixels|min_pixels", str(options) + str(messages)):
            assert sum(len(array) for name, array in arrays.items() if "pixel" in name) <= 16 * 8
