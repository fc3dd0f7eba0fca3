"""Residual addition followed by root-mean-square normalisation."""

import jax

from pallas_kernels import _validate
from pallas_kernels.rms_norm import rms_norm


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting: str = "llama",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """s = x + residual -> (rms_norm(s, weight), s).

    Args:
        x: [..., D], float.
        residual: as x, same shape and dtype.
        weight: [D], float.
        eps: as in `rms_norm`.
        offset: as in `rms_norm`.
        casting: as in `rms_norm`.
        implementation: None or "xla". None takes the sum by XLA and the norm as `rms_norm` picks it.

    Returns:
        (normed, s), both [..., D] in x's dtype. Backward keeps s, weight and one float32 a row.

    Raises:
        ValueError: x and residual differ in shape or dtype, or what `rms_norm` raises.
        NotImplementedError: an implementation that does not exist yet.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import add_rms_norm
        >>> normed, total = add_rms_norm(jnp.array([1.0, -1.0]), jnp.array([2.0, -2.0]), jnp.ones(2))
        >>> normed.round(3).tolist(), total.tolist()
        ([1.0, -1.0], [3.0, -3.0])
    """
    op = "add_rms_norm"
    _validate.implementation_exists(op, implementation)
    _validate.floating(op, x=x, residual=residual)
    _validate.same_dtype(op, x=x, residual=residual)
    _validate.shape(op, "residual", residual.shape, x.shape)
    total = x + residual
    return rms_norm(total, weight, eps=eps, offset=offset, casting=casting, implementation=implementation), total
