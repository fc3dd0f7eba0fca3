"""The layers that both towers are built of.

A `kernel` is [*in, *out], as a matrix product takes it; a `weight` has the shape it has in the hub's files. The layers of
a tower are one module whose weights carry a leading axis, one entry a layer: `jax.lax.scan` over the module takes that
axis away, so each `__call__` here sees the weights of a single layer.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels as pk


class Initializer:
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


class LoRA(nnx.Module):
    """What a `Linear` learns beside its kernel: scale x A B, with A [*stack, *in_shape, r] and B [*stack, r, *out_shape].

    Two thin products, in the dtype of x, whatever that of A and B. scale: alpha / r, or alpha / sqrt(r) (rsLoRA).

    Source: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023, rsLoRA,
    https://arxiv.org/abs/2312.03732
    """

    def __init__(self, a: jax.Array, b: jax.Array, *, alpha: float, rslora: bool):
        self.a = nnx.Param(a)
        self.b = nnx.Param(b)
        self.alpha = alpha
        self.rslora = rslora

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __call__(self, x: jax.Array, in_axes: int) -> jax.Array:
        thin = self.scale * jnp.tensordot(x, self.a[...].astype(x.dtype), axes=in_axes)
        return jnp.tensordot(thin, self.b[...].astype(x.dtype), axes=1)


class Linear(nnx.Module):
    """y = x @ kernel + bias; kernel [*stack, *in_shape, *out_shape], x [..., *in_shape] -> y [..., *out_shape].

    Heads are axes of their own, so that a mesh can split them and no activation is ever reshaped. `lora`: what
    `liger_jax.model.lora.add_lora` adds to y.
    """

    def __init__(
        self, init: Initializer, in_shape: tuple[int, ...], out_shape: tuple[int, ...], *, stack=(), bias: bool
    ):
        self.kernel = init.normal(*stack, *in_shape, *out_shape)
        self.bias = init.full(0.0, *stack, *out_shape) if bias else None
        self.lora: LoRA | None = nnx.data(None)  # part of the pytree, so that weights can come later
        self.in_axes, self.out_axes = len(in_shape), len(out_shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.kernel[...], axes=self.in_axes)
        if self.bias is not None:
            y = y + self.bias[...]
        if self.lora is not None:
            y = checkpoint_name(y + self.lora(x, self.in_axes), "adapted")
        return y

    def parts(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """y[..., i, *rest] for each i of the first of out_shape, with a product each: neither y nor its gradient is ever
        in memory as a whole, to be taken apart or put together."""
        kernels = jnp.unstack(self.kernel[...], axis=self.in_axes)
        parts = [jnp.tensordot(x, kernel, axes=self.in_axes) for kernel in kernels]
        if self.bias is not None:
            parts = [part + bias for part, bias in zip(parts, self.bias[...], strict=True)]
        if self.lora is not None:
            added = jnp.unstack(self.lora(x, self.in_axes), axis=x.ndim - self.in_axes)
            parts = [checkpoint_name(part + more, "adapted") for part, more in zip(parts, added, strict=True)]
        return tuple(parts)


class RMSNorm(nnx.Module):
    def __init__(self, init: Initializer, features: int, *, stack=(), eps: float):
        self.weight = init.full(1.0, *stack, features)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return pk.rms_norm(x, self.weight[...], eps=self.eps)


class LayerNorm(nnx.Module):
    def __init__(self, init: Initializer, features: int, *, stack=()):
        self.weight = init.full(1.0, *stack, features)
        self.bias = init.full(0.0, *stack, features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return pk.layer_norm(x, self.weight[...], self.bias[...], eps=1e-6)


class Embedding(nnx.Module):
    """One vector a token: weight [vocab, features]. As input embedding it is looked up, as output head multiplied."""

    def __init__(self, init: Initializer, rows: int, features: int):
        self.weight = init.normal(rows, features)


def inverse_frequencies(theta: float, count: int) -> np.ndarray:
    """theta ** (-i / count) for i in [0, count): float32 step by step, to the bit what the reference turns by."""
    return np.float32(1) / np.float32(theta) ** (np.arange(count, dtype=np.float32) / np.float32(count))
