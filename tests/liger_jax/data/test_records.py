"""Files of conversations: every format gives the same messages, and errors name the broken record."""

import base64
import contextlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from liger_jax import Processor
from liger_jax.data.records import read_conversations
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.errors import NotFoundError, UserError

TURNS = [("human", "<image>\nWhich digit?"), ("gpt", "7")]


def image_bytes(size=(28, 28)):
    file = io.BytesIO()
    Image.effect_noise(size, 60).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes())
    return tmp_path


def llava(turns=TURNS, **keys):
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **keys}


def chat(turns=TURNS, **keys):
    roles = {"human": "user", "gpt": "assistant"}
    return {"messages": [{"role": roles.get(role, role), "content": text} for role, text in turns], **keys}


def write(folder, *records, lines=False):
    path = folder / ("data.jsonl" if lines else "data.json")
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    "record",
    [llava(image="a.png"), llava(image=["a.png"]), llava(images=["a.png"]), chat(images=["a.png"])],
    ids=["LLaVA", "LLaVA list", "ShareGPT", "messages"],
)
def test_formats(folder, record, lines):
    """A JSON list and JSON lines give the same messages in every format."""
    (conversation,) = read_conversations(write(folder, record, lines=lines))
    assert conversation == [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(folder / "a.png")}, {"type": "text", "text": "Which digit?"}],
        },
        {"role": "assistant", "content": "7"},
    ]


def test_markers_are_filled_in_order(folder):
    """Markers may be anywhere in a text; a video is a list of frames; lists of parts and plain texts are unchanged."""
    turns = [
        ("system", "Read."),
        ("human", "A <image> and <image>\nthen <video>, equal?"),
        ("gpt", "No."),
        ("human", "Why?"),
    ]
    url = "data:image/png;base64," + base64.b64encode(image_bytes()).decode()
    raw = base64.b64encode(image_bytes((1, 1))).decode()
    record = llava([*turns, ("gpt", "Look.")], image=[url, raw], video=[["a.png", "a.png"]])
    (conversation,) = read_conversations(write(folder, record))
    assert [message["role"] for message in conversation] == ["system", "user", "assistant", "user", "assistant"]
    kinds = [(part["type"], part[part["type"]]) for part in conversation[1]["content"]]
    frames = [str(folder / "a.png")] * 2
    assert kinds == [
        ("text", "A "),
        ("image", url),
        ("text", " and "),
        ("image", base64.b64decode(raw)),
        ("text", "then "),
        ("video", frames),
        ("text", ", equal?"),
    ]
    parts = [{"type": "text", "text": "Hello"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Hi"}]}
    assert read_conversations(write(folder, record))[0][0]["content"] == parts


def test_parts_take_their_own_image_or_the_next_of_the_record(folder):
    """A list of parts may hold paths relative to the file, parts without an image, and markers in its texts."""
    content = image_bytes()
    parts = [
        {"type": "image", "image": "a.png", "max_pixels": 784},
        {"type": "image_url", "image_url": {"url": f"file://{folder}/a.png"}},
        {"type": "image", "image": {"bytes": base64.encodebytes(content).decode(), "path": "gone.png"}},
        {"type": "image"},
        {"type": "text", "text": "<image>Which?"},
    ]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "7"}],
        "images": ["a.png"] * 2,
        "system": "Read.",
    }
    system, user, _ = read_conversations(write(folder, record))[0]
    path = str(folder / "a.png")
    assert system == {"role": "system", "content": "Read."}
    values = [part.get("image", part.get("text")) for part in user["content"]]
    assert values == [path, f"file://{folder}/a.png", content, path, path, "Which?"]
    assert user["content"][0]["max_pixels"] == 784


def test_conversations_do_not_depend_on_the_working_directory(folder, monkeypatch):
    """A run can be resumed from anywhere: a relative and an absolute path give the same data."""
    path = write(folder, llava(image="a.png"))
    monkeypatch.chdir(folder.parent)
    assert read_conversations(f"{folder.name}/data.json") == read_conversations(path)


