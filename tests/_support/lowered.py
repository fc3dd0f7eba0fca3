"""Lowers functions for GPUs that this machine does not have, and counts what they run."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import _pallas


def on_gpus(device_kind="NVIDIA H200", mesh_shape=(1,)):
    """Returns a context manager in which programs can be lowered for a kind of GPU."""
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh(mesh_shape, ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def lowered_for_cuda(function, *args, device_kind="NVIDIA H200", mesh_shape=(1,)):
    """Returns the StableHLO of `function` for a kind of GPU; `args` are arrays or their shapes and dtypes."""
    with on_gpus(device_kind, mesh_shape):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def triton_calls(function, *args, device_kind="NVIDIA H200"):
    """Returns the number of Triton kernels that `function` launches on a kind of GPU."""
    return lowered_for_cuda(function, *args, device_kind=device_kind).count(_pallas.TRITON_CALL)


def count_calls(primitive, function, *args):
    """Returns how often a traced function runs a primitive. Each iteration of a scan counts."""

    def count(jaxpr):
        total = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
        for equation in jaxpr.eqns:
            values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
            calls = sum(count(value) for value in values if hasattr(value, "eqns"))
            total += calls * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        return total

    return count(jax.make_jaxpr(function)(*args))
