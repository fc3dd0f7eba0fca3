"""`prepare` pads valid batches to buckets without losing data, and names the argument that makes a batch invalid."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from liger_jax import QwenVLConfig, prepare
from liger_jax.config.families import FAMILIES
from liger_jax.errors import UserError
from liger_jax.inputs.batch import bucket
from liger_jax.inputs.layout import split_at_frames
from tests._support import parity

CONFIG = parity.config()
IMAGE, VIDEO = CONFIG.image_token_id, CONFIG.video_token_id
PATCH_VALUES = 1176


def row(*parts):
    """Returns token ids, given as numbers and as tuples (placeholder, count)."""
    return [token for part in parts for token in ([part[0]] * part[1] if isinstance(part, tuple) else [part])]


def pixels(*grids, seed=0):
    count = sum(int(np.prod(grid)) for grid in grids)
    return np.random.default_rng(seed).normal(size=(count, PATCH_VALUES)).astype(np.float32)


def two_rows():
    """Returns one row with two images (1 and 4 tokens), and one row with another (2 tokens)."""
    grids = [[1, 2, 2], [1, 4, 4], [1, 2, 4]]
    return {
        "input_ids": np.array([row(5, (IMAGE, 1), 6, (IMAGE, 4), 7), row(5, (IMAGE, 2), 6, 7, 8, 9, 10)]),
        "image_grid_thw": np.array(grids),
        "pixel_values": pixels(*grids),
    }


def one_video():
    return {
        "input_ids": np.array([row(5, (VIDEO, 2), 6)]),
        "video_grid_thw": np.array([[2, 2, 2]]),
        "pixel_values_videos": pixels([2, 2, 2]),
    }


# ---- valid batches


@pytest.mark.parametrize(("smallest", "limit"), [(1, 300), (64, 5000)])
def test_buckets(smallest, limit):
    """Never too small, at most 25 % padding from 4 units on, and four sizes per octave."""
    sizes = [bucket(n, smallest) for n in range(1, limit)]
    assert all(size >= n and size % smallest == 0 for n, size in enumerate(sizes, 1))
    assert all(size <= 1.25 * n + smallest for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    octave = [size for size in set(sizes) if 8 * smallest < size <= 16 * smallest]
    assert len(octave) == 4


def test_shapes_and_dtypes():
    batch = prepare(CONFIG, **two_rows(), labels=two_rows()["input_ids"])
    assert batch.shape == batch.labels.shape == batch.segment_ids.shape == (2, 64)
    assert batch.position_ids.shape == (2, 3, 64)
    patches = batch.vision.pixel_values.shape[1]
    assert patches == 64
    assert batch.vision.pixel_values.shape == (2, patches, PATCH_VALUES)
    assert batch.vision.position_ids.shape == (2, patches, 2)
    assert batch.vision.token_positions.shape == (2, patches // 4)
    arrays = jax.tree.leaves(batch)
    assert {array.dtype.name for array in arrays} == {"int32", "float32"}
    assert sum(array.dtype == np.float32 for array in arrays) == 1


def one_image(*grid, before=(5,), after=(7,)):
    ids = row(*before, (IMAGE, int(np.prod(grid)) // 4), *after)
    return {"input_ids": np.array([ids]), "image_grid_thw": np.array([grid]), "pixel_values": pixels(grid)}


def test_sizes_in_one_bucket_share_a_program():
    """Other images and lengths in the same bucket have the same shapes and static fields."""
    first = prepare(CONFIG, **one_image(1, 4, 4))
    second = prepare(CONFIG, **one_image(1, 4, 6, before=range(20), after=range(30)))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert [a.shape for a in jax.tree.leaves(first)] == [a.shape for a in jax.tree.leaves(second)]


def test_patches_stay_with_their_row():
    """A row's patches are stored in that row, in order, with one segment per image, followed by padding."""
    arrays = two_rows()
    vision = prepare(CONFIG, **arrays).vision
    np.testing.assert_array_equal(vision.pixel_values[0, :20], arrays["pixel_values"][:20])
    np.testing.assert_array_equal(vision.pixel_values[1, :8], arrays["pixel_values"][20:])
    assert not vision.pixel_values[0, 20:].any()
    assert not vision.pixel_values[1, 8:].any()
    assert vision.segment_ids[0, :20].tolist() == [1] * 4 + [2] * 16
    assert vision.segment_ids[1, :8].tolist() == [1] * 8
    assert not vision.segment_ids[0, 20:].any()
    assert not vision.segment_ids[1, 8:].any()
    assert vision.token_positions[0, :5].tolist() == [1, 3, 4, 5, 6]
    assert vision.token_positions[1, :2].tolist() == [1, 2]
    assert vision.token_positions[0, 5:].min() >= 64
    assert vision.token_positions[1, 2:].min() >= 64
    assert len(set(vision.token_positions[0].tolist())) == len(vision.token_positions[0])
    assert vision.max_segments >= 2