def test_byte_order_mark_and_files_that_cannot_be_read(folder):
    path = write(folder, llava(image="a.png"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as written on Windows
    assert len(read_conversations(path)) == 1
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.json is not readable as UTF-8"):
        read_conversations(path)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); expected a file of conversations"):
        read_conversations(folder)
    path.write_text("[7]")
    with pytest.raises(ValueError, match="record 1: the record is 7; expected a record"):
        read_conversations(path)


def test_processor_accepts_conversations(folder):
    """From a file to arrays: images are read, and only the answer is trained."""
    from liger_jax.demo.data import load_digits
    from liger_jax.demo.run import make_processor

    processor = make_processor(load_digits()[0])
    conversations = read_conversations(write(folder, llava(image="a.png"), llava([("human", "Hi"), ("gpt", "4")])))
    inputs = processor(conversations, labels=True)
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 2]]
    trained = inputs["input_ids"][0][inputs["labels"][0] != -100]
    assert processor.decode(trained[None])[0].strip() == "7"
    assert np.count_nonzero(inputs["labels"][1] != -100) == len(trained)


BROKEN = {
    "expected a record with one of": {"text": "hello"},
    "the record is []": [],
    "expected a list of turns": {"messages": []},
    "'from' is 'robot'": llava([("robot", "?")]),
    "turn is {'role': 'user'}; expected {'role'": {"messages": [{"role": "user"}]},
    "has 1 images, but 0 markers": llava([("human", "Which?"), ("gpt", "7")], image="a.png"),
    "<image> than images; expected as many under 'images' or 'image'": llava(
        [("human", "<image><image>"), ("gpt", "7")], image="a.png"
    ),
    "more markers <video>": llava([("human", "<video>"), ("gpt", "7")]),
    "b.png', which does not exist": llava(image="b.png"),
    "both 'images' and 'image'": llava(image="a.png", images=["a.png"]),
    "would have to be downloaded": llava(image="https://example.com/a.png"),
    "video is 'a.mp4'; expected a list of its frames": llava([("human", "<video>"), ("gpt", "7")], video="a.mp4"),
    "image is 3; expected a path": llava(image=[3]),
    "image is ['a.png']; expected a path": llava(images=[["a.png"]]),
    "and is not valid base64": llava(image="?" * 2000),  # longer than a file's name can be
    "does not exist and is not": llava(image="a/long/path/to/an/image/that/has/a/mistake/in/it/somewhere.png"),
    "no answer": llava([("human", "Which?")]),
    "has no answer; expected an assistant turn": {"messages": [{"role": "assistant", "content": [{"text": ""}]}]},
    "'system' is 3; expected a text": llava(system=3, image="a.png"),
    "'role' is ['user']": {"messages": [{"role": ["user"], "content": "?"}]},
    "no.png', which does not exist": llava(image="file:///no.png"),
    "which is not a file": llava(image="."),
    "a malformed URL": llava(image="file://["),
    "half of a surrogate pair": llava([("human", "a \ud83d"), ("gpt", "7")]),
    "the record lists no more images": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "expected one of type": {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
    "sets resized_height": {
        "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "resized_height": 280}]}]
    },
    "expected a text or a list": {"messages": [{"role": "user", "content": 3}]},
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_records_are_named_or_skipped(folder, message):
    """An error, or with "skip" a warning, names the file, the record's number and id, and the problem."""
    record = BROKEN[message]
    if isinstance(record, dict):
        record = {"id": "x7", **record}
    path = write(folder, llava(image="a.png"), record)
    with pytest.raises(UserError, match="record 2") as error:
        read_conversations(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert ("(id 'x7')" in str(error.value)) == isinstance(record, dict)
    with pytest.warns(UserWarning, match="left out 1 of 2 records: record 2"):
        assert len(read_conversations(path, on_error="skip")) == 1


def test_broken_files(folder):
    """A file is missing, not JSON, empty, or has no usable record; or the option is unknown."""
    with pytest.raises(NotFoundError, match=r"none\.json does not exist"):
        read_conversations(folder / "none.json")
    bad = folder / "bad.json"
    for text, message in {
        "[1, 2": "expected a JSON list",
        "": "no usable record",
        "{oops\n": "line 1: the line is not JSON",
    }.items():
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_conversations(bad)
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        read_conversations(bad, on_error="ignore")


def test_repeated_keys_were_dropped(folder):
    """JSON allows a key twice, and Python keeps the last value: a turn or an image was lost without a word."""
    turn = '{"role": "user", "content": "lost", "content": "q"}'
    line = f'{{"messages": [{turn}, {{"role": "assistant", "content": "a"}}]}}'
    path = folder / "data.jsonl"
    path.write_text(json.dumps(chat([("human", "q"), ("gpt", "a")])) + "\n" + line)
    with pytest.raises(UserError, match=r"line 2: the line is not JSON .an object has the key 'content' twice"):
        read_conversations(path)
    path.write_text(f"[{line}]")
    with pytest.raises(UserError, match=r"is malformed .an object has the key 'content' twice"):
        read_conversations(path)


@pytest.mark.parametrize("text", [{"train": [], "test": []}, {"messages": [{"role": "user", "content": "q"}]}])
def test_one_object_over_several_lines_is_named(folder, text):
    """It was "line 1 is not JSON". Such files hold the splits of a dataset, one record, or a description of datasets."""
    path = folder / "data.json"
    path.write_text(json.dumps(text, indent=2))
    for on_error in ("raise", "skip"):
        with pytest.raises(UserError, match=rf"data\.json is one object with the keys {re.escape(str(sorted(text)))}"):
            read_conversations(path, on_error=on_error)


# ---- keys that change the meaning of a record: they were dropped, and the record was trained


def trained_texts(processor, conversation):
    labels = processor(conversation, labels=True)["labels"][0]
    return processor.tokenizer.decode(labels[labels >= 0].tolist())


@pytest.mark.parametrize("key", ["loss", "weight", "train", "training", "trainable", "loss_scale"])
@pytest.mark.parametrize("numbers", [False, True])
def test_masked_turns_were_trained(folder, key, numbers):
    off, on = (0, 1.0) if numbers else (False, True)
    record = chat([("human", "q"), ("gpt", "BAD"), ("human", "q"), ("gpt", "good")])
    record["messages"][0][key] = off
    record["messages"][1][key] = off
    record["messages"][3][key] = on
    (conversation,) = read_conversations(write(folder, record))
    assert [message.get("loss") for message in conversation] == [None, False, None, None]
    processor = Processor(train_tokenizer([]))
    assert trained_texts(processor, conversation) == "good<|im_end|>"
    assert trained_texts(processor, record["messages"]) == "good<|im_end|>"  # the Processor reads the same keys
    with pytest.raises(UserError, match="no assistant message is trained"):
        processor(record["messages"][:2], labels=True)
    record["messages"][3][key] = off
    with pytest.raises(UserError, match="no answer to train"):
        read_conversations(write(folder, record))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"weight": 0.5}, "'weight' is 0.5; expected true or 1"),
        ({"loss_scale": [1, 0]}, r"'loss_scale' is \[1, 0\]; expected true or 1"),
        ({"loss": "false"}, "'loss' is 'false'; expected true or 1"),
        ({"loss": True, "weight": 0}, "expected all of them to be true"),
    ],
)
def test_other_masks_are_refused(folder, masks, message):
    record = chat([("human", "q"), ("gpt", "a")])
    record["messages"][1] |= masks
    with pytest.raises(UserError, match=f"record 1: {message}" if "expected true" in message else message):
        read_conversations(write(folder, record))
    with pytest.raises(UserError, match=message):
        Processor(train_tokenizer([]))(record["messages"], labels=True)


