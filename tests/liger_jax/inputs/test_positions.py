"""Positions of tokens and patches equal transformers', for each member of the family and both rules for videos."""

import dataclasses

import numpy as np
import pytest

from liger_jax import QwenVLConfig, prepare
from liger_jax.errors import UserError
from liger_jax.inputs.positions import position_table_lookup, rope_index, vision_position_ids, vision_segment_ids
from tests._support import parity

FAMILY = {version: np.load(parity.REFERENCES / f"family_inputs{version}.npz") for version in ("", "_v4")}
CASES = [
    name.removeprefix("positions/").removesuffix("/position_ids") for name in FAMILY[""] if name[-8:] == "tion_ids"
]
QWEN2_5, QWEN3 = (QwenVLConfig.tiny(family=family) for family in ("qwen2_5_vl", "qwen3_vl"))

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


# ---- the family


@pytest.mark.parametrize("case", CASES)
def test_family_equals_transformers(case):
    """transformers 5 has the rule "hf5", 4.57 the rule "max". 4.57 cuts off fractions of seconds, so it has no such case."""
    arrays = {name.split("/")[-1]: value for name, value in stored("", f"positions/{case}/").items()}
    config = QwenVLConfig.tiny(family=case.split("/")[0])
    expected = arrays.pop("position_ids")
    np.testing.assert_array_equal(rope_index(config, **arrays, video_positions="hf5"), expected)
    if f"positions/{case}/position_ids" in FAMILY["_v4"]:
        tokens = arrays["attention_mask"] > 0
        expected = FAMILY["_v4"][f"positions/{case}/position_ids"][:, tokens]
        np.testing.assert_array_equal(rope_index(config, **arrays)[:, tokens], expected)


def stored(version, folder):
    return {name: FAMILY[version][name] for name in FAMILY[version] if name.startswith(folder)}


@pytest.mark.parametrize(
    ("second_per_grid", "times", "continuation"),
    [(1.0, [2, 4, 6], 7), (0.5, [2, 3, 4], 5), (0.75, [2, 3, 5], 6), (1.5, [2, 5, 8], 9), (None, [2, 4, 6], 7)],
)
def test_time_in_seconds(second_per_grid, times, continuation):
    """Grid [3, 4, 4], two positions a second. Text continues after the last time ("max") or after the rows ("hf5")."""
    ids = np.array([[10, QWEN2_5.vision_start_token_id, *[QWEN2_5.video_token_id] * 12, 11, 12]])
    seconds = {} if second_per_grid is None else {"second_per_grid_ts": [second_per_grid]}
    for rule, expected in (("max", continuation), ("hf5", 4)):
        grid = np.array([[3, 4, 4]])
        positions = rope_index(QWEN2_5, ids, video_grid_thw=grid, video_positions=rule, **seconds)[:, 0]
        assert positions[0].tolist() == [0, 1, *np.repeat(times, 4), expected, expected + 1]
        assert positions[1, 2:6].tolist() == [2, 2, 3, 3] and positions[2, 2:6].tolist() == [2, 3, 2, 3]


@pytest.mark.parametrize("rule", ["max", "hf5"])
def test_time_in_the_text(rule):
    """Each frame pair of a video is a block of its own, at one time; the text between the blocks is counted as text."""
    frame = [QWEN3.vision_start_token_id, *[QWEN3.video_token_id] * 4, QWEN3.vision_end_token_id]
    ids = np.array([[10, 5, 6, 7, *frame, 5, 6, 7, *frame, 11]])
    positions = rope_index(QWEN3, ids, video_grid_thw=np.array([[2, 4, 4]]), video_positions=rule)[:, 0]
    assert positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 5, 5, 5, 7, 8, 9, 10, 11, 12, 12, 12, 12, 14, 15],
        [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12, 13, 13, 14, 15],
        [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10, 11, 12, 13, 12, 13, 14, 15],
    ]
    assert positions.max() + 1 - ids.size == -4


