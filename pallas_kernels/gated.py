"""Elementwise gates of MLP blocks: swiglu, geglu, quick_gelu."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import _validate


def swiglu(gate: jax.Array, up: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """silu(gate) * up = gate * sigmoid(gate) * up.

    Args:
        gate: [...], float.
        up: as gate, same shape and dtype.
        implementation: None or "xla".

    Returns:
        [...] in gate's dtype; the arithmetic is float32. Backward keeps nothing but gate and up.

    Raises:
        ValueError: shapes or dtypes differ, or are not floating.
        NotImplementedError: an implementation that does not exist yet.

    Source: Shazeer 2020, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import swiglu
        >>> print(swiglu(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0])).round(3))
        [0.    1.462]
    """
    _check("swiglu", implementation, gate=gate, up=up)
    return _gated(jax.nn.silu, gate, up)


def geglu(gate: jax.Array, up: jax.Array, *, approximate: bool = True, implementation: str | None = None) -> jax.Array:
    """gelu(gate) * up.

    Args:
        gate: [...], float.
        up: as gate, same shape and dtype.
        approximate: True for the tanh formula 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), False for x Phi(x).
        implementation: None or "xla".

    Returns:
        [...] in gate's dtype; the arithmetic is float32. Backward keeps nothing but gate and up.

    Raises:
        ValueError: shapes or dtypes differ, or are not floating.
        NotImplementedError: an implementation that does not exist yet.

    Source: Shazeer 2020, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import geglu
        >>> print(geglu(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0]), approximate=False).round(2))
        [0.   1.68]
    """
    _check("geglu", implementation, gate=gate, up=up)
    return _gated(_gelu_tanh if approximate else _gelu_exact, gate, up)


def quick_gelu(x: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of Qwen2-VL's vision MLP.

    Args:
        x: [...], float.
        implementation: None or "xla".

    Returns:
        [...] in x's dtype; the arithmetic is float32. Backward keeps nothing but x.

    Raises:
        ValueError: x is not floating.
        NotImplementedError: an implementation that does not exist yet.

    Source: Hendrycks and Gimpel 2016, Gaussian Error Linear Units, https://arxiv.org/abs/1606.08415

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import quick_gelu
        >>> print(quick_gelu(jnp.array([0.0, 1.0])).round(3))
        [0.    0.846]
    """
    _check("quick_gelu", implementation, x=x)
    return _activated(_quick_gelu, x)


def _check(op: str, implementation: str | None, **arrays: jax.Array) -> None:
    _validate.implementation_exists(op, implementation)
    _validate.floating(op, **arrays)
    _validate.same_dtype(op, **arrays)
    for name, array in arrays.items():
        _validate.shape(op, name, array.shape, next(iter(arrays.values())).shape)


# ---- XLA implementation: values in float32, and a backward that recomputes them from the inputs -----------------------

_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
_gelu_exact = functools.partial(jax.nn.gelu, approximate=False)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _value_and_slope(activation: Callable, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """activation(x) and its derivative, elementwise, in float32."""
    wide = x.astype(_validate.wide(x.dtype))
    return jax.jvp(activation, (wide,), (jnp.ones_like(wide),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation: Callable, gate: jax.Array, up: jax.Array) -> jax.Array:
    wide = _validate.wide(gate.dtype)
    return (activation(gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)


def _gated_forward(activation, gate, up):
    return _gated(activation, gate, up), (gate, up)


def _gated_backward(activation, saved, grad):
    gate, up = saved
    value, slope = _value_and_slope(activation, gate)
    grad = grad.astype(value.dtype)
    return (grad * up.astype(value.dtype) * slope).astype(gate.dtype), (grad * value).astype(up.dtype)


_gated.defvjp(_gated_forward, _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activated(activation: Callable, x: jax.Array) -> jax.Array:
    return activation(x.astype(_validate.wide(x.dtype))).astype(x.dtype)


def _activated_forward(activation, x):
    return _activated(activation, x), x


def _activated_backward(activation, x, grad):
    _, slope = _value_and_slope(activation, x)
    return ((grad.astype(slope.dtype) * slope).astype(x.dtype),)


_activated.defvjp(_activated_forward, _activated_backward)
