"""FlashAttention-4 through the optional package fa4-jax. This file and `_fa4_cache` alone import it.

The package wraps Tri Dao's CuTe kernels, which reach 60 to 65 % of the peak of an H200, in three JAX primitives. `attention`
needs the forward pass and the backward pass separately, for a gradient rule that all implementations share, and so uses the
primitives instead of the package's functions. The kernels compile when a program is lowered, in each process unless
`_fa4_cache` keeps them.

Rows that hold segments become one long sequence that is cut at their starts ("varlen"). The cuts are data: one kernel serves
every packing. Other segment ids are compared in the kernel, block by block, without skipping any.
"""

import dataclasses
import functools
import importlib.util
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _fa4_cache, _pallas, _sharding
from pallas_kernels.segments import Segments, clear_in_place, clear_outside

VERSION = "0.1"  # of fa4-jax, as in pyproject.toml: its primitives are not a public interface, and may change
BACKEND = "cute"  # the kernels; fa4-jax also has "reference", plain JAX for any platform
DTYPES = jnp.bfloat16, jnp.float16
MIN_QUERIES = 128  # of a row, for None to pick it: the backward pass launches three to five kernels


def unsupported_reason(q: jax.Array, k: jax.Array) -> str | None:
    """Returns why FlashAttention-4 does not support a call of `attention`, or None if it does."""
    capability = _pallas.compute_capability()
    reasons = {
        f"q has dtype {q.dtype}; expected bfloat16 or float16": q.dtype not in DTYPES,
        f"D is {q.shape[-1]}; expected a multiple of 8 up to 128": q.shape[-1] % 8 or q.shape[-1] > 128,
        f"the GPU has compute capability {capability}; expected at least 9.0": capability is None or capability < 9.0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or import_problem()


@functools.cache
def import_problem() -> str | None:
    """Returns why fa4-jax cannot be used, or None. Warns if it is installed."""
    if importlib.util.find_spec("fa4_jax") is None:
        return "the package fa4-jax is not installed; expected `pip install liger-jax[fa4]`, with Python 3.12 or newer"
    try:
        import fa4_jax

        if not f"{fa4_jax.__version__}.".startswith(f"{VERSION}."):
            raise ImportError(f"its version is {fa4_jax.__version__}; expected {VERSION}")
        import fa4_jax.kernels
        from fa4_jax import MaskMod  # noqa: F401
        from fa4_jax.attention import AttnConfig, fa4_fwd_p, fa4_vjp_p  # noqa: F401

        _fa4_cache.install()
    except Exception as error:  # a broken installation can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"fa4-jax is installed and cannot be used ({reason}); attention uses another implementation", stacklevel=1
        )
        return f"the package fa4-jax cannot be used ({reason})"
    return None


