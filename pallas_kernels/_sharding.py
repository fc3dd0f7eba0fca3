"""Runs operations made of independent problems (rows, heads) on a mesh.

Inside `jax.jit` a Pallas call is opaque to the partitioner: a bare call gathers its operands on a mesh with Auto axes, and
raises on one with Explicit axes. A loop over chunks of rows that accumulates a weight's gradient has a similar problem: the
partitioner would reduce the gradient over the mesh once per chunk. The solution has three layers, outermost first:

  1. `align_operands`: on Explicit axes, reshards the operands to the layout of the local function; inside a `shard_map`,
     marks replicated operands as varying. It is called outside the custom_vjp, so that JAX transposes both: into the reverse
     reshard, and into the sum over the mesh.
  2. The operation's `jax.custom_vjp`, on global arrays. It must enclose layer 3, which has no derivative rule.
  3. `run`: runs the local function on each device's shard.
       All axes Manual (inside a user's shard_map): a plain call, because the arrays are already local.
       Some axes Manual: a shard_map over the other axes, along which the arrays are replicated.
       Explicit axes: a shard_map, with the layout read from the type of the first operand.
       Auto axes, or no mesh: custom_partitioning, with the layout chosen by the partitioner. JAX refuses it in a program
       whose arguments have both Auto and Explicit axes; there, `split_rows_over` chooses a layout for a shard_map.
     It has its own batching rule, because custom_partitioning has none.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS = "..."  # any number of row axes
Layout = dict[str, tuple]  # parallel axis -> its PartitionSpec entries: a single one, but for ROWS one per row axis

rows_over: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("rows_over", default=())


@contextlib.contextmanager
def split_rows_over(mesh_axes: tuple[str, ...]) -> Iterator[None]:
    """Splits the rows of differentiable operations over axes of a mesh with Auto axes, in a `with` block.

    Outside the block, the partitioner chooses the layout, which needs custom_partitioning. The backward pass is split like
    the forward pass, wherever it runs. Without a mesh, there is no effect.

    Raises:
        ValueError: from an operation in the block, if its mesh has no such axis.
    """
    token = rows_over.set(mesh_axes)
    try:
        yield
    finally:
        rows_over.reset(token)


@dataclasses.dataclass(frozen=True)
class ParallelOp:
    """A local function and the facts about it that the partitioner needs.

    `local(static, *operands)` returns a tuple of results. Each operand and result is described by its axis names, separated
    by spaces; "..." is any number of row axes. Only the axes in `parallel` may be sharded, and all arrays follow the
    sharding of the first operand. A result that lacks a parallel axis is a sum over that axis; it is summed over the mesh
    once.

    Example: the backward pass of a norm computes dx and dweight from x, grad and weight. Its operands are ("G ... D",
    "G ... D", "G D"), its results ("G ... D", "G D"), and its parallel axes ("G", "..."). The rows form G groups with one
    weight each, and dweight is a sum over the rows of a group.
    """

    local: Callable[..., tuple]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    parallel: tuple[str, ...]
    static: Hashable = None
    rows_over: tuple[str, ...] = ()  # on Auto axes: mesh axes to split rows over instead of asking the partitioner

    def layout(self, sharding: Any, shapes: Sequence[tuple[int, ...]], mesh: Any) -> Layout:
        """Returns the layout of the parallel axes, read from the sharding of the first operand.

        An axis that cannot be divided evenly in every operand stays whole, such as few key heads over many devices. So does
        a row axis: the partitioner would pad the shards with garbage, which a sum over rows would include.
        """
        # An operand that is on no mesh may have a sharding without a spec.
        spec = tuple(getattr(sharding, "spec", None) or ())
        spec += (None,) * (len(shapes[0]) - len(spec))
        axes = [self._axes(operand, shapes) for operand in self.operands]
        layout: Layout = dict.fromkeys(self.parallel, ())
        for axis, entry, size in zip(axes[0], spec, shapes[0], strict=True):
            if axis in layout:
                layout[axis] += (None if size % _num_shards(entry, mesh) else entry,)
        for axis in set(self.parallel) - {ROWS}:
            (entry,) = layout[axis]
            sizes = [shape[names.index(axis)] for names, shape in zip(axes, shapes, strict=True) if axis in names]
            if any(size % _num_shards(entry, mesh) for size in sizes):
                layout[axis] = (None,)
        return layout

    def layout_over_rows(self, shapes: Sequence[tuple[int, ...]], mesh: Any) -> Layout:
        """Returns the layout that splits the first axis that `rows_over` divides."""
        if unknown := [name for name in self.rows_over if name not in mesh.axis_names]:
            raise ValueError(
                f"split_rows_over: mesh_axes has {unknown}; expected any of the mesh's axes {mesh.axis_names}"
            )
        shards = math.prod(mesh.shape[name] for name in self.rows_over)
        spec: list[Any] = [None] * len(shapes[0])
        for i, (axis, size) in enumerate(zip(self._axes(self.operands[0], shapes), shapes[0], strict=True)):
            if axis in self.parallel and size and size % shards == 0:
                spec[i] = self.rows_over
                break
        return self.layout(NamedSharding(mesh, P(*spec)), shapes, mesh)

    def specs(self, layout: Layout) -> tuple[tuple[P, ...], tuple[P, ...]]:
        """Returns the PartitionSpecs of all operands, and of all results."""

        def spec(axes: str) -> P:
            return P(*(entry for axis in axes.split() for entry in layout.get(axis, (None,))))

        return tuple(map(spec, self.operands)), tuple(map(spec, self.results))

    def on_shard(self, layout: Layout) -> Callable[..., tuple]:
        """Returns the local function, with its sums over parallel axes also summed over the mesh."""

        def sum_over_mesh(result: jax.Array, axes: str) -> jax.Array:
            reduced = [entries for axis, entries in layout.items() if axis not in axes.split()]
            mesh_axes = tuple(name for entries in reduced for name in _mesh_axes(entries))
            return jax.lax.psum(result, mesh_axes) if mesh_axes else result

        return lambda *operands: tuple(map(sum_over_mesh, self.local(self.static, *operands), self.results))

    def shardy_rule(self, shapes: Sequence[tuple[int, ...]], result_shapes: Sequence[tuple[int, ...]]) -> str:
        """Returns the rule for Shardy: parallel axes of equal size share a name and thus their sharding; no others do."""
        unshared = (f"own{i}" for i in itertools.count())

        def factors(axes: str, shape: tuple[int, ...]) -> str:
            rows = (f"row{i}" for i in itertools.count())

            def factor(axis: str, size: int) -> str:
                if axis not in self.parallel:
                    return next(unshared)
                return next(rows) if axis == ROWS else f"{axis}{size}"

            return " ".join(map(factor, self._axes(axes, shapes), shape))

        operands = ", ".join(map(factors, self.operands, shapes))
        results = ", ".join(map(factors, self.results, result_shapes))
        return f"{operands} -> {results}"

    @property
    def folds(self) -> bool:
        """Whether all arrays start with the same parallel axis, so that stacking problems only makes this axis longer."""
        leading = {axes.split()[0] for axes in self.operands + self.results}
        return len(leading) == 1 and leading <= set(self.parallel) - {ROWS}

    def _axes(self, axes: str, shapes: Sequence[tuple[int, ...]]) -> list[str]:
        """Returns one name per axis, with "..." repeated for each row axis of the first operand."""
        row_axes = len(shapes[0]) - len(self.operands[0].split()) + 1
        return [name for axis in axes.split() for name in [axis] * (row_axes if axis == ROWS else 1)]


def align_operands(op: ParallelOp, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the operands in the layout that `op` needs; see layer 1 above."""
    mesh = _mesh_of(*operands)
    if AxisType.Explicit in mesh.axis_types:
        specs, _ = op.specs(_layout_by_type(op, operands, mesh))
        operands = tuple(jax.sharding.reshard(x, spec) for x, spec in zip(operands, specs, strict=True))
    return vary_alike(*operands)


