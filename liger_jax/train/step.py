"""The training state and the training step."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Self, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from liger_jax import processes, runtime
from liger_jax.errors import UserError
from liger_jax.inputs.batch import IGNORE, Batch
from liger_jax.model import QwenVL
from liger_jax.model.remat import REMAT
from liger_jax.model.sharding import (
    auto_mesh,
    get_mesh,
    mesh_context,
    param_shardings,
    run_on_auto_axes,
    shard_batch,
    with_auto_axes,
    with_axes_of,
)
from liger_jax.options import LayerExecution, Remat, Unroll
from liger_jax.train.data_parallel import Reduce, gradients_by_device, row_axes, split_update, splits_only_rows
from liger_jax.train.loss import Metrics, check_labels, loss_fn, next_token_labels
from liger_jax.train.master_weights import MasterState
from liger_jax.train.memory import device_bytes, least_temporaries, most_temporaries
from liger_jax.train.optimizer import read_grad_stats, warn_if_updates_vanish

# The choices of remat="auto", from the fastest to the one that needs the least memory.
AUTO_REMAT: tuple[Remat, ...] = ("dots", "narrow", "attention", "full")
# Unrolling all layers saves Qwen2-VL 2B 6 ms a step and Qwen3-VL 4B 22 ms, and takes 12 s longer to compile (H200).
LONG_RUN = 2000  # steps

# Why the step has its remat policy, for the report: by whether "auto" chose it, and whether it fits in memory.
REMAT_REASONS = {
    (True, True): " (the fastest that fits in memory)",
    (True, False): " (none fits in memory; this one needs the least)",
    (False, True): "",
    (False, False): " (does not fit in memory)",
}
# Why unroll="auto" takes each choice, for the report.
UNROLL_REASONS = {
    "none": "with remat full, a scan needs less memory",
    "vision": f"unrolling all pays off from {LONG_RUN:,} steps of one batch shape",
    "all": f"it pays off from {LONG_RUN:,} steps of one batch shape",
}

logger = logging.getLogger(__name__)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "model", "opt_state"], meta_fields=["optimizer"]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a training run: a pytree that can be jitted, donated, sharded and saved.

    Example:
        >>> from liger_jax import QwenVL, QwenVLConfig, TrainState, make_optimizer
        >>> state = TrainState.create(QwenVL.init(QwenVLConfig.tiny()), make_optimizer(1e-5))
        >>> int(state.step)
        0
    """

    step: jax.Array  # int32 scalar: number of batches so far
    model: QwenVL
    opt_state: optax.OptState
    optimizer: optax.GradientTransformation

    @classmethod
    def create(cls, model: QwenVL, optimizer: optax.GradientTransformation) -> Self:
        """Returns the state before the first step, on the model's mesh.

        The optimizer's arrays are sharded like the weights, and over `data` as well where the mesh splits only rows. Warns
        about bfloat16 weights with an optimizer that loses small updates.
        """
        mesh, weights = get_mesh(model), with_auto_axes(model)
        init = functools.partial(_init_state, optimizer=optimizer)
        with mesh_context(get_mesh(weights)):
            shapes = jax.eval_shape(init, weights)
            options = {"strict": False, "over_data": splits_only_rows(mesh)}
            shardings = None if mesh is None else param_shardings(shapes, auto_mesh(mesh), **options)
            step, opt_state = jax.jit(init, out_shardings=shardings)(weights)
        if mesh is not None:
            step, opt_state = with_axes_of(mesh, (step, opt_state))
        warn_if_updates_vanish(model, opt_state, stacklevel=2)
        return cls(step, model, opt_state, optimizer)


def _init_state(model: QwenVL, *, optimizer: optax.GradientTransformation) -> tuple[jax.Array, optax.OptState]:
    return jnp.zeros((), jnp.int32), optimizer.init(model)


