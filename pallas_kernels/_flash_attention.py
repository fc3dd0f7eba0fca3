"""Attention's own kernels: each query sees one interval of the keys, each key is seen by one of the queries.

A causal mask, packed segments and padding all come to that. A program holds a block of queries (or of keys) and walks over
the blocks of the other side that its intervals reach; those that all of them see whole are not masked.

Forward goes through the keys with the softmax of what it has seen so far (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867; Dao et al. 2022, https://arxiv.org/abs/2205.14135). Backward computes the scores twice, for
dq and for dk and dv, so that nothing is added up through memory and the result is the same from run to run:

    p = exp(scale q k^T - lse),  ds = p * (grad v^T - delta) with delta = sum(grad * out)
    dq = scale ds k,  dk = scale ds^T q,  dv = p^T grad

Heads are held in parts whose widths are powers of two, 80 as 64 + 16: no tensor core multiplies padding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas, _validate
from pallas_kernels._tuning import Blocks

NOTHING = -1e30  # the largest score where there is none: finite, so that differences are
MOST_BYTES = 512  # of a head: the keys and values of more than that do not fit the memory of an SM
# Bytes of a head at most -> queries (rows) and keys (columns) of a block; those of 80 and 128 measured on an H200.
FORWARD = {
    160: Blocks(rows=128, columns=64, num_warps=4, loads=3),
    256: Blocks(rows=64, columns=64, num_warps=4, loads=2),
    512: Blocks(rows=32, columns=32, num_warps=4, loads=1),
}
BACKWARD = {
    160: Blocks(rows=64, columns=64, num_warps=4, loads=3),
    256: Blocks(rows=64, columns=64, num_warps=4, loads=2),
    512: Blocks(rows=32, columns=32, num_warps=4, loads=1),
}


class Interval(NamedTuple):
    """Which keys each query sees, or which queries see each key. Of nothing, `end` is not above `first`."""

    first: jax.Array  # [B, T] int32
    end: jax.Array  # [B, T] int32, one past the last


def intervals(segment_ids: jax.Array | None, q: jax.Array, k: jax.Array, causal: bool) -> tuple[Interval, Interval]:
    """-> of the queries, of the keys. segment_ids is that of both: as many queries as keys, equal numbers side by side."""
    (batch, tokens), sources = q.shape[:2], k.shape[1]
    token, source = jnp.arange(tokens, dtype=jnp.int32), jnp.arange(sources, dtype=jnp.int32)
    if segment_ids is None:
        of_queries = Interval(jnp.zeros((batch, tokens), jnp.int32), jnp.full((batch, tokens), sources, jnp.int32))
        of_keys = Interval(jnp.zeros((batch, sources), jnp.int32), jnp.full((batch, sources), tokens, jnp.int32))
    else:
        differs = segment_ids[:, 1:] != segment_ids[:, :-1]
        begins, ends = (jnp.pad(differs, ((0, 0), pad), constant_values=True) for pad in ((1, 0), (0, 1)))
        first = jax.lax.cummax(jnp.where(begins, token, 0), axis=1)
        end = jax.lax.cummin(jnp.where(ends, token + 1, tokens), axis=1, reverse=True)
        inside = segment_ids != 0
        of_queries = of_keys = Interval(jnp.where(inside, first, tokens), jnp.where(inside, end, 0))
    if causal:
        ahead = sources - tokens
        of_queries = of_queries._replace(end=jnp.minimum(of_queries.end, token + ahead + 1))
        of_keys = of_keys._replace(first=jnp.maximum(of_keys.first, source - ahead))
    return of_queries, of_keys


def refuses(q: jax.Array, kv_segment_ids: jax.Array | None, scale: float) -> str | None:
    """Why the kernels cannot do it, or None."""
    size = q.shape[-1] * q.dtype.itemsize
    reasons = {
        "segments of keys that are not those of the queries": kv_segment_ids is not None,
        f"a head takes {size} bytes, they take {MOST_BYTES}": size > MOST_BYTES,
        f"scale is {scale}, it is to be above 0": scale <= 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, of_queries: Interval, scale: float, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """-> out [B, T, N, D], log-sum-exp of the scores [B, N, T] (infinite where a query sees no key)."""
    batch, tokens, heads, dim = q.shape
    blocks = _blocks(FORWARD, q)
    out, lse = _pallas.launch(
        functools.partial(_forward, dim=dim, scale=scale, blocks=blocks, interpret=interpret),
        (q, k, v, *of_queries),
        [(q.shape, q.dtype), ((batch, heads, tokens), _validate.wide(q.dtype))],
        grid=(_pallas.cdiv(tokens, blocks.rows), batch * heads),
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
    of_queries: Interval,
    of_keys: Interval,
    scale: float,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> dq, dk, dv."""
    (batch, tokens, heads, dim), (_, sources, key_heads, _) = q.shape, k.shape
    wide = _validate.wide(q.dtype)
    delta = jnp.sum(grad.astype(wide) * out.astype(wide), axis=-1).transpose(0, 2, 1)  # [B, N, T]
    blocks = _blocks(BACKWARD, q)
    common = {"num_warps": blocks.num_warps, "num_stages": blocks.loads, "interpret": interpret}
    static = {"dim": dim, "scale": scale, "blocks": blocks, "interpret": interpret}
    (dq,) = _pallas.launch(
        functools.partial(_backward_queries, **static),
        (q, k, v, grad, lse, delta, *of_queries),
        [(q.shape, q.dtype)],
        grid=(_pallas.cdiv(tokens, blocks.rows), batch * heads),
        **common,
    )
    dk, dv = _pallas.launch(
        functools.partial(_backward_keys, **static),
        (q, k, v, grad, lse, delta, *of_keys),
        [(k.shape, k.dtype), (v.shape, v.dtype)],
        grid=(_pallas.cdiv(sources, blocks.columns), batch * key_heads),
        **common,
    )
    return dq, dk, dv


