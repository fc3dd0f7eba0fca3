"""How weights and batches are split over the devices of a mesh.

A mesh is a `jax.sharding.Mesh` with any of these axes:
    data      splits the rows of a batch; weights are replicated
    fsdp      splits the rows of a batch, and the weights, which are gathered layer by layer when they are needed
    sequence  splits the positions and the patches of each row, and the weights as fsdp does
    tensor    splits attention heads and MLP hidden units, and the positions for which the loss is computed
"""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from liger_jax.errors import LigerWarning, UserError
from liger_jax.inputs.batch import Batch
from liger_jax.model.params import Parameter, find_row, is_parameter_path, path_name
from liger_jax.processes import put
from pallas_kernels import split_rows_over

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")  # the mesh axes that split the rows of a batch

# The mesh axis that splits each axis of the table of parameters; all others stay whole.
SPLIT_BY = dict.fromkeys("VHEM", "fsdp") | dict.fromkeys("NKFnIm", "tensor")

# What each of these axes counts, for messages.
AXIS_NAMES = {
    **{"V": "tokens of the vocabulary", "H": "hidden units", "N": "query heads", "K": "key/value heads"},
    **{"F": "MLP columns", "E": "vision units", "n": "vision heads", "I": "vision MLP columns"},
    **{"M": "merger inputs", "m": "merger units"},
}


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


def check_mesh(mesh: Mesh) -> None:
    """Raises UserError if the mesh has an axis that the model does not know."""
    unknown = [name for name in mesh.axis_names if name not in MESH_AXES]
    if unknown:
        raise UserError(f"The mesh has axes {mesh.axis_names}; expected any of {MESH_AXES}, not {unknown}")


def make_mesh(*, data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1) -> Mesh | None:
    """Returns a mesh of the first data * fsdp * sequence * tensor devices, or None for a single device.

    Raises:
        UserError: A size is below 1, or the mesh needs more devices than there are.

    Example:
        >>> make_mesh() is None
        True
    """
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} is {size}; expected at least 1")
    devices, count = jax.devices(), math.prod(sizes.values())
    if count > len(devices):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"The mesh {shape} has {count} devices; expected at most {len(devices)}, the devices available")
    if count == 1:
        return None
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices[:count])


def param_shardings(tree: Any, mesh: Mesh, *, strict: bool = True, over_data: bool = False) -> Any:
    """Returns the sharding of every leaf, derived from the table of parameters (`liger_jax.model.params`).

    A dimension stays whole if its size is not divisible by that of its mesh axis; for a model, a warning says so once.
    Scalars are replicated.

    Args:
        tree: a model, its gradients, or any pytree whose leaves have the paths and shapes of parameters, such as an
            optimizer's moments.
        mesh: a mesh with any of MESH_AXES, in any order; its axes may be Auto or Explicit, and the shardings are on it.
        strict: raise for arrays that are not parameters. With False they are replicated, such as a random key in an
            optimizer's state.
        over_data: also split each array over `data`, along the first dimension that is whole and divides. For gradients and
            moments, of which a device needs only what it updates.

    Raises:
        LookupError: A parameter has no row in the table.
        UserError: The mesh has an unknown axis.
    """
    check_mesh(mesh)
    whole = set()  # (mesh axis, its size, axis of the table, its size)

    def sharding(path, leaf):
        name = path_name(path)
        if not leaf.shape or not (strict or is_parameter_path(name)):
            return NamedSharding(mesh, P())
        row, spec = find_row(name), []
        # an optimizer may keep statistics with fewer dimensions than the parameter
        for mesh_axis, axes, size in zip(partition_spec(row), row.dimensions, leaf.shape, strict=False):
            names = _split_axes(mesh_axis, mesh)
            while size % (shards := math.prod(mesh.shape[name] for name in names)):
                split = " x ".join(name for name in names if mesh.shape[name] > 1)
                whole.add((split, shards, axes[0], size))
                names = names[:-1]
            spec.append(names[0] if len(names) == 1 else names or None)
        return NamedSharding(mesh, split_over_data(P(*spec), leaf.shape, mesh) if over_data else P(*spec))

    shardings = jax.tree_util.tree_map_with_path(sharding, tree)
    if strict and whole:
        _warn_about_whole_dimensions(tuple(sorted(whole)))
    return shardings