def make_train_step(
    *, remat: Remat = "auto", accumulate: int = 1, unroll: Unroll = "auto", long_run: bool = False
) -> "TrainStep":
    """Returns a compiled training step: `state, metrics = step(state, batch)`.

    The old state is donated: its memory is reused for the new one. The step compiles once per bucket of batch shapes.

    Args:
        remat: which activations the backward pass recomputes: "none", "dots", "narrow", "attention" or "full", see
            `liger_jax.model.remat`. "auto" tries all but "none" in this order and takes the first that fits in memory,
            according to the compiler, or else "full". It skips those that cannot fit.
        accumulate: number of parts in which the batch is computed, one after the other. The gradient is that of the whole
            batch: the loss of each part is divided by the number of trained tokens in all parts.
        unroll: layers to unroll instead of scanning over them: "none", "vision" (the vision tower) or "all". "auto" is
            "vision", or "all" in a long run. It is "none" with remat "full", even if "auto" chose that, to save memory. On
            an H200, a step with "all" takes 370 ms, not 376 (2B), or 518 ms, not 540 (Qwen3-VL 4B), and about 30 % longer
            to compile.
        long_run: whether about 2,000 steps or more share a program, so that faster steps make up for longer compilation.

    Returns:
        A function of a `TrainState` and a `Batch`. If loss or gradient norm is not finite, it changes neither weights nor
        optimizer, to the last bit, and only `state.step` advances. Its metrics are those of `loss_fn`; grad_norm: the norm
        of the gradients that the optimizer reads; skipped_update: 1 if the update was left out, else 0; and, for an
        optimizer made by `make_optimizer`, those of `read_grad_stats`.

    Raises:
        UserError: an unknown remat or unroll, or accumulate below 1.

    Example:
        >>> import numpy as np
        >>> from liger_jax import QwenVL, QwenVLConfig, TrainState, make_optimizer, make_train_step, prepare
        >>> state = TrainState.create(QwenVL.init(QwenVLConfig.tiny()), make_optimizer(1e-5))
        >>> ids = np.array([[5, 6, 7]])
        >>> state, metrics = make_train_step()(state, prepare(state.model.config, input_ids=ids, labels=ids))
        >>> sorted(metrics)
        ['accuracy', 'changed_weights', 'grad_norm', 'learning_rate', 'loss', 'num_tokens', 'skipped_update']
    """
    if remat not in ("auto", *REMAT):
        raise UserError(f"remat is {remat!r}; expected one of {('auto', *REMAT)}")
    if unroll not in get_args(Unroll):
        raise UserError(f"unroll is {unroll!r}; expected one of {get_args(Unroll)}")
    if accumulate < 1:
        raise UserError(f"accumulate is {accumulate}; expected at least 1")
    return TrainStep(LayerExecution(remat, unroll), accumulate, long_run)


