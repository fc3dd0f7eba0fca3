"""Loss, state and step of fine-tuning."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import pallas_kernels as pk
from liger_jax import runtime
from liger_jax.inputs.batch import IGNORE, Batch
from liger_jax.model import Qwen2VL
from liger_jax.model.remat import REMAT, LayerExecution
from liger_jax.model.sharding import (
    constrain_batch,
    constrain_batch_and_seq,
    get_mesh,
    mesh_context,
    param_shardings,
    shard_batch,
)
from liger_jax.train.grad_stats import reported

AUTO = ("dots", "narrow", "attention", "full")  # from the fastest to the smallest

logger = logging.getLogger(__name__)
Metrics = dict[str, jax.Array]


def next_token_labels(batch: Batch) -> jax.Array:
    """What each position shall predict, [B, L]: the label of the column behind it, if that belongs to the same sequence."""
    if batch.labels is None:
        raise ValueError("The batch has no labels: give `labels` to prepare()")
    labels, segments = jnp.asarray(batch.labels), jnp.asarray(batch.segment_ids)
    behind = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1))) & (segments > 0)
    return jnp.where(same, behind, IGNORE)


def loss_fn(
    model: Qwen2VL,
    batch: Batch,
    num_items: jax.Array | float | None = None,
    *,
    remat: str = "none",
    unroll: bool = False,
) -> tuple[jax.Array, Metrics]:
    """Cross entropy of the next token, without ever making the logits.

    loss = - sum over trained tokens of log p(token | what comes before) / num_items

    Args:
        batch: with labels; the labels are shifted here, as in Hugging Face's models.
        num_items: what the sum is divided by; by default the number of trained tokens. Give the total of all parts when
            a batch is spread over several calls.
        remat, unroll: how the layers run, see `liger_jax.model.remat.LayerExecution`.

    Returns:
        The loss, and {"loss", "num_tokens": trained tokens, "accuracy": share of them that argmax gets right}. Without a
        trained token all are 0, and so are the gradients.

    Example:
        >>> import jax, numpy as np
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, loss_fn, prepare
        >>> model = Qwen2VL.init(Qwen2VLConfig.tiny(), dtype="float32")
        >>> ids = np.array([[5, 6, 7]])
        >>> loss, metrics = jax.jit(loss_fn)(model, prepare(model.config, input_ids=ids, labels=ids))
        >>> int(metrics["num_tokens"])
        2
    """
    targets = next_token_labels(batch)
    hidden = constrain_batch_and_seq(constrain_batch(model.hidden_states(batch, loop=LayerExecution(remat, unroll))))
    loss, metrics = pk.linear_cross_entropy(hidden, model.head, targets, normalizer=num_items, return_metrics=True)
    return loss, {"loss": loss, "num_tokens": metrics["num_tokens"], "accuracy": metrics["accuracy"]}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "model", "opt_state"], meta_fields=["optimizer"]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training run carries from step to step: a pytree, so it can be jitted, donated, sharded and saved.

    Example:
        >>> import optax
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState
        >>> state = TrainState.create(Qwen2VL.init(Qwen2VLConfig.tiny()), optax.adamw(1e-4))
        >>> int(state.step)
        0
    """

    step: jax.Array
    model: Qwen2VL
    opt_state: optax.OptState
    optimizer: optax.GradientTransformation

    @classmethod
    def create(cls, model: Qwen2VL, optimizer: optax.GradientTransformation) -> Self:
        """A state before its first step; the optimizer's arrays are split over the mesh as the weights are."""
        mesh = get_mesh(model)
        make = functools.partial(_start, optimizer=optimizer)
        shardings = None if mesh is None else param_shardings(jax.eval_shape(make, model), mesh)
        step, opt_state = jax.jit(make, out_shardings=shardings)(model)
        return cls(step, model, opt_state, optimizer)


def _start(model: Qwen2VL, *, optimizer: optax.GradientTransformation):
    return jnp.zeros((), jnp.int32), optimizer.init(model)


def make_train_step(
    *, remat: str = "auto", accumulate: int = 1, unroll: bool = False
) -> Callable[[TrainState, Batch], tuple]:
    """A compiled training step: `state, metrics = step(state, batch)`. The old state's memory is reused for the new one.

    Args:
        remat: what the backward pass keeps: "none", "dots", "narrow", "attention" or "full" (see `liger_jax.model.remat`);
            "auto" takes the first but "none" whose memory, as the compiler reports it, fits the device.
        accumulate: parts that the batch is computed in, one after the other. The gradient is that of the whole batch:
            each part's loss is divided by the trained tokens of all.
        unroll: a faster step for a longer compilation, see `liger_jax.model.remat.LayerExecution`.

    Returns:
        A function of a `TrainState` and a `Batch` as `prepare` returns it. Its metrics are those of `loss_fn`, and what
        the optimizer reports: grad_norm and learning_rate, if `make_optimizer` made it. It compiles once for each bucket
        of shapes.

    Example:
        >>> import numpy as np, optax
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, TrainState, make_train_step, prepare
        >>> state = TrainState.create(Qwen2VL.init(Qwen2VLConfig.tiny()), optax.adamw(1e-4))
        >>> ids = np.array([[5, 6, 7]])
        >>> state, metrics = make_train_step()(state, prepare(state.model.config, input_ids=ids, labels=ids))
        >>> sorted(metrics)
        ['accuracy', 'loss', 'num_tokens']
    """
    if remat not in ("auto", *REMAT):
        raise ValueError(f"remat is {remat!r}; expected one of {('auto', *REMAT)}")
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; expected at least 1")
    return TrainStep(remat, accumulate, unroll)


