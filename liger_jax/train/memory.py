"""Estimates the memory of a training step on each GPU of a mesh, without compiling it.

    memory = state + weights gathered + activations + gradients + working set

The peak is in the backward pass of the last text layer or of the last vision layer. The first of these holds all saved
activations and, since a stack of gradients exists as a whole, the gradients of all text weights; the second holds the
activations of the vision tower and the gradients of all weights.

State and activations are exact: the bytes of arrays that JAX traces. The working set of a layer is an estimate, from
measurements on one GPU, which the sum meets within 2 %; with all layers unrolled, it is up to 4 % too low (see
tests/liger_jax/train/test_memory.py).
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType

from liger_jax.config import QwenVLConfig
from liger_jax.inputs.batch import Batch, prepare
from liger_jax.model import QwenVL
from liger_jax.model.lora import adapted_parts
from liger_jax.model.params import PARTS, axis_sizes, find_row, param_group, param_paths
from liger_jax.model.remat import count_blocks
from liger_jax.model.sharding import BATCH_AXES, get_mesh, param_shardings
from liger_jax.options import Remat
from liger_jax.train.data_parallel import splits_only_rows
from liger_jax.train.loss import loss_fn

# Arrays of a layer that are alive at once in its backward pass, from measured peaks: as wide as the MLP, and as the tower.
# The policies that recompute the MLP hold two more of the first kind; "full" may hold them for a block of tokens at a time.
WIDE_ARRAYS = {"none": 4, "dots": 4, "narrow": 6, "attention": 6, "full": 6}
NARROW_ARRAYS = 10


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The bytes on each GPU at the peak of a training step."""

    weights: int
    optimizer: int
    gathered: int
    """Weights that the mesh splits, gathered for the computation."""
    activations: int
    """Saved in the forward pass for the backward pass."""
    gradients: int
    working: int
    """Temporaries of the layer that runs."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, and how: all that the memory of a step depends on, but for mesh and number of rows."""

    config: QwenVLConfig
    optimizer: optax.GradientTransformation
    row: Batch
    """A batch of one row, as `prepare` returns it."""
    remat: Remat
    frozen: Collection[str] = ()
    """Parts that are not trained (vision, merger, text)."""
    adapt: Callable[[QwenVL], QwenVL] | None = None
    """A function that adds LoRA to the model."""

    @functools.cached_property
    def model(self) -> QwenVL:
        """The abstract model."""
        model = QwenVL.abstract(self.config)
        return model if self.adapt is None else jax.eval_shape(self.adapt, model)

    @functools.cached_property
    def opt_state(self) -> Any:
        """The abstract state of the optimizer."""
        return jax.eval_shape(self.optimizer.init, self.model)

    @functools.cached_property
    def activations(self) -> dict[str, int]:
        """The bytes that the forward pass of one row saves for the gradients, in both towers together and in vision."""
        is_trained = [param_group(path) not in self.frozen for path in param_paths(self.model)]
        save = functools.partial(saved_bytes, self.model, remat=self.remat, is_trained=is_trained)
        everything, text = save(self.row), save(dataclasses.replace(self.row, vision=None))
        return {"text": everything, "vision": everything - text}  # held in the backward pass of each tower


def sample_row(config: QwenVLConfig, *, length: int, patches: int) -> Batch:
    """Returns a batch of one row, with one image of about `patches` patches in the middle of its prompt.

    Example:
        >>> row = sample_row(QwenVLConfig.tiny(), length=64, patches=64)
        >>> row.shape, row.vision.pixel_values.shape[:2]
        ((1, 64), (1, 64))
    """
    unit, side = config.vision.merge_unit, config.vision.spatial_merge_size
    height = math.isqrt(patches // unit)
    width = patches // unit // height if height else 0
    ids = np.full((1, length), 5)
    images: dict[str, Any] = {}
    if tokens := height * width:
        ids[0, 1] = config.vision_start_token_id
        ids[0, 2 : 2 + tokens] = config.image_token_id
        ids[0, 2 + tokens] = config.vision_end_token_id
        images["pixel_values"] = np.zeros((unit * tokens, config.vision.patch_values), np.float32)
        images["image_grid_thw"] = np.array([[1, side * height, side * width]])
    labels = np.where(np.arange(length) > 2 + tokens, ids, -100)
    return prepare(config, input_ids=ids, labels=labels, **images)


def saved_bytes(model: QwenVL, batch: Batch, *, remat: Remat, is_trained: Sequence[bool]) -> int:
    """Returns the bytes that the forward pass saves for the backward pass, without those of the weights themselves.

    Args:
        model, batch: arrays or their shapes.
        remat: rematerialization policy.
        is_trained: for each weight, whether its gradient is computed.
    """
    structure: Any  # JAX does not type the methods of tree structures
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)

    def residuals(leaves: list[jax.Array], batch: Batch):
        def loss(trained: list[jax.Array]) -> jax.Array:
            values = iter(trained)
            merged = [next(values) if is_own else x for is_own, x in zip(is_trained, leaves, strict=True)]
            return loss_fn(structure.unflatten(merged), batch, remat=remat)[0]

        return jax.vjp(loss, [x for is_own, x in zip(is_trained, leaves, strict=True) if is_own])[1]

    # Layers with windows and without are parts of one stack, so its layers are counted one by one.
    weights: Counter[Any] = Counter()
    for path, x in param_paths(model).items():
        is_stack = find_row(path).stack is not None
        weights[x.shape[1:] if is_stack else x.shape, x.dtype] += x.shape[0] if is_stack else 1
    total = 0
    for x in jax.tree.leaves(jax.eval_shape(residuals, leaves, batch)):
        for shape, count in ((x.shape, 1), (x.shape[1:], x.shape[0] if x.ndim else 1)):
            if weights[shape, x.dtype] >= count:
                weights[shape, x.dtype] -= count
                break
        else:
            total += x.size * x.dtype.itemsize
    return total