class TrainStep:
    """A training step that compiles on the first batch of each bucket. Made by `make_train_step`."""

    def __init__(self, execution: LayerExecution, accumulate: int, long_run: bool):
        self.execution = execution
        self.accumulate = accumulate
        self.long_run = long_run
        self.chosen_remat: Remat | None = None  # in the latest compilation
        self.by_device = False  # in the latest compilation: see `train_step`
        self.compiled: dict[Any, Any] = {}
        self.report: Callable[[str], None] = logger.info  # receives a line about each compilation

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_labels(batch)
        # flattened once per step: NNX modules are flattened and unflattened in Python, which takes milliseconds
        leaves, structure = jax.tree.flatten(state)
        mesh = get_mesh(leaves)
        batch = shard_batch(batch, mesh, multiple=self.accumulate)
        key = mesh, structure, jax.tree.structure(batch), _shapes(leaves), _shapes(jax.tree.leaves(batch))
        if key not in self.compiled:
            self.compiled[key] = self._compile(leaves, structure, mesh, batch)
        leaves, metrics = self.compiled[key](leaves, batch)
        return jax.tree.unflatten(structure, leaves), metrics

    def compile(self, state: TrainState, batch: Batch):
        """Returns the executable for arrays of these shapes, to inspect its `.memory_analysis()` or `.as_text()`."""
        leaves, structure = jax.tree.flatten(state)
        mesh = get_mesh(leaves)
        return self._compile(leaves, structure, mesh, shard_batch(batch, mesh, multiple=self.accumulate))

    def _compile(self, leaves: list[jax.Array], structure: Any, mesh: Mesh | None, batch: Batch):
        """Returns an executable that maps (leaves of a state, batch) to (leaves of the next state, metrics)."""
        start = time.perf_counter()
        remats = AUTO_REMAT if self.execution.remat == "auto" else (self.execution.remat,)
        rows, length = batch.shape

        def agree(fits: bool) -> bool:
            """Returns whether it fits for all processes: they run one program, even if their devices' memory differs."""
            return all(processes.exchange(fits)) if processes.spans(leaves) else fits

        choices = [(remat, by_device) for remat in remats for by_device in self._by_device_choices(mesh, rows)]
        for choice in choices[:-1]:
            if not agree(self._may_fit_memory(leaves, structure, mesh, batch, *choice)):
                continue  # compiling takes up to half a minute
            compiled = self._compile_choice(leaves, structure, mesh, batch, *choice)
            if fits := agree(_fits_memory(compiled)):
                break
        else:
            choice = choices[-1]
            compiled = self._compile_choice(leaves, structure, mesh, batch, *choice)
            fits = _fits_memory(compiled)  # for the report, of which each process makes its own
        self.chosen_remat, self.by_device = choice
        reason = REMAT_REASONS[self.execution.remat == "auto", fits]
        unrolled = self.execution.resolve(self.chosen_remat, long_run=self.long_run).unroll
        why_unrolled = f" ({UNROLL_REASONS[unrolled]})" if self.execution.unroll == "auto" else ""
        patches = f" with {batch.vision.pixel_values.shape[1]} patches each" if batch.vision else ""
        self.report(
            f"compiled the training step for {rows} x {length} tokens{patches} in {time.perf_counter() - start:.0f} s: "
            f"remat {self.chosen_remat}{reason}, unrolled layers: {unrolled}{why_unrolled}"
        )
        return compiled

    def _by_device_choices(self, mesh: Mesh | None, rows: int) -> tuple[bool, ...]:
        """Returns the ways to run on a mesh: by device, with few large collectives, or else as the partitioner decides.

        The partitioner's program has the weights of one layer at a time, and so needs less memory where weights are split.
        """
        if mesh is None or not splits_only_rows(mesh) or rows % (mesh.size * self.accumulate):
            return (False,)
        return (True, False) if mesh.shape.get("fsdp", 1) > 1 else (True,)

    def _may_fit_memory(
        self, leaves: list[jax.Array], structure: Any, mesh: Mesh | None, batch: Batch, remat: Remat, by_device: bool
    ) -> bool:
        """Returns False if a step surely needs more memory than there is, which takes a second, not a compilation."""
        limit = _memory_limit()
        if limit is None:
            return True
        state = structure.unflatten(leaves)
        arguments = sum(map(device_bytes, [*leaves, *jax.tree.leaves(batch)]))
        if arguments + most_temporaries(state.model, batch) <= limit:
            return True
        with mesh_context(mesh and auto_mesh(mesh)):  # as in the step, for an optimizer that names axes
            is_trained = reads_gradients(state)
        options: dict[str, Any] = {"remat": remat, "by_device": by_device, "parts": self.accumulate}
        return arguments + least_temporaries(state.model, batch, is_trained=is_trained, **options) <= limit

    def _compile_choice(
        self, leaves: list[jax.Array], structure: Any, mesh: Mesh | None, batch: Batch, remat: Remat, by_device: bool
    ):
        """Returns the executable for a remat policy, and one of the two ways to run on a mesh; see `train_step`."""
        placed: list[Any] = [leaf.sharding for leaf in leaves]
        shardings: Any = None if mesh is None else (placed, None)
        options: dict[str, Any] = {
            "accumulate": self.accumulate,
            "execution": self.execution.resolve(remat, long_run=self.long_run),
        }
        if by_device:
            state = structure.unflatten([sharding.spec for sharding in placed])
            options["specs"] = jax.tree.leaves(state.model)
        step = functools.partial(_flat_train_step, structure=structure, **options)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            whole = NamedSharding(mesh, PartitionSpec())  # of the metrics
            step = functools.partial(run_on_auto_axes, step, out_shardings=(placed, whole))
        with mesh_context(mesh):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
            with runtime.without_garbage_collection():
                lowered = jitted.lower(leaves, batch)
            return lowered.compile(compiler_options=runtime.step_compiler_options(mesh))