def vary_alike(*operands: Any) -> tuple[Any, ...]:
    """Returns the operands marked as varying over the mesh axes that any of them varies over; None stays None.

    A kernel reads all of its operands for each result. Has an effect only in a shard_map.
    """
    varying = {name for x in operands if x is not None for name in jax.typeof(x).manual_axis_type.varying}
    return tuple(None if x is None else _varying_over(varying, x) for x in operands)


def varying_as(like: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x marked as varying over the same mesh axes as `like`, which a loop's initial carry needs in a shard_map."""
    return _varying_over(set(jax.typeof(like).manual_axis_type.varying), x)


def over_rows(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the weight [G, D] of each group as [G, 1, ..., 1, D], which broadcasts over the rows x [G, ..., D]."""
    return weight.reshape(weight.shape[0], *(1,) * (x.ndim - 2), weight.shape[1])


def lookup(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns table[indices] for a replicated table [N], sharded like the indices. Indices outside the table are clipped."""
    sharding = jax.typeof(indices).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jnp.asarray(table).at[indices].get(mode="clip", out_sharding=sharding if explicit else None)


def run(op: ParallelOp, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the results of `op` on the current mesh, if there is one; see layer 3 above."""
    call = custom_vmap(functools.partial(_dispatch, op))

    @call.def_vmap
    def batch(size: int, batched: list[bool], *operands: jax.Array) -> tuple[tuple, tuple]:
        over_problems = _fold_problems if op.folds else _over_problems
        return over_problems(op, size, batched, operands), (True,) * len(op.results)

    return call(*operands)


def _fold_problems(op: ParallelOp, size: int, batched: list[bool], operands: tuple) -> tuple:
    """Runs a batch of problems as one, whose leading axis is longer.

    On Explicit axes, a reshape cannot merge an axis into a sharded one that follows it. If the leading axis is sharded, it
    therefore comes before the axis of the problems.
    """
    sharding = _sharding_of_problems(batched, operands)
    stacked = [x if is_batched else _repeat(x, size, sharding) for x, is_batched in zip(operands, batched, strict=True)]
    length = stacked[0].shape[1]  # of the leading axis, the same in all operands and results of a problem
    if _explicit_spec(stacked[0])[1] is None:
        results = run(op, *(x.reshape(size * length, *x.shape[2:]) for x in stacked))
        return tuple(r.reshape(size, length, *r.shape[1:]) for r in results)
    swapped = [_shard_problems(x, None).swapaxes(0, 1) for x in stacked]
    results = run(op, *(x.reshape(length * size, *x.shape[2:]) for x in swapped))
    return tuple(_shard_problems(r.reshape(length, size, *r.shape[1:]).swapaxes(0, 1), sharding) for r in results)


def _sharding_of_problems(batched: list[bool], operands: tuple) -> Any:
    """Returns the entry of a PartitionSpec for the axis of the problems, which vmap requires to be the same everywhere."""
    return next(_explicit_spec(x)[0] for x, is_batched in zip(operands, batched, strict=True) if is_batched)


def _repeat(x: jax.Array, size: int, sharding: Any) -> jax.Array:
    """Returns an operand that the problems share with an axis of the problems."""
    return _shard_problems(jnp.broadcast_to(x, (size, *x.shape)), sharding)


def _shard_problems(x: jax.Array, sharding: Any) -> jax.Array:
    """Returns x with its first axis sharded as an entry of a PartitionSpec says."""
    first, *remaining = _explicit_spec(x)
    return x if first == sharding else jax.sharding.reshard(x, P(sharding, *remaining))


def _explicit_spec(x: jax.Array) -> tuple:
    """Returns the entries of the PartitionSpec that the type of x has on Explicit axes, one per axis; None elsewhere."""
    sharding = jax.typeof(x).sharding
    spec = tuple(sharding.spec) if AxisType.Explicit in sharding.mesh.axis_types else ()
    return spec + (None,) * (x.ndim - len(spec))


def _over_problems(op: ParallelOp, size: int, batched: list[bool], operands: tuple) -> tuple:
    """Runs an operation without groups on a batch of problems.

    If the problems share all operands without rows, and no result sums over the rows, they become more rows of one problem.
    Otherwise they run one after the other: a sum over the rows, such as a weight's gradient, belongs to a single problem.
    """
    sharding = _sharding_of_problems(batched, operands)
    has_rows = [ROWS in axes.split() for axes in op.operands]
    if all(ROWS in axes.split() for axes in op.results) and all(
        rows or not is_batched for rows, is_batched in zip(has_rows, batched, strict=True)
    ):
        stacked = (
            _repeat(x, size, sharding) if rows and not is_batched else x
            for x, rows, is_batched in zip(operands, has_rows, batched, strict=True)
        )
        return run(op, *stacked)

    def run_problem(batched_operands: list[jax.Array]) -> tuple:
        problem = iter(batched_operands)
        return run(op, *(next(problem) if is_batched else x for x, is_batched in zip(operands, batched, strict=True)))

    # a loop cannot run over a sharded axis
    mapped = [_shard_problems(x, None) for x, is_batched in zip(operands, batched, strict=True) if is_batched]
    return tuple(_shard_problems(r, sharding) for r in jax.lax.map(run_problem, mapped))


def _dispatch(op: ParallelOp, *operands: jax.Array) -> tuple[jax.Array, ...]:
    mesh = _mesh_of(*operands)
    axis_types = set(mesh.axis_types)  # empty without a mesh
    local = functools.partial(op.local, op.static)
    if axis_types == {AxisType.Manual}:
        return tuple(local(*operands))
    if AxisType.Manual in axis_types:
        automatic = {
            name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual
        }
        in_specs, out_specs = (P(),) * len(op.operands), (P(),) * len(op.results)
        results = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=automatic, check_vma=False)(
            *operands
        )
        # An unchecked shard_map does not record the axes over which its results vary.
        varying = set().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
        return tuple(_varying_over(varying, x) for x in results)
    if AxisType.Explicit in axis_types:
        layout = _layout_by_type(op, operands, mesh)
        in_specs, out_specs = op.specs(layout)
        return jax.shard_map(op.on_shard(layout), in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)
    if op.rows_over and axis_types:
        layout = op.layout_over_rows([x.shape for x in operands], mesh)
        in_specs, out_specs = op.specs(layout)
        return jax.shard_map(op.on_shard(layout), mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
            *operands
        )
    return _on_auto_axes(op)(*operands)


@functools.cache
def _on_auto_axes(op: ParallelOp) -> Callable[..., tuple]:
    def operand_layout(mesh: Mesh, operands: tuple) -> Layout:
        return op.layout(operands[0].sharding, [x.shape for x in operands], mesh)

    def result_shardings(mesh: Mesh, operands: tuple, results: tuple) -> tuple:
        return tuple(NamedSharding(mesh, spec) for spec in op.specs(operand_layout(mesh, operands))[1])

    def partition(mesh: Mesh, operands: tuple, results: tuple) -> tuple:
        layout = operand_layout(mesh, operands)
        in_shardings, out_shardings = (tuple(NamedSharding(mesh, spec) for spec in specs) for specs in op.specs(layout))
        on_shard = op.on_shard(layout)

        def without_context(*operands: jax.Array) -> tuple:
            # traced by the compiler, where a mesh of the caller's `jax.set_mesh` does not apply
            device = mesh.abstract_mesh.abstract_device  # for compilation ahead of time, without devices
            with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
                return on_shard(*operands)

        return mesh, without_context, out_shardings, in_shardings

    def sharding_rule(mesh: Mesh, operands: list, results: list) -> str:
        return op.shardy_rule([tuple(x.shape) for x in operands], [tuple(x.shape) for x in results])

    partitioned = custom_partitioning(functools.partial(op.local, op.static))
    partitioned.def_partition(
        partition=partition, infer_sharding_from_operands=result_shardings, sharding_rule=sharding_rule
    )
    return partitioned


def _layout_by_type(op: ParallelOp, operands: Sequence[jax.Array], mesh: Any) -> Layout:
    return op.layout(jax.typeof(operands[0]).sharding, [x.shape for x in operands], mesh)


def _mesh_of(*operands: jax.Array) -> Any:
    """Returns the mesh of the operands; if they are on none, the mesh of `jax.set_mesh`, which may be empty."""
    for operand in operands:
        mesh = jax.typeof(operand).sharding.mesh
        if not mesh.empty:
            return mesh
    return jax.sharding.get_abstract_mesh()


def is_spread(*operands: jax.Array) -> bool:
    """Returns whether the operands may be sharded: their mesh has several devices, or Explicit axes."""
    mesh = _mesh_of(*operands)
    is_local = set(mesh.axis_types) == {AxisType.Manual}  # inside a shard_map
    return not is_local and (math.prod(mesh.shape.values()) > 1 or AxisType.Explicit in mesh.axis_types)


def _mesh_axes(entries: tuple) -> list[str]:
    """Returns the names of the mesh axes in entries of a PartitionSpec."""
    return [name for entry in entries if entry for name in (entry if isinstance(entry, tuple) else (entry,))]


def _num_shards(entry: Any, mesh: Any) -> int:
    """Returns the number of shards into which an entry of a PartitionSpec divides its axis."""
    return math.prod(mesh.shape[name] for name in _mesh_axes((entry,)))


def _varying_over(axes: set[str], x: jax.Array) -> jax.Array:
    missing = tuple(axes - set(jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
