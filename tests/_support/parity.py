"""Loads the reference values of tests/references/make_model.py, and compares results with them."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from convert import from_hf
from liger_jax import Batch, Qwen2VL, Qwen2VLConfig, prepare

REFERENCES = Path(__file__).parents[1] / "references"
TEXT = ("text", "text_batch_left", "text_batch_right")
VISION = (
    "image",
    "two_images",
    "batch_left",
    "batch_right",
    "batch_mixed_text",
    "video",
    "image_video",
    "batch_image_video",
)
PACKED = ("packed_batch_left", "packed_text_batch_left")
SCENARIOS = TEXT + VISION
PROMPTS = tuple(name for name in SCENARIOS if not name.endswith("_right"))
SAME_PIXELS = {"batch_right": "batch_left", "packed_batch_left": "batch_left", "back_to_back": "two_images"}
TOLERANCE = 2e-4  # in float32, relative to the largest number of the array


@functools.cache
def stored(file: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCES / f"{file}.npz") as arrays:
        return dict(arrays)


def config(name: str = "untied") -> Qwen2VLConfig:
    return Qwen2VLConfig.from_hf(REFERENCES / f"model_{name}")


@functools.cache
def model(name: str = "untied") -> Qwen2VL:
    return from_hf(REFERENCES / f"model_{name}", dtype="float32")


def inputs(scenario: str, *, prompt: bool = False) -> dict[str, np.ndarray]:
    """Returns arguments of `prepare`, in the shapes that transformers was run with."""
    folder = f"prompt/{scenario}/" if prompt else f"{scenario}/"
    names = ("input_ids", "labels", "attention_mask", "segment_ids", "image_grid_thw", "video_grid_thw")
    arrays = {key: stored("scenarios")[folder + key] for key in names if folder + key in stored("scenarios")}
    for key, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if grid in arrays:
            source = SAME_PIXELS.get(scenario, scenario)
            arrays[key] = stored("scenarios")[f"{source}/{key}"].astype(np.float32)
    return arrays


def batch(scenario: str, *, prompt: bool = False, video_positions: str = "hf5", **options) -> Batch:
    return prepare(config(), **inputs(scenario, prompt=prompt), video_positions=video_positions, **options)


def common(batch: Batch) -> Batch:
    """Returns the batch with a common `max_segments` (a static upper bound), so that scenarios share compiled programs."""
    vision = batch.vision and dataclasses.replace(batch.vision, max_segments=4)
    return dataclasses.replace(batch, max_segments=2, vision=vision)


def expected(scenario: str, key: str, *, name: str = "untied") -> np.ndarray:
    return stored(name)[f"{scenario}/{key}"]


def expected_gradients(scenario: str, *, name: str = "untied") -> dict[str, np.ndarray]:
    folder = f"{scenario}/grad/"
    return {key.removeprefix(folder): value for key, value in stored(name).items() if key.startswith(folder)}


def tokens(scenario: str) -> np.ndarray:
    """Returns [B, T] bool: True for tokens, False for padding, where the outputs of a model are meaningless."""
    arrays = inputs(scenario)
    return (arrays["segment_ids"] if "segment_ids" in arrays else arrays["attention_mask"]) > 0


def assert_near(actual, expected, *, tolerance: float = TOLERANCE, name: str = "") -> None:
    """Asserts that no entry differs by more than `tolerance` times the largest expected one. NaN fails."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    scale = max(np.abs(expected).max(initial=0.0), 1e-30)
    error = np.abs(actual - expected).max(initial=0.0) / scale
    assert error <= tolerance, f"{name}: differs by {error:.1e} of the largest entry {scale:.2g}"
