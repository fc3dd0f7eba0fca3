"""Counts the bytes that a training step on a mesh moves between GPUs, and estimates the time that this takes."""

import dataclasses
import math
from collections.abc import Mapping

from liger_jax.config import QwenVLConfig
from liger_jax.inputs.batch import Batch
from liger_jax.model.params import axis_sizes
from liger_jax.model.sequence import plan_heads
from liger_jax.train.memory import vision_runs_by_rows

# Bytes per second that a GPU receives over NVLink while a step runs. Measured on two H200s as the bytes of a step over the
# time that it takes longer than its computation, for the 2B: fsdp=2 and data=2 move 4.4 GB in 14 and in 3 to 13 ms.
NVLINK = 310e9
# The shares of this rate that other collectives reach. Those between the matmuls of a layer are small, and the matmuls wait
# for them: tensor=2 moves 4.9 GB in 37 to 40 ms. Weights that are gathered by layer can be gathered during the layer
# before: the 7B, whose step takes 862 ms on one GPU and 962 ms with fsdp=2, moves 24.9 GB in 100 ms.
WITHIN_LAYERS = 0.4
BY_LAYER = 0.8
# Bytes per second and GPU between hosts: one 400 Gb/s adapter per GPU, at 80 % of its data sheet. Not measured.
NETWORK = 40e9


@dataclasses.dataclass(frozen=True)
class Links:
    """The rates at which GPUs exchange data, in bytes per second and GPU."""

    nvlink: float = NVLINK
    network: float = NETWORK
    gpus_per_host: int = 8

    def rate(self, mesh: Mapping[str, int], axis: str, *, by_device: bool) -> float:
        """Returns the rate of a collective over a mesh axis. The last axes of a mesh are within a host.

        A ring that crosses hosts uses the network adapters of all its GPUs in a host; in the all-to-alls of `sequence`, each
        GPU uses its own. `by_device`: see `estimate_memory`.

        Example:
            >>> links, mesh = Links(nvlink=100, network=10), {"data": 2, "fsdp": 4, "tensor": 4}
            >>> [links.rate(mesh, axis, by_device=False) for axis in mesh]
            [10, 20, 40.0]
            >>> [links.rate({"fsdp": 8}, "fsdp", by_device=by_device) for by_device in (True, False)]
            [100, 80.0]
            >>> links.rate({"sequence": 16}, "sequence", by_device=False)
            10
        """
        inner = math.prod(size for name, size in list(mesh.items())[list(mesh).index(axis) + 1 :])
        within_host = max(1, min(mesh[axis], self.gpus_per_host // inner))
        share = 1 if by_device else {"data": 1, "fsdp": BY_LAYER}.get(axis, WITHIN_LAYERS)
        nvlink = self.nvlink * share
        adapters = 1 if axis == "sequence" else within_host
        return nvlink if within_host == mesh[axis] else min(nvlink, self.network * adapters)


def step_traffic(
    config: QwenVLConfig,
    mesh: Mapping[str, int],
    row: Batch,
    rows: int,
    *,
    weights: Mapping[str, int],
    trained: Mapping[str, int],
    by_device: bool,
) -> dict[str, float]:
    """Returns the bytes that each GPU receives in a step, by mesh axis. A collective over n GPUs moves (n - 1) / n.

        fsdp       the weights, gathered once (by_device) or twice, and the gradients, reduced and scattered
        data       the gradients, reduced and scattered, and the updated weights, gathered
        tensor     the activations of each text layer, gathered before attention and MLP, and reduced and scattered after
                   them: 4 times in the forward pass, 4 in the backward pass, and 2 that it repeats; and the weights of the
                   vision tower, gathered, and its gradients, or its activations where it does not run by rows
        sequence   queries, keys, values and outputs of attention, with copies and padding, forward and twice backward; and
                   what fsdp moves

    Args:
        config: the model's configuration.
        mesh: the sizes of its axes.
        row: a batch of one row.
        rows: rows of each group of GPUs along `tensor` and `sequence`.
        weights: the bytes of the model on all GPUs together, without copies, by parameter.
        trained: the same for the parameters that are trained.
        by_device: see `estimate_memory`.

    Example:
        >>> from liger_jax.train.memory import sample_row
        >>> config = QwenVLConfig.tiny()
        >>> row = sample_row(config, length=64, patches=0)
        >>> step_traffic(config, {"fsdp": 4}, row, 1, weights={"w": 800}, trained={"w": 800}, by_device=True)
        {'fsdp': 1200.0}
    """
    sizes = {name: mesh.get(name, 1) for name in ("data", "fsdp", "sequence", "tensor")}
    split_weights = sizes["fsdp"] * sizes["sequence"]
    parameters, gradients = (sum(tree.values()) / sizes["tensor"] for tree in (weights, trained))
    axis, positions, patches = axis_sizes(config), row.shape[1], 0
    if row.vision is not None:
        patches = row.vision.pixel_values.shape[1]
    itemsize, plan = 2, plan_heads(axis["N"], axis["K"], sizes["sequence"] * sizes["tensor"])
    heads = math.prod(plan) + plan.key_heads * plan.copies
    towers = (  # positions, layers, width, and the numbers per position that attention reads and writes
        (positions, axis["L"], axis["H"], 2 * heads * axis["D"]),
        (patches, axis["Lv"], axis["E"], 4 * axis["n"] * axis["d"]),
    )
    text_bytes, vision_bytes = (itemsize * rows * count * layers * width for count, layers, width, _ in towers)
    along_tensor = 10 * (text_bytes + vision_bytes) / sizes["sequence"]
    if vision_runs_by_rows(mesh, rows):
        tower = sum(size for tree in (weights, trained) for path, size in tree.items() if path.startswith("visual/"))
        along_tensor = 10 * text_bytes + tower
    attention = itemsize * rows * sum(count * layers * numbers for count, layers, _, numbers in towers)
    gathers = (1 if by_device else 2) * parameters + gradients
    moved = {
        "data": 2 * gradients / split_weights,
        "fsdp": gathers,
        "sequence": 3 * attention / sizes["sequence"] / sizes["tensor"] + gathers / sizes["fsdp"],
        "tensor": along_tensor,
    }
    return {name: moved[name] * (size - 1) / size for name, size in sizes.items() if size > 1}
