"""AdamW for bfloat16 weights: weights and moments stay in bfloat16, and stochastic rounding keeps small updates.

A bfloat16 has 8 significant bits. Rounded to the nearest, an update of less than 1/512 of a weight is lost, and a second
moment with b2 = 0.999 cannot decay. Stochastic rounding picks one of the two neighbours, the nearer one more often, so that
the expected value is the exact one and small updates accumulate.

The random bits are a hash of the element's position, the parameter's path, the step and a seed. They cost no memory traffic:
XLA computes them in the loop that updates the weights.

Sources: Zamirai et al. 2020, Revisiting BFloat16 Training, https://arxiv.org/abs/2010.06192; Croci et al. 2022, Stochastic
rounding: implementation, error analysis and applications, https://doi.org/10.1098/rsos.211631
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from liger_jax.model.params import param_paths

WEIGHT, FIRST_MOMENT, SECOND_MOMENT = range(3)  # the streams of random bits
MOST_SHARDS = 8  # along one axis, for which a sample of a weight needs no communication
SAMPLES_PER_AXIS = 16
WORDS = 2**32  # number of different uint32

LearningRate = float | Callable[[Any], Any]


class StochasticState(NamedTuple):
    """The moments, in the dtype of the weights, and a sample of the weights, to count those that an update changes."""

    count: jax.Array  # type: ignore[assignment]  # number of updates; tuples have a method of this name
    mu: Any
    nu: Any
    sample: Any  # some of the weights before the latest update
    changed: jax.Array  # float32: the fraction of the sample that the update before the latest one changed


def stochastic_adamw(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Returns AdamW with stochastic rounding of bfloat16 weights and of their moments.

    The arithmetic is float32. `optax.apply_updates` gives the rounded weights. Without bfloat16 weights it is `optax.adamw`.
    The result depends on the seed and the number of updates, and not on how the weights are sharded.

    Args:
        learning_rate: a number, or an optax schedule.
        b1, b2, eps: of Adam.
        weight_decay: decay per step, times the learning rate.
        mask: returns a tree of booleans that says which weights decay; by default all.
        seed: seed of the random bits.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from liger_jax.train.stochastic_rounding import stochastic_adamw
        >>> weights, optimizer = jnp.ones(1000, "bfloat16"), stochastic_adamw(1e-4)
        >>> state = optimizer.init(weights)
        >>> for _ in range(10):
        ...     updates, state = optimizer.update(jnp.ones(1000, "bfloat16"), state, weights)
        ...     weights = optax.apply_updates(weights, updates)
        >>> round(float(weights.astype("float32").mean()), 3)  # to the nearest, they would still be 1
        0.999
    """
    exact = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)

    def init(params):
        if not any(weight.dtype == jnp.bfloat16 for weight in jax.tree.leaves(params)):
            return exact.init(params)
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return StochasticState(jnp.zeros((), jnp.int32), mu, nu, _take_sample(params), jnp.zeros(()))

    def update(grads, state, params=None):
        if not isinstance(state, StochasticState):
            return exact.update(grads, state, params)
        if params is None:
            raise ValueError("params is None; expected the weights, which stochastic rounding needs in update()")
        rows, structure = _transpose(params, grads, state.mu, state.nu)
        decays = structure.flatten_up_to(mask(params)) if mask else [True] * len(rows)
        decay = [weight_decay if decayed else 0.0 for decayed in decays]
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        scalars = (jnp.float32(rate), 1 - b1**t, 1 - b2**t, step_seeds(param_paths(params), state.count, seed))

        sample = _take_sample(params)
        changed = _fraction_changed(sample, state.sample)
        # The fraction is never negative, so this changes no value. It makes the update depend on the sample and so run after
        # it: XLA would copy all weights if the sample could still be taken after they are overwritten.
        scalars = jax.tree.map(lambda scalar: jnp.where(changed < 0, jnp.zeros_like(scalar), scalar), scalars)
        new_rows = [
            _adamw(scalars, number, row, b1=b1, b2=b2, eps=eps, weight_decay=decay[number])
            for number, row in enumerate(rows)
        ]
        weights, mu, nu = (structure.unflatten(leaves) for leaves in zip(*new_rows, strict=True))
        updates = jax.tree.map(lambda new, old: new - old.astype(jnp.float32), weights, params)
        return updates, StochasticState(count, mu, nu, sample, changed)

    return optax.GradientTransformation(init, update)


