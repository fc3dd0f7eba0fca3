"""Finds NaN and infinity in weights, and weights that another dtype cannot hold."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liger_jax.errors import UserError


def largest_magnitude(values: np.ndarray, chunk: int = 2**20) -> float:
    """Returns the largest absolute value; infinity or NaN if the array holds one. Reads `chunk` values at a time.

    Without the sign bit, the bits of floating-point numbers are integers in the same order, then infinity, then NaN.

    Args:
        values: a floating-point array of any dtype, also bfloat16.
        chunk: number of values at a time, which bounds the memory.

    Example:
        >>> largest_magnitude(np.array([1.0, -3.0])), largest_magnitude(np.array([1.0, np.nan]))
        (3.0, nan)
    """
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    without_sign = unsigned.type(np.iinfo(unsigned).max >> 1)
    bits = values.reshape(-1).view(unsigned)
    starts = range(0, bits.size, chunk)
    largest = max((int((bits[start : start + chunk] & without_sign).max()) for start in starts), default=0)
    return float(np.array(largest, unsigned).view(values.dtype))


def check_finite(name: str, values: np.ndarray, dtype: Any = None) -> None:
    """Raises UserError if an array holds NaN or infinity, or a number that becomes infinite in `dtype`.

    Args:
        name: the file and the array, which the message starts with.
        values: a floating-point array.
        dtype: dtype that the values will be converted to; None: none.

    Example:
        >>> check_finite("a.safetensors: w", np.array([1e6]), "float16")
        Traceback (most recent call last):
        liger_jax.errors.UserError: a.safetensors: w holds 1e+06, which overflows float16; expected dtype bfloat16 or float32
    """
    largest = largest_magnitude(values)
    if not math.isfinite(largest):
        raise UserError(
            f"{name} holds NaN or infinity; expected finite numbers, or allow_non_finite=True (convert "
            "--allow-non-finite) to load it nevertheless"
        )
    with np.errstate(over="ignore"):
        converted = np.float64(largest).astype(values.dtype if dtype is None else dtype)
    if not np.isfinite(converted):
        better = "float32" if np.dtype(dtype) == jnp.bfloat16 else "bfloat16 or float32"
        raise UserError(f"{name} holds {largest:.6g}, which overflows {np.dtype(dtype)}; expected dtype {better}")


def non_finite(arrays: Mapping[str, jax.Array]) -> list[str]:
    """Returns the names of the arrays that hold NaN or infinity. Integer arrays hold neither.

    Arrays of other devices than CPUs are reduced there, by one program for all.

    Example:
        >>> non_finite({"a": jnp.ones(3), "b": jnp.array([1, jnp.nan]), "step": jnp.array(7)})
        ['b']
    """
    floats = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    on_cpu = all(device.platform == "cpu" for array in floats.values() for device in array.devices())
    # numpy reads the memory of a CPU array in place: much faster than XLA's reduction there, and without a compilation
    finite = [_is_finite_on_cpu(array) for array in floats.values()] if on_cpu else _are_finite(list(floats.values()))
    return [name for name, flag in zip(floats, jax.device_get(finite), strict=True) if not flag]


def _is_finite_on_cpu(array: jax.Array) -> bool:
    return all(math.isfinite(largest_magnitude(np.asarray(shard.data))) for shard in array.addressable_shards)


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(array).all() for array in arrays]
