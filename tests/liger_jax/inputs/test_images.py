"""Patches of images and videos equal transformers', stored by tests/references/make_processing.py, in all color modes."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from transformers import Qwen2VLImageProcessorPil

from liger_jax.errors import UserError
from liger_jax.inputs.images import VisionSettings, image_size, load_frames, load_image, patchify, smart_resize
from tests._support.processing import HUB_LIMITS, SMALL_LIMITS, STORED

IMAGES = sorted({key.split("/")[1] for key in STORED if key.startswith("image/")})
MODES = sorted({key.split("/")[1] for key in STORED if key.startswith("mode/")})
VIDEOS = sorted({key.split("/")[1] for key in STORED if key.startswith("video/")})
GREY_LEVEL = 1 / 255 / 0.26130258  # in normalized units, for the channel with the smallest standard deviation
RAMP = np.linspace(0, 65535, 56 * 60).astype(np.uint16).reshape(56, 60)


def test_smart_resize_equals_transformers_on_840_cases():
    for height, width, low, high, new_height, new_width in STORED["smart_resize"].tolist():
        if new_height < 0:
            with pytest.raises(ValueError, match="200 times"):
                smart_resize(height, width, 28, low, high)
        else:
            assert smart_resize(height, width, 28, low, high) == (new_height, new_width)


def test_smart_resize_accepts_an_aspect_ratio_of_exactly_200():
    assert smart_resize(28, 5600) == (28, 5600)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(("limits", "values"), [("default", HUB_LIMITS), ("small", SMALL_LIMITS)])
def test_patches_equal_transformers_bit_for_bit(name, limits, values):
    pixel_values, grid = patchify([load_image(STORED[f"image/{name}"])], VisionSettings(**values))
    assert pixel_values.dtype == np.float32
    np.testing.assert_array_equal(pixel_values, STORED[f"{limits}/{name}/pixel_values"])
    np.testing.assert_array_equal([grid], STORED[f"{limits}/{name}/image_grid_thw"])


@pytest.mark.parametrize("mode", MODES)
def test_color_modes_equal_transformers(mode):
    encoded = STORED[f"mode/{mode}/file"].tobytes()
    for source in (encoded, Image.open(io.BytesIO(encoded))):
        pixel_values, _ = patchify([load_image(source)], VisionSettings())
        np.testing.assert_array_equal(pixel_values, STORED[f"mode/{mode}/pixel_values"])


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "png", "array", "rgb array", "int32"])
def test_16_bit_images_turned_white(mode, tmp_path):
    """Everything above 255 turned white. Now the upper 8 bits count, whatever the source is."""
    sources = [Image.fromarray(RAMP)]
    if mode in ("png", "I;16B"):
        for name in ("a.png", "a.tif"):
            image = Image.fromarray(RAMP.astype(np.int32)).convert("I;16B") if mode == "I;16B" else sources[0]
            if mode == "I;16B" and name == "a.png":
                sources = [image]
                continue
            image.save(tmp_path / name)
            sources += [tmp_path / name, (tmp_path / name).read_bytes(), Image.open(tmp_path / name)]
    elif mode != "I;16":
        values = {"I": RAMP.astype(np.int32), "rgb array": np.stack([RAMP] * 3, -1), "int32": RAMP.astype(np.int32)}
        array = values.get(mode, RAMP)
        sources = [Image.fromarray(array) if mode == "I" else array]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.stack([RAMP >> 8] * 3, -1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_float_images_turned_black(dtype, tmp_path):
    """Floats in 0..1 were truncated to 0."""
    values = (RAMP / 65535).astype(dtype)
    expected = np.stack([np.rint(values.astype(np.float64) * 255)] * 3, -1)
    sources = [values, np.stack([values] * 3, -1)]
    if dtype == "float32":
        Image.fromarray(values).save(tmp_path / "f.tif")
        sources += [Image.fromarray(values), tmp_path / "f.tif", (tmp_path / "f.tif").read_bytes()]
    for source in sources:
        np.testing.assert_allclose(np.asarray(load_image(source)), expected, atol=int(dtype == "float16"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.int32) * 2, "integers from 0 to 131070; expected 0 to 65535"),
        (RAMP.astype(np.int32) - 1, "integers from -1 to 65534; expected 0 to 65535"),
        (RAMP >> 8, "integers from 0 to 255, which would all become the level 0 of 255"),
        (RAMP.astype(np.float32), "floats from 0.0 to 65535.0; expected 0 to 1"),
        (RAMP.astype(np.float32) / 2**26, "which would all become the level 0 of 255"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan to nan; expected 0 to 1"),
    ],
)
def test_values_that_cannot_be_scaled_are_refused(values, message):
    for source in (values, Image.fromarray(values)):
        with pytest.raises(UserError, match=message):
            load_image(source)
    assert np.asarray(load_image(np.full((4, 4), 7, np.uint16))).max() == 0  # black as stored


def test_transparent_images_turned_black(tmp_path):
    """Black ink on a transparent background became a black rectangle. Every source is composited on white."""
    ink = np.zeros((30, 40, 4), np.uint8)
    ink[10:20, 5:35, 3] = 255
    ink[20:25, 5:35] = (200, 100, 0, 128)
    logo = Image.fromarray(ink)
    grey = logo.convert("LA")
    palette = logo.quantize(8)
    keyed = Image.fromarray(np.where(ink[..., 3] > 200, 0, 9).astype(np.uint8))
    keyed16 = Image.fromarray(np.where(ink[..., 3] > 200, 0, 65535 - 256).astype(np.uint16))
    images = {
        "rgba": logo,
        "la": grey,
        "p": palette,
        "key": keyed,
        "key16": keyed16,
        "pa": grey.convert("L").convert("P"),
    }
    images["pa"].putalpha(grey.getchannel("A"))
    images |= {"La": grey.convert("La"), "RGBa": logo.convert("RGBa")}
    for name, image in images.items():
        sources = [image]
        if name in ("rgba", "la", "p", "key", "key16"):
            key = {"key": {"transparency": 9}, "key16": {"transparency": 65535 - 256}}.get(name, {})
            image.save(tmp_path / f"{name}.png", **key)
            opened = Image.open(tmp_path / f"{name}.png")
            path = tmp_path / f"{name}.png"
            sources = [opened, path, path.read_bytes()] + ([] if key else [image])
        for source in sources:
            pixels = np.asarray(load_image(source))
            assert (pixels[0, 0] == 255).all(), name
            assert (pixels[12, 10] == 0).all(), name
        if name == "rgba":
            np.testing.assert_allclose(pixels[22, 10], np.array([200, 100, 0]) * 128 / 255 + 127, atol=1)
        if name in ("rgba", "la", "p", "key"):  # transformers composites PIL images in the same way
            live = Qwen2VLImageProcessorPil()(images=Image.open(path), return_tensors="np")["pixel_values"]
            np.testing.assert_array_equal(patchify([load_image(path)], VisionSettings())[0], live)


def test_color_spaces():
    rgb = Image.fromarray(STORED["image/up30x40"])
    lab = ImageCms.profileToProfile(
        rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    for image, tolerance in ((lab, 16), (rgb.convert("YCbCr"), 3), (rgb.convert("HSV"), 12), (rgb.convert("CMYK"), 0)):
        np.testing.assert_allclose(np.asarray(load_image(image)).astype(int), np.asarray(rgb), atol=tolerance)
    file = io.BytesIO()
    lab.save(file, "TIFF")
    with pytest.raises(UserError, match="cannot be decoded"):
        load_image(file.getvalue()[:-200])
    bits = np.eye(28, dtype=bool)
    for source in (bits, Image.fromarray(bits)):
        np.testing.assert_array_equal(np.asarray(load_image(source))[..., 0], np.eye(28) * 255)


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_equal_transformers(name):
    """Within one grey level for resized frames: transformers' video backend is torchvision, not PIL."""
    frames = STORED[f"video/{name}/frames"]
    pixel_values, grid = patchify(load_frames(frames), VisionSettings(**HUB_LIMITS))
    expected = STORED[f"video/{name}/pixel_values_videos"]
    np.testing.assert_array_equal([grid], STORED[f"video/{name}/video_grid_thw"])
    resized = frames.shape[1] % 28 or frames.shape[2] % 28
    np.testing.assert_allclose(pixel_values, expected, rtol=0, atol=1.01 * GREY_LEVEL if resized else 1e-6)
    from_list = patchify(load_frames([Image.fromarray(frame) for frame in frames]), VisionSettings(**HUB_LIMITS))
    np.testing.assert_array_equal(from_list[0], pixel_values)