def preferred(q: jax.Array, kv_segmented: bool) -> bool:
    """Returns whether None may pick FlashAttention-4: where it was measured to be faster than cuDNN.

    With segment ids of the keys, our kernels skip what a query cannot see and this one does not: 3.5 ms on an H200, forward
    and backward, for 4 rows of 4096 patches, whether a row is one image or four; ours take 5.0 and 1.5 ms.
    """
    return q.shape[1] >= MIN_QUERIES and not kv_segmented


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
    segments: Segments | None,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns out [B, T, N, D], and the log-sum-exp of the scores [B, N, T].

    Args:
        q, k, v: as in `attention`.
        ids: segment ids of queries and keys; used where `segments` is None. None: a query sees all keys.
        segments: those of queries and keys alike.
        scale, causal: as in `attention`.
    """
    from fa4_jax.attention import fa4_fwd_p

    config, data = _describe(ids, segments, scale, causal, q.shape[1])
    options = {"cfg": config, "need_lse": True}
    if segments is None:
        out, lse = _bind(fa4_fwd_p, q, k, v, *data, **options)
        return out, lse
    out, lse = _bind(fa4_fwd_p, *map(_join_rows, (q, k, v)), *data, **options)
    return clear_in_place(out.reshape(q.shape), segments), lse.reshape(-1, *q.shape[:2]).swapaxes(0, 1)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    grad: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
    segments: Segments | None,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk, dv."""
    from fa4_jax.attention import fa4_vjp_p

    config, data = _describe(ids, segments, scale, causal, q.shape[1])
    if segments is None and ids is not None:
        # The kernel multiplies 0 by the product of each masked pair of `grad` and v, which is infinite if both are large.
        grad, v = (jnp.where(x_ids[:, :, None, None] != 0, x, 0) for x, x_ids in zip((grad, v), ids, strict=True))
    # A kernel of the backward pass accumulates into operands that its results alias. If another operand is a slice, such as
    # that of a scan's layer, XLA (of jax 0.11) fuses the slice into the call and loses the aliases: gradients become wrong.
    q, k, v, out, grad = jax.lax.optimization_barrier((q, k, v, out, grad))
    options = {"cfg": config, "has_d_lse": False}
    if segments is None:
        dq, dk, dv = _bind(fa4_vjp_p, q, k, v, out, lse, grad, *data, **options)
        return dq, dk, dv
    flat_lse = lse.swapaxes(0, 1).reshape(lse.shape[1], -1)
    q_rows, k_rows, v_rows, out_rows, grad_rows = map(_join_rows, (q, k, v, out, grad))
    grads = _bind(fa4_vjp_p, q_rows, k_rows, v_rows, out_rows, flat_lse, grad_rows, *data, **options)
    dq, dk, dv = (clear_outside(dx.reshape(x.shape), segments) for dx, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _bind(primitive: Any, q: jax.Array, *operands: jax.Array, **options: Any) -> list[jax.Array]:
    """Calls a primitive of fa4-jax. In a shard_map, its results would lose the mesh axes that its operands vary over."""
    return [_sharding.varying_as(q, x) for x in primitive.bind(q, *operands, **options)]


def _describe(
    ids: tuple[jax.Array, jax.Array] | None, segments: Segments | None, scale: float, causal: bool, tokens: int
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Returns the configuration of the primitives, and their operands after the arrays that they attend to."""
    from fa4_jax.attention import AttnConfig

    data: tuple[jax.Array, ...] = ()
    mask = None
    if segments is not None:
        offsets, lengths = slot_offsets(segments, tokens)
        data = offsets, offsets, lengths, lengths
    elif ids is not None:
        leaves, mask = jax.tree.flatten(_same_segment()(*(x.astype(jnp.int32) for x in ids)))
        data = tuple(leaves)
    config = AttnConfig(
        causal=causal,
        local=False,
        window=(None, None),
        scale=scale,
        mask=mask,
        backend=BACKEND,
        varlen=segments is not None,
    )
    return config, data


def slot_offsets(segments: Segments, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns where each slot of all rows starts and, last, the number of tokens; and the number of tokens it uses.

    A slot reaches to the start of the next one. So padding belongs to the slot before it, which does not use it, and unused
    slots are empty.
    """
    rows = segments.starts.shape[0]
    starts = jnp.where(segments.starts < 0, tokens, segments.starts) + tokens * jnp.arange(rows)[:, None]
    offsets = jnp.append(starts.ravel(), rows * tokens).astype(jnp.int32)
    return offsets, jnp.maximum(segments.lengths, 0).ravel().astype(jnp.int32)


def _join_rows(x: jax.Array) -> jax.Array:
    """Reshapes [B, T, N, D] to [B T, N, D]."""
    return x.reshape(-1, *x.shape[2:])


@functools.cache
def _same_segment() -> type:
    """Returns fa4-jax's kind of mask for segment ids of queries [B, T] and keys [B, S]."""
    from fa4_jax import MaskMod

    @dataclasses.dataclass(frozen=True)
    class SameSegment(MaskMod):
        query_ids: Any
        key_ids: Any

        def __call__(self, row, head, query, key):
            query_id = self.query_ids[row, query]
            return (query_id == self.key_ids[row, key]) & (query_id != 0)

    return SameSegment
