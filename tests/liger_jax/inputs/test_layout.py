"""Windows are those of transformers; none straddles a block; and planned slots are always enough."""

import itertools

import jax
import numpy as np
import pytest

from liger_jax import QwenVLConfig, prepare
from liger_jax.errors import UserError
from liger_jax.inputs.layout import arrange, count_slots, item_layout, window_order
from tests._support import family_parity
from tests._support.parity import REFERENCES

STORED = np.load(REFERENCES / "family_inputs.npz")
GRIDS = sorted({name.split("/")[1] for name in STORED if name.startswith("windows/")})
CONFIG = QwenVLConfig.tiny(family="qwen2_5_vl")
VISION = CONFIG.vision


def parse(grid):
    return tuple(map(int, grid.split(",")))


@pytest.mark.parametrize("grid", GRIDS)
def test_window_order_equals_transformers(grid):
    t, h, w = parse(grid)
    tokens, sizes = window_order(h // 2, w // 2, 4)
    order = np.concatenate([tokens + frame * h * w // 4 for frame in range(t)])
    np.testing.assert_array_equal(order, STORED[f"windows/{grid}/window_index"])
    lengths = np.cumsum([0, *np.tile(sizes * 4, t)])
    np.testing.assert_array_equal(lengths, STORED[f"windows/{grid}/cu_window_seqlens"])


@pytest.mark.parametrize("start", range(0, 16, 5))
@pytest.mark.parametrize("grid", GRIDS)
def test_every_window_is_stored_once_and_in_one_block(grid, start):
    """Each window holds the tokens of one of transformers' windows, in its order, without a gap or a block border."""
    tokens, windows = item_layout(VISION, parse(grid), start)
    borders = STORED[f"windows/{grid}/cu_window_seqlens"] // 4
    expected = {tuple(part) for part in np.split(STORED[f"windows/{grid}/window_index"], borders[1:-1])}
    stored = set()
    for number in range(1, windows.max() + 1):
        slots = np.flatnonzero(windows == number)
        assert (np.diff(slots) == 1).all() and (start + slots[0]) // 16 == (start + slots[-1]) // 16
        stored.add(tuple(tokens[slots]))
    assert stored == expected
    np.testing.assert_array_equal(tokens < 0, windows == 0)
    np.testing.assert_array_equal(np.sort(tokens[tokens >= 0]), np.arange(borders[-1]))
    numbers = windows[windows > 0]
    assert (np.diff(numbers) >= 0).all() and set(np.diff(numbers)) <= {0, 1}


def test_frames_stay_together():
    tokens, _ = item_layout(VISION, (3, 10, 14), 7)
    frames = tokens[tokens >= 0] // 35
    assert (np.diff(frames) >= 0).all() and set(frames) == {0, 1, 2}


def test_an_earlier_start_never_ends_later():
    """Shown for all sizes of edge windows and all starts: then a row never needs more slots than its parts planned alone."""
    for height, width in itertools.product(range(1, 16), repeat=2):
        ends = [start + len(item_layout(VISION, (1, 2 * height, 2 * width), start)[0]) for start in range(16)]
        assert (np.diff([*ends, 16 + ends[0]]) >= 0).all(), (height, width)
    assert count_slots(VISION, [(1, 6, 20), (1, 14, 30)]) == count_slots(
        VISION, [(1, 20, 6), (1, 30, 14)]
    )  # turned by EXIF


def test_planned_slots_are_enough_and_hardly_more_than_the_patches():
    """The slots of records planned one by one, and of the same images joined in one row."""
    rng = np.random.default_rng(0)
    planned, patches = 0, 0
    for _ in range(20):
        records = [
            [(int(rng.integers(1, 3)), *(2 * rng.integers(1, 40, 2)).tolist()) for _ in range(rng.integers(1, 4))]
            for _ in range(4)
        ]
        slots = sum(count_slots(VISION, grids) for grids in records)
        joined = [grid for grids in records for grid in grids]
        assert count_slots(VISION, joined) <= slots and slots % 64 == 0
        planned, patches = planned + slots, patches + int(np.prod(joined, axis=1).sum())
    assert patches <= planned < 1.07 * patches


def test_no_windows_need_no_layout():
    vision = QwenVLConfig.tiny().vision
    assert item_layout(vision, (1, 4, 6), 3) is None
    assert count_slots(vision, [(1, 4, 6), (2, 2, 2)]) == 32


def make_arrays(grids, kinds):
    """Returns a row with these images and videos; the first value of a patch is its number."""
    config, rng = CONFIG, np.random.default_rng(0)
    ids, arrays = [5], {}
    for grid, kind in zip(grids, kinds, strict=True):
        token = config.image_token_id if kind == "image" else config.video_token_id
        ids += [token] * (int(np.prod(grid)) // 4) + [6]
    for kind, pixels, name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if own := [grid for grid, own_kind in zip(grids, kinds, strict=True) if own_kind == kind]:
            values = rng.normal(size=(sum(int(np.prod(grid)) for grid in own), VISION.patch_values))
            values[:, 0] = np.arange(len(values)) + (1000 if kind == "video" else 0)
            arrays |= {name: np.array(own), pixels: values.astype(np.float32)}
    return {"input_ids": np.array([ids]), **arrays}


def test_all_arrays_of_a_batch_follow_the_windows():
    """Each slot's position, frame and window are those of its patch, which its pixels identify."""
    grids, kinds = [(1, 10, 18), (2, 4, 10), (1, 8, 8)], ["image", "video", "image"]
    arrays = make_arrays(grids, kinds)
    batch = prepare(CONFIG, **arrays, second_per_grid_ts=[0.5])
    vision = batch.vision
    filled = vision.segment_ids[0] > 0
    np.testing.assert_array_equal(filled, vision.window_ids[0] > 0)
    assert vision.pixel_values.shape[1] % 64 == 0 and not vision.pixel_values[0, ~filled].any()
    numbers = np.where(filled, vision.pixel_values[0, :, 0], -1).astype(int)
    patches = [
        (*place, frame) for place, frame in zip(vision.position_ids[0].tolist(), vision.segment_ids[0], strict=True)
    ]
    by_number = {number: patch for number, patch in zip(numbers.tolist(), patches, strict=True) if number >= 0}
    expected, first = {}, {"image": 0, "video": 1000}
    frame = 0
    for (t, h, w), kind in zip(grids, kinds, strict=True):
        for _ in range(t):
            frame += 1
            blocks = itertools.product(range(h // 2), range(w // 2), range(2), range(2))
            for row, column, y, x in blocks:
                expected[first[kind]] = (2 * row + y, 2 * column + x, frame)
                first[kind] += 1
    assert by_number == expected
    tokens = vision.token_positions[0]
    placeholders = np.flatnonzero(np.isin(arrays["input_ids"][0], (CONFIG.image_token_id, CONFIG.video_token_id)))
    first_patches = np.concatenate([np.arange(0, 180, 4), 1000 + np.arange(0, 80, 4), 180 + np.arange(0, 64, 4)])
    number = {int(patch): i for i, patch in enumerate(first_patches)}
    expected_tokens = placeholders[[number[patch] for patch in numbers[::4][filled[::4]]]]
    np.testing.assert_array_equal(tokens[filled[::4]], expected_tokens)
    assert tokens[~filled[::4]].min() >= batch.shape[1] and len(set(tokens.tolist())) == len(tokens)


def test_transposed_images_share_a_program():
    batches = [prepare(CONFIG, **make_arrays([grid], ["image"])) for grid in ((1, 10, 14), (1, 14, 10))]
    structures = [(jax.tree.structure(batch), [leaf.shape for leaf in jax.tree.leaves(batch)]) for batch in batches]
    assert structures[0] == structures[1]


@pytest.mark.parametrize("family", family_parity.FAMILIES)
def test_rows_that_are_added_have_no_patches(family):
    config = QwenVLConfig.tiny(family=family)
    ids = np.array([[5, config.image_token_id, config.image_token_id, 6]])
    pixels = np.ones((8, config.vision.patch_values), np.float32)
    batch = prepare(config, input_ids=ids, image_grid_thw=np.array([[1, 2, 4]]), pixel_values=pixels)
    vision = batch.pad_rows(3).vision
    for name, array in vars(vision).items():
        if isinstance(array, np.ndarray):
            assert array.shape == (3, *getattr(batch.vision, name).shape[1:])
            np.testing.assert_array_equal(array[:1], getattr(batch.vision, name))
            assert not array[1:].any() or (name == "token_positions" and array[1:].min() >= batch.shape[1])


def test_patches_must_be_whole_blocks():
    with pytest.raises(UserError, match="patches is 100; expected a multiple of 64, the number of patches per window"):
        prepare(CONFIG, **make_arrays([(1, 4, 6)], ["image"]), patches=100)


def test_arrange():
    values = np.arange(12).reshape(6, 2)
    assert arrange(values, np.array([2, -1, 0]), 2).tolist() == [[8, 9], [10, 11], [0, 0], [0, 0], [0, 1], [2, 3]]
