"""Compiles a training step for GPUs that this machine need not have, to read the compiler's analysis of its memory.

JAX's CUDA plugin (jax[cuda12], JAX 0.11 or newer) brings the whole compiler. It needs no GPU, only a description of one, and
the environment that `liger_jax.runtime.compile_without_gpus` sets. Attention is cuDNN's: FlashAttention-4 compiles its
kernels only for a GPU of the process.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from liger_jax.errors import UserError
from liger_jax.model.sharding import batch_shardings, param_shardings
from liger_jax.train.data_parallel import splits_only_rows
from liger_jax.train.memory import Training
from liger_jax.train.step import TrainState, make_train_step

# GPU -> name, bytes of memory, and bytes per second of its memory
HOPPER = {
    "H100": ("NVIDIA H100 80GB HBM3", 84978434048, 3352320000000),
    "H200": ("NVIDIA H200", 150754820096, 4814000000000),
}
TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def compiled_bytes(training: Training, mesh: Mapping[str, int], batch_size: int, *, gpu: str, by_device: bool) -> int:
    """Returns the bytes on each GPU that the compiled step needs: its arguments and its temporaries.

    Takes one to several minutes.

    Args:
        training: what is trained.
        mesh: the sizes of its axes.
        batch_size: rows of the whole batch, which the mesh divides.
        gpu: H100 or H200.
        by_device: see `estimate_memory`.

    Raises:
        UserError: another kind of GPU, or JAX's CUDA plugin is not installed.
    """
    devices = np.array(describe_gpus(gpu, int(np.prod(list(mesh.values())))))
    shape = mesh or {"fsdp": 1}
    placed = Mesh(devices.reshape(tuple(shape.values())), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
    state, batch = _abstract_state(training, placed), _abstract_batch(training, placed, batch_size)
    leaves, structure = jax.tree.flatten(state)
    step = make_train_step(remat=training.remat)
    compiled = step._compile_choice(leaves, structure, placed, batch, training.remat, by_device)
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def describe_gpus(gpu: str, count: int) -> list[Any]:
    """Returns devices to compile for. Raises UserError if that is not possible here."""
    if gpu not in HOPPER:
        raise UserError(f"gpu is {gpu!r}; expected one of {sorted(HOPPER)}, the kinds that --compile knows")
    name, memory, bandwidth = HOPPER[gpu]
    target = TARGET.format(name=name, memory=memory, bandwidth=bandwidth)
    try:
        return topologies.get_topology_desc(gpu, "cuda", topology=f"1x1x{count}", target_config=target).devices
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(
            f"JAX {jax.__version__} cannot compile for GPUs here ({reason}); expected jax[cuda12] with JAX 0.11 or newer "
            "(Python 3.12 or newer)"
        ) from error


def _abstract_state(training: Training, mesh: Mesh) -> TrainState:
    """Returns the state as `TrainState.create` makes it: shapes and shardings without memory."""
    options = {"strict": False, "over_data": splits_only_rows(mesh)}
    place = functools.partial(
        jax.tree.map, lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    )
    step: Any = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    model = place(training.model, param_shardings(training.model, mesh))
    opt_state = place(training.opt_state, param_shardings(training.opt_state, mesh, **options))
    return TrainState(step, model, opt_state, training.optimizer)


def _abstract_batch(training: Training, mesh: Mesh, rows: int) -> Any:
    row = training.row
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), row)
    return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, batch_shardings(row, mesh))
