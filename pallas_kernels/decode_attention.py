"""Attention of one new token per row over a KV cache, with the norm of its heads, RoPE and the cache update fused in.

The filled part of the cache is split among programs (split-KV), so that even a single row keeps a whole GPU busy. A second
kernel combines the results of the splits. The operation has no gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _validate
from pallas_kernels._tuning import Blocks
from pallas_kernels.attention import attention
from pallas_kernels.decode_linear import pallas_preferred
from pallas_kernels.qk_norm_rope import norm_halves, qk_norm_rope, rotate_halves
from pallas_kernels.rope import rope

MASKED_SCORE = -1e30  # the running maximum before any score: finite, so that differences stay numbers
MAX_QUERIES_PER_KEY_HEAD = 64
MAX_HEAD_BYTES = 512  # the loads of larger heads do not fit in the shared memory of an SM
BLOCKS = Blocks(rows=32, num_warps=4, programs=512, loads=3)  # rows: cache slots; measured on an H200 at 2048 slots


def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    valid: jax.Array,
    slot: jax.Array,
    q_weight: jax.Array | None = None,
    k_weight: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates q and k of the new token, writes k and v to `slot` of the cache, and attends to the updated cache.

        q, k = rope(q, k, cos, sin), or with weights qk_norm_rope(q, k, q_weight, k_weight, cos, sin)
        keys[:, slot], values[:, slot] = k, v
        out = softmax(q keys^T / sqrt(D)) values, over the valid slots before `slot` and `slot` itself

    Args:
        qkv: [B, N + 2 K, D], float: query heads, key heads, value heads, in the order of the fused projection. K divides N,
            and query head n uses key head n // (N / K). D is even.
        cos: [B, D/2], float; at the token's position, see `rope`.
        sin: as cos.
        keys: [B, S, K, D], qkv's dtype, rotated. Updated in place where the caller donates it (such as a loop's carry).
        values: as keys.
        valid: [B, S], int; 0 masks a slot. Its values at `slot` and after it are ignored.
        slot: int scalar: the number of filled slots, and so the index of the slot for the new token. Later slots are not
            read. Values of S or more are clamped to S - 1.
        q_weight: [D], float, or None: the weight of the RMSNorm of each query head before the rotation.
        k_weight: as q_weight, for the key heads.
        eps: added to the mean square of a head, if there is a norm.
        implementation: None, "triton", "xla" or "interpret". On an NVIDIA GPU, None picks the Pallas kernel for up to 16
            rows, 64 query heads per key head and 512 bytes per head, unless the operands may be sharded over a mesh.
            Otherwise it picks XLA, which can be partitioned.

    Returns:
        (out [B, N, D] in qkv's dtype, keys, values). The softmax is float32. There is no gradient.

    Raises:
        ValueError: a shape or dtype does not fit, D is odd, only one of the two weights is given, or a kernel is requested
            by name for more than 64 query heads per key head or 512 bytes per head.
        NotImplementedError: the operation is differentiated.

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
    slot = jnp.asarray(slot)
    _validate.known_implementation(op, implementation)
    _check(op, qkv, cos, sin, keys, values, valid, slot)
    _check_norm(op, qkv, q_weight, k_weight)
    slot = slot.astype(jnp.int32)
    (batch, heads, dim), key_heads = qkv.shape, keys.shape[2]
    queries_per_key_head, head_bytes = heads // key_heads - 2, dim * qkv.dtype.itemsize
    unsupported = []
    if queries_per_key_head > MAX_QUERIES_PER_KEY_HEAD:
        unsupported.append(
            f"qkv has {queries_per_key_head} query heads per key head; expected at most {MAX_QUERIES_PER_KEY_HEAD}"
        )
    if head_bytes > MAX_HEAD_BYTES:
        unsupported.append(f"qkv has {head_bytes} bytes per head; expected at most {MAX_HEAD_BYTES}")
    if unsupported and implementation in ("triton", "interpret"):
        raise ValueError(
            f"{op}: implementation {implementation!r} does not support this call: {'; '.join(unsupported)}"
        )
    preferred = pallas_preferred(batch, qkv, keys, values) and not unsupported
    if implementation is None and not preferred:
        implementation = "xla"
    static = StaticArgs(float(eps), implementation)
    return _decode_attention(static, qkv, cos, sin, keys, values, valid, slot, q_weight, k_weight)


class StaticArgs(NamedTuple):
    """Options of the operation that are fixed when it is traced."""

    eps: float
    implementation: str | None


def _check(op: str, qkv, cos, sin, keys, values, valid, slot) -> None:
    """Raises ValueError for a shape or dtype that does not fit."""
    _validate.floating(op, qkv=qkv, cos=cos, sin=sin, keys=keys, values=values)
    _validate.same_dtype(op, qkv=qkv, keys=keys, values=values)
    _validate.integer(op, valid=valid, slot=slot)
    if qkv.ndim != 3 or qkv.shape[-1] % 2 or keys.ndim != 4:
        raise ValueError(
            f"{op}: qkv has shape {qkv.shape}, keys {keys.shape}; expected [B, N + 2 K, D] with an even D and [B, S, K, D]"
        )
    (batch, heads, dim), (_, slots, key_heads, _) = qkv.shape, keys.shape
    for name, array, expected in (
        ("keys", keys, (batch, slots, key_heads, dim)),
        ("values", values, (batch, slots, key_heads, dim)),
        ("cos", cos, (batch, dim // 2)),
        ("sin", sin, (batch, dim // 2)),
        ("valid", valid, (batch, slots)),
        ("slot", slot, ()),
    ):
        _validate.shape(op, name, array.shape, expected)
    if not slots:
        raise ValueError(f"{op}: keys has shape {keys.shape}; expected S >= 1, a slot for the new token")
    query_heads = heads - 2 * key_heads
    if not key_heads or query_heads <= 0 or query_heads % key_heads:
        raise ValueError(f"{op}: qkv has {heads} heads, keys has {key_heads}; expected N + 2 K where K divides N")


def _check_norm(op: str, qkv, q_weight, k_weight) -> None:
    """Raises ValueError for weights that do not fit, or if there is only one."""
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    present = {name: weight for name, weight in weights.items() if weight is not None}
    if len(present) == 1:
        raise ValueError(f"{op}: {next(iter(present))} is given alone; expected q_weight and k_weight, or neither")
    _validate.floating(op, **present)
    for name, weight in present.items():
        _validate.shape(op, name, weight.shape, qkv.shape[-1:])


# ---- XLA implementation ------------------------------------------------------------------------------------------------


def attend_xla(static: StaticArgs, qkv, cos, sin, keys, values, valid, slot, q_weight=None, k_weight=None):
    """Computes the norm, the rotation, the cache update and single-query attention one after the other."""
    key_heads = keys.shape[2]
    q, k, v = jnp.split(qkv[:, None], (qkv.shape[1] - 2 * key_heads, qkv.shape[1] - key_heads), axis=2)
    tables = cos[:, None], sin[:, None]
    if q_weight is None:
        q, k = rope(q, k, *tables, implementation="xla")
    else:
        q, k = qk_norm_rope(q, k, q_weight, k_weight, *tables, eps=static.eps, implementation="xla")
    keys = jax.lax.dynamic_update_slice(keys, k, (0, slot, 0, 0))
    values = jax.lax.dynamic_update_slice(values, v, (0, slot, 0, 0))
    slots, slot = jnp.arange(keys.shape[1]), jnp.minimum(slot, keys.shape[1] - 1)
    visible = (((valid != 0) & (slots < slot)) | (slots == slot)).astype(jnp.int32)
    query_ids = jnp.ones((len(qkv), 1), jnp.int32)
    out = attention(q, keys, values, segment_ids=query_ids, kv_segment_ids=visible, implementation="xla")
    return out[:, 0], keys, values


# ---- Pallas implementation: a program holds the query heads of one key head and attends to one split of the cache -------
# A head is held as the two halves that RoPE rotates. The query heads of a key head fill a tile of at least 16 rows.


def attend_kernel(
    static: StaticArgs, qkv, cos, sin, keys, values, valid, slot, q_weight=None, k_weight=None,
    *, interpret: bool, blocks: Blocks = BLOCKS,
):  # fmt: skip
    (batch, heads, dim), (_, slots, key_heads, _) = qkv.shape, keys.shape
    heads -= 2 * key_heads
    splits = _num_splits(blocks.programs // (batch * key_heads), _pallas.cdiv(slots, blocks.rows))
    dtype = _validate.accumulation_dtype(qkv.dtype)
    per_head = ((batch, splits, heads), dtype)
    sums, largest, total, keys, values = _pallas.launch(
        functools.partial(_attend_split, eps=static.eps, dim=dim, splits=splits, blocks=blocks, interpret=interpret),
        (qkv, cos, sin, keys, values, valid, slot.reshape(1), q_weight, k_weight),
        [
            ((batch, splits, heads, dim), dtype),
            per_head,
            per_head,
            (keys.shape, keys.dtype),
            (values.shape, values.dtype),
        ],
        grid=(batch, key_heads, splits),
        num_warps=blocks.num_warps,
        num_stages=blocks.loads,
        interpret=interpret,
        in_place={3: 3, 4: 4},
    )
    (out,) = _pallas.launch(
        functools.partial(_combine_splits, dim=dim, interpret=interpret),
        (sums, largest, total),
        [((batch, heads, dim), qkv.dtype)],
        grid=(batch, heads),
        num_warps=4,
        interpret=interpret,
    )
    return out, keys, values


def _num_splits(wanted: int, blocks: int) -> int:
    """Returns the smallest power of two >= min(wanted, blocks). Splits without a block of slots end at once."""
    return 1 << (max(min(wanted, blocks), 1) - 1).bit_length()


def _attend_split(
    qkv_ref, cos_ref, sin_ref, keys_ref, values_ref, valid_ref, slot_ref, q_weight_ref, k_weight_ref,
    sums_ref, largest_ref, total_ref, new_keys_ref, new_values_ref,
    *, eps: float, dim: int, splits: int, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Writes, for each query head, sum(p v), the largest score and sum(p), with p = exp(score - largest).

    Grid (rows, key heads, splits). Split 0 also processes the new token, which it has in registers, so that no program reads
    a slot that another one writes.
    """
    row, head, split = (_pallas.program_id(i) for i in range(3))
    key_heads, dtype, acc_dtype = keys_ref.shape[2], qkv_ref.dtype, _validate.accumulation_dtype(qkv_ref.dtype)
    group = sums_ref.shape[2] // key_heads
    half, height = max(16, _pallas.next_power_of_2(dim // 2)), max(16, _pallas.next_power_of_2(group))
    in_half = None if half == dim // 2 else jnp.arange(half) < dim // 2
    halves = [_pallas.overhanging(i * (dim // 2), half) for i in range(2)]
    group_heads, in_group = _pallas.span(head * group, height), jnp.arange(height) < group
    in_queries = _row_mask(in_group, in_half, half)
    filled = jnp.minimum(_pallas.load(slot_ref, (0,), None), keys_ref.shape[1] - 1)

    cos, sin = (_pallas.load(ref, (row, halves[0]), in_half, acc_dtype) for ref in (cos_ref, sin_ref))

    def load_rotated(heads, mask, weight_ref):
        x = [_pallas.load(qkv_ref, (row, heads, columns), mask, acc_dtype) for columns in halves]
        if weight_ref is not None:
            weight = [_pallas.load(weight_ref, (columns,), in_half, acc_dtype) for columns in halves]
            x = norm_halves(x, weight, eps, dim, dtype)
        return [half.astype(dtype) for half in rotate_halves(x, cos, sin)]

    q = load_rotated(group_heads, in_queries, q_weight_ref)
    new_k = load_rotated(key_heads * group + head, in_half, k_weight_ref)
    new_v = [_pallas.load(qkv_ref, (row, key_heads * (group + 1) + head, columns), in_half) for columns in halves]

    @_pallas.when(split == 0)
    def update_cache():
        for columns, k, v in zip(halves, new_k, new_v, strict=True):
            _pallas.store(new_keys_ref, (row, filled, head, columns), k, in_half)
            _pallas.store(new_values_ref, (row, filled, head, columns), v, in_half)

    scale = _pallas.LOG2_E * dim**-0.5  # so that scores are exponents of 2
    exp2 = functools.partial(_pallas.exp2, interpret=interpret)
    state = _start_softmax(q, new_k, new_v, split, scale)

    def step(block, state):
        start = block * blocks.rows
        slots, in_filled = _pallas.span(start, blocks.rows), start + jnp.arange(blocks.rows) < filled
        mask = _row_mask(in_filled, in_half, half)
        visible = in_filled & (_pallas.load(valid_ref, (row, slots), in_filled) != 0)
        k, v = (
            [_pallas.load(ref, (row, slots, head, columns), mask) for columns in halves]
            for ref in (keys_ref, values_ref)
        )
        scores = scale * sum(_pallas.dot(a, b, transposed=True) for a, b in zip(q, k, strict=True))
        scores = jnp.where(visible[None, :], scores, -jnp.inf)
        return _add_to_softmax(state, scores, v, dtype, exp2)

    num_blocks = (filled + blocks.rows - 1) // blocks.rows
    blocks_per_split = (num_blocks + splits - 1) // splits
    stop = jnp.minimum((split + 1) * blocks_per_split, num_blocks)
    largest, total, *sums = jax.lax.fori_loop(split * blocks_per_split, stop, step, state)
    _pallas.store(largest_ref, (row, split, group_heads), largest, in_group)
    _pallas.store(total_ref, (row, split, group_heads), total, in_group)
    for columns, half_sums in zip(halves, sums, strict=True):
        _pallas.store(sums_ref, (row, split, group_heads, columns), half_sums, in_queries)


def _start_softmax(q, k, v, split: jax.Array, scale: float) -> tuple[jax.Array, ...]:
    """Returns (largest, total, *sums) of the new token, for which p = 1, in split 0, and of nothing in other splits."""
    dtype = _validate.accumulation_dtype(q[0].dtype)
    height, half = q[0].shape
    new_score = scale * sum(
        jnp.sum(q_half.astype(dtype) * k_half.astype(dtype)[None, :], axis=1)
        for q_half, k_half in zip(q, k, strict=True)
    )
    first_p = (split == 0).astype(dtype)
    largest = jnp.where(split == 0, new_score, MASKED_SCORE)
    total = jnp.zeros(height, dtype) + first_p
    return largest, total, *(jnp.zeros((height, half), dtype) + (first_p * x.astype(dtype))[None, :] for x in v)


def _add_to_softmax(state, scores: jax.Array, v, dtype: Any, exp2: Callable) -> tuple[jax.Array, ...]:
    """Returns (largest, total, *sums) after a block of scores [heads, slots] and values [slots, half]."""
    largest, total, *sums = state
    new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
    p = exp2(scores - new_largest[:, None])
    rescale = exp2(largest - new_largest)
    total = total * rescale + jnp.sum(p, axis=1)
    sums = [s * rescale[:, None] + _pallas.dot(p.astype(dtype), v_half) for s, v_half in zip(sums, v, strict=True)]
    return new_largest, total, *sums


def _combine_splits(sums_ref, largest_ref, total_ref, out_ref, *, dim: int, interpret: bool):
    """Writes out = sum(weight * sums) / sum(weight * total) over splits, with weight = 2^(largest - largest of all splits).

    Grid (rows, query heads).
    """
    row, head = (_pallas.program_id(i) for i in range(2))
    splits, width = sums_ref.shape[1], sums_ref.shape[-1]
    in_head = None if width == dim else jnp.arange(width) < dim
    largest, total = (_pallas.load(ref, (row, slice(None), head), None) for ref in (largest_ref, total_ref))
    weight = _pallas.exp2(largest - jnp.max(largest, axis=0), interpret=interpret)
    mask = None if in_head is None else jnp.broadcast_to(in_head[None, :], (splits, width))
    sums = _pallas.load(sums_ref, (row, slice(None), head, slice(None)), mask)
    out = jnp.sum(sums * weight[:, None], axis=0) / jnp.sum(total * weight, axis=0)
    _pallas.store(out_ref, (row, head, slice(None)), out, in_head)


def _row_mask(in_rows: jax.Array, in_columns: jax.Array | None, width: int) -> jax.Array:
    """Returns the mask [rows, width] of elements that exist; None means all columns."""
    mask = in_rows[:, None] if in_columns is None else in_rows[:, None] & in_columns[None, :]
    return jnp.broadcast_to(mask, (len(in_rows), width))


_decode_attention = _pallas.forward_only("decode_attention", _pallas.choose_implementation(attend_kernel, attend_xla))