def _shapes(leaves: list[jax.Array]) -> tuple:
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _memory_limit() -> int | None:
    """Returns the bytes that a device may use, or None if it does not report them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _fits_memory(compiled) -> bool:
    """Returns whether a program's arguments and temporaries fit in memory, or True if the device does not report it."""
    limit, memory = _memory_limit(), compiled.memory_analysis()
    if limit is None or memory is None:
        return True
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes <= limit


def _flat_train_step(
    leaves: list[jax.Array], batch: Batch, *, structure, **options: Any
) -> tuple[list[jax.Array], Metrics]:
    """Applies `train_step` to the leaves of a state. Raises UserError if the optimizer changes the state's structure."""
    state = structure.unflatten(leaves)
    state, metrics = train_step(state, batch, **options)
    leaves, new_structure = jax.tree.flatten(state)
    if new_structure != structure:
        raise UserError(
            f"The optimizer changes the structure of its state: it is {new_structure}; expected {structure}, as before"
        )
    return leaves, metrics


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    accumulate: int,
    execution: LayerExecution,
    specs: Sequence[PartitionSpec] | None = None,
) -> tuple[TrainState, Metrics]:
    """Returns the next state and the metrics, see `make_train_step`. A plain function, to be jitted.

    On a mesh, the partitioner decides who computes what, unless `specs` says how the mesh splits each leaf of the model.
    Then each device computes the gradients of its rows with the whole model, see `liger_jax.train.data_parallel`.
    """
    if specs is not None:
        compute = functools.partial(_gradients_of_rows, accumulate=accumulate, execution=execution)
        grads, metrics = gradients_by_device(compute, state.model, batch, specs)
    elif accumulate == 1:
        grads, metrics = gradients(state.model, batch, None, execution=execution)
    else:
        num_items = jnp.sum(next_token_labels(batch) != IGNORE)
        grads, metrics = _accumulated_gradients(state.model, batch, num_items, accumulate, execution=execution)
    update = _inlined_update(state.optimizer)
    norm = optax.tree.norm(used_gradients(state, grads, update))
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, opt_state = update(grads, state.opt_state, state.model, finite=finite)
    stats = {"grad_norm": norm, "skipped_update": 1.0 - finite} | read_grad_stats(opt_state)
    model = _select(finite, optax.apply_updates(state.model, updates), state.model)
    model = model if specs is None else split_update(model, specs)
    opt_state = _select(finite, opt_state, state.opt_state)
    state = dataclasses.replace(state, step=state.step + 1, model=model, opt_state=opt_state)
    return state, metrics | stats


def used_gradients(state: TrainState, grads: QwenVL, update: Any = None) -> list[jax.Array]:
    """Returns the gradients that the optimizer reads. Those of frozen parts need not be computed."""
    is_read = reads_gradients(state, update)
    return [grad for grad, is_used in zip(jax.tree.leaves(grads), is_read, strict=True) if is_used]


