"""Positions of tokens and patches equal transformers', with both rules for the text after a video."""

import dataclasses

import numpy as np
import pytest

from liger_jax.inputs.positions import rope_index, vision_position_ids, vision_segment_ids
from tests._support import parity

CONFIG = parity.config()
IMAGE, VIDEO = CONFIG.image_token_id, CONFIG.video_token_id
MERGE_1 = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, spatial_merge_size=1))


def grids(scenario):
    arrays = parity.inputs(scenario)
    return {key: arrays.get(key) for key in ("image_grid_thw", "video_grid_thw")}


@pytest.mark.parametrize("rule", ["max", "hf5"])
@pytest.mark.parametrize("scenario", parity.SCENARIOS)
def test_equal_to_transformers(scenario, rule):
    """Every index of every scenario, and the offset derived from them that transformers calls rope_deltas."""
    arrays = parity.inputs(scenario)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    positions = rope_index(CONFIG, ids, mask, **grids(scenario), video_positions=rule)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions, parity.stored("scenarios")[f"{scenario}/position_ids_{rule}"])
    deltas = positions.max(axis=(0, 2)) + 1 - mask.sum(axis=1)
    np.testing.assert_array_equal(deltas[:, None], parity.stored("scenarios")[f"{scenario}/rope_deltas_{rule}"])


def test_rules_differ_for_long_videos_only():
    for scenario in parity.SCENARIOS:
        by_rule = [parity.stored("scenarios")[f"{scenario}/position_ids_{rule}"] for rule in ("max", "hf5")]
        assert np.array_equal(*by_rule) == (scenario != "video")


def test_back_to_back_images():
    """Adjacent images without a token between them: transformers 5.x raises, 4.x and this project use the grids."""
    scenario = parity.inputs("back_to_back")
    positions = rope_index(CONFIG, scenario["input_ids"], scenario["attention_mask"], scenario["image_grid_thw"])
    np.testing.assert_array_equal(positions, parity.stored("scenarios")["back_to_back/position_ids_max"])

    ids = np.array([[7, *[IMAGE] * 2, *[IMAGE], 8]])
    positions = rope_index(CONFIG, ids, image_grid_thw=np.array([[1, 2, 4], [1, 2, 2]]))
    assert positions[:, 0].tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("scenario", parity.PACKED)
def test_positions_restart_in_packed_sequences(scenario):
    """Each sequence of a packed row has the same positions as when it is alone in a row."""
    arrays = parity.inputs(scenario)
    unpacked = scenario.removeprefix("packed_")
    alone = parity.stored("scenarios")[f"{unpacked}/position_ids_hf5"][:, parity.tokens(unpacked)]
    positions = rope_index(CONFIG, arrays["input_ids"], segment_ids=arrays["segment_ids"], **grids(scenario))
    np.testing.assert_array_equal(positions[:, 0], alone)


# Inputs and positions of transformers' own test_vision_position_ids, whose model merges no patches.


def test_transformers_image_vector():
    ids = np.array([[5, *[IMAGE] * 12, 5]])
    positions = rope_index(MERGE_1, ids, image_grid_thw=np.array([[1, 4, 3]]), video_positions="hf5")
    assert positions[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5],
        [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 5],
    ]


@pytest.mark.parametrize("rule", ["max", "hf5"])
def test_transformers_video_vector(rule):
    ids = np.array([[5, *[VIDEO] * 24, 5]])
    positions = rope_index(MERGE_1, ids, video_grid_thw=np.array([[2, 4, 3]]), video_positions=rule)
    assert positions[0, 0].tolist() == [0, *[1] * 12, *[2] * 12, 5]
    assert positions[1, 0].tolist() == [0, *[1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4] * 2, 5]
    assert positions[2, 0].tolist() == [0, *[1, 2, 3] * 8, 5]


def test_transformers_vector_of_one_token_images():
    ids = np.array([[5, IMAGE, 6] * 13])
    positions = rope_index(MERGE_1, ids, image_grid_thw=np.ones((13, 3), int))
    np.testing.assert_array_equal(positions, np.tile(np.arange(39), (3, 1, 1)))


def test_long_video():
    """Grid [3, 4, 4] has 3 frames of 2 x 2 tokens. Text continues after the last frame ("max") or at its index ("hf5")."""
    ids = np.array([[5, *[VIDEO] * 12, 6, 7]])
    continuations = {
        rule: rope_index(CONFIG, ids, video_grid_thw=np.array([[3, 4, 4]]), video_positions=rule)[:, 0, -2:].tolist()
        for rule in ("max", "hf5")
    }
    assert continuations == {"max": [[4, 5]] * 3, "hf5": [[3, 4]] * 3}


def test_unknown_rule():
    with pytest.raises(ValueError, match=r"video_positions.*'paper'"):
        rope_index(CONFIG, np.array([[5]]), video_positions="paper")


def test_vision_position_ids():
    """Patches are in blocks of 2 x 2, as in transformers, and each frame of a video has the same positions."""
    four_by_six = "00 01 10 11 02 03 12 13 04 05 14 15 20 21 30 31 22 23 32 33 24 25 34 35"
    expected = [[int(h), int(w)] for h, w in four_by_six.split()]
    positions = vision_position_ids(np.array([[1, 4, 6], [2, 2, 2]]), 2)
    assert positions.tolist() == expected + [[0, 0], [0, 1], [1, 0], [1, 1]] * 2


def test_vision_segment_ids():
    """An image is one segment; a video has one segment per frame of its grid."""
    segments = vision_segment_ids(np.array([[1, 2, 4], [3, 2, 2]]))
    assert segments.tolist() == [1] * 8 + [2] * 4 + [3] * 4 + [4] * 4


def test_no_grids():
    assert vision_position_ids(np.zeros((0, 3), int), 2).shape == (0, 2)
    assert vision_segment_ids(np.zeros((0, 3), int)).shape == (0,)
