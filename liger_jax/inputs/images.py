"""Turns images into patches with numpy and Pillow, bit for bit as transformers' `Qwen2VLImageProcessorPil` does."""

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from liger_jax.errors import UserError
from liger_jax.inputs.sources import ENCODED, open_encoded

MAX_ASPECT_RATIO = 200
ORIENTATION = 0x0112  # EXIF tag
# Environment variable: the largest image that is decoded, in pixels. A gigapixel takes 3 GB of memory as RGB.
MAX_PIXELS_VARIABLE, DEFAULT_MAX_PIXELS = "LIGER_JAX_MAX_IMAGE_PIXELS", 10**9
_pillow_lock = threading.Lock()
LARGEST_PATCH = 1024  # patch_size, temporal_patch_size and merge_size
# Ranges of image_mean and image_std within which every normalized pixel is finite.
LARGEST_LEVEL, SMALLEST_STD = 1e6, 1e-6
# Preprocessing steps that always run like this. A checkpoint that asks for something else is refused.
FIXED_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
# The names of the limits here, and in the `size` entry of transformers' JSON.
LIMIT_KEYS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))


@dataclasses.dataclass(frozen=True)
class VisionSettings:
    """Settings for turning images, or the frames of a video, into patches. The defaults are transformers' for images."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    min_frames: int = 4  # of a video that is sampled
    max_frames: int = 768

    @property
    def factor(self) -> int:
        """Side of the square that becomes one token, in pixels. The sides of a resized image are multiples of it."""
        return self.patch_size * self.merge_size

    def with_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> Self:
        """Returns the settings with new size limits. A limit that is not passed is adjusted if it conflicts with the other.

        Raises:
            UserError: a limit is not a positive integer, `min_pixels > max_pixels`, `min_pixels` is over the largest image
                (`largest_image`), or `max_pixels` is too small for one token.
        """
        min_pixels = None if min_pixels is None else _positive_integer("min_pixels", min_pixels)
        max_pixels = None if max_pixels is None else _positive_integer("max_pixels", max_pixels)
        if min_pixels is None:
            min_pixels = self.min_pixels if max_pixels is None else min(self.min_pixels, max_pixels)
        if max_pixels is None:
            max_pixels = max(self.max_pixels, min_pixels)
        if min_pixels > max_pixels:
            raise UserError(f"min_pixels is {min_pixels}; expected at most max_pixels, {max_pixels}")
        if min_pixels > (limit := largest_image()):
            raise UserError(
                f"min_pixels is {min_pixels}; expected at most {limit}, since images are enlarged to it. The environment "
                f"variable {MAX_PIXELS_VARIABLE} raises this limit"
            )
        if max_pixels < self.factor**2:
            raise UserError(
                f"max_pixels is {max_pixels}; expected at least {self.factor**2}, one token of {self.factor}x{self.factor} "
                "pixels"
            )
        return dataclasses.replace(self, min_pixels=min_pixels, max_pixels=max_pixels)

    def resized(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """Returns the (height, width) that an image or each of the frames of a video is resized to."""
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)

    def sample(self, frames: int, fps: float, target_fps: float) -> np.ndarray:
        """Returns the frames of a video to keep: evenly spaced from the first one on, and an even number of them.

        The rule is that of transformers for Qwen2-VL and Qwen2.5-VL: `min_frames` to `max_frames`, and not more than there
        are.

        Example:
            >>> VisionSettings().sample(100, 25.0, 2.0).tolist()
            [0, 12, 25, 37, 50, 62, 75, 87]
        """
        merge = self.temporal_patch_size
        count = min(max(frames / fps * target_fps, self.min_frames), self.max_frames, frames)
        count = math.floor(count / merge) * merge or min(merge, frames)
        return (np.arange(count) * (frames / count)).astype(np.float32).astype(int)  # float32, as in transformers

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **defaults: Any) -> Self:
        """Reads the settings from transformers' JSON.

        The limits are `min_pixels` and `max_pixels`, or else the entries of `size`, which exist under two names each.

        Args:
            config: the object in preprocessor_config.json or a similar file.
            defaults: values of fields that `config` does not set.

        Raises:
            UserError: the JSON asks for other preprocessing steps, or a value has another form. The message names the key.
        """
        if not isinstance(config, Mapping):
            raise UserError(f"image settings are {config!r:.60}; expected a JSON object")
        config = {key: value for key, value in config.items() if key != "do_convert_rgb" or value is not None}
        unsupported = [
            f"{key} is {config[key]!r:.60} (expected {step!r})"
            for key, step in FIXED_STEPS.items()
            if config.get(key, step) != step
        ]
        rescale_factor = config.get("rescale_factor", 1 / 255)
        if not isinstance(rescale_factor, float) or not math.isclose(rescale_factor, 1 / 255):
            unsupported.append(f"rescale_factor is {config['rescale_factor']!r:.60} (expected 1/255)")
        if config.get("cap_pixels_per_frame"):
            unsupported.append(f"cap_pixels_per_frame is {config['cap_pixels_per_frame']!r:.60} (expected False)")
        if unsupported:
            raise UserError("unsupported preprocessing: " + ", ".join(unsupported))
        names = {field.name for field in dataclasses.fields(cls)}
        limits = {name: defaults.pop(name) for name, _ in LIMIT_KEYS if name in defaults} | _read_limits(config)
        values = defaults | {
            key: _read_value(key, value) for key, value in config.items() if key in names - limits.keys()
        }
        values = {key: value for key, value in values.items() if value is not None}
        return cls(**values).with_limits(**limits)

    def to_hf(self) -> dict[str, Any]:
        """Returns the settings as JSON values, in the layout that every transformers version with Qwen2-VL reads."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        size = {edge: values[name] for name, edge in LIMIT_KEYS}
        return values | {"size": size, "rescale_factor": 1 / 255} | FIXED_STEPS