class TrainStep:
    """What `make_train_step` returns: compiles on the first batch of each bucket, then runs."""

    def __init__(self, remat: str, accumulate: int, unroll: bool):
        self.remat = remat
        self.accumulate = accumulate
        self.unroll = unroll
        self.chosen: str | None = None  # remat of the latest compilation
        self.compiled: dict[Any, Any] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if batch.labels is None:
            raise ValueError("The batch has no labels: give `labels` to prepare()")
        # once a step: modules are taken apart and put together in Python, which takes milliseconds
        leaves, structure = jax.tree.flatten(state)
        mesh = get_mesh(leaves)
        batch = shard_batch(batch, mesh, multiple=self.accumulate)
        key = mesh, structure, jax.tree.structure(batch), _shapes(leaves), _shapes(jax.tree.leaves(batch))
        if key not in self.compiled:
            self.compiled[key] = self._compile(leaves, structure, mesh, batch)
        leaves, metrics = self.compiled[key](leaves, batch)
        return structure.unflatten(leaves), metrics

    def compile(self, state: TrainState, batch: Batch):
        """The step's executable for arrays like these; `.memory_analysis()` and `.as_text()` tell what it is."""
        leaves, structure = jax.tree.flatten(state)
        mesh = get_mesh(leaves)
        return self._compile(leaves, structure, mesh, shard_batch(batch, mesh, multiple=self.accumulate))

    def _compile(self, leaves: list[jax.Array], structure, mesh: Mesh | None, batch: Batch):
        """-> an executable (leaves of a state, batch) -> leaves of the next one, metrics."""
        shardings = mesh and ([leaf.sharding for leaf in leaves], None)
        policies = AUTO if self.remat == "auto" else (self.remat,)
        for remat in policies:
            how = {"accumulate": self.accumulate, "remat": remat, "unroll": self.unroll}
            step = functools.partial(_flat_step, structure=structure, **how)
            with mesh_context(mesh):
                jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
                compiled = jitted.lower(leaves, batch).compile(compiler_options=runtime.COMPILER_OPTIONS)
            if remat == policies[-1] or _fits(compiled):
                break
        self.chosen = remat
        logger.info("train step compiled for %s, remat=%s", batch.shape, remat)
        return compiled


def _shapes(leaves: list[jax.Array]) -> tuple:
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _flat_step(leaves: list[jax.Array], batch: Batch, *, structure, **options: Any) -> tuple[list[jax.Array], Metrics]:
    """`train_step` on the leaves of a state."""
    state, metrics = train_step(structure.unflatten(leaves), batch, **options)
    leaves, after = jax.tree.flatten(state)
    if after != structure:
        raise ValueError(f"The optimizer makes another state of its state: it was {structure} and is {after}")
    return leaves, metrics


def _fits(compiled) -> bool:
    """Whether the program's arguments and temporaries fit its device; True where the device does not tell its size."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    memory = compiled.memory_analysis()
    if limit is None or memory is None:
        return True
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes <= limit


def train_step(state: TrainState, batch: Batch, *, accumulate: int, **how: Any) -> tuple[TrainState, Metrics]:
    """One update, as a plain function to be jitted. `how` the layers run: see `loss_fn`."""
    if accumulate == 1:
        grads, metrics = gradients(state.model, batch, None, **how)
    else:
        grads, metrics = _accumulated(state.model, batch, accumulate, **how)
    updates, opt_state = state.optimizer.update(grads, state.opt_state, state.model)
    model = optax.apply_updates(state.model, updates)
    state = dataclasses.replace(state, step=state.step + 1, model=model, opt_state=opt_state)
    return state, metrics | reported(opt_state)


def gradients(model: Qwen2VL, batch: Batch, num_items, **how: Any) -> tuple[Qwen2VL, Metrics]:
    """Gradient of `loss_fn` by every weight, shaped like the model, and the metrics."""
    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(model, batch, num_items, **how)
    return grads, metrics


def _accumulated(model: Qwen2VL, batch: Batch, parts: int, **how: Any) -> tuple[Qwen2VL, Metrics]:
    """`gradients` of the whole batch, computed in parts and summed in float32."""
    num_items = jnp.sum(next_token_labels(batch) != IGNORE)
    # part i gets rows i, i + parts, ...: on a mesh each device splits the rows that it has
    batches = jax.tree.map(lambda a: jnp.reshape(a, (-1, parts, *a.shape[1:])).swapaxes(0, 1), batch)

    def add(total, part):
        grads, metrics = gradients(model, part, num_items, **how)
        correct = metrics["accuracy"] * metrics["num_tokens"]
        new = (grads, metrics["loss"], correct)
        return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, new), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), model)
    (grads, loss, correct), _ = jax.lax.scan(add, (zeros, 0.0, 0.0), batches)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, model)
    return grads, {"loss": loss, "num_tokens": num_items, "accuracy": correct / jnp.maximum(num_items, 1)}