def test_training_a_question_is_refused(folder):
    record = chat([("human", "q"), ("gpt", "a")])
    record["messages"][0]["loss"] = True
    with pytest.raises(UserError, match="only answers are trained"):
        read_conversations(write(folder, record))
    with pytest.raises(UserError, match="expected masks in its turns"):
        read_conversations(write(folder, chat([("human", "q"), ("gpt", "a")], loss=False)))


Q = [("human", "q"), ("gpt", "a")]
MEANINGFUL = {
    "label": chat(Q, label=False),
    "kto_tag": chat(Q, kto_tag=True),
    "chosen": llava(Q, chosen={"from": "gpt", "value": "good"}),
    "rejected": llava(Q, rejected={"from": "gpt", "value": "bad"}),
    "tools": chat(Q, tools=[{"type": "function", "function": {"name": "weather"}}]),
    "functions": chat(Q, functions=[{"name": "weather"}]),
    "objects": chat(Q, objects={"ref": ["sheep"], "bbox": [[90, 160, 135, 212]]}),
    "bbox": chat(Q, bbox=[1, 2, 3, 4]),
    "audios": chat(Q, audios=["a.wav"]),
    "image_path": llava(Q, image_path="a.png"),
    "img": llava(Q, img="a.png"),
    "image_url": llava(Q, image_url="a.png"),
    "video_path": llava(Q, video_path="a.mp4"),
    "sample_weight": chat(Q, sample_weight=0.5),
}