def _read_limits(config: Mapping[str, Any]) -> dict[str, int]:
    """Returns min_pixels and max_pixels: those of the configuration, or else of its `size`; only those that are set.

    Raises:
        UserError: `size` is not an object, has other keys (transformers refuses them too), or leaves a limit open.
    """
    limits = {name: config[name] for name, _ in LIMIT_KEYS if config.get(name) is not None}
    size = config.get("size")
    if size is None:
        return limits
    keys = {key for pair in LIMIT_KEYS for key in pair}
    if not isinstance(size, Mapping) or not size or not keys >= size.keys():
        raise UserError(
            f"size is {size!r:.100}; expected an object with shortest_edge and longest_edge, in pixels of area"
        )
    for name, edge in LIMIT_KEYS:
        if name not in limits:
            limit = size.get(edge, size.get(name))
            if limit is None:
                raise UserError(f"size is {size!r:.100}; expected it to have {edge} too, or {name} next to it")
            limits[name] = limit
    return limits


def _read_value(name: str, value: Any) -> Any:
    """Returns a value of transformers' JSON as that of a field of VisionSettings. Raises UserError for another form."""
    if name in ("min_pixels", "max_pixels", "min_frames", "max_frames"):
        return None if value is None else _positive_integer(name, value)
    if name not in ("image_mean", "image_std"):
        if (size := _positive_integer(name, value)) > LARGEST_PATCH:
            raise UserError(f"{name} is {size}; expected at most {LARGEST_PATCH}")
        return size
    # transformers also accepts one number for all channels
    numbers = value if isinstance(value, list | tuple) else [value] * 3
    smallest = SMALLEST_STD if name == "image_std" else -LARGEST_LEVEL
    if len(numbers) != 3 or not all(
        isinstance(number, int | float) and not isinstance(number, bool) and smallest <= number <= LARGEST_LEVEL
        for number in numbers
    ):
        raise UserError(f"{name} is {value!r:.60}; expected three numbers from {smallest:g} to {LARGEST_LEVEL:g}")
    return tuple(map(float, numbers))


