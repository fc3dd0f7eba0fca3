"""Flash attention kernels for interval masks: each query sees one interval of keys, one interval of queries sees each key.

Causal masks, packed segments and padding all have this form. With segment ids of their own for the keys, whose segments may
have gaps, a query sees the keys of its segment inside its interval. A program holds a block of queries and loops over the
blocks of keys that their intervals reach, or vice versa. Blocks that lie inside all of these intervals are not masked.

The forward kernel loops over keys with an online softmax (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao
et al. 2022, https://arxiv.org/abs/2205.14135). The backward pass computes the scores twice, once for dq and once for dk and
dv, so that nothing is accumulated through memory and results are reproducible:

    p = exp(scale q k^T - lse),  ds = p * (grad v^T - delta) with delta = sum(grad * out)
    dq = scale ds k,  dk = scale ds^T q,  dv = p^T grad

Where the queries of a row are a single block, and so are its keys, as in the windows of a vision tower, one kernel computes
the scores once for all three gradients.

Heads are held in parts whose widths are powers of two, 80 as 64 + 16, so that no tensor core multiplies padding.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _validate
from pallas_kernels._tuning import Blocks

MASKED_SCORE = -1e30  # the running maximum before any score: finite, so that differences stay numbers
SHORT_ROW = 64  # tokens of a row in which comparing ids is cheaper than finding the runs of equal ids
MAX_HEAD_BYTES = 512  # the keys and values of larger heads do not fit in the shared memory of an SM
MIN_QUERIES = 128  # of a row, for None to pick the kernels with segment ids of the keys
# Largest number of bytes per head -> queries (rows) and keys (columns) of a block. Those for heads of 80 and 128 elements
# were measured on an H200.
FORWARD_BLOCKS = {
    160: Blocks(rows=128, columns=64, num_warps=4, loads=3),
    256: Blocks(rows=64, columns=64, num_warps=4, loads=2),
    512: Blocks(rows=32, columns=32, num_warps=4, loads=1),
}
BACKWARD_BLOCKS = {
    160: Blocks(rows=64, columns=64, num_warps=4, loads=3),
    256: Blocks(rows=64, columns=64, num_warps=4, loads=2),
    512: Blocks(rows=32, columns=32, num_warps=4, loads=1),
}


Ids = tuple[jax.Array | None, jax.Array | None]  # segment ids of queries [B, T] and keys [B, S]; None: not compared


class Intervals(NamedTuple):
    """The keys that each query sees, or the queries that see each key. An interval is empty where `end` <= `first`."""

    first: jax.Array  # [B, T] int32
    end: jax.Array  # [B, T] int32, one past the last


class Mask(NamedTuple):
    """Which keys a query sees: those inside its interval and, if there are ids to compare, with its segment id."""

    visible_keys: Intervals  # of each query
    visible_queries: Intervals  # of each key
    ids: Ids


def make_mask(query_ids: jax.Array | None, key_ids: jax.Array | None, q: jax.Array, k: jax.Array, causal: bool) -> Mask:
    """Returns the mask of a call of `attention`.

    Args:
        query_ids: segment ids [B, T], or None. Without `key_ids` they are those of the keys as well, so T = S, and equal ids
            are contiguous.
        key_ids: [B, S], or None. Equal ids may be separated by others, so the kernels compare the ids inside an interval.
        q, k, causal: as in `attention`.
    """
    (batch, tokens), sources = q.shape[:2], k.shape[1]
    query, key = jnp.arange(tokens, dtype=jnp.int32), jnp.arange(sources, dtype=jnp.int32)
    ids: Ids = query_ids, key_ids
    if query_ids is None:
        keys = Intervals(jnp.zeros((batch, tokens), jnp.int32), jnp.full((batch, tokens), sources, jnp.int32))
        queries = Intervals(jnp.zeros((batch, sources), jnp.int32), jnp.full((batch, sources), tokens, jnp.int32))
    elif key_ids is not None:
        keys, queries = _enclosing_intervals(query_ids, key_ids), _enclosing_intervals(key_ids, query_ids)
    elif tokens <= SHORT_ROW:
        inside = query_ids != 0
        keys = queries = Intervals(jnp.where(inside, 0, tokens), jnp.where(inside, tokens, 0))
        ids = query_ids, query_ids
    else:
        keys = queries = _runs(query_ids)
        ids = None, None
    if causal:
        offset = sources - tokens
        keys = keys._replace(end=jnp.minimum(keys.end, query + offset + 1))
        queries = queries._replace(first=jnp.maximum(queries.first, key - offset))
    return Mask(keys, queries, ids)


def _runs(ids: jax.Array) -> Intervals:
    """Returns the interval of elements around each of `ids` [B, T] that equal it; empty for 0."""
    tokens = ids.shape[1]
    token = jnp.arange(tokens, dtype=jnp.int32)
    differs = ids[:, 1:] != ids[:, :-1]
    starts, ends = (jnp.pad(differs, ((0, 0), pad), constant_values=True) for pad in ((1, 0), (0, 1)))
    first = jax.lax.cummax(jnp.where(starts, token, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, token + 1, tokens), axis=1, reverse=True)
    inside = ids != 0
    return Intervals(jnp.where(inside, first, tokens), jnp.where(inside, end, 0))


def _enclosing_intervals(ids: jax.Array, other_ids: jax.Array) -> Intervals:
    """Returns the smallest intervals of `other_ids` [B, S] that hold all elements equal to each of `ids` [B, T]."""
    sources = other_ids.shape[1]
    position = jnp.arange(sources, dtype=jnp.int32)
    equal = (ids[:, :, None] == other_ids[:, None, :]) & (ids != 0)[:, :, None]
    first = jnp.min(jnp.where(equal, position, sources), axis=2)
    return Intervals(first, jnp.max(jnp.where(equal, position + 1, 0), axis=2))


def unsupported_reason(q: jax.Array, scale: float) -> str | None:
    """Returns why the kernels do not support a call of `attention`, or None if they do."""
    head_bytes = q.shape[-1] * q.dtype.itemsize
    reasons = {
        f"q has {head_bytes} bytes per head; expected at most {MAX_HEAD_BYTES}": head_bytes > MAX_HEAD_BYTES,
        f"scale is {scale}; expected scale > 0": scale <= 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def preferred(q: jax.Array, kv_segmented: bool) -> bool:
    """Returns whether None may pick the kernels.

    Only if they use tensor cores, which they do not for float32. With segment ids of the keys, such as a chat's turn after a
    cache, only from MIN_QUERIES on: on an H200, 16 queries take 46 us (XLA: 33), 64 take 26 (25), and 256 take 51 (87).
    """
    capability = _pallas.compute_capability()
    uses_tensor_cores = q.dtype in (jnp.bfloat16, jnp.float16) and (capability is None or capability >= 8.0)
    return uses_tensor_cores and (not kv_segmented or q.shape[1] >= MIN_QUERIES)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns out [B, T, N, D], and the log-sum-exp of the scores [B, N, T], infinite where a query sees no key."""
    (batch, tokens, heads, dim), (_, sources, key_heads, _) = q.shape, k.shape
    blocks = _blocks(FORWARD_BLOCKS, q, k)
    kernel, grid = _attention_forward, (_pallas.cdiv(tokens, blocks.rows), batch * heads)
    if tokens <= blocks.rows and sources <= blocks.columns:
        kernel, grid = _attention_forward_block, (1, batch * key_heads)
    out, lse = _pallas.launch(
        functools.partial(kernel, dim=dim, scale=scale, blocks=blocks, interpret=interpret),
        (q, k, v, *mask.ids, *mask.visible_keys),
        [(q.shape, q.dtype), ((batch, heads, tokens), _validate.accumulation_dtype(q.dtype))],
        grid=grid,
        num_warps=blocks.num_warps,
        num_stages=blocks.loads,
        interpret=interpret,
    )
    return out, lse


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    grad: jax.Array,
    mask: Mask,
    scale: float,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk, dv."""
    (batch, tokens, heads, dim), (_, sources, key_heads, _) = q.shape, k.shape
    blocks = _blocks(BACKWARD_BLOCKS, q, k)
    launch = functools.partial(_pallas.launch, num_warps=blocks.num_warps, num_stages=blocks.loads, interpret=interpret)
    static: dict[str, Any] = {"dim": dim, "scale": scale, "blocks": blocks, "interpret": interpret}
    if tokens <= blocks.rows and sources <= blocks.columns:
        dq, dk, dv = launch(
            functools.partial(_attention_backward_block, **static),
            (q, k, v, out, grad, lse, *mask.ids, *mask.visible_keys),
            [(q.shape, q.dtype), (k.shape, k.dtype), (v.shape, v.dtype)],
            grid=(1, batch * key_heads),
        )
        return dq, dk, dv
    dtype = _validate.accumulation_dtype(q.dtype)
    delta = jnp.sum(grad.astype(dtype) * out.astype(dtype), axis=-1).transpose(0, 2, 1)  # [B, N, T]
    (dq,) = launch(
        functools.partial(_attention_backward_queries, **static),
        (q, k, v, grad, lse, delta, *mask.ids, *mask.visible_keys),
        [(q.shape, q.dtype)],
        grid=(_pallas.cdiv(tokens, blocks.rows), batch * heads),
    )
    dk, dv = launch(
        functools.partial(_attention_backward_keys, **static),
        (q, k, v, grad, lse, delta, *mask.ids, *mask.visible_queries),
        [(k.shape, k.dtype), (v.shape, v.dtype)],
        grid=(_pallas.cdiv(sources, blocks.columns), batch * key_heads),
    )
    return dq, dk, dv


def _blocks(table: dict[int, Blocks], q: jax.Array, k: jax.Array) -> Blocks:
    """Returns the block sizes for q's heads: the smallest for float32, whose exact products use many registers.

    No block is larger than a row needs: a window of 64 patches is one block.
    """
    head_bytes = q.shape[-1] * q.dtype.itemsize if q.dtype.itemsize == 2 else MAX_HEAD_BYTES
    blocks = next(blocks for limit, blocks in table.items() if head_bytes <= limit)
    rows, columns = (max(16, _pallas.next_power_of_2(x.shape[1])) for x in (q, k))
    return dataclasses.replace(blocks, rows=min(blocks.rows, rows), columns=min(blocks.columns, columns))


# ---- kernels -----------------------------------------------------------------------------------------------------------


def _attention_forward(
    q_ref, k_ref, v_ref, query_ids_ref, key_ids_ref, first_ref, end_ref, out_ref, lse_ref,
    *, dim: int, scale: float, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Writes out = softmax(scale q k^T) v and lse for a block of queries. Grid (blocks of queries, B N)."""
    (tokens, heads), (sources, key_heads) = q_ref.shape[1:3], k_ref.shape[1:3]
    dtype, acc_dtype = q_ref.dtype, _validate.accumulation_dtype(q_ref.dtype)
    queries, parts = _Tile.of_program(heads, blocks.rows, tokens), _head_parts(dim)
    key_head = queries.head // (heads // key_heads)
    visible_keys = _load_intervals(first_ref, end_ref, queries, empty_at=sources)
    same_segment = _compare_ids(query_ids_ref, queries, key_ids_ref)
    q = _load(q_ref, queries, parts)
    scale *= _pallas.LOG2_E  # so that scores are exponents of 2
    exp2 = functools.partial(_pallas.exp2, interpret=interpret)

    def step(start, exists, visible, state):
        largest, total, *sums = state
        keys = _Tile(queries.row, key_head, start, blocks.columns, exists)
        scores = _products(q, _load(k_ref, keys, parts))
        if visible is not None:
            scores = jnp.where(visible, scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1) * scale)
        p = exp2(scores * scale - new_largest[:, None])
        rescale = exp2(largest - new_largest)
        total = total * rescale + jnp.sum(p, axis=1)
        sums = _add_products([s * rescale[:, None] for s in sums], p.astype(dtype), _load(v_ref, keys, parts))
        return new_largest, total, *sums

    largest, total = jnp.full(queries.size, MASKED_SCORE, acc_dtype), jnp.zeros(queries.size, acc_dtype)
    state = largest, total, *_zeros(queries.size, parts, acc_dtype)
    largest, total, *sums = _for_each_block(visible_keys, same_segment, blocks.columns, step, state)
    sees_keys = total > 0
    total = jnp.where(sees_keys, total, 1)
    _store(out_ref, queries, parts, [s / total[:, None] for s in sums])
    lse = jnp.where(sees_keys, (largest + jnp.log2(total)) / _pallas.LOG2_E, jnp.inf)
    _pallas.store(lse_ref, (queries.row, queries.head, queries.tokens), lse, queries.inside)


