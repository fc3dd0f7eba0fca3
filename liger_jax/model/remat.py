"""Runs a stack of identical layers, scanned or unrolled, and decides which activations the backward pass recomputes."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liger_jax.errors import UserError
from liger_jax.model.sharding import constrain_batch_and_seq, on_mesh
from liger_jax.options import LayerExecution


def _narrow_matmuls(primitive: Any, *operands: Any, **params: Any) -> bool:
    """A checkpoint policy that saves the results of matmuls that are no wider than their input."""
    if primitive is not jax.lax.dot_general_p:
        return False
    (left, right), ((contracted, _), _) = operands, params["dimension_numbers"]
    depth = math.prod(left.shape[i] for i in contracted)
    return right.size <= depth**2


# The activations that are saved for the backward pass instead of being recomputed, from the most memory to the least:
#   none: everything that the operations save.
#   dots: the results of matmuls and attention, which are expensive to recompute. Norms and activations are cheap. Memory
#         traffic is lower than with "none", so this is usually the fastest as well. Where the result of a matmul is only
#         needed for a sum or a rotation that takes no more memory, that is saved instead: "operand" (of attention),
#         "residual" and, with LoRA, "adapted". On meshes that split heads, also the inputs of matmuls: "gathered".
#   narrow: like dots, without the matmuls whose result is wider than their input (those into an MLP's hidden size). Takes
#         67 to 80 % of the memory of dots and 3 to 12 % more time.
#   attention: each layer's input and the result of attention.
#   full: each layer's input only.
_policies = jax.checkpoint_policies
_POLICIES = {
    "none": None,
    "dots": _policies.save_from_both_policies(
        _policies.dots_saveable,
        _policies.save_only_these_names("attention", "operand", "residual", "adapted", "gathered"),
    ),
    "narrow": _policies.save_from_both_policies(
        _narrow_matmuls, _policies.save_only_these_names("attention", "operand", "residual")
    ),
    "attention": _policies.save_only_these_names("attention"),
    "full": _policies.nothing_saveable,
}
REMAT = tuple(_POLICIES)


def scan_layers(
    layer: Callable[..., tuple[jax.Array, Any]],
    x: jax.Array,
    layers: nnx.Module,
    execution: LayerExecution,
    *,
    tower: Literal["vision", "text"],
    kinds: Sequence[Hashable] = (),
    taps: Sequence[int] = (),
    after_first: tuple[Callable[[jax.Array, jax.Array], jax.Array], list[jax.Array]] | None = None,
) -> tuple[jax.Array, Any, list[jax.Array]]:
    """Applies x, aux_i = layer(x, layers[i]) for each i.

    Args:
        layer: takes activations and the weights of one layer; and its kind, if there are kinds.
        x: activations; the first dimension is the batch.
        layers: a module whose weights have a leading layer axis.
        execution: which towers to unroll, and which activations to recompute.
        tower: the tower that the layers belong to.
        kinds: one value per layer, in a repeating pattern. Layers of one kind share a compiled program; a scan's body is one
            period of the pattern.
        taps: the layers, in increasing order, whose outputs are returned, too.
        after_first: (update, extras). After layer i, x = update(x, extras[i]) while there are extras.

    Returns:
        The last x; all aux_i, stacked; and the outputs of the layers in `taps`, after any update.

    Raises:
        UserError: `execution.remat` is not one of REMAT.
    """
    if execution.remat not in REMAT:
        raise UserError(f"remat is {execution.remat!r}; expected one of {REMAT}")
    unroll = execution.unrolls(tower)

    def constrained_layer(kind: tuple[Hashable, ...], x, weights):
        x, aux = layer(x, weights, *kind)
        return constrain_batch_and_seq(x), aux

    def layer_of_stack(kind: tuple[Hashable, ...], x, i, stack, port):
        return constrained_layer(kind, x, _take_layer(stack, i, port))

    count = len(jax.tree.leaves(layers)[0])
    patterns: list[tuple[Hashable, ...]] = [(kind,) for kind in kinds] if kinds else [()] * count
    function = layer_of_stack if unroll else constrained_layer
    steps: dict[Any, Callable] = {kind: functools.partial(function, kind) for kind in patterns}
    if execution.remat != "none":
        # prevent_cse keeps the compiler from merging the recomputation with the original; a scan's body does that already
        remat = functools.partial(jax.checkpoint, policy=_POLICIES[execution.remat], prevent_cse=unroll)
        steps = {kind: remat(step) for kind, step in steps.items()}
    if unroll:
        steps = {kind: jax.jit(step) for kind, step in steps.items()}  # traced once
    run = _unroll if unroll else _scan
    return run([steps[kind] for kind in patterns], constrain_batch_and_seq(x), layers, taps, after_first)


def _unroll(steps: list[Callable], x: jax.Array, layers: Any, taps: Sequence[int], after_first: Any):
    """Runs `scan_layers` without a loop. This avoids a scan's copies of saved activations into stacks of zeros.

    A layer takes its weights out of the stack inside of what is rematerialized. So the backward pass takes them out again,
    and XLA lets the matmuls of both passes read the stack itself. Slices taken outside would be copies that live from the
    forward pass to the backward pass: for the Qwen2-VL-2B, 3.6 GiB. The gradients take another way, through ports, because
    the derivative of a slice is an array of zeros as large as the stack.
    """
    stack, outputs, tapped = jax.lax.stop_gradient(layers), [], []
    for i, port in enumerate(unstack(layers)):
        x, aux = steps[i](x, np.uint32(i), stack, port)
        outputs.append(aux)
        if after_first and i < len(after_first[1]):
            x = after_first[0](x, after_first[1][i])
        if i in taps:
            tapped.append(x)
    return x, _stack(*outputs), tapped


def _scan(steps: list[Callable], x: jax.Array, layers: Any, taps: Sequence[int], after_first: Any):
    """Runs `scan_layers` as a loop, whose body is one period of the steps.

    The outputs to return are carried in an array with one entry per tap, and a last one that all other layers overwrite, so
    that each layer runs the same program. For the same reason, every layer adds an extra or zeros and, in the backward pass,
    adds to the gradient of all extras: an estimated 0.2 to 0.4 % of a training step of Qwen3-VL.
    """
    count = len(steps)
    period = next(p for p in range(1, count + 1) if count % p == 0 and steps == steps[:p] * (count // p))
    numbers: Any = None
    slots: Any = None
    tapped: Any = None
    if after_first:
        numbers = jnp.arange(count).reshape(-1, period)
        update, extras = after_first[0], jnp.stack(after_first[1])
    if taps:
        slots = jnp.array([taps.index(i) if i in taps else len(taps) for i in range(count)]).reshape(-1, period)
        tapped = jnp.zeros_like(x, shape=(len(x), len(taps) + 1, *x.shape[1:]))  # varying as x in a shard_map

    def body(carry, group):
        (x, tapped), (weights, numbers, slots) = carry, group
        outputs = []
        for j, layer in enumerate([weights] if period == 1 else unstack(weights)):
            x, aux = steps[j](x, layer)
            outputs.append(aux)
            if after_first:
                extra = jnp.where(numbers[j] < len(extras), extras[jnp.minimum(numbers[j], len(extras) - 1)], 0)
                x = update(x, extra)
            if taps:
                tapped = tapped.at[:, slots[j]].set(x)
        return (x, tapped), outputs[0] if period == 1 else _stack(*outputs)

    if period > 1:
        layers = jax.tree.map(lambda w: w.reshape(-1, period, *w.shape[1:]), layers)
    (x, tapped), aux = jax.lax.scan(body, (x, tapped), (layers, numbers, slots))
    if period > 1:
        aux = jax.tree.map(lambda a: a.reshape(count, *a.shape[2:]), aux)
    return x, aux, [tapped[:, k] for k in range(len(taps))]


# ---- blocks of tokens ------------------------------------------------------------------------------------------------

MIN_BLOCK = 8192  # tokens of a block, in all rows: fewer make matmuls slower
BLOCKS = 4, 2  # into which a batch is divided, if it has enough tokens


def apply_to_tokens(
    function: Callable[[Any, jax.Array], jax.Array], weights: Any, x: jax.Array, execution: LayerExecution
) -> jax.Array:
    """Returns function(weights, x) for a function that treats every token of x [B, T, H] alike, such as an MLP.

    With remat "full", which is for the least memory, the function runs on a block of tokens at a time, in the backward pass
    too: 16 rows of the 2B need 2 GiB less, and 3 % more time. Blocks are runs of tokens in memory, so that nothing is moved
    to divide them. The gradient of the weights is summed over the blocks in float32. Not on a mesh, where every block would
    gather the weights again.
    """
    blocks = count_blocks(x.shape[0] * x.shape[1]) if execution.remat == "full" and not on_mesh() else 1
    return _in_blocks(function, blocks, weights, x) if blocks > 1 else function(weights, x)


def count_blocks(tokens: int) -> int:
    """Returns into how many blocks a batch with so many tokens is divided; 1 if it has too few."""
    return next((n for n in BLOCKS if tokens % n == 0 and tokens >= n * MIN_BLOCK), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(function: Callable, blocks: int, weights: Any, x: jax.Array) -> jax.Array:
    return jax.lax.map(functools.partial(function, weights), _split_tokens(blocks, x)).reshape(x.shape)


def _in_blocks_forward(function: Callable, blocks: int, weights: Any, x: jax.Array):
    return _in_blocks(function, blocks, weights, x), (weights, x)


def _in_blocks_backward(function: Callable, blocks: int, residuals: tuple, grad: jax.Array):
    weights, x = residuals

    def step(sums, block):
        x, grad = block
        _, pullback = jax.vjp(function, weights, x)
        d_weights, d_x = pullback(grad)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, d_weights), d_x

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), weights)
    sums, d_x = jax.lax.scan(step, zeros, (_split_tokens(blocks, x), _split_tokens(blocks, grad)))
    return jax.tree.map(lambda total, w: total.astype(w.dtype), sums, weights), d_x.reshape(x.shape)


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _split_tokens(blocks: int, x: jax.Array) -> jax.Array:
    """Reshapes [B, T, H] to [blocks, 1, B T / blocks, H]."""
    return x.reshape(blocks, 1, -1, x.shape[-1])


# ---- layers of a stack -----------------------------------------------------------------------------------------------


def _take_layer(stack: Any, i: jax.Array, port: Any) -> Any:
    """Returns the weights of layer i, whose gradient goes to the port."""

    def take(leaf, port):
        return _with_gradient_port(jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), port)

    return jax.tree.map(take, stack, port)


@jax.custom_vjp
def _with_gradient_port(x: jax.Array, port: jax.Array) -> jax.Array:
    """Returns x. Its gradient becomes that of the port, whose value is not used."""
    return x


_with_gradient_port.defvjp(lambda x, port: (x, None), lambda _, grad: (None, grad))


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.custom_vjp
def unstack(layers: Any) -> tuple:
    """Returns one tree per layer. The derivative of indexing would add up arrays of zeros; this one fills a single stack."""
    return tuple(jax.tree.map(lambda leaf: leaf[i], layers) for i in range(len(jax.tree.leaves(layers)[0])))


def _fill_stack(*grads: jax.Array) -> jax.Array:
    """Stacks the gradients of all layers, each as soon as it exists.

    Without the barriers, XLA keeps all of them until the last one exists, and fuses the stacking into the loops that read
    the stack: the gradient norm and the optimizer, which then run at half their speed or less.
    """
    stack = jnp.zeros((len(grads), *grads[0].shape), grads[0].dtype)
    for i in reversed(range(len(grads))):  # the backward pass begins with the last layer
        stack = jax.lax.optimization_barrier(stack.at[i].set(grads[i]))
    return stack


unstack.defvjp(lambda layers: (unstack(layers), None), lambda _, grads: (jax.tree.map(_fill_stack, *grads),))
