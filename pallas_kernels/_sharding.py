"""How an operation made of independent problems (rows, heads) runs on a mesh.

Inside `jax.jit` a Pallas call is opaque to the partitioner: a bare one gathers its operands on a mesh with Auto axes, and
raises on one with Explicit axes. A loop over chunks of rows that adds up a weight's gradient is no better off: the
partitioner would reduce it over the mesh once a chunk. The answer has three layers, outermost first:

  1. `agree`: on Explicit axes reshards the operands to what the local function takes; inside a `shard_map` marks
     replicated operands as varying. Called outside the custom_vjp, so that JAX transposes both by itself: into the
     reshard back, and into the sum over the mesh.
  2. the operation's `jax.custom_vjp`, on global arrays: outside layer 3, which has no derivative rule.
  3. `run`: picks how the local function meets the mesh.
       all axes Manual (inside a user's shard_map): a plain call, the arrays are local already;
       some axes Manual: a shard_map over the remaining ones, replicated there;
       Explicit axes: a shard_map, its layout read from the type of the first operand;
       Auto axes, or no mesh: custom_partitioning, its layout decided by the partitioner.
     It carries its own batching rule, since custom_partitioning has none.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Layout = dict[str, tuple]  # parallel axis -> its entries of a PartitionSpec: one, or for "." one a row axis


@dataclasses.dataclass(frozen=True)
class ParallelOp:
    """A local function and what the partitioner has to know about it.

    `local(static, *operands)` returns a tuple of results. Operands and results are written as one letter an axis, where
    "." stands for any number of row axes. The axes named in `parallel` may be sharded, as they are in the first operand;
    every other axis is whole on every device. A result that lacks one of them is a sum over it, and is added up over the
    mesh, once.

    Example: the backward of a norm, (x, grad, weight) -> (dx, dweight), is ("g.d", "g.d", "gd") -> ("g.d", "gd") with
    parallel "g.": groups g with a weight each, rows ".", and dweight a sum over the rows.
    """

    local: Callable[..., tuple]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    parallel: str
    static: Hashable = None

    def layout(self, sharding: Any, shapes: Sequence[tuple[int, ...]], mesh: Any) -> Layout:
        """Where the parallel axes lie, read from the sharding of the first operand.

        An axis that does not divide evenly in every operand, such as few key heads over many devices, is taken whole.
        """
        # an operand on no mesh may come with a sharding without one
        spec = tuple(getattr(sharding, "spec", None) or ())
        spec += (None,) * (len(shapes[0]) - len(spec))
        layout = dict.fromkeys(self.parallel, ())
        for letter, entry in zip(self._letters(self.operands[0], shapes), spec, strict=True):
            if letter in layout:
                layout[letter] += (entry,)
        for letter in set(self.parallel) - {"."}:
            shards = math.prod(mesh.shape[name] for name in _names(layout[letter]))
            sizes = [shape[s.index(letter)] for s, shape in zip(self.operands, shapes, strict=True) if letter in s]
            if any(size % shards for size in sizes):
                layout[letter] = (None,)
        return layout

    def specs(self, layout: Layout) -> tuple[tuple[P, ...], tuple[P, ...]]:
        """-> the PartitionSpecs of all operands, and of all results."""

        def spec(signature: str) -> P:
            return P(*(entry for letter in signature for entry in layout.get(letter, (None,))))

        return tuple(map(spec, self.operands)), tuple(map(spec, self.results))

    def on_shard(self, layout: Layout) -> Callable[..., tuple]:
        """The local function, with its sums over parallel axes added up over the mesh."""

        def add_up(result: jax.Array, signature: str) -> jax.Array:
            axes = [name for letter, entries in layout.items() if letter not in signature for name in _names(entries)]
            return jax.lax.psum(result, tuple(axes)) if axes else result

        return lambda *operands: tuple(map(add_up, self.local(self.static, *operands), self.results))

    def shardy_rule(self, shapes: Sequence[tuple[int, ...]], result_shapes: Sequence[tuple[int, ...]]) -> str:
        """Ties parallel axes of one size together; every other axis has a name of its own, which ties it to nothing."""
        fresh = (f"own{i}" for i in itertools.count())

        def factors(signature: str, shape: tuple[int, ...]) -> str:
            rows = (f"row{i}" for i in itertools.count())
            names = {".": lambda size: next(rows)} | {
                letter: lambda size, letter=letter: f"{letter}{size}" for letter in self.parallel if letter != "."
            }
            letters = zip(self._letters(signature, shapes), shape, strict=True)
            return " ".join(names[letter](size) if letter in names else next(fresh) for letter, size in letters)

        operands, results = (
            ", ".join(map(factors, signatures, of))
            for signatures, of in ((self.operands, shapes), (self.results, result_shapes))
        )
        return f"{operands} -> {results}"

    @property
    def folds(self) -> bool:
        """Whether every array starts with one and the same parallel axis, so that a batch of problems is a longer axis."""
        first = {signature[0] for signature in self.operands + self.results}
        return len(first) == 1 and first <= set(self.parallel) - {"."}

    def _letters(self, signature: str, shapes: Sequence[tuple[int, ...]]) -> str:
        """One letter an axis; the first operand tells how many row axes there are."""
        return signature.replace(".", "." * (len(shapes[0]) - len(self.operands[0]) + 1))


def agree(op: ParallelOp, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """The operands in the layout that `op` takes; see layer 1 above."""
    mesh = _mesh_of(*operands)
    if AxisType.Explicit in mesh.axis_types:
        specs, _ = op.specs(_layout_by_type(op, operands, mesh))
        operands = tuple(jax.sharding.reshard(x, spec) for x, spec in zip(operands, specs, strict=True))
    varying = {name for x in operands for name in jax.typeof(x).manual_axis_type.varying}
    return tuple(_varying_over(varying, x) for x in operands)


def varying_as(like: jax.Array, x: jax.Array) -> jax.Array:
    """x, marked as varying over the mesh axes that `like` varies over: what a loop inside a shard_map starts from."""
    return _varying_over(set(jax.typeof(like).manual_axis_type.varying), x)


def over_rows(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A weight for each group, [g, D] -> [g, 1, ..., 1, D], to go with the rows x [g, ..., D]."""
    return weight.reshape(weight.shape[0], *(1,) * (x.ndim - 2), weight.shape[1])