def _positive_integer(name: str, value: Any) -> int:
    """Returns an integer, also for a float such as 1003520.0. Raises UserError for any other value."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name} is {value!r:.60}; expected a positive integer")
    return int(value)


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280
) -> tuple[int, int]:
    """Returns the (height, width) that an image is resized to.

    Both sides are multiples of `factor`, the area is within the limits, and the aspect ratio is kept as far as possible.
    Each side is rounded (half to even) to a multiple of `factor`. If the area is then too large, both sides are divided
    by sqrt(height * width / max_pixels) and rounded down (not below `factor`). If it is too small, they are multiplied
    by sqrt(min_pixels / (height * width)) and rounded up. The result equals that of transformers' `smart_resize`.

    Raises:
        UserError: a side is zero, or one side is more than 200 times the other.

    Example:
        >>> smart_resize(561, 278)
        (560, 280)
    """
    if min(height, width) < 1:
        raise UserError(f"image is {width}x{height} (width x height); expected at least one pixel")
    check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def check_aspect_ratio(height: int, width: int) -> None:
    """Raises UserError if one side is more than 200 times the other."""
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise UserError(
            f"image is {width}x{height} (width x height); expected one side to be at most {MAX_ASPECT_RATIO} times the "
            "other"
        )


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_image(source: Any) -> Image.Image:
    """Returns an RGB image.

    The image is rotated according to its EXIF tag, and transparent pixels are composited on white, as in transformers
    5.22 and later. The upper 8 of 16 bits are used, and floats in 0..1 are multiplied by 255. The rules are the same for
    every kind of source.

    Args:
        source: a PIL image, an array [H, W, 3] or [H, W] (uint8, uint16, or floats in 0..1), a path, a `file://` or
            base64 `data:` URL, or the bytes of a file.

    Raises:
        NotFoundError: the path does not exist.
        UserError: the source is of another type, has no pixels, cannot be decoded, or has values that cannot be scaled
            to 8 bits. The message names it.
    """
    with _open_image(source) as image:
        if isinstance(image, np.ndarray):
            return Image.fromarray(_to_bytes(image, "(array)")).convert("RGB")
        return _to_rgb(ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image of any mode as RGB; opaque 8-bit images as `convert("RGB")` does."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        levels = _to_bytes(values, repr(getattr(image, "filename", "(PIL)")))
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):  # PNG: the one value that is transparent
            levels = np.where(values == transparent, np.uint8(255), levels)
        return Image.fromarray(levels).convert("RGB")
    if image.mode == "LAB":  # Pillow's convert has no LAB
        image.load()  # raises an OSError for damaged pixels, which ImageCms would hide
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None, "profileToProfile returns None only in place"
        return converted
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Returns uint8: the upper 8 of 16 bits, or floats in 0..1 times 255.

    Raises:
        UserError: values outside these ranges, or different values that all become the same level.
    """
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    limit, kind = (1, "float") if values.dtype.kind == "f" else (2**16 - 1, "integer")
    if values.dtype == bool:
        return values * np.uint8(255)
    if not (0 <= low <= high <= limit):  # also false for NaN
        raise UserError(
            f"image {name} holds {kind}s from {low} to {high}; expected 0 to {limit}, or values scaled to uint8"
        )
    levels = np.rint(values * values.dtype.type(255)) if kind == "float" else values >> 8
    levels = levels.astype(np.uint8)
    if low != high and levels.min() == levels.max():
        raise UserError(
            f"image {name} holds {kind}s from {low} to {high}, which would all become the level {levels.flat[0]} of 255; "
            f"expected values spread over 0 to {limit}, or scaled to uint8"
        )
    return levels


def image_size(source: Any) -> tuple[int, int]:
    """Returns the (width, height) of an image before its EXIF rotation. Reads only the header of a file.

    Raises:
        NotFoundError, UserError: as `load_image`, except for damaged pixels.
    """
    with _open_image(source) as image:
        return image.shape[1::-1] if isinstance(image, np.ndarray) else image.size


@contextlib.contextmanager
def _open_image(source: Any) -> Iterator[Image.Image | np.ndarray]:
    """Opens an image, whose pixels may not be decoded yet, or yields an array unchanged.

    Decoding errors in the `with` block name the source.
    """
    file: Any = contextlib.nullcontext()
    image: Image.Image
    if isinstance(source, ENCODED):
        file, name = open_encoded(source)
    elif isinstance(source, Image.Image):
        # Image.open reads lazily: an image from a damaged file fails only when its pixels are used
        image, name = source, repr(getattr(source, "filename", "(PIL)"))
        if 0 in image.size:
            raise UserError(f"image {name} has size {image.size}; expected at least one pixel")
    elif isinstance(source, np.ndarray):
        if source.shape[2:] not in ((), (3,)) or source.ndim < 2 or source.dtype.kind not in "buif":
            raise UserError(
                f"image is an array of {source.dtype} {list(source.shape)}; expected uint8, uint16 or floats of shape "
                "[height, width, 3] or [height, width]"
            )
        if source.size == 0:
            raise UserError(f"image is an array of shape {list(source.shape)}; expected at least one pixel")
        yield source  # outside of the `try` below: there is nothing to decode
        return
    else:
        raise UserError(
            f"image is of type {type(source).__name__}; expected a PIL image, a uint8 array [height, width, 3], a path, "
            "a file:// or data: URL, or encoded bytes"
        )
    with file:
        try:
            yield _open_file(file, name) if isinstance(source, ENCODED) else image
        except UserError:
            raise
        except UnidentifiedImageError as error:  # its message shows the file as a Python object
            raise UserError(
                f"image {name} cannot be decoded (its format is unknown, or its header is damaged); expected a format that "
                "Pillow reads"
            ) from error
        except Exception as error:  # depending on the damage: OSError, SyntaxError, AssertionError, RuntimeError, ...
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"image {name} cannot be decoded ({reason:.300}); expected a format that Pillow reads"
            ) from error


