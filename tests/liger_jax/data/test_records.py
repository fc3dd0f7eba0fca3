"""Files of conversations: every format becomes the same messages, every broken record is named."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from liger_jax.data.records import read_conversations

TURNS = [("human", "<image>\nWhich digit?"), ("gpt", "7")]


def picture(size=(28, 28)):
    file = io.BytesIO()
    Image.effect_noise(size, 60).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    return tmp_path


def llava(turns=TURNS, **more):
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


def chat(turns=TURNS, **more):
    roles = {"human": "user", "gpt": "assistant"}
    return {"messages": [{"role": roles.get(who, who), "content": text} for who, text in turns], **more}


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
    """A JSON list or a record a line, in any format: the same messages."""
    (found,) = read_conversations(write(folder, record, lines=lines))
    assert found == [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(folder / "a.png")}, {"type": "text", "text": "Which digit?"}],
        },
        {"role": "assistant", "content": "7"},
    ]


def test_several_pictures_videos_and_texts(folder):
    """Markers are filled in order, wherever they stand; frames make a video; parts go through; texts stay texts."""
    turns = [
        ("system", "Read."),
        ("human", "A <image> and <image>\nthen <video>, equal?"),
        ("gpt", "No."),
        ("human", "Why?"),
    ]
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    raw = base64.b64encode(picture((1, 1))).decode()
    record = llava([*turns, ("gpt", "Look.")], image=[url, raw], video=[["a.png", "a.png"]])
    (found,) = read_conversations(write(folder, record))
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user", "assistant"]
    kinds = [(part["type"], part[part["type"]]) for part in found[1]["content"]]
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


def test_parts_with_pictures_of_their_own_or_of_the_record(folder):
    """A content that is a list: paths from the data's folder on, the record's next picture, a marker in a text part."""
    content = picture()
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
    found = [part.get("image", part.get("text")) for part in user["content"]]
    assert found == [path, f"file://{folder}/a.png", content, path, path, "Which?"]
    assert user["content"][0]["max_pixels"] == 784


def test_the_working_directory_does_not_matter(folder, monkeypatch):
    """A run that was begun elsewhere goes on: its data, by a relative name or an absolute one, is the same."""
    path = write(folder, llava(image="a.png"))
    monkeypatch.chdir(folder.parent)
    assert read_conversations(f"{folder.name}/data.json") == read_conversations(path)


def test_files_of_other_encodings(folder):
    path = write(folder, llava(image="a.png"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Windows writes them
    assert len(read_conversations(path)) == 1
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.json is not UTF-8"):
        read_conversations(path)


def test_the_processor_takes_them(folder):
    """From a file to arrays: pictures are read, and only the answer is trained."""
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
    "found list": [],
    "expected a list of turns": {"messages": []},
    "'from' is 'robot'": llava([("robot", "?")]),
    "expected {'role'": {"messages": [{"role": "user"}]},
    "1 images, but 0 markers": llava([("human", "Which?"), ("gpt", "7")], image="a.png"),
    "more markers <image> than images": llava([("human", "<image><image>"), ("gpt", "7")], image="a.png"),
    "more markers <video>": llava([("human", "<video>"), ("gpt", "7")]),
    "b.png does not exist": llava(image="b.png"),
    "both 'images' and 'image'": llava(image="a.png", images=["a.png"]),
    "would have to be downloaded": llava(image="https://example.com/a.png"),
    "the video 'a.mp4'; expected a list of its frames": llava([("human", "<video>"), ("gpt", "7")], video="a.mp4"),
    "is no picture": llava(image=[3]),
    "the picture ['a.png']": llava(images=[["a.png"]]),
    "and is no base64": llava(image="?" * 2000),  # longer than a file's name can be
    "does not exist, and is no": llava(image="a/long/path/to/a/picture/that/has/a/mistake/in/it/somewhere.png"),
    "no answer": llava([("human", "Which?")]),
    "'role' is ['user']": {"messages": [{"role": ["user"], "content": "?"}]},
    "no.png' does not exist": llava(image="file:///no.png"),
    "is no file": llava(image="."),
    "half of a surrogate pair": llava([("human", "a \ud83d"), ("gpt", "7")]),
    "the record lists no more of them": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "expected one of type": {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
    "asks for resized_height": {
        "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "resized_height": 280}]}]
    },
    "expected a text or a list": {"messages": [{"role": "user", "content": 3}]},
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_records_are_named_or_left_out(folder, message):
    """The file, the record's place and id, what was found; or the others, with a warning that says the same."""
    record = BROKEN[message]
    if isinstance(record, dict):
        record = {"id": "x7", **record}
    path = write(folder, llava(image="a.png"), record)
    with pytest.raises(ValueError, match="record 2") as error:
        read_conversations(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert ("(id 'x7')" in str(error.value)) == isinstance(record, dict)
    with pytest.warns(UserWarning, match="left out 1 of 2 records: record 2"):
        assert len(read_conversations(path, on_error="skip")) == 1


def test_broken_files(folder):
    """No file, no JSON, nothing in it, nothing usable in it, an option that means nothing."""
    with pytest.raises(FileNotFoundError):
        read_conversations(folder / "none.json")
    bad = folder / "bad.json"
    for text, message in {"[1, 2": "not a JSON list", "": "no usable record", "{oops\n": "line 1: not JSON"}.items():
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_conversations(bad)
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        read_conversations(bad, on_error="ignore")


def test_media_folder(folder, tmp_path_factory):
    """Relative paths start at `media`, or else at the file."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write(elsewhere, llava(image="a.png"))
    assert read_conversations(path, media=folder)[0][0]["content"][0]["image"] == str(folder / "a.png")
    with pytest.raises(ValueError, match="does not exist"):
        read_conversations(path)
