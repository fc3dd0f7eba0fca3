"""The layers that both towers are made of.

A `kernel` has shape [*in, *out], as a matmul takes it; a `weight` keeps its shape in the hub's files. The layers of a
tower are one module whose weights have a leading layer axis. `jax.lax.scan` over the module removes that axis, so each
`__call__` here sees the weights of a single layer.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels as pk
from liger_jax.model.sharding import on_mesh


class Initializer:
    """Creates parameters: constant, or normal with standard deviation `scale`, each from a random key of its own."""

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
    """The low-rank update of a `Linear`: scale x A B, with A [*stack, *in_shape, r] and B [*stack, r, *out_shape].

    Both matmuls run in the dtype of x. The scale is alpha / r, or alpha / sqrt(r) for rsLoRA.

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
        low_rank = self.scale * jnp.tensordot(x, self.a[...].astype(x.dtype), axes=in_axes)
        return jnp.tensordot(low_rank, self.b[...].astype(x.dtype), axes=1)

    def merge(self, kernel: jax.Array) -> jax.Array:
        """Returns kernel + scale x A B in the kernel's dtype, computed in float32, for a kernel without a stacking axis."""
        wide, a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (kernel, self.a[...], self.b[...]))
        return (wide + self.scale * jnp.tensordot(a, b, axes=1, precision="highest")).astype(kernel.dtype)


class Linear(nnx.Module):
    """y = x @ kernel + bias; kernel [*stack, *in_shape, *out_shape], x [..., *in_shape], y [..., *out_shape].

    Heads are separate axes, so that a mesh can split them and no activation is ever reshaped. `lora` is the low-rank update
    that `liger_jax.model.lora.add_lora` adds, or None.
    """

    def __init__(
        self, init: Initializer, in_shape: tuple[int, ...], out_shape: tuple[int, ...], *, stack=(), bias: bool
    ):
        self.kernel = init.normal(*stack, *in_shape, *out_shape)
        self.bias = init.full(0.0, *stack, *out_shape) if bias else None
        self.lora: LoRA | None = nnx.data(None)  # part of the pytree, so that its weights can be added later
        self.in_axes, self.out_axes = len(in_shape), len(out_shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._affine(x, self.kernel[...], None if self.bias is None else self.bias[...])
        if self.lora is not None:
            y = checkpoint_name(y + self.lora(x, self.in_axes), "adapted")
        return y

    def merged_kernel(self) -> jax.Array:
        """Returns the kernel with LoRA merged, if there is any, without a stacking axis."""
        kernel = self.kernel[...]
        return kernel if self.lora is None else self.lora.merge(kernel)

    def unstacked(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns y[..., i, *out_shape[1:]] for each i, each computed by a matmul of its own.

        Neither y nor its gradient exists as one array, so nothing is copied to split or join them.
        """
        kernels = jnp.unstack(self.kernel[...], axis=self.in_axes)
        biases = [None] * len(kernels) if self.bias is None else self.bias[...]
        outputs = [self._affine(x, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True)]
        if self.lora is not None:
            updates = jnp.unstack(self.lora(x, self.in_axes), axis=x.ndim - self.in_axes)
            outputs = [checkpoint_name(y + update, "adapted") for y, update in zip(outputs, updates, strict=True)]
        return tuple(outputs)

    def _affine(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Returns x @ kernel + bias.

        cuBLAS adds a bias that is a vector. One with several axes becomes an array as large as the result, which XLA writes
        and cuBLAS reads again. So the axes of heads are merged for the sum, except on a mesh, which may split them.
        """
        if bias is None:
            return jnp.tensordot(x, kernel, axes=self.in_axes)
        if bias.ndim == 1 or on_mesh():
            return jnp.tensordot(x, kernel, axes=self.in_axes) + bias
        y = jnp.tensordot(x, kernel.reshape(*kernel.shape[: self.in_axes], -1), axes=self.in_axes) + bias.reshape(-1)
        return y.reshape(*y.shape[:-1], *bias.shape)


class SwiGLU(nnx.Module):
    """MLP down(silu(gate(x)) * up(x)): x [..., width] to [..., width]."""

    def __init__(self, init: Initializer, width: int, hidden: int, *, stack=(), bias: bool):
        self.gate_proj = Linear(init, (width,), (hidden,), stack=stack, bias=bias)
        self.up_proj = Linear(init, (width,), (hidden,), stack=stack, bias=bias)
        self.down_proj = Linear(init, (hidden,), (width,), stack=stack, bias=bias)

    def __call__(self, x):
        return self.down_proj(pk.swiglu(self.gate_proj(x), self.up_proj(x)))


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis; weight [*stack, features]."""

    def __init__(self, init: Initializer, features: int, *, stack=(), eps: float):
        self.weight = init.full(1.0, *stack, features)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return pk.rms_norm(x, self.weight[...], eps=self.eps)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, with eps 1e-6; weight and bias [*stack, features]."""

    def __init__(self, init: Initializer, features: int, *, stack=()):
        self.weight = init.full(1.0, *stack, features)
        self.bias = init.full(0.0, *stack, features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return pk.layer_norm(x, self.weight[...], self.bias[...], eps=1e-6)


class Embedding(nnx.Module):
    """One vector per token: weight [V, H]. Input embeddings are gathered from it; an output head is a matmul with it."""

    def __init__(self, init: Initializer, rows: int, features: int):
        self.weight = init.normal(rows, features)


def inverse_frequencies(theta: float, count: int) -> np.ndarray:
    """Returns theta ** (-i / count) for i in [0, count).

    Every step is in float32, so that the values equal those of the reference implementation to the last bit.
    """
    return np.float32(1) / np.float32(theta) ** (np.arange(count, dtype=np.float32) / np.float32(count))
