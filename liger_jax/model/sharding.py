"""Which part of each weight and of each batch a device of the mesh holds.

A mesh is a `jax.sharding.Mesh` with any of these axes:
    data    rows of the batch; weights are copied
    fsdp    rows of the batch, and weights split: gathered layer by layer when needed
    tensor  heads and MLP columns, and the tokens that the loss is computed of
"""

import contextlib
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from liger_jax.inputs.batch import Batch
from liger_jax.model.params import path_name

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split a batch

# Parameter path -> the mesh axis of each dimension. Norms and biases that no rule names are copied to every device.
RULES = (
    (r"(q|k|v)_proj/kernel", P(None, "fsdp", "tensor", None)),
    (r"(q|k|v)_proj/bias", P(None, "tensor", None)),
    (r"o_proj/kernel", P(None, "tensor", None, "fsdp")),
    (r"(gate|up)_proj/kernel", P(None, "fsdp", "tensor")),
    (r"down_proj/kernel", P(None, "tensor", "fsdp")),
    (r"attn/qkv/kernel", P(None, "fsdp", None, "tensor", None)),
    (r"attn/qkv/bias", P(None, None, "tensor", None)),
    (r"attn/proj/kernel", P(None, "tensor", None, "fsdp")),
    (r"mlp/fc1/kernel", P(None, "fsdp", "tensor")),
    (r"mlp/fc1/bias", P(None, "tensor")),
    (r"mlp/fc2/kernel", P(None, "tensor", "fsdp")),
    (r"merger/fc1/kernel", P("fsdp", "tensor")),
    (r"merger/fc1/bias", P("tensor")),
    (r"merger/fc2/kernel", P("tensor", "fsdp")),
    (r"patch_embed/kernel", P(None, "fsdp")),
    (r"(embed_tokens|lm_head)/weight", P("fsdp", None)),
    # LoRA: A [*in, r] as the kernel's inputs, B [r, *out] as its outputs
    (r"((q|k|v|gate|up)_proj|attn/qkv|mlp/fc1)/lora/a", P(None, "fsdp")),
    (r"((o|down)_proj|attn/proj|mlp/fc2)/lora/a", P(None, "tensor")),
    (r"((q|k|v|gate|up)_proj|mlp/fc1)/lora/b", P(None, None, "tensor")),
    (r"attn/qkv/lora/b", P(None, None, None, "tensor")),
    (r"((o|down)_proj|attn/proj|mlp/fc2)/lora/b", P(None, None, "fsdp")),
    (r"merger/fc1/lora/a", P("fsdp")),
    (r"merger/fc1/lora/b", P(None, "tensor")),
    (r"merger/fc2/lora/a", P("tensor")),
    (r"merger/fc2/lora/b", P(None, "fsdp")),
)


def check_mesh(mesh: Mesh) -> Mesh:
    """The mesh with Auto axes, which the model is written for; refuses axes without a meaning.

    Raises:
        ValueError: an axis that is none of data, fsdp, tensor.
    """
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        raise ValueError(f"The mesh has axes {mesh.axis_names}; expected any of {AXES}, found {unknown}")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """A mesh of the first data * fsdp * tensor devices; None for one device.

    Raises:
        ValueError: a size below 1, or more devices than there are.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")
    devices, count = jax.devices(), data * fsdp * tensor
    if count > len(devices):
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"A mesh of {asked} has {count} devices; found {len(devices)}")
    if count == 1:
        return None
    return check_mesh(jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices[:count]))


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf, by `RULES`; an axis that does not divide a dimension evenly leaves it whole.

    Works for a model, its gradients and anything whose leaves carry the same paths and shapes.
    """
    mesh = check_mesh(mesh)

    def sharding(path, leaf):
        name = path_name(path)
        spec = next((spec for pattern, spec in RULES if re.search(pattern + "$", name)), P())
        fits = [_if_even(axis, size, mesh) for axis, size in zip(spec, leaf.shape, strict=False)]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _if_even(axis: str | None, size: int, mesh: Mesh) -> str | None:
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def get_mesh(tree: Any) -> Mesh | None:
    """The mesh that a tree's arrays live on, or None."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            return leaf.sharding.mesh
    return None


def shard_batch(batch: Batch, mesh: Mesh | None, *, multiple: int = 1) -> Batch:
    """Sends a batch to the devices, rows split over the data and fsdp axes; empty rows fill up what does not divide.

    A batch whose arrays are on the devices already is left alone. `multiple`: the rows divide by this too.

    Raises:
        ValueError: a batch on the devices has a number of rows that `multiple` does not divide.
    """
    if isinstance(batch.input_ids, jax.Array):
        if batch.shape[0] % multiple:
            raise ValueError(f"The batch has {batch.shape[0]} rows on the device; expected a multiple of {multiple}")
        return batch
    if mesh is None:
        return batch.pad_rows(multiple)
    axes = tuple(name for name in ROWS if name in mesh.shape)
    shards = int(np.prod([mesh.shape[name] for name in axes]))
    batch = batch.pad_rows(multiple * shards)
    return jax.device_put(batch, NamedSharding(mesh, P(axes)))


def mesh_context(mesh: Mesh | None):
    """`with mesh_context(mesh):` makes the mesh known to `constrain_batch`."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps the rows of an activation where the batch has them, so that weights travel and activations do not.

    A hint to the partitioner, which otherwise may follow the weights' layout. Nothing outside of a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(name for name in ROWS if kinds.get(name) == AxisType.Auto)
    return jax.lax.with_sharding_constraint(x, P(axes)) if axes else x


def constrain_batch_and_seq(x: jax.Array) -> jax.Array:
    """x [B, L, ...]: rows as in `constrain_batch`, and the tokens of a row over `tensor`: for what takes each by itself.

    The devices along `tensor` would otherwise all compute the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("tensor") != AxisType.Auto or x.shape[1] % mesh.shape["tensor"]:
        return x
    axes = tuple(name for name in ROWS if kinds.get(name) == AxisType.Auto)
    return jax.lax.with_sharding_constraint(x, P(axes, "tensor"))


def replicate(weight: jax.Array) -> jax.Array:
    """Brings a split weight to every device: for a lookup, where the partitioner would rather move the activations."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(weight, P()) if AxisType.Auto in mesh.axis_types else weight
