"""Loads the reference values of tests/references/make_family.py, of Qwen2.5-VL and Qwen3-VL."""

import dataclasses
import functools

import numpy as np

from convert import from_hf
from liger_jax import Batch, QwenVL, QwenVLConfig, prepare
from tests._support.parity import REFERENCES, stored

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
VISION = ("image", "batch", "batch_text", "videos")
SCENARIOS = ("text", *VISION)
GRADIENTS = ("batch", "batch_text")
INPUTS = ("input_ids", "labels", "attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
ROWS, LENGTH, SLOTS = 2, 128, 320  # of all batches, so that the scenarios of a family share compiled programs


def config(family: str) -> QwenVLConfig:
    return QwenVLConfig.from_hf(REFERENCES / f"model_{family}")


@functools.cache
def model(family: str) -> QwenVL:
    return from_hf(REFERENCES / f"model_{family}", dtype="float32")


def inputs(family: str, scenario: str, *, prompt: bool = False) -> dict[str, np.ndarray]:
    """Returns arguments of `prepare`, in the shapes that transformers was run with."""
    arrays = stored(family)
    folder = f"prompt/{scenario}/" if prompt else f"{scenario}/"
    values = {key: arrays[folder + key] for key in INPUTS if folder + key in arrays}
    pixels = {key: f"{scenario}/{key}" for key in ("pixel_values", "pixel_values_videos")}
    return values | {key: arrays[name].astype(np.float32) for key, name in pixels.items() if name in arrays}


def batch(family: str, scenario: str, *, prompt: bool = False, video_positions: str = "hf5", **options) -> Batch:
    return prepare(
        config(family), **inputs(family, scenario, prompt=prompt), video_positions=video_positions, **options
    )


def common(config: QwenVLConfig, arrays: dict[str, np.ndarray], video_positions: str = "hf5") -> Batch:
    """Returns a batch in the shapes that all scenarios share."""
    patches = {"patches": SLOTS} if any("pixel" in key for key in arrays) else {}
    batch = prepare(config, **arrays, video_positions=video_positions, length=LENGTH, **patches).pad_rows(ROWS)
    vision = batch.vision and dataclasses.replace(batch.vision, max_segments=8)
    return dataclasses.replace(batch, max_segments=2, vision=vision)


def expected(family: str, scenario: str, key: str) -> np.ndarray:
    return stored(family)[f"{scenario}/{key}"]


def expected_gradients(family: str, scenario: str) -> dict[str, np.ndarray]:
    folder = f"{scenario}/grad/"
    return {key.removeprefix(folder): value for key, value in stored(family).items() if key.startswith(folder)}