def split_over_data(spec: P, shape: tuple[int, ...], mesh: Any) -> P:
    """Returns a spec that also splits over `data` the first dimension that is whole and divides, if there is one."""
    entries = [*spec, *(None,) * (len(shape) - len(spec))]
    names = [axis_names(entry) for entry in entries]
    shards = mesh.shape.get("data", 1)
    if shards == 1 or any("data" in axes for axes in names):
        return spec
    for i, (axes, size) in enumerate(zip(names, shape, strict=True)):
        if math.prod(mesh.shape[name] for name in axes) == 1 and size % shards == 0:
            return P(*entries[:i], "data", *entries[i + 1 :])
    return spec


def axis_names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _split_axes(mesh_axis: str | None, mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes of a mesh that split a dimension. `sequence` splits the weights further where `fsdp` does."""
    names = ("fsdp", "sequence") if mesh_axis == "fsdp" else (mesh_axis or "",)
    return tuple(name for name in names if name in mesh.shape and (name != "sequence" or mesh.shape[name] > 1))


@functools.cache  # once per process, not for every tree of weights
def _warn_about_whole_dimensions(whole: tuple[tuple[str, int, str, int], ...]) -> None:
    """Warns about dimensions that a mesh axis should split and does not divide."""
    parts = (
        f"{mesh_axis}={shards} does not divide {size} {AXIS_NAMES[axis]}" for mesh_axis, shards, axis, size in whole
    )
    warnings.warn(f"{', '.join(parts)}: weights with these dimensions are replicated", LigerWarning, stacklevel=3)


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
# The model's code names no shardings, so it runs on Auto axes. `jax.make_mesh` returns Explicit ones, and a model stays on
# the mesh that its user chose: its entry points see Explicit axes as Auto.


def with_auto_axes(tree: Any) -> Any:
    """Returns the tree with its arrays on Explicit axes moved to Auto axes of the same devices, which copies nothing."""
    mesh = get_mesh(tree)
    return tree if mesh is None or AxisType.Explicit not in mesh.axis_types else with_axes_of(auto_mesh(mesh), tree)


def with_axes_of(mesh: Mesh, tree: Any) -> Any:
    """Returns the tree with its arrays on `mesh`, which has the devices and axes that they are on; copies nothing."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), tree)


def run_on_auto_axes(
    function: Callable[..., Any], *args: Any, rows_of: Any = None, out_shardings: Any = None, **options: Any
) -> Any:
    """Returns function(*args, **options), which sees Explicit axes of the arguments, or of `jax.set_mesh`, as Auto axes.

    The results have Explicit axes again. On Auto axes, this is a plain call in which the mesh of the arguments is the
    current one, so that activations are constrained in a user's own `jax.jit`, too. Without a mesh, it is a plain call.
    Outside of `jax.jit` and `jax.set_mesh`, it is a compiled program: there, JAX would need arrays that are already on the
    mesh, and could not see the mesh of arrays within `jax.grad`.

    Args:
        function: a function of pytrees of arrays. Outside of `jax.jit`, it compiles once for each function and options.
        args: its arguments.
        rows_of: an array; the first dimension of every result is split as that of this array. None: results are whole.
        out_shardings: the sharding of each result, instead: a pytree of `NamedSharding`, or a prefix of it.
        options: its hashable keyword arguments.
    """
    meshes, has_context = _meshes(args), not jax.sharding.get_abstract_mesh().empty
    if meshes and out_shardings is None and not (has_context or is_inside_trace()):
        return _compiled(function, **options)(rows_of, *args)
    function = functools.partial(function, **options)
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        with mesh_context(None if has_context else next(iter(meshes), None)):
            return function(*args)
    if out_shardings is None:
        rows = None if rows_of is None else next(iter(jax.typeof(rows_of).sharding.spec), None)
        out_shardings = NamedSharding(mesh, P() if rows is None else P(rows))  # scalars allow no P(None)
    else:
        out_shardings = jax.tree.map(_explicit_part, out_shardings)
    function = jax.sharding.auto_axes(function, out_sharding=out_shardings)
    has_both = any(AxisType.Auto in mesh.axis_types for mesh in meshes)
    batch_axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    with split_rows_over(batch_axes) if has_both else contextlib.nullcontext():
        return function(*args)


@functools.lru_cache(maxsize=32)
def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns `run_on_auto_axes` of a function and its options as a compiled program of rows_of and args."""
    return jax.jit(lambda rows_of, *args: run_on_auto_axes(function, *args, rows_of=rows_of, **options))


def is_inside_trace(*arguments: Any) -> bool:
    """Returns whether JAX traces the caller: an argument is traced, or an array that is made here (under `jax.jit`)."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arguments, jnp.asarray(0))))


def _meshes(tree: Any) -> list[Any]:
    """Returns the meshes on which arrays of a tree are, and that of `jax.set_mesh`, each once."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
    return [mesh for mesh in dict.fromkeys([*meshes, jax.sharding.get_abstract_mesh()]) if not mesh.empty]


def _explicit_part(sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding over the Explicit axes alone, which are those that the type of an array has."""
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    names = [axis_names(entry) for entry in sharding.spec]
    kept = [tuple(name for name in entry if types.get(name) == AxisType.Explicit) for entry in names]
    return NamedSharding(sharding.mesh, P(*(entry or None for entry in kept)))


def auto_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh with Auto axes in place of Explicit ones."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


# ---- batches and activations -------------------------------------------------------------------------------------------


def shard_batch(batch: Batch, mesh: Mesh | None, *, multiple: int = 1) -> Batch:
    """Moves a batch to the devices of a mesh, split as `batch_shardings` describes.

    Empty rows are appended until all devices have the same number, and padding until `sequence` divides each row. A batch
    that is already on these devices stays as its user placed it; only the type of its axes becomes that of `mesh`.

    Args:
        batch: as `prepare` returns it, or placed on devices.
        mesh: None for a single device.
        multiple: rows per device are padded to a multiple of this.

    Raises:
        UserError: A batch that is already on the devices has a number of rows that `multiple` does not divide.
    """
    placed = get_mesh(batch)
    if mesh is None or (placed is not None and auto_mesh(placed) == auto_mesh(mesh)):
        if not isinstance(batch.input_ids, jax.Array):
            return batch.pad_rows(multiple)
        if batch.shape[0] % multiple:
            raise UserError(f"The batch has {batch.shape[0]} rows on the device; expected a multiple of {multiple}")
        return with_auto_axes(batch) if mesh is None else batch if placed == mesh else with_axes_of(mesh, batch)
    shards = math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)
    batch = batch.pad_rows(multiple * shards).split_positions(mesh.shape.get("sequence", 1))
    return put(batch, batch_shardings(batch, mesh))


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Returns the sharding of each array of a batch: rows are split over data and fsdp, pixels over sequence as well.

    The other arrays are small.
    """
    axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P(axes)), batch)
    if batch.vision is None or mesh.shape.get("sequence", 1) == 1:
        return shardings
    pixels = NamedSharding(mesh, P(axes, "sequence"))
    return dataclasses.replace(shardings, vision=dataclasses.replace(shardings.vision, pixel_values=pixels))


def mesh_context(mesh: Mesh | AbstractMesh | None):
    """Returns a context manager that sets the mesh for `constrain_batch`, `constrain_batch_and_seq` and `replicate`.

    Inside a traced function, only an abstract mesh can be set.
    """
    if isinstance(mesh, AbstractMesh):
        return jax.sharding.use_abstract_mesh(mesh)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Constrains an activation [B, T, ...] to the sharding of the batch, so that weights are gathered and it is not.

    The partitioner might otherwise follow the layout of the weights. Positions are split over `sequence`. Returns x
    unchanged without a mesh, and if the mesh does not divide the rows, as in a user's own `jax.jit`.
    """
    axes, positions = auto_axes(BATCH_AXES), sequence_axes()
    positions = positions if x.ndim > 1 and x.shape[1] % axes_size(positions) == 0 else ()
    if not auto_axes(MESH_AXES) or x.shape[0] % axes_size(axes):
        return x
    return jax.lax.with_sharding_constraint(x, P(axes, positions) if positions else P(axes))