def _adamw(
    scalars: tuple[jax.Array, ...],
    number: int,
    row: Sequence[jax.Array],
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Updates a parameter. Elementwise, for XLA to fuse.

    Args:
        scalars: learning rate, bias corrections of the two moments, and seeds of all parameters.
        number: number of the parameter, for its seed.
        row: weight, gradient, and first and second moment.
        b1, b2, eps, weight_decay: of AdamW.

    Returns:
        The rounded weight, in float32, and the moments.
    """
    rate, correction1, correction2, seeds = scalars
    word, dtype = hash_index(element_index(row[0].shape), seeds[number]), row[0].dtype
    weight, grad, m, v = (array.astype(jnp.float32) for array in row)
    m = _round(b1 * m + (1 - b1) * grad, dtype, word, FIRST_MOMENT)
    v = _round(b2 * v + (1 - b2) * grad**2, dtype, word, SECOND_MOMENT)
    # From the rounded moments: as the weights are computed last, all arrays can be updated in place.
    change = (m.astype(jnp.float32) / correction1) / (jnp.sqrt(v.astype(jnp.float32) / correction2) + eps)
    if weight_decay:
        change += weight_decay * weight
    return _round(weight - rate * change, dtype, word, WEIGHT).astype(jnp.float32), m, v


def _take_sample(params: Any) -> Any:
    """Returns evenly spaced elements of each array, at least SAMPLES_PER_AXIS along each axis.

    The distances divide the elements that a device holds of each axis, so that on a mesh each device takes its own.
    """

    def distance(size: int) -> int:
        steps = 1
        while size % (2 * steps * MOST_SHARDS) == 0 and size // (2 * steps) >= SAMPLES_PER_AXIS:
            steps *= 2
        return steps

    def take(array):
        return jax.lax.slice(array, [0] * array.ndim, array.shape, [distance(size) for size in array.shape])

    # The barrier keeps XLA from taking the sample twice, the second time after the update, from a copy of all weights.
    return jax.lax.optimization_barrier(jax.tree.map(take, params))


def _fraction_changed(sample: Any, previous: Any) -> jax.Array:
    """Returns the fraction of a sample that differs from an earlier one, float32."""
    pairs, _ = _transpose(sample, previous)
    changed = sum(jnp.sum(new != old, dtype=jnp.float32) for new, old in pairs)
    return jnp.float32(changed / sum(new.size for new, _ in pairs))


def _transpose(tree: Any, *trees: Any) -> tuple[list[tuple], Any]:
    """Returns the corresponding leaves of all trees, and the structure of the first."""
    leaves: list[jax.Array]
    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    return list(zip(leaves, *(structure.flatten_up_to(other) for other in trees), strict=True)), structure


def _round(x: jax.Array, dtype: Any, word: jax.Array, stream: int) -> jax.Array:
    return stochastic_round(x, select_bits(word, stream)) if dtype == jnp.bfloat16 else x.astype(dtype)


# ---- rounding --------------------------------------------------------------------------------------------------------


def stochastic_round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns x as bfloat16, rounded up or down at random so that the expected value is x.

        P(up) = (x - down) / (up - down)

    Exact values, infinities and NaN do not change.

    Args:
        x: float32.
        bits: uniform random integers below 2^16, uint32, as returned by `rounding_bits`.

    Example:
        >>> import jax.numpy as jnp
        >>> bits = jnp.array([0, 2**14, 2**15, 2**16 - 1], "uint32")
        >>> stochastic_round(jnp.full(4, 1 + 2**-8), bits)  # halfway between 1 and 1 + 2^-7
        Array([1, 1, 1.00781, 1.00781], dtype=bfloat16)
    """
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # the random number carries into the upper half with the probability of rounding up, for either sign
    rounded = jax.lax.bitcast_convert_type((pattern + bits) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isnan(x), x, rounded).astype(jnp.bfloat16)


def rounding_bits(shape: tuple[int, ...], seed: jax.Array, stream: int) -> jax.Array:
    """Returns uniform random integers below 2^16, uint32, one per element of an array of this shape.

    Args:
        shape: shape of the whole array. In a program for a mesh, each device computes those of its own elements.
        seed: two random words, uint32, from `step_seeds`.
        stream: WEIGHT, FIRST_MOMENT or SECOND_MOMENT, which are independent of each other.

    Example:
        >>> import jax.numpy as jnp
        >>> rounding_bits((2, 3), jnp.array([5, 6], "uint32"), WEIGHT).shape
        (2, 3)
    """
    return select_bits(hash_index(element_index(shape), seed), stream)


def step_seeds(paths: Iterable[str], count: jax.Array, seed: int) -> jax.Array:
    """Returns two random words per parameter for a step, uint32 [parameters, 2]."""
    names = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    step = _hash(count.astype(jnp.uint32), jnp.uint32(seed & 0xFFFFFFFF))
    return jnp.stack([_hash(jnp.asarray(names), step), _hash(jnp.asarray(~names), step)], axis=-1)


def element_index(shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Returns the position of each element in row-major order, as uint32.

    Above WORDS elements there are two words: the index within the last axes, and the index of these over the others.
    """
    split = 0
    while math.prod(shape[split:]) > WORDS:
        split += 1
    axes = range(len(shape))
    low = _linear_index(shape, axes[split:])
    return (low, _linear_index(shape, axes[:split])) if split else (low,)


def _linear_index(shape: tuple[int, ...], axes: Sequence[int]) -> jax.Array:
    index = jnp.zeros(shape, jnp.uint32)
    for axis in axes:
        index = index * np.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def hash_index(index: Sequence[jax.Array], seed: jax.Array) -> jax.Array:
    """Returns a random word per element, uint32."""
    low, *high = index
    low_seed, key = (_hash(high[0], word) if high else word for word in seed)
    return _hash(low + low_seed, key)


def select_bits(word: jax.Array, stream: int) -> jax.Array:
    """Returns 16 of a word's bits for WEIGHT, the other 16 for FIRST_MOMENT, and 16 new ones for SECOND_MOMENT."""
    if stream == WEIGHT:
        return word & np.uint32(0xFFFF)
    if stream == SECOND_MOMENT:
        word = (word ^ (word >> 15)) * np.uint32(0x2C9277B5)
    return word >> 16


def _hash(x: jax.Array, key: jax.Array) -> jax.Array:
    """Returns a hash of two words: two rounds of multiplication and shifts, with `key` added in between.

    The constants are those of lowbias32: Wellons 2018, Prospecting for Hash Functions, https://nullprogram.com/blog/2018/07/31
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    # not a sum: two keys would then give the same sequence, shifted
    x = (x ^ (x >> 15) ^ key) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
