"""Runs a part of the model on the rows of each device, with the part's whole weights, which are gathered once.

The partitioner would split the vision tower along `tensor` by heads and columns, as it splits the language model, and move
the activations of every layer several times. The tower is small and its activations are large: for 4 rows of the 2B, with
4096 patches each, these are 5.4 GB per device and step over two devices, and all of its weights and gradients 1.3 GB.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from liger_jax.model.sharding import (
    BATCH_AXES,
    auto_axes,
    axes_size,
    axis_names,
    inside_shard_map,
    param_shardings,
    sequence_axes,
    tensor_axes,
)


def divides_rows(rows: int) -> bool:
    """Returns whether the current mesh splits heads over `tensor`, which could split this number of rows instead."""
    if inside_shard_map() or not tensor_axes() or sequence_axes():
        return False
    return rows % axes_size(row_axes()) == 0


def row_axes() -> tuple[str, ...]:
    """Returns the axes of the current mesh that split rows, and `tensor`."""
    return (*auto_axes(BATCH_AXES), *tensor_axes())


def run_by_rows(function: Callable[[Any, Any], Any], parts: dict[str, Any], rows: Any) -> Any:
    """Returns function(parts, rows), whose results stay split by rows over `row_axes`.

    Args:
        function: sees whole weights and the rows of a device, and no mesh.
        parts: modules by their path in the model, split over the mesh as `param_shardings` describes.
        rows: a pytree of arrays whose first dimension is the rows, which `divides_rows`.
    """
    leaves: list[jax.Array]
    structure: Any
    leaves, structure = jax.tree.flatten(parts)
    mesh: Any = jax.sharding.get_abstract_mesh()
    specs = [sharding.spec for sharding in jax.tree.leaves(param_shardings(parts, mesh, strict=False))]

    def on_device(leaves: list[jax.Array], rows: Any) -> Any:
        whole = [gather_shards(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]
        return function(structure.unflatten(whole), rows)

    axes = row_axes()
    run = jax.shard_map(
        on_device,
        in_specs=(specs, P(axes)),
        out_specs=P(axes),
        axis_names=set(auto_axes(mesh.axis_names)),
        check_vma=False,
    )
    return run(leaves, rows)


def gather_shards(shard: jax.Array, spec: P) -> jax.Array:
    """Returns the whole array of which this device has a shard, inside a `shard_map`.

    Gathered along a new first axis, the shards arrive where a collective writes them, and one copy puts them in place. A
    gather along another axis would also copy its operand. Its gradient is summed over the devices, and scattered.
    """
    for axis, names in enumerate(spec):
        if (count := count_shards(names)) > 1:
            shards = jnp.moveaxis(jax.lax.all_gather(shard, names), 0, axis)
            shard = shards.reshape(*shard.shape[:axis], count * shard.shape[axis], *shard.shape[axis + 1 :])
    return shard


def count_shards(entry: Any) -> int:
    """Returns the number of devices along the axes of the current mesh that an entry of a PartitionSpec names."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in axis_names(entry))
