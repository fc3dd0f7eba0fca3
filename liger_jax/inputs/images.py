"""Pictures to patches: numpy and Pillow, equal to transformers' `Qwen2VLImageProcessorPil` to the last bit."""

import base64
import binascii
import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import unquote, urlparse

import numpy as np
from PIL import Image, ImageOps

MAX_ASPECT_RATIO = 200
OTHER_SCHEMES = ("http", "https", "s3", "gs")
# What is computed here and cannot be switched off: a checkpoint that asks for something else is refused.
FIXED_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
ENCODED = (str, Path, bytes)  # sources of pictures that are files
LIMIT_KEYS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))


@dataclasses.dataclass(frozen=True)
class VisionSettings:
    """How pictures (or the frames of a video) become patches. Defaults are transformers' for images."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this: a patch times the patches merged into one token."""
        return self.patch_size * self.merge_size

    def with_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> Self:
        """The same with other size limits. If only one is given, the other one follows where it would contradict it.

        Raises:
            ValueError: a limit is not a positive whole number, `min_pixels > max_pixels`, or `max_pixels` is less than
                one token's picture.
        """
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if min_pixels is None:
            min_pixels = self.min_pixels if max_pixels is None else min(self.min_pixels, max_pixels)
        if max_pixels is None:
            max_pixels = max(self.max_pixels, min_pixels)
        if min_pixels > max_pixels:
            raise ValueError(f"min_pixels must not exceed max_pixels, got {min_pixels} > {max_pixels}")
        if max_pixels < self.factor**2:
            raise ValueError(
                f"max_pixels must hold at least one token's {self.factor}x{self.factor} picture "
                f"({self.factor**2} pixels), got {max_pixels}"
            )
        return dataclasses.replace(self, min_pixels=int(min_pixels), max_pixels=int(max_pixels))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **defaults: Any) -> Self:
        """Reads transformers' JSON: limits as min_pixels / max_pixels (which win) or in `size`, under either name."""
        broken = [
            f"{key} = {config[key]!r}, not {step!r}"
            for key, step in FIXED_STEPS.items()
            if config.get(key, step) != step
        ]
        if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255):
            broken.append(f"rescale_factor = {config['rescale_factor']!r}, not 1/255")
        if broken:
            raise ValueError("This preprocessing is not supported: " + "; ".join(broken))
        names = {field.name for field in dataclasses.fields(cls)}
        values = defaults | {key: value for key, value in config.items() if key in names and value is not None}
        size = config.get("size") or {}
        for name, edge in LIMIT_KEYS:
            if config.get(name) is None and (limit := size.get(edge) or size.get(name)):
                values[name] = limit
        for name in ("image_mean", "image_std"):
            if name in values:
                values[name] = tuple(values[name])
        limits = {name: values.pop(name) for name, _ in LIMIT_KEYS if name in values}
        return cls(**values).with_limits(**limits)

    def to_hf(self) -> dict[str, Any]:
        """The same as JSON values, in the layout every transformers version with Qwen2-VL reads."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        size = {edge: values[name] for name, edge in LIMIT_KEYS}
        return values | {"size": size, "rescale_factor": 1 / 255} | FIXED_STEPS


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280
) -> tuple[int, int]:
    """The size a picture is resized to: multiples of `factor`, area within the limits, shape kept as well as possible.

    Each side is rounded (half to even) to a multiple of `factor`. If the area is then too large, both sides are divided
    by sqrt(height * width / max_pixels) and rounded down (not below `factor`); if too small, they are multiplied by
    sqrt(min_pixels / (height * width)) and rounded up. The same as transformers' function of this name.

    Raises:
        ValueError: a side is zero, or one side is more than 200 times the other.

    Example:
        >>> smart_resize(561, 278)
        (560, 280)
    """
    if min(height, width) < 1:
        raise ValueError(f"A picture must have at least one pixel, got {width}x{height} (width x height)")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"One side of a picture may be at most {MAX_ASPECT_RATIO} times the other, got {width}x{height} "
            f"(width x height)"
        )
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


def load_image(source: Any) -> Image.Image:
    """A picture in RGB, from a PIL image, a uint8 array [H, W, 3], a path, a `file://` or `data:` URL, or file bytes.

    Files, URLs and bytes are turned upright by their EXIF tag; transparency is dropped. As in transformers.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the source is of another kind, has no pixels, or cannot be decoded; the message names it.
    """
    with _opened(source) as image:
        return (ImageOps.exif_transpose(image) if isinstance(source, ENCODED) else image).convert("RGB")


def image_size(source: Any) -> tuple[int, int]:
    """(width, height) of a picture as it is stored, from the head of its file: nothing is decoded, or turned upright.

    Raises:
        FileNotFoundError, ValueError: as in `load_image`, but for pixels that are damaged.
    """
    with _opened(source) as image:
        return image.size


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The picture, of a file perhaps only the head; what goes wrong while it is used is told with its name."""
    file: Any = contextlib.nullcontext()
    if isinstance(source, ENCODED):
        file, name = _read(source)
    elif isinstance(source, Image.Image):
        # Image.open reads lazily: what was opened from a broken file fails only when it is used
        image, name = source, repr(getattr(source, "filename", "(PIL)"))
        if 0 in image.size:
            raise ValueError(f"A picture must have at least one pixel, got an image {name} of size {image.size}")
    elif isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[-1] != 3 or source.dtype != np.uint8:
            raise ValueError(
                f"A picture given as an array must be uint8 of shape [height, width, 3], got {source.dtype} "
                f"{list(source.shape)}"
            )
        if source.size == 0:
            raise ValueError(f"A picture must have at least one pixel, got an array of shape {list(source.shape)}")
        image, name = Image.fromarray(source), "(array)"
    else:
        raise ValueError(
            "A picture must be a PIL image, a uint8 array [height, width, 3], a path, a file:// or data: URL, or "
            f"encoded bytes, got {type(source).__name__}"
        )
    with file:
        try:
            yield Image.open(file) if isinstance(source, ENCODED) else image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"The image {name} cannot be decoded: {error}") from error


