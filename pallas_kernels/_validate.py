"""Checks that every operation makes of its arguments, before any compute."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

XLA_ONLY = ("xla",)
WITH_KERNEL = ("xla", "triton", "interpret")


def implementation_exists(op: str, implementation: str | None, available: tuple[str, ...] = XLA_ONLY) -> None:
    """Raises NotImplementedError for a known implementation that `op` lacks, ValueError for an unknown one."""
    if implementation is None or implementation in available:
        return
    choices = ", ".join(map(repr, (None, *available)))
    if implementation in WITH_KERNEL:
        raise NotImplementedError(f"{op}: there is no {implementation!r} implementation; available: {choices}")
    raise ValueError(f"{op}: implementation is {implementation!r}; expected one of {choices}")


def floating(op: str, **arrays: jax.Array) -> None:
    """Raises ValueError if an array is not of a floating dtype."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; expected a floating dtype")


def integer(op: str, **arrays: jax.Array) -> None:
    """Raises ValueError if an array is not of an integer dtype."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; expected an integer dtype")


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


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that arithmetic on `dtype` is done in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
