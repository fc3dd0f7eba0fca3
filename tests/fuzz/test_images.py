"""Image files, headers, arrays and other sources: each becomes an RGB image of the right size, or a UserError."""

import io
import struct
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from liger_jax.inputs.images import MAX_PIXELS_VARIABLE, VisionSettings, image_size, load_frames, load_image, patchify
from tests._support.fuzzing import (
    ODD_NUMBERS,
    ODD_TEXTS,
    damaged_bytes,
    fuzz,
    json_values,
    mostly,
    only_user_errors,
    pick,
)

LARGEST = 10**6  # pixels, so that a header that declares more costs no memory
SETTINGS = VisionSettings(min_pixels=28 * 28, max_pixels=4 * 28 * 28)


@pytest.fixture(scope="module", autouse=True)
def limit():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MAX_PIXELS_VARIABLE, str(LARGEST))
        yield


def ramp(mode: str, size=(12, 9)) -> Image.Image:
    image = Image.linear_gradient("L").resize(size)
    return Image.merge(mode, [image] * len(mode)) if mode in ("LA", "RGBA", "CMYK", "YCbCr") else image.convert(mode)


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E], tags[0x8769] = orientation, "a ramp", {0x9003: "2026:01:01 00:00:00"}
    return tags


PAIR = {"save_all": True, "append_images": [Image.new("L", (12, 9), 200)]}
FILES = (
    *(encode(ramp(mode), "PNG") for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16")),
    encode(ramp("P"), "PNG", transparency=b"\0\x80\xff"),
    encode(ramp("RGB"), "PNG", transparency=(0, 0, 0), exif=exif(6)),
    encode(ramp("L"), "PNG", **PAIR),
    *(encode(ramp(mode), "JPEG", exif=exif(8)) for mode in ("L", "RGB", "CMYK")),
    encode(ramp("RGB"), "JPEG", progressive=True),
    encode(ramp("RGB"), "MPO", save_all=True, append_images=[ramp("RGB")]),
    *(encode(ramp("P"), "GIF", **options) for options in ({}, PAIR, {"transparency": 3})),
    *(encode(ramp(mode), "TIFF") for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F")),
    *(encode(ramp("RGB"), "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
    encode(ramp("RGB"), "TIFF", **PAIR),
    *(encode(ramp("RGBA"), "WEBP", lossless=lossless, exif=exif(5)) for lossless in (True, False)),
    *(encode(ramp(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(encode(ramp("RGB"), format) for format in ("PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000", "AVIF")),
)  # fmt: skip


def check_image(source) -> None:
    """Loads an image, and checks its size, its mode and its patches."""
    with only_user_errors():
        width, height = image_size(source)
        image = load_image(source)
        assert image.mode == "RGB"
        assert image.size in ((width, height), (height, width))
        assert width * height > 0
        pixel_values, grid = patchify([image], SETTINGS)
        assert pixel_values.shape == (np.prod(grid), 1176)
        assert np.isfinite(pixel_values).all()


@fuzz(content=damaged_bytes(pick(FILES)))
def test_image_files(content):
    check_image(content)


def png(width: int, height: int, depth: int, color: int, pixels: bytes) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def bmp(width: int, height: int, depth: int, color: int, pixels: bytes) -> bytes:
    header = struct.pack("<IIIHHIIIIII", 40, width, height, 1, depth, color, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


def gif(width: int, height: int, depth: int, color: int, pixels: bytes) -> bytes:
    size = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    frame = b"," + bytes(4) + size + b"\0" + bytes([max(2, depth)]) + bytes([len(pixels)]) + pixels + b"\0;"
    return b"GIF89a" + size + bytes([0x80, color, 0]) + bytes(6) + frame


def tiff(width: int, height: int, depth: int, color: int, pixels: bytes) -> bytes:
    tags = {256: width, 257: height, 258: depth, 259: 1, 262: color, 273: 110, 277: 1, 278: height, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def jpeg(width: int, height: int, depth: int, color: int, pixels: bytes) -> bytes:
    content = encode(ramp("RGB"), "JPEG")
    place = content.index(b"\xff\xc0") + 4
    frame = struct.pack(">BHHB", depth, height & 0xFFFF, width & 0xFFFF, color)
    return content[:place] + frame + content[place + len(frame) :]


def webp(width: int, height: int, depth: int, color: int, pixels: bytes) -> bytes:
    size = struct.pack("<I", (width - 1) & 0xFFFFFF)[:3] + struct.pack("<I", (height - 1) & 0xFFFFFF)[:3]
    chunk = b"VP8X" + struct.pack("<II", 10, color) + size
    lossless = encode(ramp("RGB"), "WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(chunk) + len(lossless)) + b"WEBP" + chunk + lossless


SIDES = st.sampled_from(
    [1, 8, 12, *(number for number in ODD_NUMBERS if isinstance(number, int) and 0 <= number < 2**32)]
)


@fuzz(
    make=st.sampled_from([png, bmp, gif, tiff, jpeg, webp]),
    sides=st.tuples(SIDES, SIDES),
    depth=st.sampled_from([1, 2, 4, 8, 16, 24, 32, 0, 7]),
    color=st.integers(0, 7),
    pixels=st.binary(max_size=40) | st.just(bytes(1000)),
)
def test_image_headers(make, sides, depth, color, pixels):
    """Headers with any size and pixel format, in front of few pixels."""
    check_image(make(*sides, depth, color, pixels[:255] if make is gif else pixels))


DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    st.sampled_from(["u1", "u2", ">u2", "f2", "f4", "f8", "i4", "?", "O", "V4", "U3"]).map(np.dtype),
    st.sampled_from([np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype([("r", "u1")])]),
)
SHAPES = st.one_of(
    hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 3, 3, 4])),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)


@st.composite
def arrays(draw, shapes=SHAPES):
    """Draws an array of any dtype and shape, or one of levels in 0..1, 0..255 or 0..65535."""
    if draw(st.booleans()):
        dtype, limit = draw(st.sampled_from([("u1", 255), ("u2", 65535), ("f4", 1), ("f8", 1), ("f2", 1), ("i8", 255)]))
        values = np.random.default_rng(draw(st.integers(0, 99))).random(draw(shapes)) * limit
        return values.astype(dtype)
    shape, dtype = draw(shapes), draw(DTYPES)
    if dtype.kind in "biufcmMSU":
        return draw(hnp.arrays(dtype, shape))
    return np.zeros(shape, dtype)


@fuzz(array=arrays())
def test_image_arrays(array):
    """An array that is accepted gives an image of its size, and never a constant one unless it is constant itself."""
    check_image(array)
    with only_user_errors():
        image = np.asarray(load_image(array))
        assert image.shape[:2] == array.shape[:2]
        assert (image.min() == image.max()) <= (array.min() == array.max())


def pil_images() -> st.SearchStrategy:
    modes = [
        "1",
        "L",
        "P",
        "RGB",
        "RGBA",
        "LA",
        "La",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "I;16",
        "I;16B",
        "PA",
    ]
    sizes = st.tuples(st.integers(0, 9), st.integers(0, 9))
    return st.builds(Image.new, st.sampled_from(modes), sizes) | pick(FILES).map(
        lambda content: Image.open(io.BytesIO(content))
    )


FRAMES = arrays(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.just(3)))
VIDEOS = mostly(FRAMES, st.lists(mostly(pil_images(), arrays()), max_size=3))
OTHERS = json_values() | pick(ODD_TEXTS).map(Path) | st.binary(max_size=20)


@fuzz(source=mostly(VIDEOS | pil_images(), OTHERS))
def test_image_sources(source):
    """Anything at all as an image, and as a video."""
    check_image(source)
    with only_user_errors():
        frames = load_frames(source)
        assert len(frames) == len(source) and len({frame.size for frame in frames}) == 1
        patchify(frames, SETTINGS)
