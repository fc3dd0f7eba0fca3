"""Compares norm_linear, norm_swiglu and linear_add with float64 numpy, for the kernels and for XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import _pallas, shapes
from tests._support.lowered import lowered_for_cuda, triton_calls

OPS = {
    "norm_linear": (pk.norm_linear, ("x", "norm_weight", "weight", "bias")),
    "norm_linear without bias": (pk.norm_linear, ("x", "norm_weight", "weight")),
    "norm_swiglu": (pk.norm_swiglu, ("x", "norm_weight", "weights")),
    "linear_add": (pk.linear_add, ("x", "weight", "residual")),
}


def operands(names, rows, depth, width, dtype="float32"):
    rng = np.random.default_rng(0)
    arrays = {
        "x": 3 * rng.normal(size=(rows, depth)),
        "norm_weight": 1 + 0.3 * rng.normal(size=depth),
        "weight": rng.normal(size=(width, depth)) / depth**0.5,
        "weights": rng.normal(size=(2, width, depth)) / depth**0.5,
        "bias": rng.normal(size=width),
        "residual": rng.normal(size=(rows, width)),
    }
    return [jnp.asarray(arrays[name], dtype) for name in names]


def truth(names, *arrays):
    """Computes the operation in float64, without intermediate rounding."""
    operands = {name: np.asarray(array, np.float64) for name, array in zip(names, arrays, strict=True)}
    x = operands["x"]
    if "norm_weight" in operands:
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * operands["norm_weight"]
    if "weights" in operands:
        gate, up = x @ operands["weights"].swapaxes(1, 2)
        return gate / (1 + np.exp(-gate)) * up
    return x @ operands["weight"].T + operands.get("bias", 0) + operands.get("residual", 0)


def distance(got, want):
    return np.max(np.abs(np.asarray(got, np.float64) - want)) / max(np.max(np.abs(want)), 1)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "rows, depth, width, dtype",
    [
        (1, 100, 33, "float32"),
        (1, 2000, 33, "bfloat16"),
        (1, 512, 1, "float16"),
        (2, 128, 64, "bfloat16"),
        (3, 64, 50, "float16"),
        (8, 70, 90, "bfloat16"),
        (16, 128, 64, "float16"),
        (17, 300, 34, "float32"),
    ],
)
def test_output_matches_numpy(op, rows, depth, width, dtype):
    """Covers even and odd widths, one and several iterations, one and several rows, and every dtype."""
    function, names = OPS[op]
    args = operands(names, rows, depth, width, dtype)
    want = truth(names, *args)
    tolerance = 1e-5 if dtype == "float32" else 4 * float(jnp.finfo(dtype).eps)
    for implementation in ("xla", "interpret"):
        got = jax.jit(functools.partial(function, implementation=implementation))(*args)
        assert got.dtype == dtype and distance(got, want) < tolerance


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_of_the_depth_sum_to_the_whole(rows):
    """As on two devices, which each add half of the residual."""
    x, weight, residual = operands(("x", "weight", "residual"), rows, 128, 48)
    want = truth(("x", "weight", "residual"), x, weight, residual)
    for implementation in ("xla", "interpret"):
        add = functools.partial(pk.linear_add, residual_scale=0.5, implementation=implementation)
        parts = [add(x[:, part], weight[:, part], residual) for part in (slice(64), slice(64, 128))]
        assert distance(parts[0] + parts[1], want) < 1e-5


def test_large_float16_products_do_not_overflow():
    """x * norm_weight may exceed the largest float16 before it is divided by rms(x)."""
    names = "x", "norm_weight", "weight"
    for rows in (1, 5):
        x, norm_weight, weight = operands(names, rows, 64, 32, "float16")
        args = 1000 * x, 100 * norm_weight, weight / 100
        got = jax.jit(functools.partial(pk.norm_linear, implementation="interpret"))(*args)
        assert distance(got, truth(names, *args)) < 4e-3


# ---- choice and lowering ---------------------------------------------------------------------------------------------


def abstract(names, rows, depth, width, dtype="bfloat16"):
    """Returns the shapes of `operands`."""
    sizes = {
        "x": (rows, depth),
        "norm_weight": (depth,),
        "weight": (width, depth),
        "weights": (2, width, depth),
        "bias": (width,),
        "residual": (rows, width),
    }
    return [jax.ShapeDtypeStruct(sizes[name], dtype) for name in names]


@pytest.mark.parametrize("op", OPS)
def test_none_picks_kernels_for_few_rows(op):
    """A single row takes one kernel; up to 16 rows with a small weight take separate kernels for matmul, norm and gate."""
    function, names = OPS[op]
    norm, gate = "norm_weight" in names, "weights" in names
    for rows, depth, width, kernels in (
        (1, 8960, 1536, 1),
        (1, 128, 64, 1),
        (16, 128, 64, 1 + norm + gate),
        (16, 8960, 1536, norm),
        (17, 128, 64, norm),
    ):
        args = abstract(names, rows, depth, width)
        assert triton_calls(function, *args) == kernels, (rows, depth, width)
        assert "triton" not in jax.jit(function).lower(*args).as_text()  # for a CPU


@pytest.mark.parametrize(
    "rows, dtype", [(1, "bfloat16"), (1, "float32"), (16, "bfloat16"), (16, "float16"), (16, "float32")]
)
@pytest.mark.parametrize("size", shapes.TEXT)
def test_kernels_lower_at_real_shapes(size, rows, dtype):
    """At the models' shapes, a single row takes one launch; several rows take a norm, a matmul and a gate."""
    text = shapes.TEXT[size]
    heads, pairs = text.heads * text.head_dim, 2 * text.kv_heads * text.head_dim
    for op, depth, width, launches in (
        ("norm_linear", text.hidden, heads + pairs, 2),
        ("norm_linear without bias", text.hidden, text.vocab, 2),
        ("norm_swiglu", text.hidden, text.intermediate, 3),
        ("linear_add", heads, text.hidden, 1),
        ("linear_add", text.intermediate, text.hidden, 1),
    ):
        function, names = OPS[op]
        args = abstract(names, rows, depth, width, dtype)
        calls = triton_calls(functools.partial(function, implementation="triton"), *args)
        assert calls == (1 if rows == 1 else launches)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_none_picks_xla_on_explicit_meshes(op, devices):
    """XLA leaves the outputs sharded, whereas a kernel would gather the weight."""
    function, names = OPS[op]
    assert "one_row" in str(jax.make_jaxpr(function)(*operands(names, 1, 16, 8)))  # for a GPU
    mesh = jax.make_mesh((devices,), ("tensor",), (AxisType.Explicit,), devices=jax.devices("cpu")[:devices])
    with jax.set_mesh(mesh):
        args = operands(names, 1, 16, 8)
        outputs = {"weight": P("tensor", None), "weights": P(None, "tensor", None), "bias": P("tensor")}
        outputs["residual"] = P(None, "tensor")
        sharded = [
            jax.device_put(x, NamedSharding(mesh, outputs.get(n, P()))) for n, x in zip(names, args, strict=True)
        ]
        out = jax.jit(function)(*sharded)
        assert jax.typeof(out).sharding.spec == P(None, "tensor")
        assert distance(out, truth(names, *args)) < 1e-5
        assert "one_row" not in str(jax.make_jaxpr(function)(*sharded))


