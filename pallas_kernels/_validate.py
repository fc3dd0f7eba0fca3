"""Checks of arguments, which every operation makes before any compute."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

IMPLEMENTATIONS = ("triton", "xla", "interpret")
WIDEST_ROW = 65_536  # columns that one program can hold in registers


def known_implementation(op: str, implementation: str | None, available: tuple[str, ...] = IMPLEMENTATIONS) -> None:
    """Raises NotImplementedError for a known implementation that `op` lacks, ValueError for an unknown one."""
    if implementation is None or implementation in available:
        return
    choices = ", ".join(map(repr, (None, *available)))
    if implementation in IMPLEMENTATIONS:
        raise NotImplementedError(f"{op}: there is no {implementation!r} implementation; available: {choices}")
    raise ValueError(f"{op}: implementation is {implementation!r}; expected one of {choices}")


def rows(op: str, implementation: str | None, x: jax.Array, **vectors: jax.Array) -> str | None:
    """Returns the implementation for rows x [..., D] with vectors [D], which a kernel holds at full width.

    Raises ValueError for shapes that do not match, and for a kernel requested by name at D > WIDEST_ROW.
    """
    known_implementation(op, implementation)
    if x.ndim < 1:
        raise ValueError(f"{op}: x has shape (); expected [..., D]")
    for name, vector in vectors.items():
        shape(op, name, vector.shape, x.shape[-1:])
    if x.shape[-1] > WIDEST_ROW and implementation in ("triton", "interpret"):
        raise ValueError(f"{op}: x has {x.shape[-1]} columns; the {implementation!r} implementation takes {WIDEST_ROW}")
    return "xla" if x.size == 0 or x.shape[-1] > WIDEST_ROW else implementation


def floating(op: str, **arrays: jax.Array) -> None:
    """Raises ValueError if the dtype of an array is not floating, TypeError for an argument that is not an array."""
    _of_kind(op, jnp.floating, "a floating", arrays)


def integer(op: str, **arrays: jax.Array) -> None:
    """Raises ValueError if the dtype of an array is not integer, TypeError for an argument that is not an array."""
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
    """Raises ValueError if an option is not one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype for arithmetic on `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
