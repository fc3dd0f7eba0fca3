"""Images load from every kind of source; what is no image or video is refused by name."""

import base64
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from liger_jax.errors import UserError
from liger_jax.inputs.images import load_image
from tests._support.processing import (
    STORED,
    user,
)


def test_images_load_from_every_kind_of_source(tmp_path):
    image = Image.fromarray(STORED["image/up30x40"])
    path = tmp_path / "an image.png"
    image.save(path)
    encoded = path.read_bytes()
    data_url = "data:image/png;base64," + base64.b64encode(encoded).decode()
    broken = data_url.replace("base64,", "\nbase64,\r\n")  # data URLs with line breaks were refused
    broken = "\n" + "\n".join(broken[start : start + 76] for start in range(0, len(broken), 76)) + "\n"
    quoted = data_url.replace("+", "%2B").replace("=", "%3D")
    for source in (image, STORED["image/up30x40"], path, str(path), path.as_uri(), data_url, broken, quoted, encoded):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), STORED["image/up30x40"])


@pytest.fixture(scope="module")
def broken_file(tmp_path_factory):
    """Returns the path of an image file that is truncated in the middle."""
    path = tmp_path_factory.mktemp("broken") / "half.png"
    file = io.BytesIO()
    Image.fromarray(STORED["image/noise64x64"]).save(file, "PNG")
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    return path


def test_error_names_a_truncated_file(processor, broken_file):
    with Image.open(broken_file) as opened:
        for source in (broken_file, opened):
            with pytest.raises(ValueError, match=r"half\.png.*cannot be decoded"):
                processor([user({"type": "image", "image": source})])


def test_error_names_a_file_that_is_not_an_image(processor, tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"note\.png' cannot be decoded \(its format is unknown, or its header"):
        processor([user({"type": "image", "image": tmp_path / "note.png"})])


def test_error_names_a_missing_file(processor):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        processor([user({"type": "image", "image": "nowhere.png"})])


def encode(image, format):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def damaged(content, original, replacement):
    """Returns a file with other bytes, and for a chunk of a PNG also the checksum of its new name."""
    place = content.index(original)
    content = content[:place] + replacement + content[place + len(original) :]
    if replacement.isalpha():
        end = place + 4 + int.from_bytes(content[place - 4 : place])
        content = content[:end] + zlib.crc32(content[place:end]).to_bytes(4) + content[end + 4 :]
    return content


PNG, DDS = encode(Image.new("P", (4, 4)), "PNG"), encode(Image.new("RGB", (4, 4)), "DDS")
BAD_IMAGES = {
    "no pixels": (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\]; expected at least one pixel"),
    "no pixels, PIL": (Image.new("RGB", (0, 4)), r"at least one pixel"),
    "complex": (
        np.zeros((5, 5, 3), complex),
        r"array of complex128 \[5, 5, 3\]; expected uint8, uint16 or floats of shape",
    ),
    "float": (np.full((5, 5, 3), 255.0), r"floats from 255.0 to 255.0; expected 0 to 1"),
    "four channels": (np.zeros((5, 5, 4), np.uint8), r"array of uint8 \[5, 5, 4\]"),
    "channels first": (np.zeros((3, 50, 40), np.uint8), r"array of uint8 \[3, 50, 40\]"),
    "too long": (np.zeros((1, 201, 3), np.uint8), r"201x1 .*at most 200 times the other"),
    "web": ("https://example.com/a.png", r"https://example.com/a.png.*have to be downloaded"),
    "data without base64": ("data:image/png,abc", "expected a data URL like data:image/<type>;base64"),
    "bad base64": ("data:image/png;base64,a", r"\(data:image/png;base64 URL\) is not valid base64"),
    "bad bytes": (b"abc", r"\(3 bytes\) cannot be decoded"),
    "raw base64": ("iVBORw0KGgo" * 1000, "not an existing file"),
    "number": (3, "of type int; expected a PIL image"),
    # found by fuzzing: Pillow raised an AssertionError and a NotImplementedError
    "palette missing": (damaged(PNG, b"PLTE", b"pLTE"), r"bytes\) cannot be decoded \(AssertionError\)"),
    "unknown DDS": (damaged(DDS, DDS[80:84], b"\0\x20\0\0"), r"cannot be decoded \(Unknown pixel format flags 8192\)"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(processor, case):
    image, message = BAD_IMAGES[case]
    with pytest.raises(UserError, match=message):
        processor([user({"type": "image", "image": image})])


BAD_VIDEOS = {
    "file": ("clip.mp4", "'clip.mp4'; expected its frames.*not decoded here"),
    "empty": ([], "at least one frame"),
    "sizes": ([Image.new("RGB", (30, 30)), Image.new("RGB", (30, 31))], r"\(30, 30\), \(30, 31\).*one size"),
    "one image": (Image.new("RGB", (30, 30)), "'Image'; expected its frames"),
    "float": (np.full((2, 30, 30, 3), 255.0), r"floats from 255.0 to 255.0; expected 0 to 1"),
    "one array": (
        np.zeros((30, 30, 3), np.uint8),
        r"array of shape \[30, 30, 3\]; expected \[frames, height, width, 3\]",
    ),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_bad_videos_are_refused(processor, case):
    video, message = BAD_VIDEOS[case]
    with pytest.raises(ValueError, match=message):
        processor([user({"type": "video", "video": video})])
