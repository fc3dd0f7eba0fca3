"""Argument checks, which every operation makes before it computes anything."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

IMPLEMENTATIONS = ("triton", "xla", "interpret")
WIDEST_ROW = 65_536  # columns that one program can hold in registers


def known_implementation(op: str, implementation: str | None, available: tuple[str, ...] = IMPLEMENTATIONS) -> None:
    """Raises ValueError for an implementation that is neither None nor available."""
    if implementation is not None and implementation not in available:
        choices = ", ".join(map(repr, (None, *available)))
        raise ValueError(f"{op}: implementation is {implementation!r}; expected one of {choices}")


def rows(op: str, implementation: str | None, x: jax.Array, **vectors: jax.Array) -> str | None:
    """Returns the implementation for rows x [..., D] with vectors [D], of an operation whose kernel holds whole rows.

    Raises ValueError if shapes do not match, or if a kernel is requested by name for D > WIDEST_ROW.
    """
    known_implementation(op, implementation)
    if x.ndim < 1:
        raise ValueError(f"{op}: x has shape (); expected [..., D]")
    for name, vector in vectors.items():
        shape(op, name, vector.shape, x.shape[-1:])
    if x.shape[-1] > WIDEST_ROW and implementation in ("triton", "interpret"):
        raise ValueError(
            f"{op}: x has {x.shape[-1]} columns; expected at most {WIDEST_ROW} for implementation {implementation!r}"
        )
    return "xla" if x.shape[-1] > WIDEST_ROW else implementation


def floating(op: str, **arrays: jax.Array) -> None:
    """Raises ValueError if the dtype of an array is not floating, TypeError if an argument is not an array."""
    _of_kind(op, jnp.floating, "a floating", arrays)


def integer(op: str, **arrays: jax.Array) -> None:
    """Raises ValueError if the dtype of an array is not integer, TypeError if an argument is not an array."""
    _of_kind(op, jnp.integer, "an integer", arrays)


def _of_kind(op: str, kind: type, name_of_kind: str, arrays: dict[str, jax.Array]) -> None:
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise TypeError(f"{op}: {name} is a {type(array).__name__}; expected an array")
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; expected {name_of_kind} dtype")


def shape(op: str, name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ValueError if a shape is not the expected one."""
    if tuple(actual) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {tuple(actual)}; expected {tuple(expected)}")


def same_dtype(op: str, **arrays: jax.Array) -> None:
    """Raises ValueError if the arrays differ in dtype."""
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{op}: {listed}; expected one dtype")


def choice(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError if an option's value is not allowed."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype for arithmetic on `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
