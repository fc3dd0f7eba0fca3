"""How weights and batches are split over the devices of a mesh.

A mesh is a `jax.sharding.Mesh` with any of these axes:
    data    splits the rows of a batch; weights are replicated
    fsdp    splits the rows of a batch, and the weights, which are gathered layer by layer when they are needed
    tensor  splits attention heads and MLP hidden units, and the positions for which the loss is computed
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from liger_jax.errors import UserError
from liger_jax.inputs.batch import Batch
from liger_jax.model.params import Parameter, find_row, is_parameter_path, path_name
from pallas_kernels import split_rows_over

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the mesh axes that split the rows of a batch

# The mesh axis that splits each axis of the table of parameters; all others stay whole.
SPLIT_BY = dict.fromkeys("VHEM", "fsdp") | dict.fromkeys("NKFnIm", "tensor")


def partition_spec(parameter: Parameter) -> P:
    """Returns the mesh axis of each dimension of a parameter.

    Vectors are small, so they are not split over fsdp. Each mesh axis splits at most one dimension, the first eligible one.

    Example:
        >>> from liger_jax.model.params import find_row
        >>> tuple(partition_spec(find_row("language_model/layers/self_attn/q_proj/kernel")))
        (None, 'fsdp', 'tensor', None)
        >>> tuple(partition_spec(find_row("visual/blocks/mlp/fc1/bias")))
        (None, 'tensor')
    """
    spec: list[str | None] = []
    for axes in parameter.dimensions:
        mesh_axis = SPLIT_BY.get(axes[0])
        spec.append(None if mesh_axis in spec or (mesh_axis == "fsdp" and parameter.is_vector) else mesh_axis)
    return P(*spec)


def check_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh with Auto axes, which the model requires.

    Raises:
        UserError: The mesh has an axis other than data, fsdp and tensor.
    """
    unknown = [name for name in mesh.axis_names if name not in MESH_AXES]
    if unknown:
        raise UserError(f"The mesh has axes {mesh.axis_names}; expected any of {MESH_AXES}, not {unknown}")
    return _auto(mesh)


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """Returns a mesh of the first data * fsdp * tensor devices, or None for a single device.

    Raises:
        UserError: A size is below 1, or the mesh needs more devices than there are.

    Example:
        >>> make_mesh() is None
        True
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} is {size}; expected at least 1")
    devices, count = jax.devices(), data * fsdp * tensor
    if count > len(devices):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"The mesh {shape} has {count} devices; expected at most {len(devices)}, the devices available")
    if count == 1:
        return None
    return check_mesh(jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices[:count]))


def param_shardings(tree: Any, mesh: Mesh, *, strict: bool = True) -> Any:
    """Returns the sharding of every leaf, derived from the table of parameters (`liger_jax.model.params`).

    A dimension stays whole if its size is not divisible by that of its mesh axis. Scalars are replicated.

    Args:
        tree: a model, its gradients, or any pytree whose leaves have the paths and shapes of parameters, such as an
            optimizer's moments.
        mesh: a mesh with any of the axes data, fsdp, tensor.
        strict: raise for arrays that are not parameters. With False they are replicated, such as a random key in an
            optimizer's state.

    Raises:
        LookupError: A parameter has no row in the table.
        UserError: The mesh has an unknown axis.
    """
    mesh = check_mesh(mesh)

    def sharding(path, leaf):
        name = path_name(path)
        if not leaf.shape or not (strict or is_parameter_path(name)):
            return NamedSharding(mesh, P())
        # an optimizer may keep statistics with fewer dimensions than the parameter
        spec = zip(partition_spec(find_row(name)), leaf.shape, strict=False)
        return NamedSharding(mesh, P(*(_if_divisible(axis, size, mesh) for axis, size in spec)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _if_divisible(axis: str | None, size: int, mesh: Mesh) -> str | None:
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def get_mesh(tree: Any) -> Mesh | None:
    """Returns the mesh on which a tree's arrays are placed, or None."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            return leaf.sharding.mesh
    return None


