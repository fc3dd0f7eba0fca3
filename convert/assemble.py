"""Assembles parameters from the tensors of their layers, which arrive in the order of the files."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from convert.table import hub_partition, to_parameter
from liger_jax.processes import put

# Bytes sent to a device at a time. The driver makes a pinned copy of each transfer, and never releases that memory.
PIECE_BYTES = 2**26

# Parameters of up to this many bytes, such as norms and biases, are assembled in host memory. Rearranging them there needs
# no compilation, and no call to the device for each layer.
SMALL_BYTES = 2**24


def make_assembler(
    layout: str, sizes: dict[str, int], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None
) -> "HostAssembler | DeviceAssembler":
    """Returns the assembler of a parameter: `put` the tensors of its layers in any order, then `finish`."""
    small = leaf.size * leaf.dtype.itemsize <= SMALL_BYTES
    return (HostAssembler if small else DeviceAssembler)(layout, sizes, leaf, sharding)


class HostAssembler:
    """Fills a parameter in host memory, and sends it to the devices at the end."""

    def __init__(self, layout: str, sizes: dict[str, int], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None):
        self.layout, self.sizes, self.sharding = layout, sizes, sharding
        self.value = np.empty(leaf.shape, leaf.dtype)

    def put(self, tensor: np.ndarray, layer: int | None) -> None:
        self.value[... if layer is None else layer] = to_parameter(self.layout, tensor, self.sizes)

    def finish(self) -> jax.Array:
        return put(self.value, self.sharding)


class DeviceAssembler:
    """Fills a parameter on its devices: each tensor is sent separately, rearranged there, and written in place."""

    def __init__(self, layout: str, sizes: dict[str, int], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None):
        self.layout, self.sizes, self.leaf, self.sharding = layout, tuple(sizes.items()), leaf, sharding
        self.value: jax.Array | None = None

    def put(self, tensor: np.ndarray, layer: int | None) -> None:
        if tensor.dtype == np.float64 and self.leaf.dtype != np.float64:
            tensor = tensor.astype(np.float32)  # JAX has float64 only in its x64 mode
        on_device = _send(tensor, self._hub_sharding(layer))
        if layer is None:
            self.value = _rearrange(on_device, self.layout, self.sizes, self.leaf.dtype, self.sharding)
        else:
            if self.value is None:
                self.value = jnp.zeros(self.leaf.shape, self.leaf.dtype, device=self.sharding)
            self.value = _write_layer(self.value, on_device, layer, self.layout, self.sizes, self.sharding)
        # otherwise the next tensors would be read while this one is still in host memory
        self.value.block_until_ready()

    def finish(self) -> jax.Array:
        assert self.value is not None, "finish before put"
        return self.value

    def _hub_sharding(self, layer: int | None) -> NamedSharding | None:
        """Returns a sharding of the hub's tensor that sends each device little more than its part of the parameter."""
        if self.sharding is None:
            return None
        spec = self.sharding.spec if layer is None else self.sharding.spec[1:]
        return NamedSharding(self.sharding.mesh, PartitionSpec(*hub_partition(self.layout, tuple(spec))))


def _send(tensor: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """Returns a tensor on the devices. A single device receives it in pieces of PIECE_BYTES."""
    length = max(1, PIECE_BYTES * len(tensor) // tensor.nbytes)
    if sharding is not None or length >= len(tensor):
        return put(tensor, sharding)
    on_device = jnp.zeros(tensor.shape, tensor.dtype)
    for start in range(0, len(tensor), length):
        piece = jax.device_put(tensor[start : start + length])
        on_device = _write_piece(on_device, piece, start).block_until_ready()
    return on_device


@functools.partial(jax.jit, donate_argnums=0)
def _write_piece(tensor: jax.Array, piece: jax.Array, start: int) -> jax.Array:
    """Returns the tensor with a piece of it written in place."""
    return jax.lax.dynamic_update_slice_in_dim(tensor, piece, start, 0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _rearrange(tensor: jax.Array, layout: str, sizes: tuple, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    value = to_parameter(layout, tensor, dict(sizes)).astype(dtype)
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)


@functools.partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=0)
def _write_layer(
    stack: jax.Array, tensor: jax.Array, layer: int, layout: str, sizes: tuple, sharding: NamedSharding | None
) -> jax.Array:
    """Returns the stack with one layer of it written in place."""
    value = to_parameter(layout, tensor, dict(sizes)).astype(stack.dtype)
    stack = jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
    return stack if sharding is None else jax.lax.with_sharding_constraint(stack, sharding)