def test_images_and_videos_keep_the_order_of_the_text():
    """Patches arrive in two arrays and are merged in order. A video has one segment per frame."""
    arrays = {
        "input_ids": np.array([row(5, (IMAGE, 1), 6, (VIDEO, 2), 7, (IMAGE, 2), 8)]),
        "image_grid_thw": np.array([[1, 2, 2], [1, 4, 2]]),
        "pixel_values": pixels([1, 2, 2], [1, 4, 2]),
        "video_grid_thw": np.array([[2, 2, 2]]),
        "pixel_values_videos": pixels([2, 2, 2], seed=1),
    }
    vision = prepare(CONFIG, **arrays).vision
    images, video = arrays["pixel_values"], arrays["pixel_values_videos"]
    np.testing.assert_array_equal(vision.pixel_values[0, :20], np.concatenate([images[:4], video, images[4:]]))
    assert vision.segment_ids[0, :20].tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 8
    assert vision.token_positions[0, :5].tolist() == [1, 3, 4, 6, 7]


def test_text_rows_and_image_rows_in_one_batch():
    arrays = two_rows()
    arrays["input_ids"] = np.concatenate([np.full((1, 8), 9), arrays["input_ids"]])
    batch = prepare(CONFIG, **arrays)
    assert not batch.vision.segment_ids[0].any()
    assert batch.vision.token_positions[0].min() >= 64
    assert batch.position_ids[0, :, :8].tolist() == [list(range(8))] * 3


def test_text_only_has_no_vision():
    assert prepare(CONFIG, input_ids=np.array([[5, 6]])).vision is None


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
def test_any_padding_side(mask):
    """Tokens keep their positions in the array; padding on any side has segment and position 0."""
    ids = np.array([[5, 6, 7, 8, 9]])
    batch = prepare(CONFIG, input_ids=ids, attention_mask=np.array([mask]))
    assert batch.input_ids[0, :5].tolist() == ids[0].tolist()
    assert batch.segment_ids[0].tolist() == mask + [0] * 59
    expected = np.where(mask, np.cumsum(mask) - 1, 0)
    assert batch.position_ids[0, :, :5].tolist() == [expected.tolist()] * 3


def test_placeholders_in_padding_are_ignored():
    ids = np.array([row((IMAGE, 3), 5, 6)])
    assert prepare(CONFIG, input_ids=ids, attention_mask=np.array([[0, 0, 0, 1, 1]])).vision is None


def test_packed_rows():
    """Sequences are renumbered from 1; an image belongs to the sequence that contains its placeholders."""
    arrays = {
        "input_ids": np.array([row(5, (IMAGE, 1), 6, 7, 8, (IMAGE, 2), 9)]),
        "image_grid_thw": np.array([[1, 2, 2], [1, 2, 4]]),
        "pixel_values": pixels([1, 2, 2], [1, 2, 4]),
        "segment_ids": np.array([[7] * 3 + [3] * 5]),
    }
    batch = prepare(CONFIG, **arrays)
    assert batch.segment_ids[0, :8].tolist() == [1] * 3 + [2] * 5
    assert batch.position_ids[0, 0, :8].tolist() == [0, 1, 2, 0, 1, 2, 2, 4]
    assert batch.max_segments == 2


def test_explicit_position_ids_are_used():
    positions = np.arange(6).reshape(3, 1, 2)
    batch = prepare(CONFIG, input_ids=np.array([[5, 6]]), position_ids=positions)
    assert batch.position_ids[0, :, :2].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_explicit_length_and_patches():
    """A run whose batches must all have the same shape passes both."""
    batch = prepare(CONFIG, **two_rows(), length=100, patches=32)
    assert batch.shape == (2, 100)
    assert batch.vision.pixel_values.shape == (2, 32, PATCH_VALUES)
    assert batch.vision.token_positions[0, 5:].min() >= 100
    text = prepare(CONFIG, input_ids=np.array([[5, 6]]), patches=32)
    assert text.vision.pixel_values.shape == (1, 32, PATCH_VALUES)