def _open_file(file: BinaryIO, name: str) -> Image.Image:
    """Opens an encoded image of up to MAX_PIXELS_VARIABLE pixels. Pillow's own limit has no effect.

    JPEGs are decoded in full. Pillow's `draft`, which decodes at 1/2 to 1/8 of the size, would save memory, but the resized
    image would differ by up to 36, 16 or 11 of 255 levels where the decoded one is 2, 4 or 8 times as wide (measured on an
    image of 4032 x 4032 with a natural spectrum, edges and text, at quality 90).
    """
    limit = largest_image()
    with _pillow_lock:  # Image.open checks a global variable; later steps do not
        pillow_limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit
    width, height = image.size
    if width * height > limit:
        raise UserError(
            f"image {name} is {width}x{height} (width x height); expected at most {limit} pixels. Set the environment "
            f"variable {MAX_PIXELS_VARIABLE} to decode larger images"
        )
    return image


def largest_image() -> int:
    """Returns the largest number of pixels that an image may have, decoded or resized."""
    limit = os.environ.get(MAX_PIXELS_VARIABLE, str(DEFAULT_MAX_PIXELS))
    if not limit.isdecimal() or int(limit) < 1:
        raise UserError(f"{MAX_PIXELS_VARIABLE} is {limit!r:.60}; expected a number of pixels")
    return int(limit)


def load_frames(source: Any) -> list[Image.Image]:
    """Returns the RGB frames of a video, given as an array [T, H, W, 3] or a sequence of images of one size.

    Raises:
        UserError: there are no frames, their sizes differ, or `source` is a video file, which is not decoded here.
    """
    frames = [load_image(frame) for frame in check_frames(source)]
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise UserError(f"video has frames of sizes (width, height) {sizes}; expected one size")
    return frames


def check_frames(source: Any) -> np.ndarray | Sequence[Any]:
    """Returns the frames of a video without opening them. Raises UserError unless there is a sequence of frames."""
    if isinstance(source, str | Path | bytes) or not isinstance(source, np.ndarray | Sequence):
        value = str(source) if isinstance(source, str | Path) else type(source).__name__
        raise UserError(
            f"video is {value!r:.300}; expected its frames, as an array [frames, height, width, 3] or a list of images "
            "(video files are not decoded here)"
        )
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise UserError(
            f"video is an array of shape {list(source.shape)}; expected [frames, height, width, 3] or a list of images"
        )
    if len(source) == 0:
        raise UserError("video has no frames; expected at least one frame")
    return source


# ---- patches ---------------------------------------------------------------------------------------------------------


def patchify(frames: Sequence[Image.Image], settings: VisionSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Returns the patches of one image (`[image]`) or of the frames of one video, and their grid.

    Frames are resized with bicubic filtering on bytes, padded to a multiple of `temporal_patch_size` by repeating the
    last one, rescaled and normalized. The patches are ordered so that each `merge_size**2` of them become one token:
    axis 0 is (t, h / merge, w / merge, merge, merge), axis 1 is (channel, frame, y, x).

    Returns:
        pixel_values float32 [t * h * w, 3 * temporal_patch_size * patch_size**2], and the grid (t, h, w) in patches.

    Raises:
        UserError: one side is more than 200 times the other.
    """
    t, h, w = patch_grid(frames[0].size, len(frames), settings)
    width, height = w * settings.patch_size, h * settings.patch_size
    video = np.stack([np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in frames])
    missing = -len(video) % settings.temporal_patch_size
    video = np.concatenate([video, np.repeat(video[-1:], missing, axis=0)])

    patch, merge, patch_frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    blocks = video.reshape(t, patch_frames, h // merge, merge, patch, w // merge, merge, patch, 3)
    #                      0  1             2           3      4      5           6      7      8
    patches = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3, -1)
    levels = _normalised_levels(settings)
    pixel_values = np.stack([levels[channel][patches[:, channel]] for channel in range(3)], axis=1)
    return pixel_values.reshape(t * h * w, -1), (t, h, w)


def patch_grid(size: tuple[int, int], frames: int, settings: VisionSettings) -> tuple[int, int, int]:
    """Returns the grid (t, h, w) that `patchify` makes of `frames` frames of this (width, height).

    Example:
        >>> patch_grid((278, 561), 1, VisionSettings())
        (1, 40, 20)
    """
    width, height = size
    height, width = settings.resized(height, width, frames)
    return -(-frames // settings.temporal_patch_size), height // settings.patch_size, width // settings.patch_size


def _normalised_levels(settings: VisionSettings) -> np.ndarray:
    """Returns float32 [3, 256]: the normalized value of each byte in each channel, rounded as in transformers."""
    rescaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (settings.image_mean, settings.image_std))
    return (rescaled - mean) / std