def test_patches_equal_an_element_by_element_reference():
    """Axis 0 is (t, h/2, w/2, 2, 2), axis 1 is (channel, frame, y, x), written as loops."""
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (3, 56, 84, 3), dtype=np.uint8)
    pixel_values, grid = patchify(load_frames(video), VisionSettings())
    assert grid == (2, 4, 6)
    video = np.concatenate([video, video[-1:]])
    mean, std = VisionSettings().image_mean, VisionSettings().image_std
    rows = [
        [
            (video[2 * t + frame, 14 * y + py, 14 * x + px, channel] / 255 - mean[channel]) / std[channel]
            for channel in range(3)
            for frame in range(2)
            for py in range(14)
            for px in range(14)
        ]
        for t in range(2)
        for block_y in range(2)
        for block_x in range(3)
        for y in (2 * block_y, 2 * block_y + 1)
        for x in (2 * block_x, 2 * block_x + 1)
    ]
    np.testing.assert_allclose(pixel_values, rows, rtol=0, atol=1e-6)


def test_very_large_images_were_refused_whatever_the_setting(tmp_path, monkeypatch):
    """Pillow refuses images over 179 megapixels, and warns from 89 on; the limit here is a setting."""
    path = tmp_path / "map.png"
    Image.new("1", (20_000, 9_000), 1).save(path)
    assert image_size(path) == (20_000, 9_000)  # 180 megapixels: no error, no warning
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a smaller image, refused by Pillow in the same way
    image = Image.fromarray(STORED["image/noise64x64"])
    image.save(tmp_path / "small.png")
    for source in (tmp_path / "small.png", (tmp_path / "small.png").read_bytes()):
        np.testing.assert_array_equal(np.asarray(load_image(source)), STORED["image/noise64x64"])
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setenv("LIGER_JAX_MAX_IMAGE_PIXELS", "4095")
    message = r"small\.png' is 64x64 .*expected at most 4095 pixels\. Set the environment variable LIGER_JAX_MAX_IMAGE"
    with pytest.raises(UserError, match=message):
        load_image(tmp_path / "small.png")
    monkeypatch.setenv("LIGER_JAX_MAX_IMAGE_PIXELS", "many")
    with pytest.raises(UserError, match="LIGER_JAX_MAX_IMAGE_PIXELS is 'many'; expected a number of pixels"):
        load_image(tmp_path / "small.png")


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(STORED["image/up30x40"])
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == (30, 40)
    with Image.open(tmp_path / "turned.png") as opened:  # an image opened by the user was not turned
        assert load_image(opened).tobytes() == load_image(tmp_path / "turned.png").tobytes()
        upright = ImageOps.exif_transpose(opened)
        assert opened.size == (40, 30)
    assert load_image(upright).tobytes() == upright.tobytes()
