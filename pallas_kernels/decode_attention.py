"""Attention of one new token over a cache, its rotation and its place in the cache included.

The filled part of the cache is shared out among programs, so that a single row keeps a whole GPU busy; a second kernel puts
the shares together. Forward only: there is no gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _validate
from pallas_kernels._tuning import Blocks
from pallas_kernels.attention import attention
from pallas_kernels.decode_linear import takes_kernels
from pallas_kernels.rope import rope

NOTHING = -1e30  # the largest score where there is none: finite, so that differences are
MOST_QUERIES = 64  # heads that share one key head
MOST_BYTES = 512  # of a head: the loads of more than that do not fit the memory of an SM
BLOCKS = Blocks(rows=32, num_warps=4, programs=512, loads=3)  # of slots; measured on an H200 at 2048 of them


def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    valid: jax.Array,
    slot: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates the new token's q and k, writes k and v to `slot`, and attends to what the cache holds then.

        q, k = rope(q, k, cos, sin);  keys[:, slot], values[:, slot] = k, v
        out = softmax(q keys^T / sqrt(D)) values, over the valid slots before `slot` and `slot` itself

    Args:
        qkv: [B, N + 2 K, D], float: query heads, key heads, value heads, as one product leaves them. K divides N, and
            query head n uses key head n // (N / K).
        cos: [B, D/2], float; of the token's position, see `rope`.
        sin: as cos.
        keys: [B, S, K, D], qkv's dtype, rotated. Updated in place where the caller gives it away (a loop's carry).
        values: as keys.
        valid: [B, S], int; 0 for slots that nobody sees. What it says of `slot` and those behind does not matter.
        slot: int, a scalar below S: how many slots are filled, and where the new token goes. What lies behind is not read.
            One that is not below S is taken for S - 1.
        implementation: None, "triton", "xla" or "interpret". None is the Pallas kernel on an NVIDIA GPU for up to 16
            rows, 64 query heads a key head and 512 bytes a head, if they are not spread over a mesh; else XLA's, which the
            partitioner sees into.

    Returns:
        out [B, N, D] in qkv's dtype, keys, values. The softmax is float32; no gradient.

    Raises:
        ValueError: a shape or dtype that does not fit, an odd D, or a kernel asked for by name for more than 64 query heads
            a key head or 512 bytes a head.
        NotImplementedError: when it is differentiated.

    Source: Dao et al. 2023, Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import decode_attention
        >>> qkv, angle, cache = jnp.array([[[1.0, 0.0]] * 3]), jnp.zeros((1, 1)), jnp.zeros((1, 4, 1, 2))
        >>> out, keys, _ = decode_attention(qkv, angle + 1, angle, cache, cache, jnp.ones((1, 4), int), 1)
        >>> keys[0, :, 0, 0].tolist()
        [0.0, 1.0, 0.0, 0.0]
    """
    op = "decode_attention"
    _validate.known_implementation(op, implementation)
    _validate.floating(op, qkv=qkv, cos=cos, sin=sin, keys=keys, values=values)
    _validate.same_dtype(op, qkv=qkv, keys=keys, values=values)
    slot = jnp.asarray(slot)
    _validate.integer(op, valid=valid, slot=slot)
    slot = slot.astype(jnp.int32)
    if qkv.ndim != 3 or qkv.shape[-1] % 2 or keys.ndim != 4:
        raise ValueError(
            f"{op}: qkv has shape {qkv.shape}, keys {keys.shape}; expected [B, N + 2 K, D] with an even D and [B, S, K, D]"
        )
    (batch, heads, dim), (_, slots, key_heads, _) = qkv.shape, keys.shape
    expected = {"keys": (batch, slots, key_heads, dim), "cos": (batch, dim // 2), "valid": (batch, slots), "slot": ()}
    given = {"keys": keys, "values": values, "cos": cos, "sin": sin, "valid": valid, "slot": slot}
    for name, like in {"values": "keys", "sin": "cos"}.items():
        expected[name] = expected[like]
    for name, array in given.items():
        _validate.shape(op, name, array.shape, expected[name])
    queries = heads - 2 * key_heads
    if not key_heads or queries <= 0 or queries % key_heads:
        raise ValueError(f"{op}: qkv has {heads} heads, keys has {key_heads}; expected N + 2 K where K divides N")
    limits = {"query heads a key head": (queries // key_heads, MOST_QUERIES)}
    limits |= {"bytes a head": (dim * qkv.dtype.itemsize, MOST_BYTES)}
    beyond = [f"{found} {what}, it takes {most}" for what, (found, most) in limits.items() if found > most]
    if beyond and implementation in ("triton", "interpret"):
        raise ValueError(f"{op}: implementation {implementation!r} cannot do this: {'; '.join(beyond)}")
    few = takes_kernels(batch, qkv, keys, values) and not beyond
    if not qkv.size or (implementation is None and not few):
        implementation = "xla"
    return _local(_Static(implementation), qkv, cos, sin, keys, values, valid, slot)


class _Static(NamedTuple):
    implementation: str | None


# ---- XLA implementation ------------------------------------------------------------------------------------------------


def _attend_xla(static: _Static, qkv, cos, sin, keys, values, valid, slot):
    """As a model writes it: rotation, update, attention of a single query."""
    key_heads = keys.shape[2]
    q, k, v = jnp.split(qkv[:, None], (qkv.shape[1] - 2 * key_heads, qkv.shape[1] - key_heads), axis=2)
    q, k = rope(q, k, cos[:, None], sin[:, None], implementation="xla")
    keys, values = (jax.lax.dynamic_update_slice(old, new, (0, slot, 0, 0)) for old, new in ((keys, k), (values, v)))
    number, slot = jnp.arange(keys.shape[1]), jnp.minimum(slot, keys.shape[1] - 1)
    seen = (((valid != 0) & (number < slot)) | (number == slot)).astype(jnp.int32)
    query = jnp.ones((len(qkv), 1), jnp.int32)
    out = attention(q, keys, values, segment_ids=query, kv_segment_ids=seen, implementation="xla")
    return out[:, 0], keys, values


# ---- kernels: a program takes the query heads of a key head, over a share of the filled slots --------------------------
# Heads are held in two halves, as they are rotated; the queries of a key head fill a tile of 16 rows or more.


def _attend_shares(
    qkv_ref, cos_ref, sin_ref, keys_ref, values_ref, valid_ref, slot_ref, out_ref, largest_ref, total_ref,
    new_keys_ref, new_values_ref, *, dim: int, group: int, shares: int, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Grid (rows, key heads, shares). -> for each query head: sum of p v, the largest score, the sum of p.

    The first share holds the new token, from registers: nobody reads a slot that somebody writes.
    """
    row, head, share = (_pallas.program_id(i) for i in range(3))
    key_heads, dtype, wide = keys_ref.shape[2], qkv_ref.dtype, _validate.wide(qkv_ref.dtype)
    half, height = max(16, _pallas.next_power_of_2(dim // 2)), max(16, _pallas.next_power_of_2(group))
    in_half = None if half == dim // 2 else jnp.arange(half) < dim // 2
    halves = [_pallas.overhanging(i * (dim // 2), half) for i in range(2)]
    in_group = jnp.arange(height) < group
    in_queries = in_group[:, None] if in_half is None else in_group[:, None] & in_half[None, :]
    in_queries = jnp.broadcast_to(in_queries, (height, half))
    filled = jnp.minimum(_pallas.load(slot_ref, (0,), None), keys_ref.shape[1] - 1)

    cos, sin = (_pallas.load(ref, (row, halves[0]), in_half, wide) for ref in (cos_ref, sin_ref))

    def rotated(index, inside):
        first, second = (_pallas.load(qkv_ref, (row, index, columns), inside, wide) for columns in halves)
        turned = first * cos - second * sin, second * cos + first * sin
        return [x.astype(dtype) for x in turned]

    queries = rotated(_pallas.span(head * group, height), in_queries)
    key = rotated(key_heads * group + head, in_half)
    value = [_pallas.load(qkv_ref, (row, key_heads * (group + 1) + head, i), in_half) for i in halves]

    @_pallas.when(share == 0)
    def _():
        for columns, new_key, new_value in zip(halves, key, value, strict=True):
            _pallas.store(new_keys_ref, (row, filled, head, columns), new_key, in_half)
            _pallas.store(new_values_ref, (row, filled, head, columns), new_value, in_half)

    scale = _pallas.LOG2_E * dim**-0.5  # scores are exponents of two
    exp2 = functools.partial(_pallas.exp2, interpret=interpret)
    score = scale * sum(
        jnp.sum(q.astype(wide) * k.astype(wide)[None, :], axis=1) for q, k in zip(queries, key, strict=True)
    )
    mine = (share == 0).astype(wide)
    largest = jnp.where(share == 0, score, NOTHING)
    total = jnp.zeros(height, wide) + mine
    sums = [jnp.zeros((height, half), wide) + (mine * v.astype(wide))[None, :] for v in value]

    def step(block, state):
        largest, total, *sums = state
        first = block * blocks.rows
        slots = _pallas.span(first, blocks.rows)
        inside = first + jnp.arange(blocks.rows) < filled
        every = inside[:, None] if in_half is None else inside[:, None] & in_half[None, :]
        every = jnp.broadcast_to(every, (blocks.rows, half))
        seen = inside & (_pallas.load(valid_ref, (row, slots), inside) != 0)
        ks, vs = (
            [_pallas.load(ref, (row, slots, head, columns), every) for columns in halves]
            for ref in (keys_ref, values_ref)
        )
        scores = scale * sum(_pallas.dot(q, k, transposed=True) for q, k in zip(queries, ks, strict=True))
        scores = jnp.where(seen[None, :], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
        p = exp2(scores - new_largest[:, None])
        shrink = exp2(largest - new_largest)
        total = total * shrink + jnp.sum(p, axis=1)
        sums = [s * shrink[:, None] + _pallas.dot(p.astype(dtype), v) for s, v in zip(sums, vs, strict=True)]
        return new_largest, total, *sums

    count = (filled + blocks.rows - 1) // blocks.rows
    each = (count + shares - 1) // shares
    stop = jnp.minimum((share + 1) * each, count)
    largest, total, *sums = jax.lax.fori_loop(share * each, stop, step, (largest, total, *sums))
    some = _pallas.span(head * group, height)
    _pallas.store(largest_ref, (row, share, some), largest, in_group)
    _pallas.store(total_ref, (row, share, some), total, in_group)
    for columns, part in zip(halves, sums, strict=True):
        _pallas.store(out_ref, (row, share, some, columns), part, in_queries)


def _join_shares(sums_ref, largest_ref, total_ref, out_ref, *, dim: int, interpret: bool):
    """Grid (rows, query heads)."""
    row, head = (_pallas.program_id(i) for i in range(2))
    shares, width = sums_ref.shape[1], sums_ref.shape[-1]
    inside = None if width == dim else jnp.arange(width) < dim
    largest, total = (_pallas.load(ref, (row, slice(None), head), None) for ref in (largest_ref, total_ref))
    weight = _pallas.exp2(largest - jnp.max(largest, axis=0), interpret=interpret)
    every = None if inside is None else jnp.broadcast_to(inside[None, :], (shares, width))
    sums = _pallas.load(sums_ref, (row, slice(None), head, slice(None)), every)
    out = jnp.sum(sums * weight[:, None], axis=0) / jnp.sum(total * weight, axis=0)
    _pallas.store(out_ref, (row, head, slice(None)), out, inside)


def attend_kernel(
    static: _Static, qkv, cos, sin, keys, values, valid, slot, *, interpret: bool, blocks: Blocks = BLOCKS
):
    """As _attend_xla."""
    (batch, heads, dim), (_, slots, key_heads, _) = qkv.shape, keys.shape
    heads -= 2 * key_heads
    shares = _shares(blocks.programs // (batch * key_heads), _pallas.cdiv(slots, blocks.rows))
    wide = _validate.wide(qkv.dtype)
    per_head = ((batch, shares, heads), wide)
    sums, largest, total, keys, values = _pallas.launch(
        functools.partial(
            _attend_shares, dim=dim, group=heads // key_heads, shares=shares, blocks=blocks, interpret=interpret
        ),
        (qkv, cos, sin, keys, values, valid, slot.reshape(1)),
        [
            ((batch, shares, heads, dim), wide),
            per_head,
            per_head,
            (keys.shape, keys.dtype),
            (values.shape, values.dtype),
        ],
        grid=(batch, key_heads, shares),
        num_warps=blocks.num_warps,
        num_stages=blocks.loads,
        interpret=interpret,
        in_place={3: 3, 4: 4},
    )
    (out,) = _pallas.launch(
        functools.partial(_join_shares, dim=dim, interpret=interpret),
        (sums, largest, total),
        [((batch, heads, dim), qkv.dtype)],
        grid=(batch, heads),
        num_warps=4,
        interpret=interpret,
    )
    return out, keys, values


def _shares(wanted: int, most: int) -> int:
    """A power of two, at least as many as are wanted and useful: programs without a block end at once."""
    return 1 << (max(min(wanted, most), 1) - 1).bit_length()


_local = _pallas.forward_only("decode_attention", _pallas.either(attend_kernel, _attend_xla))
