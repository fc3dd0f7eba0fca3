"""The batches of a run: reproducible, every conversation once per epoch, little padding, broken conversations handled."""

import base64
import dataclasses
import io
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from liger_jax import Processor, QwenVLConfig
from liger_jax.data.dataset import BatchSchedule, make_dataset
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.demo.tokenizer import train_tokenizer
from liger_jax.errors import UserError
from liger_jax.inputs.images import VisionSettings, image_size, load_image
from liger_jax.inputs.messages import KINDS
from liger_jax.options import Batching

COUNT = 30


@pytest.fixture(scope="module")
def processor():
    processor = make_processor(load_digits()[0])
    processor.image = processor.image.with_limits(28 * 28, 64 * 28 * 28)
    return processor


@pytest.fixture(scope="module")
def config(processor):
    return make_config(processor)


def ask(content, answer="7"):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def ask_about(*images):
    return ask([*({"type": "image", "image": image} for image in images), {"type": "text", "text": "Which?"}])


@pytest.fixture(scope="module")
def data():
    """Returns texts and images of many sizes."""
    rng = np.random.default_rng(0)
    mixed = list(itertools.islice(conversations(load_digits()[0], rng), COUNT // 3))
    for side in rng.integers(28, 224, COUNT // 3):
        mixed.append(ask_about(Image.new("RGB", (int(side), 112), "white")))
    return mixed + [ask("Which? " * int(n), str(n % 10)) for n in rng.integers(1, 60, COUNT // 3)]


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width, height):
    return Image.effect_noise((width, height), 60).convert("RGB")


@pytest.fixture(scope="module")
def truncated_image(tmp_path_factory):
    """Returns the path of an image file with an intact header and missing pixels."""
    path = tmp_path_factory.mktemp("broken") / "cut.png"
    path.write_bytes(encode(noise(56, 84))[:200])
    return str(path)


LAYOUTS = {"plain": {}, "grouped": {"group_by_length": True}, "packed": {"pack_length": 512}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_conversation_occurs_once_per_epoch(processor, config, data, layout):
    """The order differs between epochs. A batch depends on its step alone, not on the batches made before."""
    batching = Batching(batch_size=4, seed=1, **LAYOUTS[layout])
    dataset, same = (make_dataset(processor, config, data, batching) for _ in range(2))
    schedule, batches = dataset.schedule, dataset.schedule.epoch_batches
    first, second = (
        [sequence for step in range(epoch * batches, (epoch + 1) * batches) for sequence in schedule.batch(step)]
        for epoch in range(2)
    )
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(COUNT))
    assert first != second and sorted(first) == sorted(second)
    last = 2 * batches - 1
    for leaf, expected in zip(jax.tree.leaves(same(last)), jax.tree.leaves(dataset(last)), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    other = make_dataset(processor, config, data, dataclasses.replace(batching, seed=2)).schedule
    assert [other.batch(step) for step in range(batches)] != [schedule.batch(step) for step in range(batches)]


def test_image_larger_than_its_share_of_a_packed_sequence(processor, config):
    """Packed sequences have room for the image. (Regression: a numpy integer was refused.)"""
    large = ask_about(Image.new("RGB", (224, 224), "white"))
    texts = [ask("Which? " * 9) for _ in range(20)]
    dataset = make_dataset(processor, config, [large, *texts], Batching(batch_size=2, pack_length=128))
    assert dataset.shape.patches >= (224 // 14) ** 2
    assert dataset(0).vision is not None


def test_packed_windows_fit_their_sequences():
    """Slots are planned conversation by conversation; the batches, whose images share blocks of windows, fit them."""
    config = QwenVLConfig.tiny(270, family="qwen2_5_vl")  # the ids of the placeholders are those of the tokenizer
    limits = VisionSettings(min_pixels=28 * 28, max_pixels=128 * 28 * 28)
    processor = Processor(train_tokenizer([]), limits, limits, family="qwen2_5_vl")
    rng = np.random.default_rng(0)
    data = [
        ask_about(*(Image.new("RGB", tuple(rng.integers(28, 300, 2).tolist())) for _ in range(rng.integers(1, 3))))
        for _ in range(24)
    ]
    video = {"type": "video", "video": np.zeros((5, 60, 90, 3), np.uint8), "sample_fps": 1.0}
    data += [ask([video, {"type": "text", "text": "How long?"}])] * 2
    dataset = make_dataset(processor, config, data, Batching(batch_size=4, pack_length=512))
    assert dataset.shape.patches % config.vision.window_patches == 0
    filled = slots = 0
    for step in range(dataset.schedule.epoch_batches):
        batch = dataset(step)
        assert batch.vision.window_ids.shape == (4, dataset.shape.patches)
        filled += np.count_nonzero(batch.vision.segment_ids)
        slots += np.count_nonzero(batch.vision.segment_ids.reshape(-1, 64).any(axis=1)) * 64
    expected = sum(int(np.prod(grids)) for data_grids in map(processor.measure, data) for grids in data_grids[1])
    assert filled == expected and filled > 0.9 * slots


def test_seconds_of_packed_videos_reach_their_positions():
    """Two videos of different rates in one sequence: 2 positions per second, and 2 frames per row of the grid."""
    config = QwenVLConfig.tiny(270, family="qwen2_5_vl")
    processor = Processor(train_tokenizer([]), family="qwen2_5_vl")
    frames = np.zeros((6, 28, 28, 3), np.uint8)
    data = [ask([{"type": "video", "video": frames, "sample_fps": fps, "max_pixels": 28 * 28}]) for fps in (2.0, 0.5)]
    batch = make_dataset(processor, config, data, Batching(batch_size=1, pack_length=1024), shuffle=False)(0)
    is_video = batch.input_ids[0] == config.video_token_id
    times = {}
    for segment in (1, 2):
        time = batch.position_ids[0, 0, is_video & (batch.segment_ids[0] == segment)]
        times[segment] = (time - time[0]).tolist()
    assert sorted(times.values()) == [[0, 2, 4], [0, 8, 16]]


def run_epoch(processor, config, data, **layout):
    """Returns the number of programs compiled for an epoch, and the used fractions of its positions and patches."""
    dataset = make_dataset(processor, config, data, Batching(batch_size=4, **layout))
    traced, used, size = [], np.zeros(2), np.zeros(2)

    @jax.jit
    def step(batch):
        traced.append(batch.shape)
        return jax.tree.map(lambda leaf: leaf.sum(), batch)

    for number in range(dataset.schedule.epoch_batches):
        batch = dataset(number)
        step(batch)
        parts = [batch.segment_ids] + ([] if batch.vision is None else [batch.vision.segment_ids])
        used[: len(parts)] += [np.count_nonzero(part) for part in parts]
        size[: len(parts)] += [part.size for part in parts]
    return len(traced), used / size


def test_little_padding_and_few_programs(processor, config, data):
    """Grouped batches have less padding than random ones, in about as many programs; packed ones have the least, in one."""
    results = {name: run_epoch(processor, config, data * 12, **layout) for name, layout in LAYOUTS.items()}
    programs, used = zip(*results.values(), strict=True)
    plain, grouped, packed = used
    assert (grouped > plain).all() and grouped[0] > plain[0] + 0.15, results
    assert packed[0] > 0.9 and packed[1] > 0.8, results
    assert programs[1] <= programs[0] + 2 and programs[2] == 1, results


def test_schedule_groups_similar_sizes():
    """Batches of similar sizes stay together when sizes do not fill them, and the last batch is the short one."""
    sizes = np.array([[size, 0] for size in [5, 1, 5, 1, 5, 1, 5]])
    schedule = BatchSchedule([(i,) for i in range(7)], batch_size=2, seed=0, sizes=sizes)
    batches = [[sizes[sequence[0], 0] for sequence in schedule.batch(step)] for step in range(4)]
    assert sorted(batches[:3]) == [[1, 1], [1, 5], [5, 5]] and batches[3] == [5]


def test_sizes_without_decoding(processor, tmp_path, truncated_image):
    """The measured sizes equal those of the processor's arrays: rotated images, URLs, arrays, several images, videos."""
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[274] = 6
    rotated.write_bytes(encode(noise(112, 56), "JPEG", exif=exif))
    assert image_size(rotated) == load_image(rotated).size[::-1] == (112, 56)
    url = "data:image/png;base64," + base64.b64encode(encode(noise(300, 40))).decode()
    array = np.zeros((60, 90, 3), np.uint8)
    video = {"type": "video", "video": [noise(60, 90)] * 5}
    for conversation in [
        ask_about(str(rotated), url, array),
        ask_about(encode(noise(28, 28))),
        ask("Hi"),
        ask([video]),
    ]:
        inputs = processor(conversation, labels=True)
        grids = np.concatenate([inputs.get(kind.arrays[1], np.zeros((0, 3), int)) for kind in KINDS])
        tokens, measured = processor.measure(conversation)
        assert tokens == inputs["input_ids"].size
        assert [(t, *sorted(hw)) for t, *hw in measured] == [(t, *sorted(hw)) for t, *hw in grids.tolist()]
    assert processor.measure(ask_about(truncated_image))[1] == [(1, 6, 4)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_pixels(processor, config, data, truncated_image, layout):
    """An error names the conversation when a batch needs it. When it is skipped instead, with a warning, the other
    conversations of the batch are unaffected, in every epoch."""
    bad, good = ask_about(truncated_image), ask_about(noise(56, 84))
    batching = Batching(batch_size=30, seed=0, **LAYOUTS[layout])
    with pytest.raises(UserError, match=r"conversation 10: image '.*cut\.png' cannot be decoded.*it asks 'Which\?'"):
        make_dataset(processor, config, [*data[:10], bad, *data[10:]], batching)(0)
    intact = make_dataset(processor, config, [*data[:10], good, *data[10:]], batching)
    skipping = make_dataset(
        processor, config, [*data[:10], bad, *data[10:]], dataclasses.replace(batching, skip_broken=True)
    )
    assert [skipping.schedule.batch(step) for step in range(4)] == [intact.schedule.batch(step) for step in range(4)]
    step = next(step for step in range(4) if any(10 in sequence for sequence in intact.schedule.batch(step)))
    with pytest.warns(UserWarning, match=r"left out 1 conversations: conversation 10: image '.*cut\.png"):
        batch = skipping(step)
    with pytest.warns(UserWarning, match="left out"):
        assert all(map(np.array_equal, jax.tree.leaves(skipping(step)), jax.tree.leaves(batch)))
    missing = np.count_nonzero(intact(step).segment_ids) - np.count_nonzero(batch.segment_ids)
    assert missing == intact.read(10)["input_ids"].size
    if layout != "packed":
        (row,) = (i for i, sequence in enumerate(intact.schedule.batch(step)) if 10 in sequence)
        other_rows = np.delete(np.arange(len(batch.input_ids)), row)
        length = min(batch.shape[1], intact(step).shape[1])
        assert not batch.segment_ids[row].any()
        assert (batch.input_ids[other_rows, :length] == intact(step).input_ids[other_rows, :length]).all()


def test_batch_whose_conversations_are_all_skipped(processor, config, truncated_image):
    """The batch consists of padding and has no labels."""
    dataset = make_dataset(processor, config, [ask_about(truncated_image)], Batching(batch_size=2, skip_broken=True))
    with pytest.warns(UserWarning, match="left out"):
        batch = dataset(0)
    assert batch.shape == (2, 64) and not batch.segment_ids.any() and (batch.labels == -100).all()


def test_problems_found_before_training(processor, config, data, tmp_path):
    """Measuring finds conversations that are too large and files that are not images. They are named, or skipped."""
    text_file, missing = tmp_path / "no.png", tmp_path / "gone.png"
    text_file.write_text("hello")
    broken = {
        "conversation 30: it has .* tokens; expected at most the 512 of a sequence": ask("Which? " * 600),
        r"conversation 30: image .*no\.png.* cannot be decoded": ask_about(str(text_file)),
        r"conversation 30: image is .*gone\.png": ask_about(str(missing)),
        r"conversation 30: message is \{": [{"role": "user"}, 7],
    }
    for message, conversation in broken.items():
        for layout in ({"pack_length": 512}, {"length": 512}):
            batching = Batching(batch_size=4, **layout)
            with pytest.raises(UserError, match=message):
                make_dataset(processor, config, [*data, conversation], batching)
            with pytest.warns(UserWarning, match=message):
                dataset = make_dataset(
                    processor, config, [*data, conversation], dataclasses.replace(batching, skip_broken=True)
                )
            assert sorted(itertools.chain(*dataset.schedule.sequences)) == list(range(COUNT))


def test_no_usable_conversation(processor, config, data):
    message = "None of 1 conversations can be used: conversation 0: it has .* patches"
    with pytest.raises(UserError, match=message), pytest.warns(UserWarning, match="left out 1"):
        make_dataset(processor, config, data[:1], Batching(batch_size=4, patches=4, length=64, skip_broken=True))


def test_conversation_longer_than_the_model_allows(processor, config, data):
    short = dataclasses.replace(config, text=dataclasses.replace(config.text, max_position_embeddings=8))
    with pytest.raises(
        UserError, match=r"conversation \d+: it has \d+ tokens; expected at most the model's 8 positions"
    ):
        make_dataset(processor, short, data, Batching(batch_size=4))(0)


def test_invalid_options(processor, config, data):
    for name in ("length", "patches", "pack_length", "batch_size", "accumulate"):
        with pytest.raises(UserError, match=f"{name} is 0; expected at least 1"):
            make_dataset(processor, config, data, Batching(**{name: 0}))
    for name in ("seed", "workers"):
        with pytest.raises(UserError, match=f"{name} is -1; expected at least 0"):
            make_dataset(processor, config, data, Batching(**{name: -1}))
    for name, value in (("batch_size", None), ("seed", [1]), ("patches", {}), ("length", 64.0)):
        with pytest.raises(UserError, match=f"{name} is .*; expected an integer"):
            make_dataset(processor, config, data, Batching(**{name: value}))
    for name, value in (("pack_length", 10**400), ("batch_size", 2**31), ("seed", 2**64)):
        with pytest.raises(UserError, match=f"{name} is .*; expected at most"):
            make_dataset(processor, config, data, Batching(**{name: value}))
    with pytest.raises(UserError, match="conversations is empty; expected at least one"):
        make_dataset(processor, config, [], Batching())
    windows = QwenVLConfig.tiny(family="qwen2_5_vl")
    for model, patches, message in ((config, 62, "4, .* per merged token"), (windows, 96, "64, .* per window")):
        with pytest.raises(UserError, match=f"patches is {patches}; expected a multiple of {message}"):
            make_dataset(processor, model, data, Batching(batch_size=4, patches=patches))
    for other in ({"group_by_length": True}, {"length": 64}):
        with pytest.raises(UserError, match="pack_length is 64, which fixes the length of all sequences"):
            make_dataset(processor, config, data, Batching(pack_length=64, **other))
