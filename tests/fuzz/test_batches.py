"""`prepare`, packing and datasets: arrays that contradict each other are refused, others give a consistent batch."""

import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from liger_jax import Processor, QwenVLConfig, prepare
from liger_jax.data.dataset import make_dataset
from liger_jax.data.packing import pack
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.inputs.families import FAMILIES
from liger_jax.inputs.video import ClipSettings
from liger_jax.options import Batching
from tests._support.fuzzing import ODD_NUMBERS, fuzz, json_values, mostly, only_user_errors, pick

CONFIGS = {family: QwenVLConfig.tiny(family=family) for family in FAMILIES}
IMAGE, VIDEO = CONFIGS["qwen2_vl"].image_token_id, CONFIGS["qwen2_vl"].video_token_id  # the same for all


def valid_arguments(config: QwenVLConfig) -> list[dict]:
    """Returns arguments of `prepare`: text, two images and a video, and packed rows."""
    rng = np.random.default_rng(0)
    ids = np.array([[5, IMAGE, IMAGE, 6, 7, 8, 9], [IMAGE, 9, VIDEO, VIDEO, 3, 2, 4]])
    mask = np.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    segments = mask * [1, 1, 1, 2, 2, 2, 2]
    patches = {
        "pixel_values": rng.normal(size=(12, config.vision.patch_values)).astype(np.float32),
        "image_grid_thw": np.array([[1, 2, 4], [1, 2, 2]]),
        "pixel_values_videos": rng.normal(size=(8, config.vision.patch_values)).astype(np.float32),
        "video_grid_thw": np.array([[2, 2, 2]]),
    }
    if config.vision.video_time == "text":  # the frames are apart
        ids[1], segments[1] = [IMAGE, 9, VIDEO, 3, VIDEO, 2, 4], [1, 1, 2, 2, 2, 2, 2]
    if config.vision.video_time == "seconds":
        patches["second_per_grid_ts"] = np.array([0.5])
    types = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    labels = np.where((mask == 1) & (types == 0), ids, -100)
    positions = np.broadcast_to(np.arange(7), (3, 2, 7))
    return [
        {"input_ids": np.array([[1, 2, 3]])},
        {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": types, **patches},
        {"input_ids": ids, "segment_ids": mask, "position_ids": positions, "length": 64, "patches": 64, **patches},
        {"input_ids": ids, "segment_ids": segments, "video_positions": "hf5", **patches},
    ]


ARGUMENTS = {family: valid_arguments(config) for family, config in CONFIGS.items()}
NAMES = st.sampled_from(sorted(set().union(*(arguments for cases in ARGUMENTS.values() for arguments in cases))))


@st.composite
def changed(draw, array):
    """Draws an array like this one, of another dtype or shape, or with other values; or something else."""
    try:
        array = np.asarray(array)
    except ValueError:  # changed before, into lists of different lengths
        return array
    if array.dtype.kind not in "biuf":
        return draw(json_values())
    change = draw(
        st.sampled_from(["value", "value", "dtype", "axes", "rows", "columns", "list", "empty", "other", "ragged"])
    )
    if change == "value" and array.size:
        array = np.array(array)
        place = draw(st.integers(0, array.size - 1))
        for number in draw(st.lists(st.sampled_from([*ODD_NUMBERS, IMAGE, VIDEO, -100, 5]), min_size=1, max_size=2)):
            try:
                array.flat[place] = number
            except (OverflowError, ValueError):
                array = array.astype(object if draw(st.booleans()) else np.float64)
        return array
    if change == "dtype":
        with np.errstate(all="ignore"):
            return array.astype(draw(st.sampled_from(["i1", "u1", "i4", "u8", "f2", "f4", "f8", "c8", "?", "O", "U4"])))
    if change == "axes":
        return draw(st.sampled_from([array[None], array.ravel(), array.T, array[..., None], array.sum()]))
    if change == "rows" and array.ndim:
        return draw(st.sampled_from([array[:-1], array[1:], array[::-1], np.concatenate([array, array])]))
    if change == "columns" and array.ndim > 1:
        return draw(st.sampled_from([array[:, :-1], array[:, ::-1], np.concatenate([array, array], axis=1)]))
    if change == "list":
        return array.tolist()
    if change == "ragged":
        return [[1], [1, 2]]
    if change == "empty":
        return array[:0] if array.ndim else array
    return draw(json_values())


@st.composite
def arguments(draw):
    """Draws a family, and valid arguments of `prepare` for it with up to three changes."""
    family = draw(st.sampled_from(sorted(CONFIGS)))
    values = dict(draw(pick(ARGUMENTS[family])))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(NAMES)
        change = draw(st.sampled_from(["change", "change", "change", "remove", "take"]))
        if change == "remove":
            values.pop(name, None)
        elif change == "take":
            other = draw(st.sampled_from([family, *CONFIGS]))
            values |= {key: value for key, value in draw(pick(ARGUMENTS[other])).items() if key == name}
        elif name in values:
            values[name] = draw(changed(values[name]))
    return family, {"input_ids": None} | values


@fuzz(case=arguments())
def test_prepare(case):
    """A batch that is accepted has finite pixels, positions in range, and a token for each merged patch."""
    family, values = case
    with only_user_errors():
        batch = prepare(CONFIGS[family], **values)
        rows, length = np.shape(values["input_ids"])
        assert batch.shape[0] == rows and batch.shape[1] >= length
        np.testing.assert_array_equal(batch.input_ids[:, :length], values["input_ids"])
        assert all(leaf.dtype in (np.int32, np.float32) for leaf in jax.tree.leaves(batch))
        assert batch.position_ids.min() >= 0 and batch.segment_ids.max() <= batch.max_segments
        is_media = np.isin(batch.input_ids, (IMAGE, VIDEO)) & (batch.segment_ids > 0)
        if batch.vision is None:
            assert not is_media.any()
            return
        assert np.isfinite(batch.vision.pixel_values).all()
        np.testing.assert_array_equal((batch.vision.segment_ids > 0).sum(axis=1), is_media.sum(axis=1) * 4)
        for row, positions in zip(is_media, batch.vision.token_positions, strict=True):
            np.testing.assert_array_equal(np.flatnonzero(row), np.sort(positions[positions < batch.shape[1]]))
        check_patches(CONFIGS[family].vision, batch.vision)


def check_patches(config, vision):
    """Checks the windows and the weights of the position table, for models that have them."""
    filled = vision.segment_ids > 0
    assert (vision.window_ids is not None) == (config.window_size > 0)
    if vision.window_ids is not None:
        np.testing.assert_array_equal(vision.window_ids > 0, filled)
        for row in vision.window_ids.reshape(len(filled), -1, config.window_patches):
            windows = [set(block[block > 0].tolist()) for block in row]
            assert sum(map(len, windows)) == len(set().union(*windows)), "a window is in two blocks"
    assert (vision.table_weights is not None) == (config.position_table_side > 0)
    if vision.table_weights is not None:
        np.testing.assert_allclose(vision.table_weights.sum(axis=-1), filled, atol=1e-6)
        assert (vision.table_indices >= 0).all() and (vision.table_indices < config.position_table_side**2).all()


SIZES = st.integers(0, 12)


@fuzz(
    sizes=st.lists(st.tuples(SIZES, SIZES), max_size=12),
    length=st.integers(-1, 14),
    max_patches=st.integers(-1, 14),
    seed=st.integers(0, 9),
)
def test_packing(sizes, length, max_patches, seed):
    """Each conversation occurs once, and no sequence holds more than fits."""
    tokens, patches = np.array(sizes, np.int64).reshape(-1, 2).T
    with only_user_errors():
        sequences = pack(tokens, patches, length=length, max_patches=max_patches, seed=seed)
        assert sorted(i for sequence in sequences for i in sequence) == list(range(len(sizes)))
        for sequence in map(list, sequences):
            assert tokens[sequence].sum() <= length and patches[sequence].sum() <= max_patches


@pytest.fixture(scope="module")
def processors():
    """Returns processors of the family with limits for small images."""
    processors = {}
    for family, member in FAMILIES.items():
        processor = processors[family] = Processor(train_tokenizer([]), family=family)
        processor.image = member.image.with_limits(processor.image.factor**2, 4 * processor.image.factor**2)
        processor.video = member.video.with_limits(processor.image.factor**2, 8 * processor.image.factor**2)
    assert isinstance(processors["qwen3_vl"].video, ClipSettings)
    return processors


CONVERSATIONS = [
    [{"role": "user", "content": content}, {"role": "assistant", "content": "An answer."}]
    for content in (
        "A question?",
        [{"type": "image", "image": np.zeros((30, 40, 3), np.uint8)}, {"type": "text", "text": "What?"}],
        [{"type": "image", "image": "missing.png"}],
        "A long question. " * 9,
        [{"type": "video", "video": [np.zeros((30, 40, 3), np.uint8)] * 2}],
    )
] + [[{"role": "user", "content": "A question without an answer?"}], "not a conversation"]
COUNT = mostly(st.sampled_from([None, 64, 256, 1024]), st.integers(-1, 9) | json_values())
SMALL = mostly(st.integers(1, 5), st.none() | json_values())


@fuzz(
    conversations=st.lists(pick(CONVERSATIONS), max_size=5),
    options=st.fixed_dictionaries(
        {},
        optional={
            "batch_size": SMALL,
            "accumulate": SMALL,
            "pack_length": COUNT,
            "length": COUNT,
            "patches": COUNT,
            "group_by_length": st.booleans(),
            "skip_broken": st.booleans(),
            "seed": SMALL,
        },
    ),
    shuffle=st.booleans(),
    family=st.sampled_from(sorted(FAMILIES)),
)
def test_datasets(conversations, options, shuffle, family, processors):
    """Datasets of good and broken conversations with any options."""
    with only_user_errors():
        batching = Batching(**options)
        # the ids of the placeholders are those of the tokenizer
        config = QwenVLConfig.tiny(270, family=family)
        data = make_dataset(processors[family], config, conversations, batching, shuffle=shuffle)
        for step in range(data.schedule.epoch_batches):
            batch = data(step)
            assert batch.shape[0] == batching.batch_size
            if batching.pack_length or batching.length:
                assert batch.shape[1] == (batching.pack_length or batching.length)
