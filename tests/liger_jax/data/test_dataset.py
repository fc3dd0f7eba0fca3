"""Batches of a run: every conversation once an epoch, the same whoever makes them, little padding, nothing broken."""

import base64
import dataclasses
import io
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from liger_jax.data.dataset import make_dataset
from liger_jax.data.schedule import Plan
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.inputs.images import image_size, load_image
from liger_jax.inputs.messages import KINDS

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


def asked_about(*pictures):
    return ask([*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": "Which?"}])


@pytest.fixture(scope="module")
def data():
    """Texts and pictures of many sizes."""
    rng = np.random.default_rng(0)
    found = list(itertools.islice(conversations(load_digits()[0], rng), COUNT // 3))
    for side in rng.integers(28, 224, COUNT // 3):
        found.append(asked_about(Image.new("RGB", (int(side), 112), "white")))
    return found + [ask("Which? " * int(n), str(n % 10)) for n in rng.integers(1, 60, COUNT // 3)]


def as_file(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width, height):
    return Image.effect_noise((width, height), 60).convert("RGB")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A file that says its size, and of which the pixels are missing."""
    path = tmp_path_factory.mktemp("broken") / "cut.png"
    path.write_bytes(as_file(noise(56, 84))[:200])
    return str(path)


LAYOUTS = {"plain": {}, "grouped": {"group_by_length": True}, "packed": {"pack_length": 512}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_conversation_comes_once_in_an_epoch(processor, config, data, layout):
    """In another order each time; a batch is the same whoever makes it, and whatever was made before."""
    dataset, again = (make_dataset(processor, config, data, batch_size=4, seed=1, **LAYOUTS[layout]) for _ in range(2))
    batches = dataset.plan.epoch_batches
    first, second = (
        [row for step in range(epoch * batches, (epoch + 1) * batches) for row in dataset.plan.batch(step)]
        for epoch in range(2)
    )
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(COUNT))
    assert first != second and sorted(first) == sorted(second)
    last = 2 * batches - 1
    for found, wanted in zip(jax.tree.leaves(again(last)), jax.tree.leaves(dataset(last)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    other = make_dataset(processor, config, data, batch_size=4, seed=2, **LAYOUTS[layout])
    assert [other.plan.batch(step) for step in range(batches)] != [dataset.plan.batch(step) for step in range(batches)]


def test_a_picture_larger_than_a_rows_share(processor, config):
    """Rows are packed with room for it; a numpy integer stopped this once."""
    large = asked_about(Image.new("RGB", (224, 224), "white"))
    dataset = make_dataset(
        processor, config, [large, *(ask("Which? " * 9) for _ in range(20))], batch_size=2, pack_length=128
    )
    assert dataset.shape.patches >= (224 // 14) ** 2
    assert dataset(0).vision is not None


def epoch(processor, config, data, **layout):
    """-> programs compiled for an epoch's batches, and the shares of their columns and patches that are used."""
    dataset = make_dataset(processor, config, data, batch_size=4, **layout)
    traced, used, size = [], np.zeros(2), np.zeros(2)

    @jax.jit
    def step(batch):
        traced.append(batch.shape)
        return jax.tree.map(lambda leaf: leaf.sum(), batch)

    for number in range(dataset.plan.epoch_batches):
        batch = dataset(number)
        step(batch)
        parts = [batch.segment_ids] + ([] if batch.vision is None else [batch.vision.segment_ids])
        used[: len(parts)] += [np.count_nonzero(part) for part in parts]
        size[: len(parts)] += [part.size for part in parts]
    return len(traced), used / size


def test_little_padding_and_few_programs(processor, config, data):
    """Grouped batches hold more than random ones, in about as many programs; packed ones more still, in a single one."""
    many = data * 12
    results = {name: epoch(processor, config, many, **layout) for name, layout in LAYOUTS.items()}
    programs, used = zip(*results.values(), strict=True)
    plain, grouped, packed = used
    assert (grouped > plain).all() and grouped[0] > plain[0] + 0.15, results
    assert packed[0] > 0.9 and packed[1] > 0.8, results
    assert programs[1] <= programs[0] + 2 and programs[2] == 1, results


def test_rows_of_a_plan():
    """Batches of similar sizes stay together however the data end, and the last batch is the short one."""
    sizes = np.array([[size, 0] for size in [5, 1, 5, 1, 5, 1, 5]])
    plan = Plan([(i,) for i in range(7)], batch_size=2, seed=0, sizes=sizes)
    batches = [[sizes[row[0], 0] for row in plan.batch(step)] for step in range(4)]
    assert sorted(batches[:3]) == [[1, 1], [1, 5], [5, 5]] and batches[3] == [5]


def test_sizes_without_decoding(processor, tmp_path, broken):
    """Tokens and grids as the processor makes them: lying pictures, URLs, arrays, several pictures, videos."""
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6
    turned.write_bytes(as_file(noise(112, 56), "JPEG", exif=exif))
    assert image_size(turned) == load_image(turned).size[::-1] == (112, 56)
    url = "data:image/png;base64," + base64.b64encode(as_file(noise(300, 40))).decode()
    array = np.zeros((60, 90, 3), np.uint8)
    video = {"type": "video", "video": [noise(60, 90)] * 5}
    some = [asked_about(str(turned), url, array), asked_about(as_file(noise(28, 28))), ask("Hi"), ask([video])]
    for conversation in some:
        inputs = processor(conversation, labels=True)
        grids = np.concatenate([inputs.get(kind.arrays[1], np.zeros((0, 3), int)) for kind in KINDS])
        wanted = (inputs["input_ids"].size, grids.prod(axis=1).sum(), grids[:, 0].sum())
        assert processor.measure(conversation) == wanted
    assert processor.measure(asked_about(broken))[1:] == (24, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_pixels(processor, config, data, broken, layout):
    """Named when they are needed; or left out with a warning: the rest of the batch is as it is with the whole picture,
    and the same in every epoch."""
    bad, good = asked_about(broken), asked_about(noise(56, 84))
    options = {"batch_size": 30, "seed": 0, **LAYOUTS[layout]}
    with pytest.raises(
        ValueError, match=r"conversation 10: The image '.*cut\.png' cannot be decoded.*it asks 'Which\?'"
    ):
        make_dataset(processor, config, [*data[:10], bad, *data[10:]], **options)(0)
    whole = make_dataset(processor, config, [*data[:10], good, *data[10:]], **options)
    skipping = make_dataset(processor, config, [*data[:10], bad, *data[10:]], on_error="skip", **options)
    assert [skipping.plan.batch(step) for step in range(4)] == [whole.plan.batch(step) for step in range(4)]
    step = next(step for step in range(4) if any(10 in row for row in whole.plan.batch(step)))
    with pytest.warns(UserWarning, match=r"left out 1 conversations: conversation 10: .*cut\.png"):
        batch = skipping(step)
    with pytest.warns(UserWarning, match="left out"):
        assert all(map(np.array_equal, jax.tree.leaves(skipping(step)), jax.tree.leaves(batch)))
    missing = np.count_nonzero(whole(step).segment_ids) - np.count_nonzero(batch.segment_ids)
    assert missing == whole.read(10)["input_ids"].size
    if layout != "packed":
        (row,) = (i for i, row in enumerate(whole.plan.batch(step)) if 10 in row)
        others = np.delete(np.arange(len(batch.input_ids)), row)
        columns = min(batch.shape[1], whole(step).shape[1])
        assert not batch.segment_ids[row].any()
        assert (batch.input_ids[others, :columns] == whole(step).input_ids[others, :columns]).all()


def test_a_batch_of_nothing(processor, config, broken):
    """All of its conversations left out: rows of padding, which train nothing."""
    dataset = make_dataset(processor, config, [asked_about(broken)], batch_size=2, on_error="skip")
    with pytest.warns(UserWarning, match="left out"):
        batch = dataset(0)
    assert batch.shape == (2, 64) and not batch.segment_ids.any() and (batch.labels == -100).all()


def test_what_can_be_seen_before_training(processor, config, data, tmp_path):
    """Of planned batches: conversations too large for a row, files that are no pictures; named, or left out."""
    no_picture, gone = tmp_path / "no.png", tmp_path / "gone.png"
    no_picture.write_text("hello")
    strange = {
        "conversation 30: it has .* tokens, and a row holds 512": ask("Which? " * 600),
        r"conversation 30: The image .*no\.png.* cannot be decoded": asked_about(str(no_picture)),
        r"conversation 30: No image file at .*gone\.png": asked_about(str(gone)),
        "conversation 30: A message must be": [{"role": "user"}, 7],
    }
    for message, conversation in strange.items():
        some = [*data, conversation]
        for layout in ({"pack_length": 512}, {"length": 512}):
            with pytest.raises(ValueError, match=message):
                make_dataset(processor, config, some, batch_size=4, **layout)
            with pytest.warns(UserWarning, match=message):
                dataset = make_dataset(processor, config, some, batch_size=4, on_error="skip", **layout)
            assert sorted(itertools.chain(*dataset.plan.rows)) == list(range(COUNT))
    none = "None of 1 conversations can be used: conversation 0: it has .* patches"
    with pytest.raises(ValueError, match=none), pytest.warns(UserWarning, match="left out 1"):
        make_dataset(processor, config, data[:1], batch_size=4, patches=3, length=64, on_error="skip")
    small = dataclasses.replace(config, text=dataclasses.replace(config.text, max_position_embeddings=8))
    with pytest.raises(ValueError, match=r"conversation \d+: it has \d+ tokens, and the model 8 positions"):
        make_dataset(processor, small, data, batch_size=4)(0)
    for name in ("length", "patches", "pack_length"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            make_dataset(processor, config, data, batch_size=4, **{name: 0})
    with pytest.raises(ValueError, match="packed rows have one length"):
        make_dataset(processor, config, data, batch_size=4, pack_length=64, group_by_length=True)