VIDEO3 = QWEN3.video_token_id
BAD_VIDEOS = {
    "one run": ([5, *[VIDEO3] * 8, 6], None, r"video 0 has 8 adjacent placeholders .*expected 2 separate runs of 4"),
    "too few runs": (
        [5, *[VIDEO3] * 4, 6],
        None,
        r"row 0: video 0 has 1 runs .* in one sequence; expected 2, one for each",
    ),
    "too many runs": (
        [5, *[VIDEO3] * 4, 6, *[VIDEO3] * 4, 6, *[VIDEO3] * 4],
        None,
        r"video_grid_thw has 1 grids \(2 frames\); expected at least 2",
    ),
    "short run": ([5, *[VIDEO3] * 4, 6, *[VIDEO3] * 3, 6], None, r"3 adjacent placeholders .* expected 4 for a frame"),
    "two sequences": (
        [*[VIDEO3] * 4, 5, 6, *[VIDEO3] * 4],
        [1] * 5 + [2] * 5,
        r"video 0 has 1 runs of placeholders in one sequence; expected 2",
    ),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_frames_that_do_not_match_their_video_are_refused(case):
    ids, segment_ids, message = BAD_VIDEOS[case]
    segments = {} if segment_ids is None else {"segment_ids": np.array([segment_ids])}
    with pytest.raises(UserError, match=message):
        rope_index(QWEN3, np.array([ids]), video_grid_thw=np.array([[2, 4, 4]]), **segments)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ([1.0, 1.0], r"second_per_grid_ts has shape \[2\]; expected \[1\]"),
        ([], r"second_per_grid_ts has shape \[0\]; expected \[1\]"),
        ([0.0], r"second_per_grid_ts is \[0.0\]; expected positive, finite numbers"),
        ([float("nan")], r"expected positive, finite numbers"),
        (1.0, r"second_per_grid_ts has shape \[\]"),
        (["1"], r"second_per_grid_ts is \['1'\]; expected a list of numbers"),
        ([10**400], "expected a list of numbers"),
        ([[1.0], [1.0, 2.0]], "expected a list of numbers"),
        (["a"], r"second_per_grid_ts is \['a'\]; expected a list of numbers"),
    ],
)
def test_wrong_seconds_are_refused(seconds, message):
    ids = np.array([[5, *[QWEN2_5.video_token_id] * 2, 6]])
    with pytest.raises(UserError, match=message):
        rope_index(QWEN2_5, ids, video_grid_thw=np.array([[2, 2, 2]]), second_per_grid_ts=seconds)


def test_seconds_are_refused_where_they_have_no_effect():
    ids = np.array([[5, *[VIDEO] * 2, 6]])
    with pytest.raises(UserError, match="second_per_grid_ts is given; expected none"):
        rope_index(CONFIG, ids, video_grid_thw=np.array([[2, 2, 2]]), second_per_grid_ts=[1.0])


def test_times_beyond_all_positions_are_refused():
    """They overflow no integer."""
    ids = np.array([[5, *[QWEN2_5.video_token_id] * 2, 6]])
    pixels = np.zeros((8, QWEN2_5.vision.patch_values), np.float32)
    arrays = {"input_ids": ids, "video_grid_thw": np.array([[2, 2, 2]]), "pixel_values_videos": pixels}
    with pytest.raises(UserError, match=r"position 2147483650; expected position_ids in \[0, 4096\)"):
        prepare(QWEN2_5, **arrays, second_per_grid_ts=[1e300])


def test_packed_videos_with_their_time_as_text():
    """Positions restart in each sequence, whose frames belong to its own video."""
    first = [5, *[VIDEO3] * 4, 6, *[VIDEO3] * 4, 7]
    second = [8, 9, *[VIDEO3] * 2, 6, *[VIDEO3] * 2, 6, *[VIDEO3] * 2]
    grids = np.array([[2, 4, 4], [3, 2, 4]])
    segment_ids = np.array([[1] * len(first) + [2] * len(second)])
    packed = rope_index(QWEN3, np.array([first + second]), video_grid_thw=grids, segment_ids=segment_ids)
    parts = [
        rope_index(QWEN3, np.array([ids]), video_grid_thw=grids[i : i + 1]) for i, ids in enumerate((first, second))
    ]
    np.testing.assert_array_equal(packed, np.concatenate(parts, axis=2))


TABLES = sorted({name.rsplit("/", 1)[0] for name in FAMILY[""] if name.startswith("table/")})


@pytest.mark.parametrize("case", TABLES)
def test_position_table_lookup_equals_transformers(case):
    _, side, grid = case.split("/")
    indices, weights = position_table_lookup(tuple(map(int, grid.split(","))), int(side), 2)
    np.testing.assert_array_equal(indices, FAMILY[""][f"{case}/indices"])
    np.testing.assert_array_equal(weights, FAMILY[""][f"{case}/weights"])
    assert (indices.dtype, weights.dtype) == (np.int32, np.float32)