def find_abstract_mesh(tree: Any) -> AbstractMesh | None:
    """Returns the mesh of a tree's arrays, which may be traced, or None. Inside a `shard_map`, arrays are on no mesh."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if set(mesh.axis_types) - {AxisType.Manual}:
            return mesh
    return None


# ---- Explicit axes -----------------------------------------------------------------------------------------------------
# The model's code names no shardings, so it needs Auto axes. `jax.make_mesh` returns Explicit ones, and users place arrays
# on them.


def with_auto_axes(tree: Any) -> Any:
    """Returns the tree with its arrays on Explicit axes moved to Auto axes of the same devices, which copies nothing."""
    mesh = get_mesh(tree)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return tree
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(_auto(x.sharding.mesh), x.sharding.spec)), tree)


def run_on_auto_axes(function: Callable[..., Any], *args: Any, rows_of: Any = None) -> Any:
    """Returns function(*args), which sees Explicit axes of the arguments, or of `jax.set_mesh`, as Auto axes.

    The results have Explicit axes again. Without Explicit axes, this is a plain call.

    Args:
        function: a function of pytrees of arrays.
        args: its arguments.
        rows_of: an array; the first dimension of every result is split as that of this array. None: results are whole.
    """
    meshes = _meshes(args)
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return function(*args)
    rows = None if rows_of is None else next(iter(jax.typeof(rows_of).sharding.spec), None)
    spec = P() if rows is None else P(rows)  # scalars allow no P(None)
    function = jax.sharding.auto_axes(function, out_sharding=NamedSharding(mesh, spec))
    has_both = any(AxisType.Auto in mesh.axis_types for mesh in meshes)
    batch_axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    with split_rows_over(batch_axes) if has_both else contextlib.nullcontext():
        return function(*args)


def _meshes(tree: Any) -> list[Any]:
    """Returns the meshes on which arrays of a tree are, and that of `jax.set_mesh`, each once."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
    return [mesh for mesh in dict.fromkeys([*meshes, jax.sharding.get_abstract_mesh()]) if not mesh.empty]


def _auto(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


# ---- batches and activations -------------------------------------------------------------------------------------------


def shard_batch(batch: Batch, mesh: Mesh | None, *, multiple: int = 1) -> Batch:
    """Moves a batch to the devices of a mesh, with its rows split over the data and fsdp axes.

    Empty rows are appended until all devices have the same number. A batch that is already on the devices stays where it is.

    Args:
        batch: as `prepare` returns it.
        mesh: None for a single device.
        multiple: rows per device are padded to a multiple of this.

    Raises:
        UserError: A batch that is already on the devices has a number of rows that `multiple` does not divide.
    """
    if isinstance(batch.input_ids, jax.Array):
        if batch.shape[0] % multiple:
            raise UserError(f"The batch has {batch.shape[0]} rows on the device; expected a multiple of {multiple}")
        return with_auto_axes(batch)
    if mesh is None:
        return batch.pad_rows(multiple)
    axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
    shards = math.prod(mesh.shape[name] for name in axes)
    batch = batch.pad_rows(multiple * shards)
    return jax.device_put(batch, NamedSharding(mesh, P(axes)))


def mesh_context(mesh: Mesh | AbstractMesh | None):
    """Returns a context manager that sets the mesh for `constrain_batch`, `constrain_batch_and_seq` and `replicate`.

    Inside a traced function, only an abstract mesh can be set.
    """
    if isinstance(mesh, AbstractMesh):
        return jax.sharding.use_abstract_mesh(mesh)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Constrains an activation's rows to the sharding of the batch, so that weights are gathered and activations are not.

    The partitioner might otherwise follow the layout of the weights. Returns x unchanged without a mesh, and if the mesh
    does not divide the rows, as in a user's own `jax.jit`.
    """
    axes = _auto_axes(BATCH_AXES)
    if not axes or x.shape[0] % _size(axes):
        return x
    return jax.lax.with_sharding_constraint(x, P(axes))


def constrain_batch_and_seq(x: jax.Array) -> jax.Array:
    """Constrains x [B, T, ...] as `constrain_batch` does, and splits its positions over `tensor`.

    For operations that act on each position separately, which all devices along `tensor` would otherwise repeat.
    """
    axes = _auto_axes(BATCH_AXES)
    if not _auto_axes(("tensor",)) or x.shape[0] % _size(axes) or x.shape[1] % _size(("tensor",)):
        return x
    return jax.lax.with_sharding_constraint(x, P(axes, "tensor"))


def replicate(weight: jax.Array) -> jax.Array:
    """Gathers a sharded weight on every device, for a lookup. The partitioner would otherwise move the activations."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(weight, P()) if AxisType.Auto in mesh.axis_types else weight


def on_mesh() -> bool:
    """Returns whether there is a current mesh, over which weights may be sharded."""
    return not jax.sharding.get_abstract_mesh().empty


def _auto_axes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of `names` that are Auto axes of the current mesh, over which the partitioner may split arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(name for name in names if types.get(name) == AxisType.Auto)


def _size(axes: tuple[str, ...]) -> int:
    """Returns the number of devices along axes of the current mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)