def _blocks(table: dict[int, Blocks], q: jax.Array) -> Blocks:
    """Exact products of float32 take no tensor cores but many registers: always the smallest blocks."""
    size = q.shape[-1] * q.dtype.itemsize if q.dtype.itemsize == 2 else MOST_BYTES
    return next(blocks for most, blocks in table.items() if size <= most)


# ---- what the kernels share --------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Of a head."""

    columns: Any  # an index
    width: int  # a power of two, 16 at least
    inside: jax.Array | None  # which columns exist; None if all do


def _parts(dim: int) -> list[_Part]:
    found, start = [], 0
    while start < dim:
        rest = dim - start
        width = max(16, 1 << rest.bit_length() - 1)
        inside = None if width <= rest else jnp.arange(width) < rest
        columns = (_pallas.span if inside is None else _pallas.overhanging)(start, width)
        found.append(_Part(columns, width, inside))
        start += width
    return found


def _mask(rows: jax.Array | None, columns: jax.Array | None, shape: tuple[int, int]) -> jax.Array | None:
    found = [] if rows is None else [jnp.broadcast_to(rows[:, None], shape)]
    found += [] if columns is None else [jnp.broadcast_to(columns[None, :], shape)]
    return functools.reduce(jnp.logical_and, found) if found else None


def _load(ref, row, head, start, size: int, inside: jax.Array | None, parts: list[_Part]) -> list[jax.Array]:
    """Tokens of a head in its parts, [size, width] each; zeros where `inside` [size] is False (None: nowhere)."""
    tokens = _pallas.span(start, size)
    return [
        _pallas.load(ref, (row, tokens, head, part.columns), _mask(inside, part.inside, (size, part.width)))
        for part in parts
    ]


def _store(
    ref, row, head, start, size: int, inside: jax.Array, parts: list[_Part], values: Sequence[jax.Array]
) -> None:
    tokens = _pallas.span(start, size)
    for part, value in zip(parts, values, strict=True):
        mask = _mask(inside, part.inside, (size, part.width))
        _pallas.store(ref, (row, tokens, head, part.columns), value, mask)


