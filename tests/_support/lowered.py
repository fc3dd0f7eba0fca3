"""Lowering for GPUs that are not there."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import _pallas


def triton_calls(function, *args, device_kind="NVIDIA H200"):
    """How many kernels a function becomes for a kind of GPU, found out without one."""
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count(_pallas.TRITON_CALL)
