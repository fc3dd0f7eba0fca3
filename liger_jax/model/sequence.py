"""The positions of one sequence on several devices: what the mesh axis `sequence` needs, apart from constraints.

Every layer works on the positions (or patches) of its own device, except for attention. There, an all-to-all exchanges the
split positions for split heads, and each device runs the same kernel as on a single GPU, on some heads of whole sequences.
All devices have the same amount of work, however a causal mask and segments cut it; a ring of key blocks would leave the
devices with the first positions idle. For 32,768 tokens of the 2B on two devices, the all-to-alls of a layer move 59 MB
per device, and attention takes 3.3 TFLOP.

Windows lie within the patches of one device, and frames usually do (see `Batch.split_positions`), so their attention moves
nothing. The features of images are gathered once, and each device takes those of its own positions.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from liger_jax.model.sharding import BATCH_AXES, auto_axes, axes_size, constrain_batch, inside_shard_map, sequence_axes

BEYOND = 2**30  # past the end of any sequence


def split_positions(x: jax.Array) -> jax.Array:
    """Returns x [B, T, ...], constrained like an activation if the mesh splits sequences, so that its reads are local."""
    return constrain_batch(x) if sequence_axes() else x


class HeadPlan(NamedTuple):
    """How heads become divisible by a number of devices: key heads are padded, then repeated; query heads are padded.

    A key head and the query heads that share it are a group. Copy c of a key head serves its query heads from
    c * group on.
    """

    key_heads: int  # with padding, without copies
    copies: int  # of each key head
    group: int  # query heads per copy, with padding


def plan_heads(heads: int, key_heads: int, devices: int) -> HeadPlan:
    """Returns the plan with the fewest query heads.

    Example:
        >>> plan_heads(12, 2, 4)  # each device has one key head and three query heads
        HeadPlan(key_heads=2, copies=2, group=3)
        >>> plan_heads(28, 4, 8)  # 32 query heads, four per device
        HeadPlan(key_heads=4, copies=2, group=4)
        >>> plan_heads(16, 16, 3)
        HeadPlan(key_heads=18, copies=1, group=1)
    """
    padded = -(-key_heads // devices) * devices
    options = [(key_heads, devices // math.gcd(key_heads, devices)), (padded, 1)]
    plans = [HeadPlan(count, copies, -(-heads // (key_heads * copies))) for count, copies in options]
    return min(plans, key=math.prod)


# attend(q [B,T,N,D], k [B,T,K,D], v [B,T,K,D], rows) -> [B,T,N,D]: attention within each row, independently per
# head, with a pytree of arrays [B, ...] that describe the rows
AttendRows = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def attend_by_heads(attend: AttendRows, q: jax.Array, k: jax.Array, v: jax.Array, rows: Any) -> jax.Array:
    """Returns attend(q, k, v, rows), computed with the heads split over `tensor` and `sequence`, and whole rows.

    Without a mesh, inside a caller's `shard_map`, and where `tensor` divides the key heads and nothing splits the positions,
    it is a plain call. The layout is spelled out in a shard_map: the partitioner would store some saved activations split by
    positions, and move those of all layers at once.
    """
    tensor, sequence, batch_axes = auto_axes(("tensor",)), sequence_axes(), auto_axes(BATCH_AXES)
    devices = axes_size(tensor + sequence)
    (batch, length, heads, dim), key_heads = q.shape, k.shape[2]
    is_split = (sequence or key_heads % devices) and not inside_shard_map()
    if not is_split or batch % axes_size(batch_axes) or length % axes_size(sequence):
        return attend(q, k, v, rows)
    plan, group = plan_heads(heads, key_heads, devices), heads // key_heads
    whole_groups = heads == math.prod(plan)

    def attend_to_rows(q, k, v, rows):
        if not sequence:
            return attend(q, k, v, rows)
        exchange = functools.partial(jax.lax.all_to_all, axis_name=sequence, tiled=True)
        q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q, k, v))
        return exchange(attend(q, k, v, rows), split_axis=1, concat_axis=2)

    def as_projected(x):  # the layout of a projection's result; without it, that of repeated heads would reach RoPE
        head_axes = () if x.shape[2] % axes_size(tensor) else tensor
        return jax.lax.with_sharding_constraint(x, P(batch_axes, sequence, head_axes))

    q, k, v = map(as_projected, (q, k, v))
    if not whole_groups:
        q = q.reshape(batch, length, key_heads, group, dim)
        q = _pad_axis(_pad_axis(q, 2, plan.key_heads), 3, plan.copies * plan.group).reshape(batch, length, -1, dim)
    k, v = (jnp.repeat(_pad_axis(x, 2, plan.key_heads), plan.copies, axis=2) for x in (k, v))
    out = _on_shards(attend_to_rows, (P(batch_axes, sequence, tensor),) * 3, P(batch_axes), q, k, v, rows)
    if not whole_groups:
        out = out.reshape(batch, length, plan.key_heads, plan.copies * plan.group, dim)
        out = out[:, :, :key_heads, :group].reshape(batch, length, heads, dim)
    return as_projected(out)


def _pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Returns x with zeros appended until an axis has a size."""
    missing = size - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def attend_in_blocks(block: int, attend: AttendRows, q: jax.Array, k: jax.Array, v: jax.Array, rows: Any) -> jax.Array:
    """Returns attend(q, k, v, rows), where no patch attends beyond its block of `block` slots.

    Each device runs it on its own patches, if they are whole blocks. The arrays of `rows` are [B, P, ...].
    """
    batch_axes, sequence, tensor = auto_axes(BATCH_AXES), sequence_axes(), auto_axes(("tensor",))
    batch, patches, heads, _ = q.shape
    if not splits_sequence(batch, patches // block):
        return attend(q, k, v, rows)
    split = P(batch_axes, sequence, () if heads % axes_size(tensor) else tensor)
    return _on_shards(attend, (split,) * 3, P(batch_axes, sequence), q, k, v, rows)


def _on_shards(attend: AttendRows, specs: tuple[P, P, P], rows_spec: P, q, k, v, rows: Any) -> jax.Array:
    """Runs attention on the arrays of each device. The result is split as q."""
    axes = set(auto_axes(jax.sharding.get_abstract_mesh().axis_names))
    run = jax.shard_map(attend, in_specs=(*specs, rows_spec), out_specs=specs[0], axis_names=axes, check_vma=False)
    return run(q, k, v, rows)


def set_features(x: jax.Array, token_positions: jax.Array, features: jax.Array) -> jax.Array:
    """Returns x [B, T, H] with each feature at its position.

    Args:
        x: activations.
        token_positions: [B, P/4], distinct in each row. Positions of T or more are dropped.
        features: [B, P/4, H].
    """
    if not splits_sequence(x.shape[0], x.shape[1], features.shape[1]):
        return jax.vmap(_set_rows)(x, token_positions, features)
    batch_axes, sequence = auto_axes(BATCH_AXES), sequence_axes()

    def set_local(x, positions, features):
        features = jax.lax.all_gather(features, sequence, axis=1, tiled=True)
        positions = positions - jax.lax.axis_index(sequence) * x.shape[1]
        return jax.vmap(_set_rows)(x, jnp.where(positions < 0, positions + BEYOND, positions), features)

    split, axes = P(batch_axes, sequence), {*batch_axes, *sequence}
    specs = split, P(batch_axes), split
    return jax.shard_map(set_local, in_specs=specs, out_specs=split, axis_names=axes, check_vma=False)(
        x, token_positions, constrain_batch(features)
    )


def _set_rows(x: jax.Array, positions: jax.Array, features: jax.Array) -> jax.Array:
    """Returns x [T, H] with x[positions[j]] replaced by features[j]. Positions of T or more are dropped."""
    return x.at[positions].set(features.astype(x.dtype), mode="drop", unique_indices=True)


def splits_sequence(rows: int, *sizes: int) -> bool:
    """Returns whether the current mesh splits sequences, and divides a number of rows, and positions and patches.

    Inside a caller's `shard_map`, where the functions here could not run one of their own, it does not count as split.
    """
    sequence = sequence_axes()
    return (
        bool(sequence)
        and not inside_shard_map()
        and not rows % axes_size(auto_axes(BATCH_AXES))
        and not any(n % axes_size(sequence) for n in sizes)
    )
