"""Plans training on GPUs that are not there: memory, communication and expected efficiency of each mesh.

Memory is an estimate. `liger-jax plan --compile` also prints that of the compiled program, see `liger_jax.train.ahead`.
"""

import dataclasses
import functools
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from liger_jax.config import QwenVLConfig
from liger_jax.errors import LigerWarning, UserError, closest
from liger_jax.files import CONFIG, local_folder
from liger_jax.model.lora import adapted_parts, add_lora
from liger_jax.model.params import PARTS, param_group, param_paths
from liger_jax.model.sequence import plan_heads
from liger_jax.options import Optimization, Part, PlanOptions, Remat
from liger_jax.train.communication import Links, step_traffic
from liger_jax.train.data_parallel import splits_only_rows
from liger_jax.train.flops import PEAKS, step_flops
from liger_jax.train.memory import StepMemory, Training, abstract_mesh, estimate_memory, sample_row
from liger_jax.train.optimizer import build_optimizer
from liger_jax.train.step import AUTO_REMAT

GIB = 2**30
GPUS = {"A100": 79.1, "H100": 79.1, "H200": 140.4, "B200": 178.0}  # GiB of memory
# The fraction of it that a program may take, as XLA_PYTHON_CLIENT_MEM_FRACTION; JAX's default is 0.75.
USABLE = 0.95
# Share of the peak rate that a step reaches on one GPU: (weights, share), measured for Qwen2-VL 2B and 7B on an H200,
# with FlashAttention-4.
UTILIZATION = ((2.2e9, 0.46), (8.3e9, 0.52))
# Time of a step relative to "dots". Measured on an H200: narrow 1.12 (Qwen2.5-VL 3B and 7B), full 1.14 (Qwen2-VL 2B);
# attention is between them.
SLOWDOWN: dict[str, float] = {"none": 1.0, "dots": 1.0, "narrow": 1.12, "attention": 1.13, "full": 1.14}


MESH_FLAGS = ("data", "fsdp", "sequence", "tensor")  # the last axes are those within a host


def check_options(options: PlanOptions) -> None:
    """Raises UserError for values out of range."""
    names = ("gpus", "length", "gpus_per_host", "nvlink", "network", *MESH_FLAGS, "lora", "batch_size", "memory")
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value}; expected above 0")
    largest = 4 * (options.length - 3)
    if not 0 <= options.patches <= largest:
        raise UserError(f"patches is {options.patches}; expected 0 to {largest}, four for each token of an image")
    if mesh := named_mesh(options):
        count, shape = math.prod(mesh.values()), " x ".join(f"{name} {size}" for name, size in mesh.items())
        if count != options.gpus:
            raise UserError(f"The mesh {shape} has {count} GPUs; expected {options.gpus}")


def named_mesh(options: PlanOptions) -> dict[str, int]:
    """Returns the mesh that the options name, or {} if they name none."""
    sizes = {name: getattr(options, name) for name in MESH_FLAGS}
    return {name: size or 1 for name, size in sizes.items()} if any(sizes.values()) else {}


def batch_rows(options: PlanOptions) -> int:
    """Returns the sequences per step."""
    return options.batch_size or 4 * options.gpus


def memory_limit(options: PlanOptions) -> float:
    """Returns the bytes per GPU that may be used."""
    return USABLE * GIB * (GPUS[options.gpu] if options.memory is None else options.memory)


def link_rates(options: PlanOptions) -> Links:
    return Links(options.nvlink * 1e9, options.network * 1e9, options.gpus_per_host)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A way to train on a mesh."""

    mesh: dict[str, int]
    """The sizes of the axes of more than one GPU."""
    remat: Remat
    by_device: bool
    """Whether each GPU gathers all weights for a step; else they are gathered by layer."""
    memory: StepMemory
    limit: float
    """Bytes per GPU that may be used."""
    traffic: dict[str, float]
    """Bytes that each GPU receives in a step, by axis."""
    compute_s: float
    """Time of a step without communication."""
    communication_s: float
    """Time by which communication makes the step longer."""
    alone_s: float
    """Step time of one GPU on its share of the batch, with the same remat, without communication and padded heads."""
    tokens: int
    """Positions in a step."""
    splits_heads: bool = True
    """Whether `tensor` divides the attention heads. If not, each GPU projects all of them, which `compute_s` leaves out."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    @property
    def step_s(self) -> float:
        return self.compute_s + self.communication_s

    @property
    def efficiency(self) -> float:
        """The speed per GPU relative to one GPU with its part of the batch and the same remat."""
        return self.alone_s / self.step_s

    @property
    def name(self) -> str:
        """The mesh, as in `fsdp=4 tensor=2`."""
        return " ".join(f"{axis}={size}" for axis, size in self.mesh.items()) or "one GPU"


