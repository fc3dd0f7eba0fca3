"""Rotary position embedding: rope (one position a token) and mrope (three: time, height, width)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import _validate


def rope(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rotates each pair (x[i], x[i + D/2]) of a head by its token's i-th angle: the half-split layout of Llama and Qwen.

        out[..., : D/2] = x1 cos - x2 sin        x1, x2 = x[..., : D/2], x[..., D/2 :]
        out[..., D/2 :] = x2 cos + x1 sin

    Args:
        q: [B, T, N, D], float.
        k: [B, T, K, D], float.
        cos: [B, T, D/2], float. Constants: no gradient flows into cos and sin.
        sin: [B, T, D/2], float.
        implementation: None or "xla".

    Returns:
        (q, k), rotated, in their own dtypes; the arithmetic is float32. Backward keeps cos and sin only: it is the rotation
        by the opposite angle.

    Raises:
        ValueError: a shape that does not fit, an odd D, a dtype that is not floating.
        NotImplementedError: an implementation that does not exist yet.

    Source: Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import rope
        >>> x = jnp.ones((1, 1, 1, 2))
        >>> rope(x, x, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1)))[0].tolist()  # a quarter turn
        [[[[-1.0, 1.0]]]]
    """
    _check("rope", implementation, q, k, cos, sin, tables=())
    return _rotate(q, k, jax.lax.stop_gradient(cos), jax.lax.stop_gradient(sin))


def mrope(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    sections: Sequence[int],
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """rope with three positions a token, as in Qwen2-VL: the i-th section of frequencies turns with the i-th position.

    Args:
        q: [B, T, N, D], float.
        k: [B, T, K, D], float.
        cos: [3, B, T, D/2], float: tables for time, height and width. Constants: no gradient flows into cos and sin.
        sin: [3, B, T, D/2], float.
        sections: three ints that sum to D/2; (16, 24, 24) in Qwen2-VL.
        implementation: None or "xla".

    Returns:
        (q, k), rotated, in their own dtypes; the arithmetic is float32. Backward keeps nothing but the angles in use.

    Raises:
        ValueError: a shape or sections that do not fit, an odd D, a dtype that is not floating.
        NotImplementedError: an implementation that does not exist yet.

    Source: Wang et al. 2024, Qwen2-VL, https://arxiv.org/abs/2409.12191

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels import mrope
        >>> x, cos = jnp.ones((1, 5, 1, 8)), jnp.ones((3, 1, 5, 4))
        >>> bool((mrope(x, x, cos, 0 * cos, (2, 1, 1))[0] == x).all())  # no angle, no rotation
        True
    """
    _check("mrope", implementation, q, k, cos, sin, tables=(3,))
    sections = tuple(int(section) for section in sections)
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != q.shape[-1] // 2:
        raise ValueError(
            f"mrope: sections is {sections}; expected three ints >= 0 that sum to D/2 = {q.shape[-1] // 2}"
        )
    cos, sin = (_by_section(jax.lax.stop_gradient(table), sections) for table in (cos, sin))
    return _rotate(q, k, cos, sin)


def _check(op, implementation, q, k, cos, sin, tables):
    _validate.implementation_exists(op, implementation)
    _validate.floating(op, q=q, k=k, cos=cos, sin=sin)
    if q.ndim != 4 or q.shape[-1] % 2:
        raise ValueError(f"{op}: q has shape {q.shape}; expected [B, T, N, D] with an even D")
    batch, tokens, _, dim = q.shape
    if k.ndim != 4:
        raise ValueError(f"{op}: k has shape {k.shape}; expected [B, T, K, D]")
    _validate.shape(op, "k", k.shape, (batch, tokens, k.shape[2], dim))
    _validate.shape(op, "cos", cos.shape, (*tables, batch, tokens, dim // 2))
    _validate.shape(op, "sin", sin.shape, (*tables, batch, tokens, dim // 2))


# ---- XLA implementation -----------------------------------------------------------------------------------------------


def _by_section(tables: jax.Array, sections: tuple[int, int, int]) -> jax.Array:
    """[3, B, T, D/2] -> [B, T, D/2]: each frequency from the table of its section."""
    time, height, _ = sections
    ends = (0, time, time + height, tables.shape[-1])
    return jnp.concatenate([tables[axis, ..., ends[axis] : ends[axis + 1]] for axis in range(3)], axis=-1)


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    wide = jnp.promote_types(_validate.wide(x.dtype), cos.dtype)
    cos, sin = (table.astype(wide)[:, :, None, :] for table in (cos, sin))
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def _rotate(q, k, cos, sin):
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _rotate_forward(q, k, cos, sin):
    return _rotate(q, k, cos, sin), (cos, sin)


def _rotate_backward(saved, grads):
    cos, sin = saved
    dq, dk = (_turn(grad, cos, -sin) for grad in grads)
    return dq, dk, jnp.zeros_like(cos), jnp.zeros_like(sin)


_rotate.defvjp(_rotate_forward, _rotate_backward)