def _attention_backward_queries(
    q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, query_ids_ref, key_ids_ref, first_ref, end_ref, dq_ref,
    *, dim: int, scale: float, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Writes dq for a block of queries. Grid (blocks of queries, B N)."""
    (tokens, heads), (sources, key_heads) = q_ref.shape[1:3], k_ref.shape[1:3]
    dtype = q_ref.dtype
    queries, parts = _Tile.of_program(heads, blocks.rows, tokens), _head_parts(dim)
    key_head = queries.head // (heads // key_heads)
    visible_keys = _load_intervals(first_ref, end_ref, queries, empty_at=sources)
    same_segment = _compare_ids(query_ids_ref, queries, key_ids_ref)
    q, grad = (_load(ref, queries, parts) for ref in (q_ref, grad_ref))
    lse, delta = (_load_scalars(ref, queries)[:, None] for ref in (lse_ref, delta_ref))

    def step(start, exists, visible, dq):
        keys = _Tile(queries.row, key_head, start, blocks.columns, exists)
        k, v = (_load(ref, keys, parts) for ref in (k_ref, v_ref))
        p = _pallas.exp2((_products(q, k) * scale - lse) * _pallas.LOG2_E, interpret=interpret)
        ds = p * ((_products(grad, v) - delta) * scale)  # scaled before rounding: the largest float16 is 65504
        if visible is not None:
            ds = jnp.where(visible, ds, 0)
        return tuple(_add_products(dq, ds.astype(dtype), k))

    zeros = tuple(_zeros(queries.size, parts, _validate.accumulation_dtype(dtype)))
    _store(dq_ref, queries, parts, _for_each_block(visible_keys, same_segment, blocks.columns, step, zeros))


def _attention_backward_keys(
    q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, query_ids_ref, key_ids_ref, first_ref, end_ref, dk_ref, dv_ref,
    *, dim: int, scale: float, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Writes dk and dv for a block of keys, summed over the query heads of its key head. Grid (blocks of keys, B K)."""
    (tokens, heads), (sources, key_heads) = q_ref.shape[1:3], k_ref.shape[1:3]
    dtype, acc_dtype, group = q_ref.dtype, _validate.accumulation_dtype(q_ref.dtype), heads // key_heads
    keys, parts = _Tile.of_program(key_heads, blocks.columns, sources), _head_parts(dim)
    visible_queries = _load_intervals(first_ref, end_ref, keys, empty_at=tokens)
    same_segment = _compare_ids(key_ids_ref, keys, query_ids_ref)
    k, v = (_load(ref, keys, parts) for ref in (k_ref, v_ref))

    def add_query_head(i, sums):
        head = keys.head * group + i

        def step(start, exists, visible, sums):
            dk, dv = sums[: len(parts)], sums[len(parts) :]
            queries = _Tile(keys.row, head, start, blocks.rows, exists)
            q, grad = (_load(ref, queries, parts) for ref in (q_ref, grad_ref))
            lse, delta = (_load_scalars(ref, queries)[None, :] for ref in (lse_ref, delta_ref))
            p = _pallas.exp2((_products(k, q) * scale - lse) * _pallas.LOG2_E, interpret=interpret)
            ds = p * ((_products(v, grad) - delta) * scale)
            if visible is not None:
                p, ds = jnp.where(visible, p, 0), jnp.where(visible, ds, 0)
            return *_add_products(dk, ds.astype(dtype), q), *_add_products(dv, p.astype(dtype), grad)

        return _for_each_block(visible_queries, same_segment, blocks.rows, step, sums)

    sums = jax.lax.fori_loop(0, group, add_query_head, tuple(2 * _zeros(keys.size, parts, acc_dtype)))
    _store(dk_ref, keys, parts, sums[: len(parts)])
    _store(dv_ref, keys, parts, sums[len(parts) :])


# Where the queries of a row fit one block, as do its keys, a program takes a key head, and computes its scores once.


def _attention_forward_block(
    q_ref, k_ref, v_ref, query_ids_ref, key_ids_ref, first_ref, end_ref, out_ref, lse_ref,
    *, dim: int, scale: float, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Writes out and lse of the query heads of a key head, for a row of a single block. Grid (1, B K)."""
    keys, queries, visible = _single_block(q_ref, k_ref, query_ids_ref, key_ids_ref, first_ref, end_ref, blocks)
    parts, scale = _head_parts(dim), scale * _pallas.LOG2_E  # so that scores are exponents of 2
    k, v = (_load(ref, keys, parts) for ref in (k_ref, v_ref))

    def write_query_head(i, _):
        tile = queries._replace(head=queries.head + i)
        scores = jnp.where(visible, _products(_load(q_ref, tile, parts), k) * scale, -jnp.inf)
        largest = jnp.maximum(jnp.max(scores, axis=1), MASKED_SCORE)
        p = _pallas.exp2(scores - largest[:, None], interpret=interpret)
        total = jnp.sum(p, axis=1)
        sees_keys = total > 0
        total = jnp.where(sees_keys, total, 1)
        p = (p / total[:, None]).astype(q_ref.dtype)
        _store(out_ref, tile, parts, [_pallas.dot(p, part) for part in v])
        lse = jnp.where(sees_keys, (largest + jnp.log2(total)) / _pallas.LOG2_E, jnp.inf)
        _pallas.store(lse_ref, (tile.row, tile.head, tile.tokens), lse, tile.inside)
        return _

    jax.lax.fori_loop(0, q_ref.shape[2] // k_ref.shape[2], write_query_head, None)


def _attention_backward_block(
    q_ref, k_ref, v_ref, out_ref, grad_ref, lse_ref, query_ids_ref, key_ids_ref, first_ref, end_ref, dq_ref, dk_ref, dv_ref,
    *, dim: int, scale: float, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Writes dq, dk and dv of a key head, for a row of a single block. Grid (1, B K)."""
    dtype, acc_dtype, parts = q_ref.dtype, _validate.accumulation_dtype(q_ref.dtype), _head_parts(dim)
    keys, queries, visible = _single_block(q_ref, k_ref, query_ids_ref, key_ids_ref, first_ref, end_ref, blocks)
    k, v = (_load(ref, keys, parts) for ref in (k_ref, v_ref))

    def add_query_head(i, sums):
        tile = queries._replace(head=queries.head + i)
        q, out, grad = (_load(ref, tile, parts) for ref in (q_ref, out_ref, grad_ref))
        delta = sum(jnp.sum(a.astype(acc_dtype) * b.astype(acc_dtype), axis=1) for a, b in zip(grad, out, strict=True))
        lse = _load_scalars(lse_ref, tile)
        p = _pallas.exp2((_products(q, k) * scale - lse[:, None]) * _pallas.LOG2_E, interpret=interpret)
        p = jnp.where(visible, p, 0)
        ds = jnp.where(visible, p * ((_products(grad, v) - delta[:, None]) * scale), 0).astype(dtype)
        _store(dq_ref, tile, parts, [_pallas.dot(ds, part) for part in k])
        dk, dv = sums[: len(parts)], sums[len(parts) :]
        dk = [total + _pallas.dot(ds, part, transposed_a=True) for total, part in zip(dk, q, strict=True)]
        p = p.astype(dtype)
        dv = [total + _pallas.dot(p, part, transposed_a=True) for total, part in zip(dv, grad, strict=True)]
        return *dk, *dv

    zeros = tuple(2 * _zeros(keys.size, parts, acc_dtype))
    sums = jax.lax.fori_loop(0, q_ref.shape[2] // k_ref.shape[2], add_query_head, zeros)
    _store(dk_ref, keys, parts, sums[: len(parts)])
    _store(dv_ref, keys, parts, sums[len(parts) :])


# ---- helpers of the kernels --------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """`size` consecutive tokens of one head in one row of the batch."""

    row: Any
    head: Any
    start: Any
    size: int
    inside: jax.Array | None  # the mask of tokens to load; None for all

    @classmethod
    def of_program(cls, heads: int, size: int, tokens: int) -> "_Tile":
        """Returns the tile of this program of a grid (blocks of tokens, rows * heads)."""
        block, row_and_head = _pallas.program_id(0), _pallas.program_id(1)
        start = block * size
        return cls(row_and_head // heads, row_and_head % heads, start, size, start + jnp.arange(size) < tokens)

    @property
    def tokens(self) -> Any:
        return _pallas.span(self.start, self.size)


class _HeadPart(NamedTuple):
    """Some columns of a head."""

    columns: Any  # index of the columns
    width: int  # a power of two, at least 16
    inside: jax.Array | None  # the mask of columns that exist; None for all


def _head_parts(dim: int) -> list[_HeadPart]:
    """Returns parts of a head whose widths are powers of two, widest first; the last part may extend past the head."""
    parts, start = [], 0
    while start < dim:
        remaining = dim - start
        width = max(16, 1 << remaining.bit_length() - 1)
        inside = None if width <= remaining else jnp.arange(width) < remaining
        columns = (_pallas.span if inside is None else _pallas.overhanging)(start, width)
        parts.append(_HeadPart(columns, width, inside))
        start += width
    return parts


def _load(ref, tile: _Tile, parts: list[_HeadPart]) -> list[jax.Array]:
    """Loads a tile of [B, T, N, D] in parts [size, width]; zeros where the mask is False."""
    return [
        _pallas.load(ref, (tile.row, tile.tokens, tile.head, part.columns), _part_mask(tile, part)) for part in parts
    ]


def _store(ref, tile: _Tile, parts: list[_HeadPart], values: Sequence[jax.Array]) -> None:
    """Stores the parts of a tile of [B, T, N, D]."""
    for part, value in zip(parts, values, strict=True):
        _pallas.store(ref, (tile.row, tile.tokens, tile.head, part.columns), value, _part_mask(tile, part))


def _load_scalars(ref, tile: _Tile) -> jax.Array:
    """Loads one number per token of a tile, from [B, N, T]; zeros where the mask is False."""
    return _pallas.load(ref, (tile.row, tile.head, tile.tokens), tile.inside)


def _part_mask(tile: _Tile, part: _HeadPart) -> jax.Array | None:
    shape = tile.size, part.width
    masks = [] if tile.inside is None else [jnp.broadcast_to(tile.inside[:, None], shape)]
    masks += [] if part.inside is None else [jnp.broadcast_to(part.inside[None, :], shape)]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _products(left: list[jax.Array], right: list[jax.Array]) -> Any:
    """Returns left right^T, summed over the parts of a head."""
    return sum(_pallas.dot(a, b, transposed=True) for a, b in zip(left, right, strict=True))


def _add_products(sums: Sequence[jax.Array], weights: jax.Array, parts: list[jax.Array]) -> list[jax.Array]:
    """Returns sums + weights part, for each part of a head."""
    return [total + _pallas.dot(weights, part) for total, part in zip(sums, parts, strict=True)]


def _zeros(size: int, parts: list[_HeadPart], dtype: Any) -> list[jax.Array]:
    return [jnp.zeros((size, part.width), dtype) for part in parts]


def _single_block(q_ref, k_ref, query_ids_ref, key_ids_ref, first_ref, end_ref, blocks: Blocks):
    """Returns the keys of this program, the queries of its first query head, and the mask of visible keys."""
    (tokens, heads), (sources, key_heads) = q_ref.shape[1:3], k_ref.shape[1:3]
    keys = _Tile.of_program(key_heads, blocks.columns, sources)
    first_head, in_row = keys.head * (heads // key_heads), jnp.arange(blocks.rows) < tokens
    queries = _Tile(keys.row, first_head, keys.start, blocks.rows, in_row)
    first, end = _load_intervals(first_ref, end_ref, queries, empty_at=sources)
    position = jnp.arange(blocks.columns)
    visible = (position[None, :] >= first[:, None]) & (position[None, :] < end[:, None])
    same_segment = _compare_ids(query_ids_ref, queries, key_ids_ref)
    if same_segment is not None:
        visible &= same_segment(keys.start, blocks.columns, keys.inside)
    return keys, queries, visible


def _load_intervals(first_ref, end_ref, tile: _Tile, *, empty_at: int) -> Intervals:
    """Loads the intervals of a tile. Tokens that do not exist get an empty interval, which starts at `empty_at`."""
    first = _pallas.load(first_ref, (tile.row, tile.tokens), tile.inside, other=empty_at)
    return Intervals(first, _pallas.load(end_ref, (tile.row, tile.tokens), tile.inside))


def _compare_ids(ids_ref, tile: _Tile, other_ids_ref) -> Callable[..., jax.Array] | None:
    """Returns a function of positions and their mask [size] -> mask [tile, size] of ids equal to those of the tile.

    None without ids. The mask is also set where both ids are 0: no interval holds such a pair.
    """
    if other_ids_ref is None:
        return None
    ids = _pallas.load(ids_ref, (tile.row, tile.tokens), tile.inside)

    def same_segment(start, size, exists):
        other_ids = _pallas.load(other_ids_ref, (tile.row, _pallas.span(start, size)), exists)
        return ids[:, None] == other_ids[None, :]

    return same_segment


def _for_each_block(
    intervals: Intervals, same_segment: Callable | None, size: int, step: Callable, state: tuple
) -> tuple:
    """Runs state = step(start, exists, visible, state) over the blocks of `size` elements that the intervals reach.

    `intervals` are those of a tile. `exists` [size] masks the elements before the end of the last interval, and `visible`
    [tile, size] those inside each interval and of the `same_segment`. In blocks that lie inside all intervals, `exists` is
    None, and so is `visible` if no segments are compared.
    """
    first, end = intervals
    start, stop = jnp.min(first), jnp.max(end)
    count = jnp.maximum(stop - start + size - 1, 0) // size
    # The order: blocks in which some intervals begin, blocks inside all intervals, blocks in which some intervals end.
    before = jnp.minimum((jnp.max(first) - start + size - 1) // size, count)
    inner = jnp.clip(jnp.maximum(jnp.min(end) - start, 0) // size - before, 0, count - before)

    def inner_step(i, state):
        block_start = start + (before + i) * size
        visible = None if same_segment is None else same_segment(block_start, size, None)
        return step(block_start, None, visible, state)

    def masked_step(i, state):
        block_start = start + jnp.where(i < before, i, i + inner) * size
        position = block_start + jnp.arange(size)
        exists = position < stop
        visible = (position[None, :] >= first[:, None]) & (position[None, :] < end[:, None])
        if same_segment is not None:
            visible &= same_segment(block_start, size, exists)
        return step(block_start, exists, visible, state)

    state = jax.lax.fori_loop(0, inner, inner_step, state)
    return jax.lax.fori_loop(0, count - inner, masked_step, state)