def read_config(model: str) -> QwenVLConfig:
    """Returns the configuration of a preset, or of a model in any format.

    Raises:
        UserError, NotFoundError: there is no such model.

    Example:
        >>> read_config("qwen2_vl_72b").text.num_hidden_layers
        80
    """
    presets = [name for name in vars(QwenVLConfig) if re.fullmatch(r"qwen.*_\d+b", name)]
    if model in presets and not Path(model).exists():
        return getattr(QwenVLConfig, model)()
    if "/" not in model and not Path(model).exists():  # a hub id has an owner
        hint = closest(model.replace("-", "_"), presets)
        raise UserError(f"MODEL is {model!r}; expected one of {presets}, a folder or a hub id{hint}")
    return QwenVLConfig.from_hf(local_folder(model, [CONFIG]) / CONFIG)


def make_plans(config: QwenVLConfig, options: PlanOptions) -> list[Plan]:
    """Returns one plan per mesh, with the fastest remat that fits: those that fit first, the fastest first.

    Raises:
        UserError: no mesh of this many GPUs divides the batch and splits its rows within a host.

    Example:
        >>> plans = make_plans(QwenVLConfig.tiny(), PlanOptions(gpus=4, length=64, patches=64, remat="dots"))
        >>> plans[0].fits, {"data": 4} in [plan.mesh for plan in plans]
        (True, True)
    """
    check_options(options)
    remats = AUTO_REMAT if options.remat == "auto" else (options.remat,)
    trainings = [make_training(config, options, remat) for remat in remats]
    plans = []
    for mesh in meshes(config, options):
        ways = (True, False) if splits_only_rows(abstract_mesh(mesh)) else (False,)
        for training, by_device in itertools.product(
            trainings, ways
        ):  # in the order in which the training step tries them
            plan = plan_mesh(training, mesh, options, by_device=by_device)
            if plan.fits:
                break
        plans.append(plan)
    if not plans:
        raise UserError(
            f"batch_size is {batch_rows(options)}; expected a multiple of data x fsdp for a mesh of {options.gpus} GPUs "
            f"whose sequence x tensor divides the {options.gpus_per_host} GPUs of a host. Name the mesh, such as "
            f"sequence={options.gpus}, to split rows over hosts"
        )
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step_s if plan.fits else plan.memory.total))


def meshes(config: QwenVLConfig, options: PlanOptions) -> Iterator[dict[str, int]]:
    """Yields the meshes to compare: the one that the options name, or all whose `sequence` and `tensor` are within a host.

    Only meshes that divide the batch, and whose `tensor` divides the attention heads. `sequence` is among them if the GPUs
    cannot share the rows evenly: where they can, it takes as much memory as `fsdp`, and communicates more.
    """
    if fixed := named_mesh(options):
        yield {name: size for name, size in fixed.items() if size > 1}
        return
    divisors = [n for n in range(1, options.gpus + 1) if options.gpus % n == 0]
    splits_of_rows = divisors if batch_rows(options) % options.gpus else (1,)
    for data, fsdp, sequence, tensor in itertools.product(divisors, divisors, splits_of_rows, divisors):
        if (
            data * fsdp * sequence * tensor == options.gpus
            and batch_rows(options) % (data * fsdp) == 0
            and divides_heads(config, tensor)
            and (options.gpus <= options.gpus_per_host or options.gpus_per_host % (sequence * tensor) == 0)
        ):
            sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
            yield {name: size for name, size in sizes.items() if size > 1}