def estimate_memory(
    training: Training, mesh: Mapping[str, int], batch_size: int, *, by_device: bool = True
) -> StepMemory:
    """Returns the memory of a training step on each GPU.

    Args:
        training: what is trained.
        mesh: the sizes of its axes, some of data, fsdp, sequence and tensor.
        batch_size: rows of the whole batch.
        by_device: on a mesh that only splits rows, each device gathers all weights for the step, which is faster. False:
            weights are gathered by layer.

    Example:
        >>> from liger_jax.train.optimizer import make_optimizer
        >>> config = QwenVLConfig.tiny()
        >>> row = sample_row(config, length=64, patches=0)
        >>> training = Training(config, make_optimizer(1e-5), row, "dots")
        >>> one, two = (estimate_memory(training, {"fsdp": gpus}, 4 * gpus) for gpus in (1, 2))
        >>> two.optimizer < one.optimizer, two.activations == one.activations
        (True, True)
    """
    abstract = abstract_mesh(mesh)
    rows = -(-batch_size // math.prod(mesh.get(name, 1) for name in ("data", "fsdp")))
    split = math.prod(mesh.get(name, 1) for name in ("sequence", "tensor"))
    over_data = splits_only_rows(abstract)
    by_device &= over_data
    weights = shard_bytes(training.model, abstract)
    optimizer = sum(shard_bytes(training.opt_state, abstract, strict=False, over_data=over_data).values())
    whole = {path: leaf.size * leaf.dtype.itemsize for path, leaf in param_paths(training.model).items()}
    gathered = 0
    if mesh.get("fsdp", 1) * mesh.get("sequence", 1) > 1:
        gathered = sum(whole.values()) if by_device else _bytes_of_two_layers(training.config, whole, mesh)
    reduced = whole if by_device else weights
    if training.row.vision is not None and vision_runs_by_rows(mesh, rows):
        visual = {path: size for path, size in whole.items() if path.startswith("visual/")}
        gathered, reduced = gathered + sum(visual.values()), weights | visual
    trained = {path: size for path, size in reduced.items() if param_group(path) not in training.frozen}
    in_text = sum(size for path, size in trained.items() if not path.startswith("visual/"))
    peaks, whole_on_tensor = [], _bytes_whole_on_tensor(training, mesh, rows)
    for tower, gradients in (("text", in_text), ("vision", sum(trained.values()))):
        working = _working_bytes(training, tower, rows, on_mesh=math.prod(mesh.values()) > 1)
        saved = rows * training.activations[tower] // split + whole_on_tensor[tower]
        peaks.append((saved, gradients, working // split))
    return StepMemory(sum(weights.values()), optimizer, gathered, *max(peaks, key=sum))


def least_temporaries(
    model: QwenVL, batch: Batch, *, remat: Remat, is_trained: Sequence[bool], by_device: bool, parts: int = 1
) -> int:
    """Returns bytes that a training step surely needs on each device in addition to its arguments.

    They are nine tenths of what `estimate_memory` counts for the text layers, without the working set.

    Args:
        model: placed arrays, or their shapes and shardings; they may have an optimizer and a mesh of the user's own.
        batch: all rows.
        remat, is_trained: see `saved_bytes`.
        by_device: see `estimate_memory`.
        parts: in which the batch is computed, one after the other.
    """
    mesh = get_mesh(model)
    sizes: Mapping[str, int] = {} if mesh is None else mesh.shape
    rows = max(1, batch.shape[0] // (parts * math.prod(sizes.get(name, 1) for name in BATCH_AXES)))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    split = math.prod(sizes.get(name, 1) for name in ("sequence", "tensor"))
    activations = saved_bytes(model, batch, remat=remat, is_trained=is_trained) // split
    gradients = gathered = 0
    for (path, leaf), has_gradient in zip(param_paths(model).items(), is_trained, strict=True):
        if path.startswith("visual/"):
            continue
        shard = device_bytes(leaf)
        computed = leaf.size * leaf.dtype.itemsize if by_device else shard
        gradients += computed if has_gradient else 0
        gathered += computed if computed > shard else 0  # weights that are not split are arguments
    return (activations + gradients + gathered) * 9 // 10


def most_temporaries(model: QwenVL, batch: Batch) -> int:
    """Returns bytes that `least_temporaries` does not exceed. Nothing is traced, so this takes no time.

    They are two copies of the weights and, for each token and patch in each layer, what remat "none" saves at most.

    Args:
        model, batch: arrays or their shapes.
    """
    sizes, config = axis_sizes(model.config), model.config
    patches = 0 if batch.vision is None else math.prod(batch.vision.pixel_values.shape[:2])
    units = math.prod(batch.shape) * config.text.num_hidden_layers * (4 * sizes["F"] + 16 * sizes["H"])
    units += patches * config.vision.depth * (4 * sizes["I"] + 16 * sizes["E"])
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    return 2 * weights + units * model.language_model.norm.weight.dtype.itemsize


def vision_runs_by_rows(mesh: Mapping[str, int], rows: int) -> bool:
    """Returns whether `tensor` splits the rows of the vision tower instead of its heads; see `liger_jax.model.by_rows`.

    Args:
        mesh: the sizes of its axes.
        rows: rows of each group of GPUs along `tensor`.
    """
    tensor = mesh.get("tensor", 1)
    return tensor > 1 and mesh.get("sequence", 1) == 1 and rows % tensor == 0


def device_bytes(leaf: Any) -> int:
    """Returns the bytes of an array, or of its shape, on each of its devices; without a sharding, all of them."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def abstract_mesh(mesh: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh without devices, of the axes with more than one."""
    names = tuple(name for name, size in mesh.items() if size > 1)
    return AbstractMesh(tuple(mesh[name] for name in names), names, axis_types=(AxisType.Auto,) * len(names))


def shard_bytes(tree: Any, mesh: AbstractMesh, **options: Any) -> dict[str, int]:
    """Returns the bytes of each leaf on one device."""
    placed: Any = mesh  # shapes need no devices
    shardings: Any = param_paths(param_shardings(tree, placed, **options))
    return {
        path: math.prod(shardings[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for path, leaf in param_paths(tree).items()
    }


def _bytes_of_two_layers(config: QwenVLConfig, whole: Mapping[str, int], mesh: Mapping[str, int]) -> int:
    """Returns the bytes of the weights that are gathered by layer: of two layers, and of embeddings and head."""
    tables = sum(size for path, size in whole.items() if path.endswith(("embed_tokens/weight", "lm_head/weight")))
    layers = sum(size for path, size in whole.items() if "language_model/layers" in path)
    return tables + 2 * layers // config.text.num_hidden_layers // mesh.get("tensor", 1)


def _bytes_whole_on_tensor(training: Training, mesh: Mapping[str, int], rows: int) -> dict[str, int]:
    """Returns the bytes by which saved activations exceed an even split over `tensor`, held as `Training.activations`.

    The inputs of attention and MLP are gathered, see `liger_jax.model.sharding.gather_positions`; of these, "dots" saves
    nothing without `tensor`. Keys and values are whole where `tensor` does not divide the key heads.
    """
    tensor, sequence = (mesh.get(name, 1) for name in ("tensor", "sequence"))
    sizes, row, excess = axis_sizes(training.config), training.row, 1 - 1 / tensor
    of_inputs = {"none": excess, "dots": 1.0}.get(training.remat, 0.0) if tensor > 1 else 0.0
    of_keys = excess if training.remat in ("none", "dots", "narrow") and sizes["K"] % tensor else 0.0
    computed = {*PARTS} - {*training.frozen} | adapted_parts(training.model)
    tokens, patches = sizes["L"] * row.shape[1], 0
    if row.vision is not None and not vision_runs_by_rows(mesh, rows):
        patches = sizes["Lv"] * row.vision.pixel_values.shape[1]
    # the gradients of a frozen language model's inputs pass through its attention, but not through its matmuls' inputs
    text = tokens * (sizes["H"] * of_inputs * ("text" in computed) + sizes["K"] * sizes["D"] * of_keys)
    vision = patches * sizes["E"] * of_inputs * ("vision" in computed)
    itemsize = training.model.language_model.norm.weight.dtype.itemsize
    in_text, in_vision = (2 * itemsize * rows * int(count) // sequence for count in (text, vision))
    return {"text": in_text + in_vision, "vision": in_vision}


def _working_bytes(training: Training, tower: str, rows: int, *, on_mesh: bool) -> int:
    """Returns the bytes of the temporaries in the backward pass of a layer."""
    sizes, row = axis_sizes(training.config), training.row
    if tower == "text":
        tokens, hidden, wide = rows * row.shape[1], sizes["H"], sizes["F"]
    else:
        patches = 0 if row.vision is None else row.vision.pixel_values.shape[1]
        tokens, hidden, wide = rows * patches, sizes["E"], sizes["I"]
    blocks = count_blocks(tokens) if training.remat == "full" and not on_mesh else 1
    units = WIDE_ARRAYS[training.remat] * wide // blocks + NARROW_ARRAYS * hidden
    sums = 3 * wide * hidden * 4 if blocks > 1 else 0  # of the gradients of the MLP over blocks, in float32
    return tokens * units * training.model.language_model.norm.weight.dtype.itemsize + sums
