"""rms_norm: what its castings round, and the ways to meet a mesh that are the same for all operations over rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import _pallas

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


def close(got, want, tolerance=1e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.max(np.abs(g - w), initial=0) <= tolerance * max(np.max(np.abs(w), initial=0), 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("casting", ["llama", "gemma", "none"])
def test_casting(casting, dtype):
    """Each casting rounds where it says, step by step as numpy does, and the kernel agrees to one unit."""
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
    got, of_kernel = jax.jit(lambda *args: (xla(*args, **options), kernel(*args, **options)))(x, weight)
    assert np.mean(np.asarray(got, np.float64) != want) < 0.02  # float32 sums on the other side of a rounding
    close(of_kernel, got, tolerance=2 * float(jnp.finfo(dtype).eps))


# ---- transformations and meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_operands_in_another_layout(kind):
    """A sharded weight is gathered, an x sharded by columns too; arrays on no mesh are taken as they are."""
    args = inputs(8, 16)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices("cpu")[:4])
    want = jax.jit(gradients(xla))(*args)
    with jax.set_mesh(mesh):
        for x_spec, weight_spec, grad_spec in ((P("data"), P("data"), P("data")), (P(None, "data"), P(), P())):
            placed = [NamedSharding(mesh, spec) for spec in (x_spec, weight_spec, grad_spec)]
            close(jax.jit(gradients(kernel))(*jax.device_put(args, tuple(placed))), want)
        close(jax.jit(gradients(kernel))(*args), want)


@pytest.mark.parametrize("axes", [{"data", "model"}, {"data"}], ids=["all manual", "one manual"])
def test_inside_a_shard_map(axes):
    """Inside a user's shard_map, with all of the mesh's axes or with some of them."""
    x, weight, grad = inputs(8, 16)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    specs = {"in_specs": (P("data"), P()), "out_specs": P("data"), "axis_names": axes}
    want = jax.jit(gradients(xla))(x, weight, grad)
    for norm, check in ((kernel, False), (xla, False), (xla, True)):  # the interpreter cannot be checked
        mapped = jax.shard_map(norm, mesh=mesh, **specs, check_vma=check)
        close(jax.jit(gradients(mapped))(x, weight, grad), want)


# ---- lowering for GPUs that are not there ----------------------------------------------------------------------------


def lowered_for_cuda(function, *args, device_kind="NVIDIA H200", mesh_shape=(1,), wrap=lambda function, mesh: function):
    """StableHLO of `function` for a kind of GPU, made without one; `args` are shapes and dtypes."""
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh(mesh_shape, ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    args = [jax.ShapeDtypeStruct(*arg) for arg in args]
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(wrap(function, mesh)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_lowers_inside_a_checked_shard_map():
    """shard_map(check_vma=True), its default: kernels say over which mesh axes their results vary."""

    def wrap(function, mesh):
        return gradients(jax.shard_map(function, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")))

    x, weight = ((64, 100), jnp.bfloat16), ((100,), jnp.bfloat16)
    text = lowered_for_cuda(pk.rms_norm, x, weight, x, mesh_shape=(4,), wrap=wrap)
    assert text.count(_pallas.TRITON_CALL) == 2
