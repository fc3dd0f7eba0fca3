#!/usr/bin/env python
"""Writes reference values for the processor: Hugging Face transformers' results for images, videos and conversations.

    pip install torch==2.13.0 torchvision==0.28.0 transformers==5.24.0 pillow==13.0.0   # the CPU builds
    pip install -e . && python tests/references/make_processing.py                      # 10 s; writes processing.npz

Of the stored arrays, mode/ was written by transformers 5.24, which composites transparency on white, the others by 5.17.

Arrays
  smart_resize             [840, 6]: height, width, min_pixels, max_pixels, new height, new width (-1: ValueError)
  image/<name>             uint8 [H, W, 3]
  default|small/<name>/... pixel_values and image_grid_thw of the PIL backend, with the hub's limits and with small ones
  mode/<PIL mode>/...      file (the encoded image, bytes) and pixel_values
  video/<name>/...         frames uint8 [T, H, W, 3], pixel_values_videos, video_grid_thw (torchvision backend)
  chat/<name>/...          outputs of Qwen2VLProcessor for the conversations in `CONVERSATIONS`, with the tokenizer without
                           merges, `train_tokenizer([])`; chat/<name>/text is the rendered text, as bytes
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

TARGET = Path(__file__).with_name("processing.npz")
HUB_LIMITS = {"shortest_edge": 3136, "longest_edge": 12845056}
SMALL_LIMITS = {"shortest_edge": 3136, "longest_edge": 12 * 28 * 28}
MODES = ("L", "LA", "RGBA", "P", "CMYK", "1")
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def _text(text):
    return {"type": "text", "text": text}


def _turn(role, *content):
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


# Images and videos are taken in order from IMAGE_NAMES and VIDEO_NAMES.
CONVERSATIONS = {
    "text": [[_turn("user", "Hello, what's 12345?\n\nTwo lines.")]],
    "image": [[_turn("user", IMAGE, _text("What is this?")), _turn("assistant", "A wave.")]],
    "system": [[_turn("system", "Be brief."), _turn("user", _text("a"), IMAGE, _text(" b"), IMAGE)]],
    "batch": [
        [_turn("user", IMAGE, IMAGE, _text("Which is larger? Größe, 大小, 😀"))],
        [_turn("user", "No picture here.")],
        [_turn("user", VIDEO, IMAGE, _text("Both?")), _turn("assistant", "Yes."), _turn("user", VIDEO)],
    ],
}
IMAGE_NAMES = ("up30x40", "exact56x84", "thin28x280")
VIDEO_NAMES = ("odd", "one")


def make_image(rng, height, width):
    """Returns gradients with a little noise, uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 90 * np.sin(x / 9 + i) + 35 * np.cos(y / (5 + i)) for i in range(3)]
    values = np.stack(channels, -1) + rng.normal(0, 6, (height, width, 3))
    return np.clip(values, 0, 255).astype(np.uint8)


def in_mode(image, mode):
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.tile(np.arange(56, dtype=np.uint8) * 4, (56, 1))))
    return image


def smart_resize_table(smart_resize):
    heights = (1, 2, 13, 14, 15, 27, 28, 29, 41, 42, 43, 56, 70, 98, 100, 223, 224, 560, 561, 1080, 4000)
    widths = (1, 14, 28, 42, 70, 98, 150, 278, 1920, 6000)
    rows = []
    for limits in ((3136, 12845056), (3136, 1003520), (784, 7840), (100352, 602112)):
        for height in heights:
            for width in widths:
                try:
                    resized = smart_resize(height, width, 28, *limits)
                except ValueError:
                    resized = (-1, -1)
                rows.append((height, width, *limits, *resized))
    return np.array(rows, np.int32)


def main():
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    from liger_jax import Processor
    from liger_jax.demo.tokenizer import train_tokenizer

    rng = np.random.default_rng(0)
    arrays = {"smart_resize": smart_resize_table(smart_resize)}
    images = {
        "exact56x84": make_image(rng, 56, 84),
        "up30x40": make_image(rng, 30, 40),
        "down150x200": make_image(rng, 150, 200),
        "odd101x67": make_image(rng, 101, 67),
        "thin28x280": make_image(rng, 28, 280),
        "noise64x64": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "tiny5x5": make_image(rng, 5, 5),
    }
    for name, image in images.items():
        arrays[f"image/{name}"] = image
        for limits, size in (("default", HUB_LIMITS), ("small", SMALL_LIMITS)):
            result = Qwen2VLImageProcessorPil(size=dict(size))(images=Image.fromarray(image), return_tensors="np")
            arrays |= {f"{limits}/{name}/{key}": np.asarray(value) for key, value in result.items()}

    for mode in MODES:
        file = io.BytesIO()
        image = in_mode(Image.fromarray(make_image(rng, 56, 56)), mode)
        image.save(file, "TIFF" if mode == "CMYK" else "PNG")
        result = Qwen2VLImageProcessorPil(size=dict(HUB_LIMITS))(images=Image.open(file), return_tensors="np")
        arrays[f"mode/{mode}/file"] = np.frombuffer(file.getvalue(), np.uint8)
        arrays[f"mode/{mode}/pixel_values"] = np.asarray(result["pixel_values"])

    videos = {"even": (4, 56, 56), "odd": (5, 60, 90), "one": (1, 84, 56)}
    video_processor = Qwen2VLVideoProcessor(size=dict(HUB_LIMITS), cap_pixels_per_frame=False)
    for name, (frames, height, width) in videos.items():
        arrays[f"video/{name}/frames"] = np.stack([make_image(rng, height, width) for _ in range(frames)])
        result = video_processor(videos=[arrays[f"video/{name}/frames"]], return_tensors="pt")
        arrays |= {f"video/{name}/{key}": value.numpy() for key, value in result.items()}

    tokenizer = Processor(train_tokenizer([])).tokenizer
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(size=dict(HUB_LIMITS)), tokenizer, video_processor, tokenizer.chat_template
    )
    for name, conversations in CONVERSATIONS.items():
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
        joined = "".join(texts)
        pil_images = [Image.fromarray(images[name]) for name in IMAGE_NAMES[: joined.count("<|image_pad|>")]]
        clips = [arrays[f"video/{name}/frames"] for name in VIDEO_NAMES[: joined.count("<|video_pad|>")]]
        result = processor(
            text=texts, images=pil_images or None, videos=clips or None, padding=True, do_sample_frames=False
        )
        keys = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        arrays |= {f"chat/{name}/{key}": np.asarray(result[key], np.int32) for key in keys if key in result}
        arrays[f"chat/{name}/text"] = np.frombuffer("\0".join(texts).encode(), np.uint8)

    np.savez_compressed(TARGET, **arrays)
    print(f"{len(arrays)} arrays, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
