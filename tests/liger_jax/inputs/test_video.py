"""Clips are resized and sampled as in transformers; the times of frames follow from their rate."""

import numpy as np
import pytest

from liger_jax.errors import UserError
from liger_jax.inputs.images import VisionSettings, load_frames, patchify
from liger_jax.inputs.video import ClipSettings, sample_video, smart_resize_clip, timestamps
from tests._support.parity import REFERENCES

STORED = np.load(REFERENCES / "family_inputs.npz")
SAMPLES = [name.removeprefix("frames/") for name in STORED if name.startswith("frames/")]
SETTINGS = {"VisionSettings": VisionSettings(), "ClipSettings": ClipSettings()}


def test_sizes_of_clips_equal_transformers_on_600_cases():
    for frames, height, width, low, high, new_height, new_width in STORED["clip_sizes"].tolist():
        if new_height < 0:
            with pytest.raises(UserError, match=r"expected at least 2 frames|200 times"):
                smart_resize_clip(frames, height, width, 2, 32, low, high)
        else:
            assert smart_resize_clip(frames, height, width, 2, 32, low, high) == (new_height, new_width)


def test_limits_are_for_the_whole_clip():
    """Twice the frames leave half the area for each of them, rounded down to whole tokens."""
    settings = ClipSettings(min_pixels=4096, max_pixels=8 * 128 * 128)
    areas = []
    for frames in (8, 16):
        video = np.zeros((frames, 300, 300, 3), np.uint8)
        pixel_values, (t, h, w) = patchify(load_frames(video), settings)
        assert pixel_values.shape == (t * h * w, 3 * 2 * 16 * 16)
        areas.append(256 * h * w)
    assert areas == [128 * 128, 64 * 64]


@pytest.mark.parametrize("case", SAMPLES)
def test_sampled_frames_equal_transformers(case):
    name, arguments = case.split("/")
    total, fps, target_fps = arguments.split(",")
    frames = SETTINGS[name].sample(int(total), float(fps), float(target_fps))
    np.testing.assert_array_equal(frames, STORED[f"frames/{case}"])


def test_limits_on_frames_in_the_settings_were_ignored():
    """min_frames and max_frames of video_preprocessor_config.json, by the rules of transformers."""
    limits = {"min_frames": 3, "max_frames": 5}
    settings = [kind.from_hf(limits) for kind in (VisionSettings, ClipSettings)]
    assert [kind.sample(100, 25.0, 2.0).tolist() for kind in settings] == [[0, 25, 50, 75], [0, 25, 50, 74, 99]]
    assert [kind.sample(100, 25.0, 0.1).tolist() for kind in settings] == [[0, 50], [0, 50, 99]]
    assert [type(kind).from_hf(kind.to_hf()) for kind in settings] == settings
    assert VisionSettings.from_hf({"min_frames": None, "max_frames": 4096}) == VisionSettings(max_frames=4096)
    with pytest.raises(UserError, match="max_frames is 'all'; expected a positive integer"):
        VisionSettings.from_hf({"max_frames": "all"})


def test_a_single_frame_is_kept():
    """transformers divides by zero."""
    assert VisionSettings().sample(1, 1.0, 2.0).tolist() == [0]


def test_times_divide_before_they_average():
    """With 53 frames at 30 per second, 35 / 30 and 52 / 30 average to 1.45, which is written as 1.5. 43.5 / 30 is as 1.4."""
    frames, time = sample_video(list(range(53)), ClipSettings(), 30.0, 2.0)
    assert frames == [0, 17, 35, 52]
    assert [f"{seconds:.1f}" for seconds in time.timestamps] == ["0.3", "1.5"]
    assert f"{43.5 / 30:.1f}" == "1.4"
    assert time.second_per_grid == 2 / (4 / 53 * 30)


def test_times_of_an_odd_number_of_frames():
    """The last frame is repeated, so the last time is its own."""
    assert timestamps(np.arange(3), 2.0, 2) == (0.25, 1.0)
    assert timestamps(np.arange(4), 2.0, 2) == (0.25, 1.25)


def test_arrays_and_lists_are_sampled_alike():
    video = np.arange(20)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    frames, time = sample_video(video, VisionSettings(), 10.0, 4.0)
    listed, listed_time = sample_video(list(video), VisionSettings(), 10.0, 4.0)
    assert frames[:, 0, 0, 0].tolist() == [frame[0, 0, 0] for frame in listed] == [0, 2, 5, 7, 10, 12, 15, 17]
    assert time == listed_time and time.second_per_grid == 2 / 4
