"""Checks that every operation makes of its arguments, before any compute."""

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
    """The implementation for rows x [..., D] with vectors [D], which a kernel holds at full width.

    Raises ValueError for shapes that do not fit, and for a kernel asked for by name at D > WIDEST_ROW.
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
    """Raises ValueError if an array is not of a floating dtype, TypeError if it is none."""
    _of_kind(op, jnp.floating, "a floating", arrays)


def integer(op: str, **arrays: jax.Array) -> None:
    """Raises ValueError if an array is not of an integer dtype, TypeError if it is none."""
    _of_kind(op, jnp.integer, "an integer", arrays)


def _of_kind(op: str, kind: type, name_of_kind: str, arrays: dict[str, jax.Array]) -> None:
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise TypeError(f"{op}: {name} is a {type(array).__name__}; expected an array")
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; expected {name_of_kind} dtype")


def shape(op: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ValueError if a shape is not the expected one."""
    if tuple(found) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {tuple(found)}; expected {tuple(expected)}")


def same_dtype(op: str, **arrays: jax.Array) -> None:
    """Raises ValueError if the arrays differ in dtype."""
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{op}: {found}; expected one dtype")


def choice(op: str, name: str, found: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError if an option is not one of the allowed ones."""
    if found not in allowed:
        raise ValueError(f"{op}: {name} is {found!r}; expected one of {', '.join(map(repr, allowed))}")


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that arithmetic on `dtype` is done in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