@pytest.mark.parametrize("key", MEANINGFUL)
def test_keys_that_change_the_meaning_are_refused_by_name(folder, key):
    with pytest.raises(UserError, match=f"record 1: the record has '{key}'"):
        read_conversations(write(folder, MEANINGFUL[key]))


@pytest.mark.parametrize(
    "key", ["tool_calls", "function_call", "images", "image", "image_path", "masked", "reasoning_content", "thinking"]
)
def test_keys_of_turns_are_refused_by_name(folder, key):
    record = chat(Q)
    record["messages"][1][key] = [{"function": {"name": "weather", "arguments": "{}"}}]
    with pytest.raises(UserError, match=f"the turn has '{key}'"):
        read_conversations(write(folder, record))


@pytest.mark.parametrize("key", ["img", "image_path", "image"])
def test_image_of_a_part_under_another_key_is_refused(folder, key):
    content = [{"type": "text", "text": "Which?"} if key == "image" else {"type": "image"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]}
    record |= {} if key == "image" else {"images": ["a.png"]}
    content[0][key] = None  # as in exports of tables
    assert len(read_conversations(write(folder, record))) == 1
    content[0][key] = "b.png"
    with pytest.raises(UserError, match=f"the part has '{key}'; expected its images under 'image' of a part"):
        read_conversations(write(folder, record))


@pytest.mark.parametrize(
    "value",
    ["a.png", ["a.png", "b/C.JPEG"], "data:image/png;base64,", {"bytes": "iVBORw0KGgo=", "path": None}, "a.mp4"],
)
def test_images_under_any_other_key_were_dropped(folder, value):
    """And the record trained without them. Next to the images of a record, such a value is only reported."""
    for place in ("record", "turn"):
        record = chat(Q)
        (record if place == "record" else record["messages"][0])["pics"] = value
        with pytest.raises(UserError, match=f"record 1: the {place} has 'pics' .*, and no image or video is read"):
            read_conversations(write(folder, record))
    with pytest.warns(UserWarning, match="ignored unknown keys .'pics' of records: 1."):
        assert len(read_conversations(write(folder, llava(image="a.png", pics=value)))) == 1
    for text in ("It is in a.png", "a.pdf", {"bytes": 800}, []):
        with pytest.warns(UserWarning, match="ignored unknown keys"):
            assert len(read_conversations(write(folder, chat(Q, pics=text, source="x")))) == 1


@pytest.mark.parametrize("key", ["bbox", "weight", "loss", "thinking"])
def test_keys_of_parts_were_not_checked(folder, key):
    """A masked part was trained, and nothing reported unknown keys of parts."""
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"text": "a"}]}]}
    part = record["messages"][1]["content"][0]
    part["cache_control"] = {"type": "ephemeral"}
    with pytest.warns(UserWarning, match="ignored unknown keys .'cache_control' of parts: 1."):
        assert len(read_conversations(write(folder, record))) == 1
    part[key] = 0
    with pytest.raises(UserError, match=f"the part has '{key}' .0., which is not supported"):
        read_conversations(write(folder, record))


def test_text_of_an_image_part_was_dropped(folder):
    parts = [{"type": "image", "image": "a.png", "text": ""}, {"type": "text", "text": "Which?", "image": None}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "7"}]}
    assert len(read_conversations(write(folder, record))[0][0]["content"]) == 2
    for part in ({"type": "image", "image": "a.png", "text": "A cat."}, {"image": "a.png", "text": "A cat."}):
        record["messages"][0]["content"] = [part]
        with pytest.raises(UserError, match=r"expected a part for each|the part has 'image'"):
            read_conversations(write(folder, record))
    part = {"type": "image", "image": image_bytes(), "text": "A cat."}
    with pytest.raises(UserError, match="with both media and a text"):
        Processor(train_tokenizer([]))([{"role": "user", "content": [part]}])


