"""Gradients on a mesh that only splits rows and weights: each device runs the program of a single device on its rows.

The partitioner would place the communication itself: it gathers every weight of every layer for each pass, and reduces every
gradient where it arises, in hundreds of small collectives that slow down the matmuls running at the same time. Here, a step
gathers each stack of weights once, before the first layer, and reduces each stack of gradients once, so that the collectives
are few, large and at the edges of the step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from liger_jax.model.by_rows import count_shards, gather_shards
from liger_jax.model.sharding import BATCH_AXES, axis_names, split_over_data

Reduce = Callable[[Any], Any]


def splits_only_rows(mesh: Any) -> bool:
    """Returns whether a mesh, or None, has several devices, and these along data and fsdp only."""
    split = {name for name, size in mesh.shape.items() if size > 1} if mesh is not None else set()
    return bool(split) and split <= set(BATCH_AXES)


def gradients_by_device(
    compute: Callable[..., tuple[Any, dict[str, jax.Array]]], model: Any, batch: Any, specs: Sequence[P]
) -> tuple[Any, dict[str, jax.Array]]:
    """Returns compute(model, batch, reduce): gradients and metrics, with the rows split over the current mesh.

    Args:
        compute: a function of the whole model, the rows of a device, and a function that sums gradients over the mesh. It
            returns reduced gradients, and metrics that are equal on all devices.
        model: weights, as the mesh splits them.
        batch: arrays whose first dimension is the rows of the batch.
        specs: how each leaf of the model is split.

    Returns:
        Gradients, split by `update_specs`, and metrics.
    """
    axes = row_axes()
    leaves: list[jax.Array]
    structure: Any
    leaves, structure = jax.tree.flatten(model)
    reduced_specs = update_specs(leaves, specs)

    def reduce(grads: Any) -> Any:
        pairs = zip(jax.tree.leaves(grads), reduced_specs, strict=True)
        return structure.unflatten([_sum_over_mesh(grad, spec, axes) for grad, spec in pairs])

    def on_device(leaves: list[jax.Array], batch: Any):
        whole = structure.unflatten([gather_shards(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)])
        grads, metrics = compute(whole, batch, reduce)
        return jax.tree.leaves(grads), metrics

    grads, metrics = jax.shard_map(
        on_device, in_specs=(list(specs), P(axes)), out_specs=(reduced_specs, P()), check_vma=False
    )(leaves, batch)
    return structure.unflatten(grads), metrics


def update_specs(leaves: Sequence[jax.Array], specs: Sequence[P]) -> list[P]:
    """Returns how the updates of weights are split: like the weights, and over `data` where possible.

    Each device along `data` updates a part of the weights, which are then gathered. A reduce-scatter and a gather move as
    much as the all-reduce in their place, and optimizer and moments take a fraction of the time and memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return [split_over_data(spec, leaf.shape, mesh) for leaf, spec in zip(leaves, specs, strict=True)]


def split_update(model: Any, specs: Sequence[P]) -> Any:
    """Constrains updated weights to `update_specs`, so that they are gathered once they have their final dtype."""
    leaves: list[jax.Array]
    structure: Any
    leaves, structure = jax.tree.flatten(model)
    pairs = zip(leaves, update_specs(leaves, specs), strict=True)
    return structure.unflatten([jax.lax.with_sharding_constraint(leaf, spec) for leaf, spec in pairs])


def row_axes() -> tuple[str, ...]:
    """Returns the axes of the current mesh that split rows."""
    return tuple(name for name in BATCH_AXES if name in jax.sharding.get_abstract_mesh().shape)


def _sum_over_mesh(grad: jax.Array, spec: P, axes: tuple[str, ...]) -> jax.Array:
    """Returns the sum of a gradient over `axes`, split by `spec`.

    It is scattered over the last axes of the mesh first. These are within a host, so that what crosses hosts is smallest.
    """
    entries, order = [axis_names(entry) for entry in spec], jax.sharding.get_abstract_mesh().axis_names
    split = [axis for axis, names in enumerate(entries) if count_shards(names) > 1]
    for axis in sorted(split, key=lambda axis: order.index(entries[axis][0]), reverse=True):
        count = count_shards(entries[axis])
        shape = *grad.shape[:axis], count, grad.shape[axis] // count, *grad.shape[axis + 1 :]
        grad = jax.lax.psum_scatter(jnp.moveaxis(grad.reshape(shape), axis, 0), entries[axis])
    unsplit = tuple(name for name in axes if all(name not in names for names in entries))
    return jax.lax.psum(grad, unsplit) if unsplit else grad
