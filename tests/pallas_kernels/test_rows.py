"""Operations over rows and elements (norms, rotations, gates) against plain formulas, evaluated in float64."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

# ---- the formulas, as a textbook has them; arithmetic in `wide`, the result in the dtype of the inputs ------------------


def wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x, weight, *, offset=0.0):
    normed = wide(x) / jnp.sqrt(jnp.mean(wide(x) ** 2, axis=-1, keepdims=True) + 1e-6)
    return (normed * (offset + wide(weight))).astype(x.dtype)


def add_rms_norm(x, residual, weight):
    return rms_norm(x + residual, weight), x + residual


def layer_norm(x, weight, bias):
    centred = wide(x) - jnp.mean(wide(x), axis=-1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)
    return (normed * wide(weight) + wide(bias)).astype(x.dtype)


def turned(x, cos, sin):
    cos, sin = jnp.tile(wide(cos), 2)[:, :, None], jnp.tile(wide(sin), 2)[:, :, None]
    first, second = jnp.split(wide(x), 2, axis=-1)
    return (wide(x) * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)


def rope(angles, q, k):
    return turned(q, jnp.cos(angles), jnp.sin(angles)), turned(k, jnp.cos(angles), jnp.sin(angles))


def mrope(angles, sections, q, k):
    axis = np.repeat(np.arange(3), sections)  # which of the three positions turns each frequency
    return rope(jnp.stack([angles[a, :, :, i] for i, a in enumerate(axis)], axis=-1), q, k)


# ---- the cases ----------------------------------------------------------------------------------------------------------

SECTIONS = (2, 1, 1)
ANGLES = np.random.default_rng(1).uniform(0, 6, (3, 3, 5, sum(SECTIONS)))


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation, its formula, and the shapes of its differentiable arguments for a row shape and a width."""

    run: Callable
    formula: Callable
    vectors: int  # arguments [D], after those of the full shape
    full: int = 1  # arguments [..., D]


CASES = {
    "rms_norm": Case(functools.partial(pk.rms_norm, implementation="xla"), rms_norm, 1),
    "rms_norm kernel": Case(functools.partial(pk.rms_norm, implementation="interpret"), rms_norm, 1),
    "rms_norm offset": Case(
        functools.partial(pk.rms_norm, offset=1.0, casting="gemma"), functools.partial(rms_norm, offset=1.0), 1
    ),
    "add_rms_norm": Case(pk.add_rms_norm, add_rms_norm, 1, full=2),
    "layer_norm": Case(pk.layer_norm, layer_norm, 2),
    "swiglu": Case(pk.swiglu, lambda g, u: (wide(g) / (1 + jnp.exp(-wide(g))) * wide(u)).astype(g.dtype), 0, full=2),
    "geglu": Case(
        pk.geglu,
        lambda g, u: (
            wide(g) / 2 * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (wide(g) + 0.044715 * wide(g) ** 3))) * wide(u)
        ).astype(g.dtype),
        0,
        full=2,
    ),
    "geglu exact": Case(
        functools.partial(pk.geglu, approximate=False),
        lambda g, u: (wide(g) / 2 * jax.scipy.special.erfc(-wide(g) / 2**0.5) * wide(u)).astype(g.dtype),
        0,
        full=2,
    ),
    "quick_gelu": Case(pk.quick_gelu, lambda x: (wide(x) / (1 + jnp.exp(-1.702 * wide(x)))).astype(x.dtype), 0),
}


def arguments(case, shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    full = [np.round(16 * rng.normal(size=shape)) / 16 for _ in range(case.full)]  # whose sums are exact in bfloat16
    vectors = [1 + 0.3 * rng.normal(size=shape[-1:]) for _ in range(case.vectors)]
    return [jnp.asarray(x, dtype) for x in full + vectors]


def values_and_gradients(functions, args, dtype=None):
    """For each function its results and the pullback of a random cotangent (rounded to `dtype`), as float64 arrays."""

    def both(function, *args):
        out, pullback = jax.vjp(function, *args)
        rng = np.random.default_rng(1)
        cotangent = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype or x.dtype).astype(x.dtype), out)
        return jax.tree.leaves((out, pullback(cotangent)))

    results = jax.jit(lambda *args: [both(function, *args) for function in functions])(*args)
    return [[np.asarray(x, np.float64) for x in arrays] for arrays in results]