def _read(source: str | Path | bytes) -> tuple[BinaryIO, str]:
    """The encoded picture as a file, and how to name it in a message."""
    if isinstance(source, bytes):
        return io.BytesIO(source), f"({len(source)} bytes)"
    text = str(source)
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError(f"A data URL must read data:image/<type>;base64,<data>, got {text[:60]!r}")
        try:
            return io.BytesIO(base64.b64decode(body, validate=True)), f"({head} URL)"
        except binascii.Error as error:
            raise ValueError(f"The image ({head} URL) cannot be decoded: {error}") from error
    url = urlparse(text)
    if url.scheme in OTHER_SCHEMES:
        raise ValueError(f"Images are not downloaded; save it and give its path instead: {text!r}")
    path = Path(unquote(url.path)) if url.scheme == "file" else Path(text)
    if not os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        raise FileNotFoundError(f"No image file at {text[:300]!r}")
    return path.open("rb"), repr(str(path))


def load_frames(source: Any) -> list[Image.Image]:
    """The frames of a video in RGB, from an array [T, H, W, 3] or a sequence of pictures of one size.

    Raises:
        ValueError: no frames, frames of different sizes, or a video file (which is not decoded here).
    """
    frames = [load_image(frame) for frame in check_frames(source)]
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"The frames of a video must have one size, got (width, height) {sizes}")
    return frames


def check_frames(source: Any) -> np.ndarray | Sequence[Any]:
    """The frames of a video, not opened yet; a ValueError for what is none."""
    if isinstance(source, str | Path | bytes) or not isinstance(source, np.ndarray | Sequence):
        raise ValueError(
            "A video must be given as its frames, an array [frames, height, width, 3] or a list of pictures, got "
            f"{source if isinstance(source, str | Path) else type(source).__name__!r}; video files are not decoded here"
        )
    if len(source) == 0:
        raise ValueError("A video must have at least one frame, got none")
    return source


def patchify(frames: Sequence[Image.Image], settings: VisionSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """One picture ([image]) or the frames of one video as rows of numbers, with their grid.

    Resizes with bicubic filtering on bytes, pads the frames to a multiple of `temporal_patch_size` by repeating the
    last one, rescales and normalises, and orders the patches so that each `merge_size**2` rows become one token:
    rows (t, h / merge, w / merge, merge, merge), columns (channel, frame, y, x).

    Returns:
        pixel_values float32 [t * h * w, 3 * temporal_patch_size * patch_size**2], and the grid (t, h, w) in patches.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    t, h, w = grid_of(frames[0].size, len(frames), settings)
    width, height = w * settings.patch_size, h * settings.patch_size
    video = np.stack([np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in frames])
    missing = -len(video) % settings.temporal_patch_size
    video = np.concatenate([video, np.repeat(video[-1:], missing, axis=0)])

    patch, merge, frames_of_patch = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    blocks = video.reshape(t, frames_of_patch, h // merge, merge, patch, w // merge, merge, patch, 3)
    #                      0  1                2           3      4      5           6      7      8
    patches = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3, -1)
    levels = _normalised_levels(settings)
    pixel_values = np.stack([levels[channel][patches[:, channel]] for channel in range(3)], axis=1)
    return pixel_values.reshape(t * h * w, -1), (t, h, w)


def grid_of(size: tuple[int, int], frames: int, settings: VisionSettings) -> tuple[int, int, int]:
    """The grid (t, h, w) of patches that `patchify` makes of frames of a size (width, height).

    >>> grid_of((278, 561), 1, VisionSettings())
    (1, 40, 20)
    """
    width, height = size
    height, width = smart_resize(height, width, settings.factor, settings.min_pixels, settings.max_pixels)
    return -(-frames // settings.temporal_patch_size), height // settings.patch_size, width // settings.patch_size


def _normalised_levels(settings: VisionSettings) -> np.ndarray:
    """float32 [3, 256]: what each byte becomes in each channel, rounded at the same steps as in transformers."""
    rescaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (settings.image_mean, settings.image_std))
    return (rescaled - mean) / std