def test_zero_depth_returns_the_residual():
    """An empty sum gives the residual."""
    out = pk.linear_add(jnp.zeros((1, 0)), jnp.zeros((3, 0)), jnp.ones((1, 3)))
    assert out.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("op", OPS)
def test_none_picks_kernels_inside_a_shard_map(op):
    """The arrays are local there, on a mesh of any size."""
    function, names = OPS[op]
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices("cpu")[:2])
    run = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P())
    assert "one_row" in str(jax.make_jaxpr(run)(*operands(names, 1, 16, 8)))


@pytest.mark.parametrize("op", OPS)
def test_outputs_sharded_inside_a_checked_shard_map(op):
    """Regression: with a replicated x and a sharded weight, the kernel's result did not declare that it varies, which was a
    TypeError, on a CPU as well.
    """
    function, names = OPS[op]
    args = operands(names, 1, 16, 8)
    outputs = {"weight": P("data"), "weights": P(None, "data"), "bias": P("data"), "residual": P(None, "data")}
    specs = tuple(outputs.get(name, P()) for name in names)
    split = functools.partial(jax.shard_map, function, in_specs=specs, out_specs=P(None, "data"))
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices("cpu")[:2])
    assert distance(jax.jit(split(mesh=mesh))(*args), truth(names, *args)) < 1e-5
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    assert lowered_for_cuda(lambda *args: split()(*args), *shapes, mesh_shape=(2,)).count(_pallas.TRITON_CALL) == 1


@pytest.mark.parametrize("op", ["norm_linear", "norm_swiglu"])
def test_none_picks_xla_for_rows_wider_than_the_norm_supports(op):
    """Regression: with several rows and a small weight, lowering for a GPU raised a ValueError of rms_norm."""
    function, names = OPS[op]
    assert triton_calls(function, *abstract(names, 2, 65_537, 4)) == 0
    assert triton_calls(function, *abstract(names, 1, 65_537, 4)) == 1
