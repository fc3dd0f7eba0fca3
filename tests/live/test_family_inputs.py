"""Positions, windows and lookups in the position table equal the installed transformers', for random prompts and grids."""

import numpy as np
import pytest

from liger_jax import QwenVLConfig
from liger_jax.inputs.layout import window_order
from liger_jax.inputs.positions import position_table_lookup, rope_index
from tests.references import make_family_inputs as reference

pytest.importorskip("torch", reason="needs torch, see the extra `parity`")

pytestmark = pytest.mark.live


@pytest.mark.parametrize("seed", range(1, 11))
def test_positions(seed):
    cases: dict = {}
    for name, array in reference.positions(is_v4=False, seed=seed).items():
        _, family, number, key = name.split("/")
        cases.setdefault((family, number), {})[key] = array
    assert {family for family, _ in cases} == {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
    for (family, _), arrays in cases.items():
        expected = arrays.pop("position_ids")
        actual = rope_index(QwenVLConfig.tiny(family=family), **arrays, video_positions="hf5")
        np.testing.assert_array_equal(actual, expected)


def test_windows_and_tables():
    rng = np.random.default_rng(1)
    grids = [(int(rng.integers(1, 3)), *(2 * rng.integers(1, 30, 2)).tolist()) for _ in range(20)]
    stored = reference.patches(grids)
    for t, h, w in grids:
        name = f"{t},{h},{w}"
        tokens, sizes = window_order(h // 2, w // 2, 4)
        order = np.concatenate([tokens + frame * h * w // 4 for frame in range(t)])
        np.testing.assert_array_equal(order, stored[f"windows/{name}/window_index"])
        np.testing.assert_array_equal(np.cumsum(np.tile(sizes * 4, t)), stored[f"windows/{name}/cu_window_seqlens"][1:])
        for side in (4, 48):
            indices, weights = position_table_lookup((t, h, w), side, 2)
            np.testing.assert_array_equal(indices, stored[f"table/{side}/{name}/indices"])
            np.testing.assert_array_equal(weights, stored[f"table/{side}/{name}/weights"])
