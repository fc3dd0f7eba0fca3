"""Operations over rows and elements (norms, activations, RoPE) against their formulas, evaluated in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.registry import OPERATIONS
from tests._support.ops import OPS

CASES = {
    name: (functools.partial(op.run, implementation=None), op.formula, op.make)
    for name, op in OPS.items()
    if op.operation.family in ("norm", "activation")
}
CASES["rms_norm xla"], CASES["rms_norm kernel"] = (
    (functools.partial(pk.rms_norm, implementation=implementation), OPS["rms_norm"].formula, OPS["rms_norm"].make)
    for implementation in ("xla", "interpret")
)
SECTIONS = (2, 1, 1)
ANGLES = np.random.default_rng(1).uniform(0, 6, (3, 3, 5, sum(SECTIONS)))


def values_and_gradients(functions, args, dtype=None):
    """Returns each function's results and the gradients for a random cotangent (rounded to `dtype`), as float64 arrays."""

    def value_and_gradients(function, *args):
        out, pullback = jax.vjp(function, *args)
        rng = np.random.default_rng(1)
        cotangent = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype or x.dtype).astype(x.dtype), out)
        return jax.tree.leaves((out, pullback(cotangent)))

    results = jax.jit(lambda *args: [value_and_gradients(function, *args) for function in functions])(*args)
    return [[np.asarray(x, np.float64) for x in arrays] for arrays in results]


def error(got, want):
    """Returns the root mean square error, relative to the largest entry."""
    return float(np.sqrt(np.mean((got - want) ** 2)) / max(np.max(np.abs(want)), 1e-30))


def check_as_exact_as_formula(run, formula, args):
    """Asserts float32 rounding error; below float32, at most 1.5 times the error of the formula at the same dtype."""
    with jax.enable_x64(True):
        (truth,) = values_and_gradients([formula], [np.asarray(x, np.float64) for x in args], args[0].dtype)
    if args[0].dtype == jnp.float32:
        (got,) = values_and_gradients([run], args)
        allowed = [1e-6] * len(got)
    else:
        got, plain = values_and_gradients([run, formula], args)
        allowed = [1.5 * error(x, want) + 1e-7 for x, want in zip(plain, truth, strict=True)]
    for actual, want, limit in zip(got, truth, allowed, strict=True):
        assert error(actual, want) <= limit


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape, dtype", [((2, 3, 100), "float32"), ((16, 1536), "bfloat16")], ids=str)
def test_values_and_gradients_equal_the_formula(name, shape, dtype):
    """Values and gradients of each operation equal those of its formula, at an odd and at a real width."""
    run, formula, make = CASES[name]
    check_as_exact_as_formula(run, formula, make(shape[:-1], shape[-1], dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotations_equal_the_formula(dtype):
    """rope and mrope equal the rotate-half formula; each section of mrope follows its own position."""
    args = [jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, heads, 8)), dtype) for heads in (4, 2)]
    cos, sin = jnp.cos(ANGLES).astype(jnp.float32), jnp.sin(ANGLES).astype(jnp.float32)

    def rope(q, k):
        return OPERATIONS["rope"].formula(q, k, jnp.cos(ANGLES[0]), jnp.sin(ANGLES[0]))

    def mrope(q, k):
        return OPERATIONS["mrope"].formula(q, k, jnp.cos(ANGLES), jnp.sin(ANGLES), sections=SECTIONS)

    check_as_exact_as_formula(lambda q, k: pk.rope(q, k, cos[0], sin[0]), rope, args)
    check_as_exact_as_formula(lambda q, k: pk.mrope(q, k, cos, sin, SECTIONS), mrope, args)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm", "swiglu", "quick_gelu"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1)], ids=str)
def test_smallest_shapes_give_finite_results(name, shape):
    """Zero rows, and rows of one number, give finite results and gradients."""
    run, _, make = CASES[name]
    (results,) = values_and_gradients([run], make(shape[:-1], shape[-1]))
    assert all(np.isfinite(x).all() for x in results)


def test_layer_norm_is_accurate_for_a_large_mean():
    """A mean of 1000 standard deviations costs no precision beyond the float32 rounding of the inputs."""
    x = 1000 + np.random.default_rng(0).normal(size=(4, 1280)).astype(np.float32)
    want = (x - x.mean(-1, keepdims=True, dtype=np.float64)) / x.std(-1, keepdims=True, dtype=np.float64)
    got = pk.layer_norm(jnp.asarray(x), jnp.ones(1280), jnp.zeros(1280))
    assert np.max(np.abs(got - want)) < 1e-3


def test_backward_saves_inputs_only():
    """A bfloat16 activation or norm saves its inputs for the backward pass, and no float32 copy of a full array."""
    x, vector = (jnp.asarray(np.ones(shape), jnp.bfloat16) for shape in ((8, 64), 64))
    for run, args in (
        (pk.swiglu, (x, x)),
        (pk.quick_gelu, (x,)),
        (pk.rms_norm, (x, vector)),
        (pk.layer_norm, (x, vector, vector)),
    ):
        pullback = jax.eval_shape(lambda *args, run=run: jax.vjp(run, *args)[1], *args)
        assert not [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= x.size and leaf.dtype == jnp.float32]
