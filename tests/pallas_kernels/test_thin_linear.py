"""norm_linear and linear_add: the kernel and XLA's against numpy in float64."""

import functools
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import shapes

sys.path.append(str(Path(__file__).parent))
from lowered import triton_calls

thin = importlib.import_module("pallas_kernels.thin_linear")

OPS = {
    "norm_linear": (pk.norm_linear, ("x", "norm_weight", "kernel", "bias")),
    "norm_linear without bias": (pk.norm_linear, ("x", "norm_weight", "kernel")),
    "linear_add": (pk.linear_add, ("x", "kernel", "residual")),
}


def operands(names, rows, depth, width, dtype="float32"):
    rng = np.random.default_rng(0)
    made = {
        "x": 3 * rng.normal(size=(rows, depth)),
        "norm_weight": 1 + 0.3 * rng.normal(size=depth),
        "kernel": rng.normal(size=(depth, width)) / depth**0.5,
        "bias": rng.normal(size=width),
        "residual": rng.normal(size=(rows, width)),
    }
    return [jnp.asarray(made[name], dtype) for name in names]


def truth(names, *arrays):
    """In float64, with nothing rounded in between."""
    given = {name: np.asarray(array, np.float64) for name, array in zip(names, arrays, strict=True)}
    x = given["x"]
    if "norm_weight" in given:
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * given["norm_weight"]
    return x @ given["kernel"] + given.get("bias", 0) + given.get("residual", 0)


def distance(got, want):
    return np.max(np.abs(np.asarray(got, np.float64) - want)) / max(np.max(np.abs(want)), 1)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "rows, depth, width, dtype",
    [
        (1, 100, 36, "float32"),
        (2, 128, 64, "bfloat16"),
        (3, 64, 50, "float16"),
        (8, 70, 90, "bfloat16"),
        (16, 128, 64, "float16"),
        (17, 300, 34, "float32"),
    ],
)
def test_against_float64(op, rows, depth, width, dtype):
    """Even and odd widths, one turn and several, every dtype; XLA's is the truth that others are measured by."""
    function, names = OPS[op]
    args = operands(names, rows, depth, width, dtype)
    want = truth(names, *args)
    tolerance = 1e-5 if dtype == "float32" else 4 * float(jnp.finfo(dtype).eps)
    for how in ("xla", "interpret"):
        got = jax.jit(functools.partial(function, implementation=how))(*args)
        assert got.dtype == dtype and distance(got, want) < tolerance


def test_large_float16():
    """x * norm_weight past the largest float16, before the norm's factor brings it back; by the tensor cores' kernel."""
    x, weight, kernel = operands(("x", "norm_weight", "kernel"), 5, 64, 32, "float16")
    args = 1000 * x, 100 * weight, kernel / 100
    want = truth(("x", "norm_weight", "kernel"), *args)
    assert distance(jax.jit(functools.partial(pk.norm_linear, implementation="interpret"))(*args), want) < 4e-3


# ---- choice and lowering ---------------------------------------------------------------------------------------------


def abstract(names, rows, depth, width, dtype="bfloat16"):
    """As `operands`, shapes alone."""
    row, column = (rows, depth), (width,)
    sizes = {"x": row, "norm_weight": (depth,), "kernel": (depth, width), "bias": column, "residual": (rows, width)}
    return [jax.ShapeDtypeStruct(sizes[name], dtype) for name in names]


@pytest.mark.parametrize("rows, kernels", [(1, 1), (16, 1), (17, 0)])
def test_none_takes_the_kernel_for_few_rows(rows, kernels):
    """On a GPU, and a small weight; and never for a CPU."""
    for function, names in OPS.values():
        assert triton_calls(function, *abstract(names, rows, 8960, 1536)) == 0
        args = abstract(names, rows, 128, 64)
        assert triton_calls(function, *args) == kernels
        assert "triton" not in jax.jit(function).lower(*args).as_text()


@pytest.mark.parametrize("rows, dtype", [(1, "bfloat16"), (16, "bfloat16"), (16, "float16"), (16, "float32")])
@pytest.mark.parametrize("size", shapes.TEXT)
def test_lowers_at_real_shapes(size, rows, dtype):
    """Each becomes one Triton call at the models' shapes."""
    text = shapes.TEXT[size]
    heads, pairs = text.heads * text.head_dim, 2 * text.kv_heads * text.head_dim
    for op, depth, width in (
        ("norm_linear", text.hidden, heads + pairs),
        ("linear_add", heads, text.hidden),
        ("linear_add", text.intermediate, text.hidden),
    ):
        function, names = OPS[op]
        args = abstract(names, rows, depth, width, dtype)
        assert triton_calls(functools.partial(function, implementation="triton"), *args) == 1


def test_on_a_mesh_none_is_xla():
    """A kernel would gather the weight; XLA's product leaves it where it is."""
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices("cpu")[:2])
    with jax.set_mesh(mesh):
        assert not thin.takes_kernels(1, jnp.ones((1, 8)))
    assert thin.takes_kernels(1, jnp.ones((1, 8)))
