"""rms_norm's kernels as compiled for the GPU at hand, against float64; skipped without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import shapes


def has_gpu():
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU")]

SHAPES = [(rows, text.hidden) for text in shapes.TEXT.values() for rows in (1, 7, 8192)]
SHAPES += [(33, width) for width in (*shapes.AWKWARD_WIDTHS, shapes.VISION.embed, 29_568)]


def value_and_gradients(norm):
    def both(x, weight, grad):
        out, pullback = jax.vjp(norm, x, weight)
        return out, *pullback(grad)

    return jax.jit(both)


def truth(x, weight, grad, offset):
    """In float64 numpy: out, dx, dweight."""
    x, weight, grad = (np.asarray(a, np.float64) for a in (x, weight, grad))
    inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    g = grad * (offset + weight)
    dx = inverse * (g - x * inverse**2 * np.mean(g * x, axis=-1, keepdims=True))
    return x * inverse * (offset + weight), dx, np.sum(grad * x * inverse, axis=0)


def plain(x, weight, *, casting, offset):
    """The formula as a Flax script has it."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    if casting == "llama":
        return normed.astype(x.dtype) * (offset + weight)
    return (normed * (offset + weight.astype(jnp.float32))).astype(x.dtype)


@pytest.mark.parametrize("casting, offset", [("llama", 0.0), ("gemma", 1.0)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, casting, offset):
    """Values and gradients: at most 1.5 times as far from float64 as the plain formula; the same numbers twice."""
    rng = np.random.default_rng(0)
    x, grad = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    weight = jnp.asarray(1 + 0.3 * rng.normal(size=shape[-1:]), dtype)
    run = value_and_gradients(functools.partial(pk.rms_norm, casting=casting, offset=offset, implementation="triton"))
    got, again = run(x, weight, grad), run(x, weight, grad)
    formula = value_and_gradients(functools.partial(plain, casting=casting, offset=offset))(x, weight, grad)
    for found, repeated, other, want in zip(got, again, formula, truth(x, weight, grad, offset), strict=True):
        assert (found == repeated).all()
        error, allowed = (np.sqrt(np.mean((np.asarray(a, np.float64) - want) ** 2)) for a in (found, other))
        assert error <= 1.5 * allowed + 2e-6 * np.max(np.abs(want))


def test_more_than_two_to_the_31_elements():
    """Addresses past 2^31 elements: the last rows come out as they do on their own."""
    rows, width = 2**31 // 1536 + 64, 1536
    x = (
        jnp.ones((rows, width), jnp.bfloat16)
        .at[-2:]
        .set(jax.random.normal(jax.random.key(0), (2, width), jnp.bfloat16))
    )
    run = value_and_gradients(functools.partial(pk.rms_norm, implementation="triton"))
    weight = jnp.linspace(0.5, 1.5, width, dtype=jnp.bfloat16)
    out, dx, _ = run(x, weight, x)
    last, dlast, _ = run(x[-2:], weight, x[-2:])
    assert (out[-2:] == last).all() and (dx[-2:] == dlast).all()
    assert (out[0] == out[-3]).all()
