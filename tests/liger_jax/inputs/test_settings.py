"""Image settings are read from all layouts of files, and mean what they mean in transformers."""

import copy

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from liger_jax import Processor
from liger_jax.errors import UserError
from liger_jax.inputs.images import VisionSettings, patchify
from tests._support.processing import SETTINGS_FILES, STORED, copy_with_changes

LAYOUTS = {
    "hub": (
        {"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 9408, "in_chans": 3, "size": None}},
        (3136, 9408),
        (3136, 9408),
    ),
    "size and limits": (
        {"preprocessor_config.json": {"min_pixels": 784, "size": {"min_pixels": 9, "max_pixels": 9408}}},
        (784, 9408),
        (784, 9408),
    ),
    "separate video settings": (
        {
            "preprocessor_config.json": {"size": {"shortest_edge": 784, "longest_edge": 9408}},
            "video_preprocessor_config.json": {"size": {"shortest_edge": 3136, "longest_edge": 4704}},
        },
        (784, 9408),
        (3136, 4704),
    ),
    "nested": (
        {
            "processor_config.json": {
                "image_processor": {"size": {"shortest_edge": 784, "longest_edge": 9408}},
                "video_processor": {"do_sample_frames": False},
            },
            "preprocessor_config.json": {"min_pixels": 1568},
        },
        (784, 9408),
        (100352, 602112),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_of_settings_are_read(folder, tmp_path, layout):
    files, image, video = LAYOUTS[layout]
    loaded = Processor.from_pretrained(copy_with_changes(folder, tmp_path, files, SETTINGS_FILES))
    assert (loaded.image.min_pixels, loaded.image.max_pixels) == image
    assert (loaded.video.min_pixels, loaded.video.max_pixels) == video


ODD_SETTINGS = [
    {"size": {"height": 224, "width": 224}},
    {"size": {"height": 224, "width": 224}, "min_pixels": 784, "max_pixels": 9408},
    {"size": {"shortest_edge": 224}},
    {"size": {"shortest_edge": 784}, "max_pixels": 9408},
    {"size": {"longest_edge": 9408}},
    {"size": {"shortest_edge": 784, "longest_edge": None}},
    {"size": 224},
    {"size": [224, 224]},
    {"size": {}},
    {"size": None},
    {"rescale_factor": None},
    {"do_convert_rgb": None},
    {"do_resize": None},
    {"do_normalize": None},
    {"resample": None},
    {"image_mean": None},
    {"image_mean": 0.5},
    {"image_std": [0.5]},
    {"image_mean": [0.5, 0.5]},
    {"patch_size": None},
    {"patch_size": {"height": 14, "width": 14}},
    {"merge_size": None},
    {"max_pixels": 9408.0},
    {"max_pixels": None},
    {"min_pixels": 0},
    {"min_pixels": "784"},
]


@pytest.mark.parametrize("settings", ODD_SETTINGS, ids=str)
def test_odd_settings_were_ignored_or_ended_in_an_attribute_error(settings):
    """They mean what they mean in transformers, or a UserError names the key."""
    key = next(iter(settings))
    image = Image.fromarray(STORED["image/down150x200"])
    try:
        expected = Qwen2VLImageProcessorPil.from_dict(dict(settings))(images=image, return_tensors="np")
    except (TypeError, ValueError):
        expected = None
    try:
        pixel_values, grid = patchify([image], VisionSettings.from_hf(copy.deepcopy(settings)))
    except UserError as error:
        assert key in str(error)
        assert expected is None or key.startswith("do_"), "only preprocessing that is not implemented may be refused"
    else:
        assert expected is not None
        np.testing.assert_array_equal([grid], expected["image_grid_thw"])
        np.testing.assert_array_equal(pixel_values, expected["pixel_values"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_std": [0.5, -0.5, 0.5]}, "image_std is .*; expected three numbers from 1e-06"),
        ({"image_std": 1e-300}, "image_std is 1e-300; expected three numbers from 1e-06"),
        ({"image_mean": 1e300}, "image_mean is 1e.300; expected three numbers from -1e.06 to 1e.06"),
        ({"patch_size": 1e300}, "patch_size is 1000.*; expected at most 1024"),
        ({"temporal_patch_size": 65535}, "temporal_patch_size is 65535; expected at most 1024"),
        ({"rescale_factor": 10**400}, "rescale_factor is 1000"),
    ],
)
def test_settings_that_gave_infinite_pixels_or_no_memory(settings, message):
    """Found by fuzzing."""
    with pytest.raises(UserError, match=message):
        VisionSettings.from_hf(settings)