@pytest.mark.parametrize("key", ["fps", "nframes", "min_frames", "max_frames"])
def test_frame_rates_next_to_frames_were_ignored(folder, key):
    content = [{"type": "video", "video": ["a.png", "a.png"], key: 2}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]}
    processor = Processor(train_tokenizer([]))
    for read in (lambda: read_conversations(write(folder, record)), lambda: processor(record["messages"])):
        with pytest.raises(UserError, match=f"part sets {key}, which is not supported"):
            read()


MARKERS = ["<bbox>", "<ref-object>", "<audio>", "<|image_pad|>", "<|video_pad|>", "<Image>", "<image_1>", "<image 2>"]
MARKERS += ["<|image|>", "<|image_1|>", "<ImageHere>", "<image-placeholder>", "<img>a.png</img>"]


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("turn", [0, 1])
def test_left_over_markers_were_trained_as_text(folder, marker, turn):
    """Or, for Qwen2-VL's own, ended the run when the conversation was loaded. Those of other models lost their images."""
    turns = [list(pair) for pair in Q]
    turns[turn][1] = f"It is {marker} there."
    with pytest.raises(UserError, match=f"a text has the marker {re.escape(marker)}, which nothing fills"):
        read_conversations(write(folder, chat(turns)))


def test_empty_and_null_keys_are_accepted(folder):
    """Exports of tables have every column in every record."""
    empty = {"tools": "[]", "objects": {"ref": [], "bbox": []}, "label": None, "chosen": "", "audios": [], "img": None}
    for record in (chat(Q) | {"conversations": None} | empty, llava(Q) | {"messages": [], "images": []}):
        assert len(read_conversations(write(folder, record))) == 1
    for nothing in ("", [], {}, [None], [""], {"bytes": None, "path": None}):  # all but [] and null were refused
        assert len(read_conversations(write(folder, chat(Q, image=nothing, videos=nothing)))) == 1
    record = llava(image="a.png", images=[], videos=None)
    assert read_conversations(write(folder, record))[0][0]["content"][0]["image"] == str(folder / "a.png")


def test_unknown_keys_are_reported_once_with_counts(folder):
    records = [chat(Q, source="x", topic="y"), chat(Q, source="z"), chat(Q)]
    records[2]["messages"][1]["name"] = "bot"
    message = r"data\.json: ignored unknown keys \('source' of records: 2, 'topic' of records: 1, 'name' of turns: 1\)"
    with pytest.warns(UserWarning, match=message) as caught:
        assert len(read_conversations(write(folder, *records))) == 3
    assert len(caught) == 1


def test_deep_nesting_was_a_recursion_error(folder):
    """Found by fuzzing, as were messages that repeated an id or a key of any length."""
    (folder / "list.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"list\.json is malformed \(maximum recursion depth"):
        read_conversations(folder / "list.json")
    (folder / "lines.jsonl").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"lines\.jsonl, line 1: the line is not JSON"):
        read_conversations(folder / "lines.jsonl")
    for nested in ('{"a":' * 900 + "7" + "}" * 900, "[" * 900 + "]" * 900):  # within the limits of the JSON reader
        (folder / "lines.jsonl").write_text(json.dumps(chat(Q))[:-1] + f', "objects": {{}}, "note": {nested}}}')
        with pytest.warns(UserWarning) if "7" in nested else contextlib.nullcontext():
            assert len(read_conversations(folder / "lines.jsonl")) == 1
    for record in ({"id": "x" * 5000}, {"x" * 5000: 1}):
        with pytest.raises(UserError, match="expected a record with one of") as raised:
            read_conversations(write(folder, record))
        assert len(str(raised.value)) < 700


def test_media_folder(folder, tmp_path_factory):
    """Relative paths refer to `media`, or by default to the folder of the file."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write(elsewhere, llava(image="a.png"))
    assert read_conversations(path, media=folder)[0][0]["content"][0]["image"] == str(folder / "a.png")
    with pytest.raises(ValueError, match="does not exist"):
        read_conversations(path)