def reads_gradients(state: TrainState, update: Any = None) -> list[bool]:
    """Returns for each weight whether the optimizer reads its gradient.

    A step passes the function that it then calls, so that the optimizer is traced once.
    """
    update = update or _inlined_update(state.optimizer)
    # without their shardings: Explicit axes would not match gradients that have none
    model, opt_state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.model, state.opt_state))
    finite = jax.ShapeDtypeStruct((), bool)
    jaxpr = update.trace(model, opt_state, model, finite=finite).jaxpr.jaxpr  # gradients have the model's shapes
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars} | set(map(id, jaxpr.outvars))
    return [id(variable) in used for variable in jaxpr.invars[: len(jax.tree.leaves(model))]]


def _inlined_update(optimizer: optax.GradientTransformation) -> Any:
    """Returns the optimizer's update as a function that JAX traces once for the same shapes, and inlines."""
    return jax.jit(optax.with_extra_args_support(optimizer).update, inline=True)


def _select(finite: jax.Array, new: Any, old: Any) -> Any:
    """Returns the new arrays if `finite`, else the old ones.

    Elementwise, so that XLA computes it in the loops that update the arrays in place. Master weights are already selected:
    the old ones could not be read after `with_master_weights` without a copy.
    """

    def select(new, old):
        if isinstance(new, MasterState):
            return new._replace(inner=_select(finite, new.inner, old.inner))
        return jnp.where(finite, new, old)

    return jax.tree.map(select, new, old, is_leaf=lambda node: isinstance(node, MasterState))


def gradients(
    model: QwenVL, batch: Batch, num_items: jax.Array | None, *, execution: LayerExecution
) -> tuple[QwenVL, Metrics]:
    """Returns the gradient of `loss_fn` with respect to every weight, as a pytree like the model, and the metrics."""
    loss = functools.partial(loss_fn, remat=execution.remat, unroll=execution.unroll)
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(model, batch, num_items)
    return grads, metrics


def _gradients_of_rows(
    model: QwenVL, batch: Batch, reduce: Reduce, *, accumulate: int, execution: LayerExecution
) -> tuple[QwenVL, Metrics]:
    """Returns `gradients` of the batch of which this device has some rows: reduced over the mesh, and its metrics."""
    axes = row_axes()
    num_items = jax.lax.psum(jnp.sum(next_token_labels(batch) != IGNORE), axes)
    if accumulate == 1:
        grads, metrics = gradients(model, batch, num_items, execution=execution)
        grads, correct = reduce(grads), metrics["accuracy"] * metrics["num_tokens"]
    else:
        grads, metrics = _accumulated_gradients(model, batch, num_items, accumulate, execution=execution, reduce=reduce)
        correct = metrics["accuracy"] * jnp.maximum(num_items, 1)
    loss, correct = jax.lax.psum((metrics["loss"], correct), axes)
    return grads, {"loss": loss, "num_tokens": num_items, "accuracy": correct / jnp.maximum(num_items, 1)}


def _accumulated_gradients(
    model: QwenVL,
    batch: Batch,
    num_items: jax.Array,
    parts: int,
    *,
    execution: LayerExecution,
    reduce: Reduce = lambda grads: grads,
) -> tuple[QwenVL, Metrics]:
    """Returns `gradients` for the whole batch, computed in parts, each of them reduced, and summed in float32."""
    # part i takes sequences i, i + parts, ...: on a mesh, each device splits the sequences that it holds
    batches = jax.tree.map(lambda a: jnp.reshape(a, (-1, parts, *a.shape[1:])).swapaxes(0, 1), batch)

    def add_part(totals, part):
        grads, metrics = gradients(model, part, num_items, execution=execution)
        grads = reduce(grads)
        correct = metrics["accuracy"] * metrics["num_tokens"]
        terms = (grads, metrics["loss"], correct)
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), totals, terms), None

    zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), jax.eval_shape(reduce, model))
    totals: Any = (zeros, 0.0, 0.0)
    (grads, loss, correct), _ = jax.lax.scan(add_part, totals, batches)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, model)
    return grads, {"loss": loss, "num_tokens": num_items, "accuracy": correct / jnp.maximum(num_items, 1)}