def divides_heads(config: QwenVLConfig, tensor: int) -> bool:
    """Returns whether a number of GPUs can share the query heads of both towers evenly."""
    return config.text.num_attention_heads % tensor == 0 == config.vision.num_heads % tensor


def make_training(config: QwenVLConfig, options: PlanOptions, remat: Remat) -> Training:
    """Returns what the options train, which does not depend on the number of GPUs."""
    return _make_training(
        config, options.length, options.patches, remat, options.freeze, options.lora, options.master_weights
    )


@functools.lru_cache(maxsize=16)  # a training traces the model, which takes seconds
def _make_training(
    config: QwenVLConfig,
    length: int,
    patches: int,
    remat: Remat,
    freeze: tuple[Part, ...],
    lora: int | None,
    master_weights: bool,
) -> Training:
    frozen = PARTS if lora else freeze
    optimizer = build_optimizer(Optimization(freeze=frozen, master_weights=master_weights), steps=1000)
    adapt = functools.partial(add_lora, rank=lora) if lora else None
    return Training(config, optimizer, sample_row(config, length=length, patches=patches), remat, frozen, adapt)


def plan_mesh(training: Training, mesh: Mapping[str, int], options: PlanOptions, *, by_device: bool) -> Plan:
    """Returns the plan of one mesh and one way to run the step on it."""
    config = training.config
    rows = -(-batch_rows(options) // math.prod(mesh.get(name, 1) for name in ("data", "fsdp")))
    weights = {path: leaf.size * leaf.dtype.itemsize for path, leaf in param_paths(training.model).items()}
    trained = {path: size for path, size in weights.items() if param_group(path) not in training.frozen}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LigerWarning)  # about dimensions that a mesh does not divide
        memory = estimate_memory(training, mesh, batch_rows(options), by_device=by_device)
    traffic = step_traffic(config, mesh, training.row, rows, weights=weights, trained=trained, by_device=by_device)
    links = link_rates(options)
    adapted = adapted_parts(training.model) if options.lora else ()
    split, text = math.prod(mesh.get(name, 1) for name in ("sequence", "tensor")), config.text
    heads = math.prod(plan_heads(text.num_attention_heads, text.num_key_value_heads, split))
    count_flops = functools.partial(step_flops, config, training.row, frozen=training.frozen, adapted=adapted)
    peak = next(peak for pattern, peak in PEAKS if re.search(pattern, f"{options.gpu} SXM"))
    rate = peak * utilization(sum(leaf.size for leaf in param_paths(training.model).values()))
    seconds_per_flop = rows / split * SLOWDOWN[training.remat] / rate
    return Plan(
        dict(mesh),
        training.remat,
        by_device,
        memory,
        memory_limit(options),
        traffic,
        compute_s=count_flops(heads=heads) * seconds_per_flop,
        communication_s=sum(size / links.rate(mesh, axis, by_device=by_device) for axis, size in traffic.items()),
        alone_s=count_flops() * seconds_per_flop,
        tokens=batch_rows(options) * options.length,
        splits_heads=divides_heads(config, mesh.get("tensor", 1)),
    )


def utilization(weights: int) -> float:
    """Returns the share of a GPU's peak rate that a step of a model reaches, interpolated between measured sizes.

    Example:
        >>> utilization(10**9), utilization(70 * 10**9)
        (0.46, 0.52)
    """
    (small, low), (large, high) = UTILIZATION
    position = (math.log(weights) - math.log(small)) / (math.log(large) - math.log(small))
    return low + (high - low) * min(max(position, 0), 1)


def as_record(plan: Plan) -> dict[str, Any]:
    """Returns the numbers of a plan, for a file."""
    return {
        "mesh": plan.mesh,
        "remat": plan.remat,
        "fits": plan.fits,
        "gib": plan.memory.total / GIB,
        "traffic_gb": sum(plan.traffic.values()) / 1e9,
        "step_ms": plan.step_s * 1e3,
        "tokens_per_s": plan.tokens / plan.step_s,
        "efficiency": plan.efficiency,
    }