def test_pad_rows():
    """Empty rows belong to no sequence, have no labels and receive no image."""
    batch = prepare(CONFIG, **two_rows(), labels=two_rows()["input_ids"])
    padded = batch.pad_rows(4)
    assert jax.tree.map(lambda a: a[:2].tolist(), padded) == jax.tree.map(lambda a: a.tolist(), batch)
    assert padded.shape == (4, 64)
    assert not padded.segment_ids[2:].any()
    assert (padded.labels[2:] == -100).all()
    assert not padded.vision.segment_ids[2:].any()
    assert padded.vision.token_positions[2:].min() >= 64
    assert batch.pad_rows(2) is batch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole_frames", [True, False])
def test_split_positions(family, whole_frames):
    """Appended positions have no labels, and every patch keeps its token and its frame, wherever it is moved to."""
    config = QwenVLConfig.tiny(family=family)
    grids, parts, unit = [(1, 12, 8), (1, 6, 8), (1, 6, 8), (1, 8, 8), (1, 4, 6)], 3, config.vision.merge_unit
    ids = [1]
    for t, h, w in grids:
        ids += [config.image_token_id] * (t * h * w // unit) + [2]
    patches = sum(math.prod(grid) for grid in grids)
    pixels = np.arange(patches * config.vision.patch_values, dtype=np.float32).reshape(patches, -1)
    rows = np.array([ids, [3] * len(ids)])
    batch = prepare(config, input_ids=rows, labels=rows, pixel_values=pixels, image_grid_thw=grids)
    split = batch.split_positions(parts, whole_frames=whole_frames)
    assert split.shape == (2, 129) and split.position_ids.shape == (2, 3, 129)
    for name in ("input_ids", "labels", "segment_ids", "position_ids"):
        np.testing.assert_array_equal(getattr(split, name)[..., :128], getattr(batch, name), err_msg=name)
    assert not split.segment_ids[:, 128:].any() and (split.labels[:, 128:] == -100).all()

    def by_token(batch):
        """Returns the arrays of each merged token's patches, in the order of the tokens' positions."""
        positions = batch.vision.token_positions[0]
        order = [i for i in np.argsort(positions) if positions[i] < batch.shape[1]]
        arrays = jax.tree.map(lambda x: x[0].reshape(len(positions), -1), batch.vision)
        return jax.tree.map(lambda x: x[order].tolist(), dataclasses.replace(arrays, max_segments=0, parts=1))

    assert jax.tree.leaves(by_token(split)) == jax.tree.leaves(by_token(batch))
    slots = split.vision.segment_ids.shape[1]
    assert slots % (64 * parts) == 0 and slots - batch.vision.segment_ids.shape[1] < 64 * parts
    for positions in split.vision.token_positions:
        assert len(set(positions)) == len(positions)
    frames = [set(part) - {0} for part in split.vision.segment_ids[0].reshape(parts, -1)]
    assert split.vision.parts == (parts if whole_frames else 1)
    if whole_frames:
        assert sum(map(len, frames)) == len(set.union(*frames)) == split.vision.segment_ids.max()
        assert all(frames)


def test_split_positions_divides_frames_that_are_too_large():
    """An image of 288 patches is longer than a part of 192 slots."""
    config = QwenVLConfig.tiny()
    ids = np.array([[1] + [config.image_token_id] * 72 + [2]])
    pixels = np.zeros((288, config.vision.patch_values), np.float32)
    batch = prepare(config, input_ids=ids, pixel_values=pixels, image_grid_thw=[(1, 16, 18)])
    split = batch.split_positions(2)
    assert split.vision.parts == 1
    np.testing.assert_array_equal(split.vision.segment_ids[0].nonzero()[0], np.arange(288))
    assert batch.split_positions(1) is batch
    assert prepare(config, input_ids=ids[:, :1]).split_positions(3).shape == (1, 66)


@pytest.mark.parametrize("seed", range(3))
def test_split_at_frames(seed):
    """The longest part is as short as possible, compared with all ways to cut rows of up to eight frames."""
    rng = np.random.default_rng(seed)
    for _ in range(30):
        lengths, parts = rng.integers(1, 5, rng.integers(1, 9)), int(rng.integers(1, 4))
        frames = np.concatenate([np.full(n, i) for i, n in enumerate(lengths, 1)] + [np.zeros(2, int)])
        ends = [0, *np.cumsum(lengths).tolist()]
        cuts = itertools.combinations_with_replacement(ends, parts - 1)
        shortest = min(max(np.diff([0, *cut, ends[-1]])) for cut in cuts)
        slices = split_at_frames(frames, parts, len(frames), 1)
        assert max(part.stop - part.start for part in slices) == shortest
        assert [part.start for part in slices[1:]] == [part.stop for part in slices[:-1]]
        assert {part.stop for part in slices} <= set(ends) and slices[-1].stop == ends[-1]
        assert split_at_frames(frames, parts, shortest - 1, 1) is None


def test_batch_passes_through_jit():
    batch = prepare(CONFIG, **two_rows())
    returned = jax.jit(lambda b: b)(batch)
    assert returned.shape == batch.shape
    np.testing.assert_array_equal(returned.vision.pixel_values, batch.vision.pixel_values)


def test_any_integer_width_and_boolean_masks():
    arrays = two_rows()
    narrow = {**arrays, "input_ids": arrays["input_ids"].astype(np.uint8), "attention_mask": np.ones((2, 8), bool)}
    jax.tree.map(np.testing.assert_array_equal, prepare(CONFIG, **narrow), prepare(CONFIG, **arrays))


def test_token_types_are_checked():
    arrays = two_rows()
    types = (arrays["input_ids"] == IMAGE).astype(int)
    prepare(CONFIG, **arrays, mm_token_type_ids=types)
    with pytest.raises(ValueError, match=r"mm_token_type_ids\[0, 1\] is 2"):
        prepare(CONFIG, **arrays, mm_token_type_ids=2 * types)


def test_token_types_may_mark_videos_as_text():
    """As in transformers 4. A video is not half text, or an image, and text is not a video."""
    for types in ([0, 2, 2, 0], [0, 0, 0, 0]):
        prepare(CONFIG, **one_video(), mm_token_type_ids=[types])
    for types, place in (([0, 2, 0, 0], 2), ([0, 1, 1, 0], 1), ([2, 0, 0, 0], 0), ([0, 0, 0, 1], 3)):
        with pytest.raises(UserError, match=rf"mm_token_type_ids\[0, {place}\] is {types[place]}; expected"):
            prepare(CONFIG, **one_video(), mm_token_type_ids=[types])


# ---- invalid batches

TEXT = {"input_ids": np.array([[5, 6, 7]])}
BAD = {
    # placeholders and grids are compared in each row, since the totals may agree
    "one placeholder too few": (
        two_rows()
        | {"input_ids": np.array([row(5, (IMAGE, 1), 6, (IMAGE, 3), 7, 8), row(5, (IMAGE, 2), 6, 7, 8, 9, 10)])},
        r"row 0: image 1 has 3 adjacent placeholders.*expected 4",
    ),
    "one placeholder too many": (
        two_rows() | {"input_ids": np.array([row(5, (IMAGE, 1), 6, (IMAGE, 4), 7), row(5, (IMAGE, 3), 6, 7, 8, 9)])},
        r"row 1: image_grid_thw has 3 grids.*image 3",
    ),
    "placeholders in the wrong row": (
        two_rows() | {"input_ids": np.array([row(5, (IMAGE, 1), 6, (IMAGE, 2), 7, 8, 9), row(5, (IMAGE, 4), 6, 7, 8)])},
        r"row 0: image 1 has 2 adjacent placeholders.*expected 4",
    ),
    "an image split by text": (
        one_image(1, 4, 4) | {"input_ids": np.array([row(5, (IMAGE, 2), 6, (IMAGE, 2), 7)])},
        r"row 0: image 0 has 2 adjacent placeholders.*expected 4",
    ),
    "one grid too many": (
        one_image(1, 4, 4) | {"image_grid_thw": np.array([[1, 4, 4]] * 2), "pixel_values": pixels(*[[1, 4, 4]] * 2)},
        r"image_grid_thw has 2 grids; expected 1",
    ),
    "placeholders without images": (
        {"input_ids": np.array([row(5, (IMAGE, 1), 6)])},
        r"row 0: image_grid_thw has 0 grids.*image 0",
    ),
    "images in place of videos": (
        {
            "input_ids": one_video()["input_ids"],
            "image_grid_thw": one_video()["video_grid_thw"],
            "pixel_values": one_video()["pixel_values_videos"],
        },
        r"row 0: video_grid_thw has 0 grids.*video 0",
    ),
    "videos in place of images": (
        {
            "input_ids": one_image(1, 4, 4)["input_ids"],
            "video_grid_thw": one_image(1, 4, 4)["image_grid_thw"],
            "pixel_values_videos": one_image(1, 4, 4)["pixel_values"],
        },
        r"row 0: image_grid_thw has 0 grids.*image 0",
    ),
    # pixels and grids
    "patches": (
        one_image(1, 4, 4) | {"pixel_values": pixels([1, 4, 4])[:-1]},
        r"pixel_values .*\[15, 1176\].*\[16, 1176\]",
    ),
    "video patches": (
        one_video() | {"pixel_values_videos": pixels([1, 2, 2])},
        r"pixel_values_videos .*\[4, 1176\].*\[8, 1176\]",
    ),
    "patch values": (
        one_image(1, 4, 4) | {"pixel_values": pixels([1, 4, 4])[:, :588]},
        r"pixel_values .*\[16, 588\].*\[16, 1176\]",
    ),
    "an image tensor": (
        one_image(1, 4, 4) | {"pixel_values": np.zeros((1, 3, 56, 56), np.float32)},
        r"pixel_values .*\[1, 3, 56, 56\]",
    ),
    "integer pixels": (
        one_image(1, 4, 4) | {"pixel_values": np.zeros((16, 1176), np.uint8)},
        r"pixel_values has dtype uint8",
    ),
    "odd height": (
        one_image(1, 4, 4) | {"image_grid_thw": np.array([[1, 1, 16]])},
        r"image_grid_thw\[0\].*\(1, 1, 16\).*multiples of 2",
    ),
    "odd width": (one_image(1, 4, 4) | {"image_grid_thw": np.array([[1, 2, 5]])}, r"image_grid_thw\[0\].*\(1, 2, 5\)"),
    "negative grid": (one_image(1, 4, 4) | {"image_grid_thw": np.array([[1, -4, -4]])}, r"image_grid_thw\[0\]"),
    "no frames": (one_video() | {"video_grid_thw": np.array([[0, 4, 4]])}, r"video_grid_thw\[0\]"),
    "grid of two numbers": (
        one_image(1, 4, 4) | {"image_grid_thw": np.array([[4, 4]])},
        r"image_grid_thw has shape \[1, 2\]",
    ),
    "flat grid": (one_image(1, 4, 4) | {"image_grid_thw": np.array([1, 4, 4])}, r"image_grid_thw has shape \[3\]"),
    "float grid": (one_image(1, 4, 4) | {"image_grid_thw": np.array([[1.0, 4, 4]])}, r"image_grid_thw.*float64"),
    "pixels without grid": (
        one_image(1, 4, 4) | {"image_grid_thw": None},
        r"pixel_values is given without image_grid_thw",
    ),
    "grid without pixels": (
        one_image(1, 4, 4) | {"pixel_values": None},
        r"image_grid_thw is given without pixel_values",
    ),
    "video without grid": (
        one_video() | {"video_grid_thw": None},
        r"pixel_values_videos is given without video_grid_thw",
    ),
    "video grid without pixels": (one_video() | {"pixel_values_videos": None}, r"video_grid_thw is given without"),
    # ids, mask, labels
    "no sequences": ({"input_ids": np.zeros((0, 4), int)}, r"input_ids has shape \[0, 4\]"),
    "no tokens": ({"input_ids": np.zeros((2, 0), int)}, r"input_ids has shape \[2, 0\]"),
    "ragged ids": ({"input_ids": [[5, 6], [7]]}, r"input_ids is not rectangular"),
    "one axis": ({"input_ids": np.array([5, 6])}, r"input_ids has shape \[2\]; expected 2 axes"),
    "float ids": ({"input_ids": np.array([[5.0, 6.0]])}, r"input_ids has dtype float64"),
    "id above the vocabulary": ({"input_ids": np.array([[5, 160]])}, r"input_ids\[0, 1\] is 160.*\[0, 160\)"),
    "negative id": ({"input_ids": np.array([[-1, 5]])}, r"input_ids\[0, 0\] is -1"),
    "mask of another length": (
        TEXT | {"attention_mask": np.ones((1, 2), int)},
        r"attention_mask has shape \[1, 2\].*\[1, 3\]",
    ),
    "mask of another batch size": (
        TEXT | {"attention_mask": np.ones((2, 3), int)},
        r"attention_mask has shape \[2, 3\]",
    ),
    "mask of one axis": (TEXT | {"attention_mask": np.ones(3, int)}, r"attention_mask has shape \[3\]"),
    "additive mask": (TEXT | {"attention_mask": np.array([[0.0, -1e9, 0.0]])}, r"attention_mask has dtype float64"),
    "mask with a hole": (
        TEXT | {"attention_mask": np.array([[1, 0, 1]])},
        "attention_mask of row 0 has padding between tokens, at position 1",
    ),
    "mask of other numbers": (TEXT | {"attention_mask": np.array([[1, 2, 1]])}, r"attention_mask holds \[1, 2\]"),
    "labels of another shape": (TEXT | {"labels": np.array([[5, 6]])}, r"labels has shape \[1, 2\].*\[1, 3\]"),
    "float labels": (TEXT | {"labels": np.array([[5.0, 6, 7]])}, r"labels has dtype float64"),
    "label above the vocabulary": (TEXT | {"labels": np.array([[5, 6, 160]])}, r"labels\[0, 2\] is 160.*or -100"),
    "another ignored label": (TEXT | {"labels": np.array([[-1, 6, 7]])}, r"labels\[0, 0\] is -1.*or -100"),
    "segments of another shape": (TEXT | {"segment_ids": np.ones((1, 2), int)}, r"segment_ids has shape \[1, 2\]"),
    "negative segments": (TEXT | {"segment_ids": np.array([[1, 1, -1]])}, r"segment_ids holds -1"),
    "segments that return": (TEXT | {"segment_ids": np.array([[1, 2, 1]])}, r"segment_ids of row 0 return"),
    "segments that contradict the mask": (
        TEXT | {"segment_ids": np.array([[1, 1, 0]]), "attention_mask": np.ones((1, 3), int)},
        r"segment_ids and attention_mask differ",
    ),
    "an image across sequences": (
        one_image(1, 4, 4) | {"segment_ids": np.array([[1, 1, 1, 2, 2, 2]])},
        r"row 0: image 0 has 2 adjacent placeholders",
    ),
    "positions of another shape": (TEXT | {"position_ids": np.zeros((1, 3), int)}, r"position_ids has shape \[1, 3\]"),
    "negative positions": (TEXT | {"position_ids": np.full((3, 1, 3), -1)}, r"position_ids"),
    "a position beyond the model's": (
        TEXT | {"position_ids": np.full((3, 1, 3), 512)},
        r"position 512.*position_ids in \[0, 512\)",
    ),
    "longer than the model": ({"input_ids": np.full((1, 513), 5)}, r"position 512.*max_position_embeddings"),
    "unknown rule": (TEXT | {"video_positions": "paper"}, r"video_positions is 'paper'"),
    "length too small": (TEXT | {"length": 2}, r"length is 2.* 3"),
    "patches too few": (one_image(1, 4, 4) | {"patches": 12}, r"patches is 12.* 16"),
    "length of another type": (TEXT | {"length": "64"}, r"length is '64'; expected an integer up to 16777216"),
    "patches beyond any device": (
        one_image(1, 4, 4) | {"patches": 2**31},
        r"patches is 2147483648; expected an integer",
    ),
    "ragged pixels": (one_image(1, 4, 4) | {"pixel_values": [[1], [1, 2]]}, r"pixel_values is not rectangular"),
    "NaN pixels": (
        one_image(1, 4, 4) | {"pixel_values": np.full((16, 1176), np.nan, np.float32)},
        r"pixel_values\[0, 0\] is nan; expected finite numbers",
    ),
    "pixels beyond float32": (
        one_image(1, 4, 4) | {"pixel_values": np.full((16, 1176), 1e300)},
        r"pixel_values\[0, 0\] is inf; expected finite numbers",
    ),
    "patches of half a token": (one_image(1, 4, 4) | {"patches": 18}, r"patches is 18.*multiple of 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_arguments_are_refused(case):
    """The error names the argument, its value and the expected value."""
    arguments, message = BAD[case]
    with pytest.raises(UserError, match=message):
        prepare(CONFIG, **arguments)


def test_arguments_are_not_changed_in_place():
    arrays = two_rows()
    before = {key: value.copy() for key, value in arrays.items()}
    prepare(CONFIG, **arrays)
    for key, value in before.items():
        np.testing.assert_array_equal(arrays[key], value)
