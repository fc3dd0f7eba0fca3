"""Packing: rows are full and hold what was asked for, and training on them is training on the conversations alone."""

import itertools

import jax
import numpy as np
import pytest

from liger_jax import Qwen2VL, loss_fn, prepare
from liger_jax.data.dataset import make_dataset
from liger_jax.data.packing import pack
from liger_jax.demo.data import conversations, load_digits
from liger_jax.demo.run import make_config, make_processor
from liger_jax.model.params import param_paths
from tests._support.parity import assert_near


def sizes(count, *, pictures, seed=0):
    """Tokens and patches as in a mixed data set: texts of all lengths, and pictures from 224 to 1344 pixels a side."""
    rng = np.random.default_rng(seed)
    text = np.minimum(rng.lognormal(4.5, 0.8, count).astype(int) + 20, 800)
    side = 2 * rng.integers(8, 35, (count, 2))
    patches = np.where(rng.random(count) < pictures, side.prod(axis=1), 0)
    return text + patches // 4, patches


@pytest.mark.parametrize("pictures", [0, 0.3, 1])
def test_rows_are_full(pictures):
    """Every conversation once, no row over a limit, and nearly as few rows as there could be."""
    tokens, patches = sizes(3000, pictures=pictures)
    limit = int(max(patches.max(), 1.1 * 2048 * patches.sum() / tokens.sum()))
    rows = pack(tokens, patches, length=2048, most_patches=limit)
    assert sorted(itertools.chain(*rows)) == list(range(3000))
    assert max(tokens[list(row)].sum() for row in rows) <= 2048
    assert max(patches[list(row)].sum() for row in rows) <= limit
    assert tokens.sum() / (2048 * len(rows)) > 0.95


def test_the_seed_decides():
    tokens, patches = sizes(200, pictures=0.5)
    tokens[:100] = 300
    first, same, other = (pack(tokens, patches, length=2048, most_patches=8192, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="conversation 1 has 11 tokens; a row holds 10"):
        pack([3, 11], [0, 0], length=10, most_patches=0)
    with pytest.raises(ValueError, match="conversation 0 has 8 patches; a row holds 4"):
        pack([3, 4], [8, 0], length=10, most_patches=4)
    assert pack([], [], length=10, most_patches=4) == []


def test_packed_is_padded():
    """Loss and gradient of packed rows equal those of the same conversations each in a row of its own, in float32."""
    processor = make_processor(load_digits()[0])
    config = make_config(processor)
    data = list(itertools.islice(conversations(load_digits()[0], np.random.default_rng(3)), 9))
    data.append([{"role": "user", "content": "Which digit is shown?"}, {"role": "assistant", "content": "4"}])
    model = Qwen2VL.init(config, dtype="float32")
    dataset = make_dataset(processor, config, data, batch_size=3, pack_length=128)
    assert dataset.plan.epoch_batches == 1 and max(map(len, dataset.plan.rows)) > 2
    packed = dataset(0)
    padded = prepare(config, **processor(data, labels=True, padding="right"))
    assert packed.shape == (3, 128) and np.count_nonzero(packed.segment_ids) == np.count_nonzero(padded.segment_ids)

    positions = {}
    for b, row in enumerate(dataset.plan.batch(0)):
        for number, i in enumerate(row, start=1):
            positions[i] = packed.position_ids[b][:, packed.segment_ids[b] == number]
    for i in range(len(data)):  # they begin anew with each conversation
        np.testing.assert_array_equal(positions[i], padded.position_ids[i][:, padded.segment_ids[i] > 0])

    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, metrics), grads = gradient(model, packed)
    (wanted, wanted_metrics), wanted_grads = gradient(model, padded)
    assert int(metrics["num_tokens"]) == int(wanted_metrics["num_tokens"])
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    for (path, got), want in zip(param_paths(grads).items(), param_paths(wanted_grads).values(), strict=True):
        assert_near(got, want, tolerance=2e-5, what=path)