def _products(left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
    """left right^T over all parts of a head."""
    return sum(_pallas.dot(a, b, transposed=True) for a, b in zip(left, right, strict=True))


def _plus(sums: list[jax.Array], weight: jax.Array, parts: list[jax.Array]) -> list[jax.Array]:
    """sums + weight parts"""
    return [total + _pallas.dot(weight, part) for total, part in zip(sums, parts, strict=True)]


def _zeros(size: int, parts: list[_Part], dtype: Any) -> list[jax.Array]:
    return [jnp.zeros((size, part.width), dtype) for part in parts]


def _walk(interval: Interval, size: int, step: Callable, state: tuple) -> tuple:
    """Runs state = step(start, exists, seen, state) over blocks of `size` of the other side, from `start`.

    `interval` is of a block of this side. `exists` [size] is what of the other side somebody sees, `seen` [this side, size]
    who sees it; both are None for blocks that everybody sees whole.
    """
    first, end = interval
    start, stop = jnp.min(first), jnp.max(end)
    count = jnp.maximum(stop - start + size - 1, 0) // size
    # the first blocks are cut by where some begin, then come whole ones, then those that are cut by where some end
    before = jnp.minimum((jnp.max(first) - start + size - 1) // size, count)
    whole = jnp.clip(jnp.maximum(jnp.min(end) - start, 0) // size - before, 0, count - before)

    def unmasked(i, state):
        return step(start + (before + i) * size, None, None, state)

    def masked(i, state):
        begin = start + jnp.where(i < before, i, i + whole) * size
        position = begin + jnp.arange(size)
        seen = (position[None, :] >= first[:, None]) & (position[None, :] < end[:, None])
        return step(begin, position < stop, seen, state)

    state = jax.lax.fori_loop(0, whole, unmasked, state)
    return jax.lax.fori_loop(0, count - whole, masked, state)


def _interval(first_ref, end_ref, row, start, size: int, inside: jax.Array, nowhere: int) -> Interval:
    tokens = _pallas.span(start, size)
    first = _pallas.load(first_ref, (row, tokens), inside, other=nowhere)
    return Interval(first, _pallas.load(end_ref, (row, tokens), inside))


# ---- kernels -----------------------------------------------------------------------------------------------------------


def _forward(
    q_ref, k_ref, v_ref, first_ref, end_ref, out_ref, lse_ref,
    *, dim: int, scale: float, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Grid (blocks of queries, B N)."""
    tokens, heads = q_ref.shape[1:3]
    sources, key_heads = k_ref.shape[1:3]
    size, dtype, wide = blocks.rows, q_ref.dtype, _validate.wide(q_ref.dtype)
    start, row, head = _pallas.program_id(0) * size, _pallas.program_id(1) // heads, _pallas.program_id(1) % heads
    key_head = head // (heads // key_heads)
    parts, inside = _parts(dim), start + jnp.arange(size) < tokens
    interval = _interval(first_ref, end_ref, row, start, size, inside, sources)
    q = _load(q_ref, row, head, start, size, inside, parts)
    scale *= _pallas.LOG2_E  # scores are exponents of two
    exp2 = functools.partial(_pallas.exp2, interpret=interpret)

    def step(first_key, exists, seen, state):
        largest, total, *sums = state
        at = row, key_head, first_key, blocks.columns, exists, parts
        scores = _products(q, _load(k_ref, *at))
        if seen is not None:
            scores = jnp.where(seen, scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1) * scale)
        p = exp2(scores * scale - new_largest[:, None])
        shrink = exp2(largest - new_largest)
        total = total * shrink + jnp.sum(p, axis=1)
        sums = _plus([s * shrink[:, None] for s in sums], p.astype(dtype), _load(v_ref, *at))
        return new_largest, total, *sums

    state = jnp.full(size, NOTHING, wide), jnp.zeros(size, wide), *_zeros(size, parts, wide)
    largest, total, *sums = _walk(interval, blocks.columns, step, state)
    some = total > 0
    total = jnp.where(some, total, 1)
    _store(out_ref, row, head, start, size, inside, parts, [s / total[:, None] for s in sums])
    lse = jnp.where(some, (largest + jnp.log2(total)) / _pallas.LOG2_E, jnp.inf)
    _pallas.store(lse_ref, (row, head, _pallas.span(start, size)), lse, inside)


def _backward_queries(
    q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, first_ref, end_ref, dq_ref,
    *, dim: int, scale: float, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Grid (blocks of queries, B N)."""
    tokens, heads = q_ref.shape[1:3]
    sources, key_heads = k_ref.shape[1:3]
    size, dtype = blocks.rows, q_ref.dtype
    start, row, head = _pallas.program_id(0) * size, _pallas.program_id(1) // heads, _pallas.program_id(1) % heads
    key_head = head // (heads // key_heads)
    parts, inside = _parts(dim), start + jnp.arange(size) < tokens
    interval = _interval(first_ref, end_ref, row, start, size, inside, sources)
    q, grad = (_load(ref, row, head, start, size, inside, parts) for ref in (q_ref, grad_ref))
    lse, delta = (
        _pallas.load(ref, (row, head, _pallas.span(start, size)), inside)[:, None] for ref in (lse_ref, delta_ref)
    )

    def step(first_key, exists, seen, dq):
        k, v = (_load(ref, row, key_head, first_key, blocks.columns, exists, parts) for ref in (k_ref, v_ref))
        p = _pallas.exp2((_products(q, k) * scale - lse) * _pallas.LOG2_E, interpret=interpret)
        ds = p * ((_products(grad, v) - delta) * scale)  # scaled before it is rounded: float16 ends at 65504
        if seen is not None:
            ds = jnp.where(seen, ds, 0)
        return tuple(_plus(dq, ds.astype(dtype), k))

    dq = _walk(interval, blocks.columns, step, tuple(_zeros(size, parts, _validate.wide(dtype))))
    _store(dq_ref, row, head, start, size, inside, parts, dq)


def _backward_keys(
    q_ref, k_ref, v_ref, grad_ref, lse_ref, delta_ref, first_ref, end_ref, dk_ref, dv_ref,
    *, dim: int, scale: float, blocks: Blocks, interpret: bool,
):  # fmt: skip
    """Grid (blocks of keys, B K): goes through the query heads of a key head, and through their queries."""
    tokens, heads = q_ref.shape[1:3]
    sources, key_heads = k_ref.shape[1:3]
    size, dtype, group, wide = blocks.columns, q_ref.dtype, heads // key_heads, _validate.wide(q_ref.dtype)
    start, row = _pallas.program_id(0) * size, _pallas.program_id(1) // key_heads
    key_head = _pallas.program_id(1) % key_heads
    parts, inside = _parts(dim), start + jnp.arange(size) < sources
    interval = _interval(first_ref, end_ref, row, start, size, inside, tokens)
    k, v = (_load(ref, row, key_head, start, size, inside, parts) for ref in (k_ref, v_ref))

    def of_head(i, sums):
        head = key_head * group + i

        def step(first_query, exists, seen, sums):
            dk, dv = sums[: len(parts)], sums[len(parts) :]
            q, grad = (_load(ref, row, head, first_query, blocks.rows, exists, parts) for ref in (q_ref, grad_ref))
            queries = _pallas.span(first_query, blocks.rows)
            lse, delta = (_pallas.load(ref, (row, head, queries), exists)[None, :] for ref in (lse_ref, delta_ref))
            p = _pallas.exp2((_products(k, q) * scale - lse) * _pallas.LOG2_E, interpret=interpret)
            ds = p * ((_products(v, grad) - delta) * scale)
            if seen is not None:
                p, ds = jnp.where(seen, p, 0), jnp.where(seen, ds, 0)
            return *_plus(dk, ds.astype(dtype), q), *_plus(dv, p.astype(dtype), grad)

        return _walk(interval, blocks.rows, step, sums)

    sums = jax.lax.fori_loop(0, group, of_head, tuple(2 * _zeros(size, parts, wide)))
    _store(dk_ref, row, key_head, start, size, inside, parts, sums[: len(parts)])
    _store(dv_ref, row, key_head, start, size, inside, parts, sums[len(parts) :])