def error(got, want):
    """Root of the mean square error, relative to the largest entry."""
    return float(np.sqrt(np.mean((got - want) ** 2)) / max(np.max(np.abs(want)), 1e-30))


def check_as_exact_as_formula(run, formula, args):
    """float32: to rounding. Below: at most 1.5 times as far from float64 as the formula at the same dtype."""
    with jax.enable_x64(True):
        (truth,) = values_and_gradients([formula], [np.asarray(x, np.float64) for x in args], args[0].dtype)
    if args[0].dtype == jnp.float32:
        (got,) = values_and_gradients([run], args)
        allowed = [1e-6] * len(got)
    else:
        got, plain = values_and_gradients([run, formula], args)
        allowed = [1.5 * error(x, want) + 1e-7 for x, want in zip(plain, truth, strict=True)]
    for found, want, limit in zip(got, truth, allowed, strict=True):
        assert error(found, want) <= limit


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape, dtype", [((2, 3, 100), "float32"), ((16, 1536), "bfloat16")], ids=str)
def test_values_and_gradients(name, shape, dtype):
    """Each operation and its gradients equal its formula's, in odd and in real widths."""
    case = CASES[name]
    check_as_exact_as_formula(case.run, case.formula, arguments(case, shape, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotations(dtype):
    """rope and mrope equal the rotate-half formula; each section of mrope follows its own position."""
    args = [jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, heads, 8)), dtype) for heads in (4, 2)]
    cos, sin = jnp.cos(ANGLES).astype(jnp.float32), jnp.sin(ANGLES).astype(jnp.float32)
    check_as_exact_as_formula(lambda q, k: pk.rope(q, k, cos[0], sin[0]), functools.partial(rope, ANGLES[0]), args)
    check_as_exact_as_formula(
        lambda q, k: pk.mrope(q, k, cos, sin, SECTIONS), functools.partial(mrope, ANGLES, SECTIONS), args
    )


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm", "swiglu", "quick_gelu"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1)], ids=str)
def test_smallest_shapes(name, shape):
    """No rows give no results and zero weight gradients; one number is a row."""
    case = CASES[name]
    (results,) = values_and_gradients([case.run], arguments(case, shape, "float32"))
    assert all(np.isfinite(x).all() for x in results)


def test_layer_norm_of_a_large_mean():
    """A mean a thousand times the deviation costs float32 no more than its rounding of the inputs."""
    x = 1000 + np.random.default_rng(0).normal(size=(4, 1280)).astype(np.float32)
    want = (x - x.mean(-1, keepdims=True, dtype=np.float64)) / x.std(-1, keepdims=True, dtype=np.float64)
    got = pk.layer_norm(jnp.asarray(x), jnp.ones(1280), jnp.zeros(1280))
    assert np.max(np.abs(got - want)) < 1e-3


def test_backward_keeps_inputs_only():
    """What a bfloat16 gate or norm saves for backward is its inputs; no float32 copy of a full array."""
    x, vector = (jnp.asarray(np.ones(shape), jnp.bfloat16) for shape in ((8, 64), 64))
    for run, args in (
        (pk.swiglu, (x, x)),
        (pk.quick_gelu, (x,)),
        (pk.rms_norm, (x, vector)),
        (pk.layer_norm, (x, vector, vector)),
    ):
        pullback = jax.eval_shape(lambda *args, run=run: jax.vjp(run, *args)[1], *args)
        assert not [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= x.size and leaf.dtype == jnp.float32]
