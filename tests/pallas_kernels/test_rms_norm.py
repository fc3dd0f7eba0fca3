"""Checks where the castings of rms_norm round, and how operations over rows, which share this code, run on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import _pallas
from tests._support.lowered import lowered_for_cuda
from tests._support.ops import close

kernel = functools.partial(pk.rms_norm, implementation="interpret")
xla = functools.partial(pk.rms_norm, implementation="xla")


def inputs(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, grad = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    return x, jnp.asarray(1 + 0.3 * rng.normal(size=shape[-1:]), dtype), grad


def gradients(norm):
    def value_and_gradients(x, weight, grad):
        out, pullback = jax.vjp(norm, x, weight)
        return out, *pullback(grad)

    return value_and_gradients


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("casting", ["llama", "gemma", "none"])
def test_casting_rounds_where_documented(casting, dtype):
    """Each casting rounds as numpy does step by step, and the kernel agrees to within two ulps."""
    x, weight, _ = inputs(6, 48, dtype=dtype)
    x64, w64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)

    def rounded(value):
        return np.asarray(np.asarray(value, np.float32).astype(dtype), np.float64)

    mean_square = np.mean(rounded(x64 * x64) if casting == "none" else x64 * x64, axis=-1, keepdims=True)
    if casting == "none":
        normed = rounded(x64 * rounded(1 / np.sqrt(rounded(mean_square) + 1e-6)))
        want = rounded(normed * rounded(0.5 + w64))
    else:
        normed = x64 / np.sqrt(mean_square + 1e-6)
        want = rounded((rounded(normed) if casting == "llama" else normed) * (0.5 + w64))
    options = {"offset": 0.5, "casting": casting}
    from_xla, from_kernel = jax.jit(lambda *args: (xla(*args, **options), kernel(*args, **options)))(x, weight)
    assert np.mean(np.asarray(from_xla, np.float64) != want) < 0.02  # float32 sums that round the other way
    close(from_kernel, from_xla, tolerance=2 * float(jnp.finfo(dtype).eps))


# ---- transformations and meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_operands_in_other_layouts_are_resharded(kind):
    """A sharded weight, and an x sharded by columns, are gathered; arrays on no mesh work as well."""
    args = inputs(8, 16)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices("cpu")[:4])
    want = jax.jit(gradients(xla))(*args)
    with jax.set_mesh(mesh):
        for x_spec, weight_spec, grad_spec in ((P("data"), P("data"), P("data")), (P(None, "data"), P(), P())):
            placed = [NamedSharding(mesh, spec) for spec in (x_spec, weight_spec, grad_spec)]
            close(jax.jit(gradients(kernel))(*jax.device_put(args, tuple(placed))), want)
        close(jax.jit(gradients(kernel))(*args), want)


@pytest.mark.parametrize("axes", [{"data", "model"}, {"data"}], ids=["all manual", "one manual"])
def test_results_are_right_inside_a_shard_map(axes):
    """Results and gradients are right inside a user's shard_map over all of the mesh's axes, or over some of them."""
    x, weight, grad = inputs(8, 16)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    specs = {"in_specs": (P("data"), P()), "out_specs": P("data"), "axis_names": axes}
    want = jax.jit(gradients(xla))(x, weight, grad)
    for norm, check in ((kernel, False), (xla, False), (xla, True)):  # the interpreter cannot be checked
        mapped = jax.shard_map(norm, mesh=mesh, **specs, check_vma=check)
        close(jax.jit(gradients(mapped))(x, weight, grad), want)


# ---- lowering for GPUs that this machine does not have ---------------------------------------------------------------


def test_kernels_lower_inside_a_checked_shard_map():
    """Under shard_map(check_vma=True), the default, kernels declare the mesh axes that their results vary over."""

    def value_and_gradients(*args):
        specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
        return gradients(jax.shard_map(pk.rms_norm, mesh=jax.sharding.get_abstract_mesh(), **specs))(*args)

    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 100), (100,)))
    text = lowered_for_cuda(value_and_gradients, x, weight, x, mesh_shape=(4,))
    assert text.count(_pallas.TRITON_CALL) == 2
