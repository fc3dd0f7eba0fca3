"""The layers that both towers are built of.

A `kernel` is [*in, *out], as a matrix product takes it; a `weight` has the shape it has in the hub's files. The layers of
a tower are one module whose weights carry a leading axis, one entry a layer: `jax.lax.scan` over the module takes that
axis away, so each `__call__` here sees the weights of a single layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pallas_kernels as pk


class Init:
    """Makes weights: a fresh random key for each, normal with the configuration's `initializer_range`."""

    def __init__(self, seed: int | jax.Array, dtype, scale: float):
        self.key = jax.random.key(seed)
        self.dtype = jnp.dtype(dtype)
        self.scale = scale

    def normal(self, *shape: int) -> nnx.Param:
        self.key, key = jax.random.split(self.key)
        return nnx.Param((self.scale * jax.random.normal(key, shape, jnp.float32)).astype(self.dtype))

    def full(self, value: float, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.full(shape, value, self.dtype))


class Linear(nnx.Module):
    """y = x @ kernel + bias; kernel [*stack, *in_shape, *out_shape], x [..., *in_shape] -> y [..., *out_shape].

    Heads are axes of their own, so that a mesh can split them and no activation is ever reshaped.
    """

    def __init__(self, init: Init, in_shape: tuple[int, ...], out_shape: tuple[int, ...], *, stack=(), bias: bool):
        self.kernel = init.normal(*stack, *in_shape, *out_shape)
        self.bias = init.full(0.0, *stack, *out_shape) if bias else None
        self.in_axes = len(in_shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.kernel[...], axes=self.in_axes)
        return y if self.bias is None else y + self.bias[...]

    def parts(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """y[..., i, *rest] for each i of the first of out_shape, with a product each: neither y nor its gradient is ever
        in memory as a whole, to be taken apart or put together."""
        kernel, bias = self.kernel[...], self.bias[...]
        axis = self.in_axes
        kernels, biases = (jnp.unstack(array, axis=i) for array, i in ((kernel, axis), (bias, 0)))
        return tuple(jnp.tensordot(x, k, axes=axis) + b for k, b in zip(kernels, biases, strict=True))


class RMSNorm(nnx.Module):
    def __init__(self, init: Init, features: int, *, stack=(), eps: float):
        self.weight = init.full(1.0, *stack, features)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return pk.rms_norm(x, self.weight[...], eps=self.eps)


class LayerNorm(nnx.Module):
    def __init__(self, init: Init, features: int, *, stack=()):
        self.weight = init.full(1.0, *stack, features)
        self.bias = init.full(0.0, *stack, features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return pk.layer_norm(x, self.weight[...], self.bias[...], eps=1e-6)


class Table(nnx.Module):
    """One vector a token: weight [vocab, features]. As input embedding it is looked up, as output head multiplied."""

    def __init__(self, init: Init, rows: int, features: int):
        self.weight = init.normal(rows, features)


def inverse_frequencies(theta: float, count: int) -> np.ndarray:
    """theta ** (-i / count) for i in [0, count): float32 step by step, to the bit what the reference turns by."""
    return np.float32(1) / np.float32(theta) ** (np.arange(count, dtype=np.float32) / np.float32(count))
