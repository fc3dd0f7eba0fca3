"""Attention over full scores in float64, and what its tests share."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

SEGMENTS = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2], [1] * 9, [0] * 9, [1, 1, 2, 3, 3, 3, 0, 0, 0]])


def data(batch=4, tokens=9, sources=9, heads=4, key_heads=2, dim=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    sizes = ((tokens, heads), (sources, key_heads), (sources, key_heads), (tokens, heads))
    return [jnp.asarray(rng.normal(size=(batch, *size, dim)), dtype) for size in sizes]  # q, k, v, cotangent


def reference(q, k, v, grad, segment_ids=None, kv_segment_ids=None, *, causal=False):
    """Returns out, dq, dk, dv from all scores at once, in float64 numpy."""
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    (batch, tokens, _, dim), sources, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    repeated_k, repeated_v = (np.repeat(x, group, axis=2) for x in (k, v))
    mask = np.ones((batch, tokens, sources), bool)
    if causal:
        mask &= np.tri(tokens, sources, sources - tokens, dtype=bool)
    if segment_ids is not None:
        queries, keys = (
            np.asarray(x) for x in (segment_ids, segment_ids if kv_segment_ids is None else kv_segment_ids)
        )
        mask &= (queries[:, :, None] == keys[:, None]) & (queries != 0)[:, :, None]
    scores = np.einsum("btnd,bsnd->bnts", q, repeated_k) * dim**-0.5
    p = np.exp(np.where(mask[:, None], scores, -np.inf) - scores.max(axis=-1, keepdims=True))
    p /= np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnd->btnd", p, repeated_v)
    dp = np.einsum("btnd,bsnd->bnts", grad, repeated_v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * dim**-0.5
    dk, dv = np.einsum("bnts,btnd->bsnd", ds, q), np.einsum("bnts,btnd->bsnd", p, grad)
    dk, dv = (x.reshape(batch, sources, -1, group, dim).sum(axis=3) for x in (dk, dv))
    return out, np.einsum("bnts,bsnd->btnd", ds, repeated_k), dk, dv


def root_mean_square_error(got, want):
    return np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2))


def collectives(compiled):
    return re.findall(r"\b(all-gather|all-reduce|all-to-all|collective-permute)(?=\()", compiled.as_text())


def gradients(run, **options):
    """Returns a jitted function of q, k, v, a cotangent and segment ids that computes out, dq, dk, dv of run(q, k, v)."""

    def value_and_gradients(q, k, v, grad, *ids):
        named = dict(zip(("segment_ids", "kv_segment_ids"), ids, strict=False))
        out, pullback = jax.vjp(functools.partial(run, **named, **options), q, k, v)
        return out, *pullback(grad)

    return jax.jit(value_and_gradients)


def assert_close(got, want, tolerance=2e-6):
    """Compares largest differences, relative to the largest element or 1."""
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.max(np.abs(g - w), initial=0) <= tolerance * max(np.max(np.abs(w), initial=0), 1)