def constrain_batch_and_seq(x: jax.Array) -> jax.Array:
    """Constrains x [B, T, ...] as `constrain_batch` does, and splits rows or positions over `tensor`, too.

    For operations that act on each position separately, which all devices along `tensor` would otherwise repeat. Rows are
    contiguous in memory, so collectives need no copies, and each has its share of the tokens that the loss counts. If
    `tensor` does not divide the rows, it splits positions.
    """
    axes, positions, tensor = auto_axes(BATCH_AXES), sequence_axes(), tensor_axes()
    rows = (*axes, *tensor) if x.shape[0] % axes_size((*axes, *tensor)) == 0 else axes
    positions = positions if rows != axes else (*positions, *tensor)
    if not tensor or x.shape[0] % axes_size(rows) or x.shape[1] % axes_size(positions):
        return constrain_batch(x)
    return jax.lax.with_sharding_constraint(x, P(rows, positions) if positions else P(rows))


def gather_positions(x: jax.Array) -> jax.Array:
    """Constrains an activation to `constrain_batch_and_seq`, then to `constrain_batch`: the input of matmuls.

    Where `tensor` splits the columns of these matmuls, the gradient is a partial sum on each device. It takes the way back:
    reduced and scattered. The remat policy "dots" saves what is gathered, so that it is not gathered again.
    """
    if not tensor_axes():
        return constrain_batch(x)
    return checkpoint_name(constrain_batch(constrain_batch_and_seq(x)), "gathered")


