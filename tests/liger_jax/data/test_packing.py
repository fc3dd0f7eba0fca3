"""Packing: sequences are full, hold every conversation once, and train like unpacked conversations."""

import itertools

import jax
import numpy as np
import pytest

from liger_jax import Qwen2VL, loss_fn, prepare
from liger_jax.data.dataset import make_dataset
from liger_jax.data.packing import pack
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.errors import UserError
from liger_jax.model.params import param_paths
from liger_jax.options import Batching
from tests._support.parity import assert_near


def mixed_sizes(count, *, with_images, seed=0):
    """Returns tokens and patches as in a mixed data set: texts of all lengths, and images of 224 to 1344 pixels a side."""
    rng = np.random.default_rng(seed)
    text = np.minimum(rng.lognormal(4.5, 0.8, count).astype(int) + 20, 800)
    side = 2 * rng.integers(8, 35, (count, 2))
    patches = np.where(rng.random(count) < with_images, side.prod(axis=1), 0)
    return text + patches // 4, patches


@pytest.mark.parametrize("with_images", [0, 0.3, 1])
def test_sequences_are_full(with_images):
    """Every conversation occurs once, no sequence exceeds a limit, and there are nearly as few sequences as possible."""
    tokens, patches = mixed_sizes(3000, with_images=with_images)
    limit = int(max(patches.max(), 1.1 * 2048 * patches.sum() / tokens.sum()))
    sequences = pack(tokens, patches, length=2048, max_patches=limit)
    assert sorted(itertools.chain(*sequences)) == list(range(3000))
    assert max(tokens[list(sequence)].sum() for sequence in sequences) <= 2048
    assert max(patches[list(sequence)].sum() for sequence in sequences) <= limit
    assert tokens.sum() / (2048 * len(sequences)) > 0.95


def test_seed_determines_the_packing():
    tokens, patches = mixed_sizes(200, with_images=0.5)
    tokens[:100] = 300
    first, same, other = (pack(tokens, patches, length=2048, max_patches=8192, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_too_large_conversation_is_named():
    with pytest.raises(UserError, match="conversation 1 has 11 tokens; expected at most the 10 of a sequence"):
        pack([3, 11], [0, 0], length=10, max_patches=0)
    with pytest.raises(UserError, match="conversation 0 has 8 patches; expected at most the 4 of a sequence"):
        pack([3, 4], [8, 0], length=10, max_patches=4)
    assert pack([], [], length=10, max_patches=4) == []
    with pytest.raises(UserError, match="length is 0 and max_patches is 0; expected at least 1 and 0"):
        pack([0], [0], length=0, max_patches=0)  # divided by zero


def test_packed_batch_trains_like_a_padded_one():
    """Loss and gradient of packed sequences equal those of one conversation per sequence, in float32."""
    processor = make_processor(load_digits()[0])
    config = make_config(processor)
    data = list(itertools.islice(conversations(load_digits()[0], np.random.default_rng(3)), 9))
    data.append([{"role": "user", "content": "Which digit is shown?"}, {"role": "assistant", "content": "4"}])
    model = Qwen2VL.init(config, dtype="float32")
    dataset = make_dataset(processor, config, data, Batching(batch_size=3, pack_length=128))
    assert dataset.schedule.epoch_batches == 1 and max(map(len, dataset.schedule.sequences)) > 2
    packed = dataset(0)
    padded = prepare(config, **processor(data, labels=True, padding="right"))
    assert packed.shape == (3, 128) and np.count_nonzero(packed.segment_ids) == np.count_nonzero(padded.segment_ids)

    positions = {}
    for b, sequence in enumerate(dataset.schedule.batch(0)):
        for segment, i in enumerate(sequence, start=1):
            positions[i] = packed.position_ids[b][:, packed.segment_ids[b] == segment]
    for i in range(len(data)):  # they restart with each conversation
        np.testing.assert_array_equal(positions[i], padded.position_ids[i][:, padded.segment_ids[i] > 0])

    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, metrics), grads = gradient(model, packed)
    (padded_loss, padded_metrics), padded_grads = gradient(model, padded)
    assert int(metrics["num_tokens"]) == int(padded_metrics["num_tokens"])
    np.testing.assert_allclose(loss, padded_loss, rtol=1e-6)
    for (path, grad), expected in zip(param_paths(grads).items(), param_paths(padded_grads).values(), strict=True):
        assert_near(grad, expected, tolerance=2e-5, name=path)


def test_a_long_text_and_a_large_image_share_a_sequence():
    """Each needs more of one resource than the other needs of either: 6 of 10 tokens and 7 of 10 patches."""
    assert pack([6, 3], [2, 7], length=10, max_patches=10) == [(1, 0)]
