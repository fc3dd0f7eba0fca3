"""NaN, infinity and overflow are found in arrays of every floating dtype, on the host and on devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from liger_jax import finite
from liger_jax.errors import UserError
from liger_jax.finite import check_finite, largest_magnitude, non_finite

DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e5m2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [5, 2**20])
def test_largest_magnitude(dtype, chunk):
    values = np.array([[0.0, -0.0, 3.0], [-5.0, 1.0, 0.5]], jnp.dtype(dtype))
    assert largest_magnitude(values, chunk) == 5
    assert largest_magnitude(values.T[1:], chunk) == 3  # not contiguous
    assert largest_magnitude(values * 0, chunk) == 0
    assert largest_magnitude(values[:0], chunk) == 0
    limit = float(jnp.finfo(dtype).max)
    assert largest_magnitude(np.array([-limit, 1], values.dtype), chunk) == limit
    for special in (np.nan, -np.nan, np.inf, -np.inf):
        values[1, 0] = special
        np.testing.assert_equal(largest_magnitude(values, chunk), np.nan if special != special else np.inf)


@pytest.mark.parametrize(
    ("stored", "largest", "dtype", "better"),
    [
        ("bfloat16", 65536, "float16", "bfloat16 or float32"),
        ("float32", -65520, "float16", "bfloat16 or float32"),  # the smallest that does not round to 65504
        ("float32", 3.4e38, "bfloat16", "float32"),
        ("float64", -1e39, "float32", "bfloat16 or float32"),
    ],
)
def test_overflow_names_the_array_and_its_largest_value(stored, largest, dtype, better):
    values = np.array([1, largest, 2], jnp.dtype(stored))
    number = f"{abs(float(values[1])):.6g}".replace("+", r"\+")
    with pytest.raises(UserError, match=f"w holds {number}, which overflows {dtype}; expected dtype {better}$"):
        check_finite("w", values, dtype)
    check_finite("w", values)
    check_finite("w", np.array([65519], np.float32), "float16")  # rounds to the largest, 65504


@pytest.mark.parametrize("on_device", [False, True])
def test_non_finite_names_the_arrays(monkeypatch, on_device):
    if on_device:  # the program of other devices, which numpy replaces on a CPU
        monkeypatch.setattr(finite, "_is_finite_on_cpu", lambda array: bool(finite._are_finite([array])[0]))
    arrays = {
        "nan": jnp.array([[1, jnp.nan]]),
        "inf": jnp.array([-jnp.inf], "bfloat16"),
        "large": jnp.array([3e38], "bfloat16"),
        "half": jnp.array([1, jnp.nan], "float16"),
        "none": jnp.zeros((0, 3)),
        "step": jnp.array(2**30),
    }
    assert non_finite(arrays) == ["nan", "inf", "half"]
    assert non_finite({}) == []