def scatter_positions(x: jax.Array) -> jax.Array:
    """Constrains the result of a matmul to `constrain_batch_and_seq`, and its gradient to `constrain_batch`.

    Where `tensor` splits the inputs of the matmul, the result, a partial sum on each device, is reduced and scattered.
    """
    return _scatter_positions(x) if tensor_axes() else constrain_batch(x)


@jax.custom_vjp
def _scatter_positions(x: jax.Array) -> jax.Array:
    # Where the other axes split the weight as well, the partitioner would gather the matmul's input instead of the weight.
    splits_weights = axes_size(auto_axes(("fsdp", "sequence"))) > 1
    return constrain_batch_and_seq(constrain_batch(x) if splits_weights else x)


# A plain constraint would leave the gradient scattered, and the partitioner would gather the weights for it.
_scatter_positions.defvjp(lambda x: (_scatter_positions(x), None), lambda _, grad: (constrain_batch(grad),))


def replicate(weight: jax.Array) -> jax.Array:
    """Gathers a sharded weight on every device, for a lookup. The partitioner would otherwise move the activations."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(weight, P()) if AxisType.Auto in mesh.axis_types else weight


def on_mesh() -> bool:
    """Returns whether there is a current mesh over which weights may be sharded. Inside a `shard_map`, they are local."""
    return any(kind != AxisType.Manual for kind in jax.sharding.get_abstract_mesh().axis_types)


def inside_shard_map() -> bool:
    """Returns whether the caller runs a `shard_map` over some axes of the current mesh, or all.

    Another one inside would hide from JAX that its operands vary over these axes, so that gradients of weights would not be
    summed over them.
    """
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def auto_axes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of `names` that are Auto axes of the current mesh, over which the partitioner may split arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(name for name in names if types.get(name) == AxisType.Auto)


def sequence_axes() -> tuple[str, ...]:
    """Returns ("sequence",) if an Auto axis of the current mesh splits sequences over several devices, else ()."""
    return tuple(name for name in auto_axes(("sequence",)) if axes_size((name,)) > 1)


def tensor_axes() -> tuple[str, ...]:
    """Returns ("tensor",) if an Auto axis of the current mesh splits heads and columns over several devices, else ()."""
    return tuple(name for name in auto_axes(("tensor",)) if axes_size((name,)) > 1)


def axes_size(axes: tuple[str, ...]) -> int:
    """Returns the number of devices along axes of the current mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)