def lookup(table: jax.Array, indices: jax.Array) -> jax.Array:
    """table[indices] of a replicated table [N], laid out as the indices; an index past an end takes what is there."""
    sharding = jax.typeof(indices).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jnp.asarray(table).at[indices].get(mode="clip", out_sharding=sharding if explicit else None)


def run(op: ParallelOp, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """The results of `op` on whatever mesh there is; see layer 3 above."""
    call = custom_vmap(functools.partial(_dispatch, op))

    @call.def_vmap
    def batch(size: int, batched: list[bool], *operands: jax.Array) -> tuple[tuple, tuple]:
        all_batched = (True,) * len(op.results)
        if not op.folds:
            return _over_problems(op, size, batched, operands), all_batched
        stacked = (
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(operands, batched, strict=True)
        )
        results = run(op, *(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in stacked))
        return tuple(r.reshape(size, r.shape[0] // size, *r.shape[1:]) for r in results), all_batched

    return call(*operands)


def _over_problems(op: ParallelOp, size: int, batched: list[bool], operands: tuple) -> tuple:
    """`run` of an operation without groups on a batch of problems: as more rows, where rows are all that differs.

    A sum over the rows, such as a weight's gradient, is one for each problem, and so are they, one after the other.
    """
    of_rows = ["." in signature for signature in op.operands]
    if all("." in signature for signature in op.results) and all(
        rows or not is_batched for rows, is_batched in zip(of_rows, batched, strict=True)
    ):
        stacked = (
            jnp.broadcast_to(x, (size, *x.shape)) if rows and not is_batched else x
            for x, rows, is_batched in zip(operands, of_rows, batched, strict=True)
        )
        return run(op, *stacked)

    def one(own: list[jax.Array]) -> tuple:
        given = iter(own)
        return run(op, *(next(given) if is_batched else x for x, is_batched in zip(operands, batched, strict=True)))

    return jax.lax.map(one, [x for x, is_batched in zip(operands, batched, strict=True) if is_batched])


def _dispatch(op: ParallelOp, *operands: jax.Array) -> tuple[jax.Array, ...]:
    mesh = _mesh_of(*operands)
    kinds = set(mesh.axis_types)  # empty without a mesh
    local = functools.partial(op.local, op.static)
    if kinds == {AxisType.Manual}:
        return tuple(local(*operands))
    if AxisType.Manual in kinds:
        rest = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        specs = {"in_specs": (P(),) * len(op.operands), "out_specs": (P(),) * len(op.results)}
        results = jax.shard_map(local, **specs, axis_names=rest, check_vma=False)(*operands)
        # what is not checked does not say over which axes its results vary
        varying = set().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
        return tuple(_varying_over(varying, x) for x in results)
    if AxisType.Explicit in kinds:
        layout = _layout_by_type(op, operands, mesh)
        in_specs, out_specs = op.specs(layout)
        return jax.shard_map(op.on_shard(layout), in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)
    return _on_auto_axes(op)(*operands)


@functools.cache
def _on_auto_axes(op: ParallelOp) -> Callable[..., tuple]:
    def layout_of(mesh: Mesh, operands: tuple) -> Layout:
        return op.layout(operands[0].sharding, [x.shape for x in operands], mesh)

    def result_shardings(mesh: Mesh, operands: tuple, results: tuple) -> tuple:
        return tuple(NamedSharding(mesh, spec) for spec in op.specs(layout_of(mesh, operands))[1])

    def partition(mesh: Mesh, operands: tuple, results: tuple) -> tuple:
        layout = layout_of(mesh, operands)
        in_shardings, out_shardings = (tuple(NamedSharding(mesh, spec) for spec in specs) for specs in op.specs(layout))
        return mesh, op.on_shard(layout), out_shardings, in_shardings

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
    """The mesh that the operands live on; if they live on none, the one of `jax.set_mesh`; empty if there is none."""
    for operand in operands:
        mesh = jax.typeof(operand).sharding.mesh
        if not mesh.empty:
            return mesh
    return jax.sharding.get_abstract_mesh()


def is_spread(*operands: jax.Array) -> bool:
    """Whether the operands may be split: their mesh has several devices, or axes that are part of types."""
    mesh = _mesh_of(*operands)
    return math.prod(mesh.shape.values()) > 1 or AxisType.Explicit in mesh.axis_types


def _names(entries: tuple) -> list[str]:
    """The mesh axes in entries of a PartitionSpec."""
    return [name for entry in entries if entry for name in (entry if isinstance(entry, tuple) else (entry,))]


def _varying_over(axes: set[str], x: jax.Array) -> jax.Array:
    missing = tuple(axes - set(jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
