"""How decoding is split over the devices of a mesh.

A decoding step reads every weight and does little with it, so weights that are gathered in the loop would cost more than the
whole step. They are laid out once, before the loop. Each device then runs the fused kernels on its own part:

    rows        split over data and fsdp. A device holds whole what fsdp splits elsewhere
    heads       query heads split over the other axes (tensor, sequence), each with the key head that it attends to
    columns     of the MLP, and the entries of the vocabulary, split over the same axes

Along the other axes, the devices sum the outputs of `o` and of `down`, and compare their best tokens. A device could read
tens of megabytes in the time of a sum, so what is smaller is not split: of the 2B and the 7B on two devices, the MLP and the
vocabulary are, and attention is not. Along data and fsdp, the devices do not communicate.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from liger_jax.config import TextConfig
from liger_jax.errors import LigerWarning
from liger_jax.model.params import find_row, path_name, split_axes
from liger_jax.model.sharding import BATCH_AXES
from liger_jax.model.text import LanguageModel

# Bytes that a device must save in a layer for a sum to pay. On two H100s with NVLink, splitting the 2B's MLP, which saves 41
# MB, makes a token 0.22 ms faster; splitting its attention, which saves 7 MB, makes it 0.62 ms slower.
SMALLEST_SAVING = 36_000_000
LARGEST_COPY = 0.7  # of a device's free memory, for the weights; the rest is for the prompts and their cache


@dataclasses.dataclass(frozen=True)
class DecodeLayout:
    """The mesh axes that split decoding, and what they split. The default value is that of a single device."""

    mesh_axes: tuple[str, ...] = ()
    """All axes of the mesh; none for a single device."""
    row_axes: tuple[str, ...] = ()
    """The mesh axes that split the rows."""
    column_axes: tuple[str, ...] = ()
    """The mesh axes that split heads, MLP columns and the vocabulary."""
    shards: int = 1
    """Number of devices along `column_axes`."""
    split: str = ""
    """What `column_axes` splits: axes of the table of parameters, some of N, K, F and V. All others are whole on each
    device."""
    key_head_copies: int = 1
    """How often the cache holds each key head: more than once if there are more devices than key heads."""

    @classmethod
    def on_current_mesh(
        cls, config: TextConfig, cache_shape: tuple[int, int], dtype, *, gather_fsdp: bool = True
    ) -> Self:
        """Returns the layout on the current mesh, see `liger_jax.model.sharding.mesh_context`.

        Args:
            config: the configuration of the language model.
            cache_shape: rows and slots. If the mesh does not divide the rows, all devices along data and fsdp decode all
                rows.
            dtype: dtype of the weights and the cache.
            gather_fsdp: with False, fsdp splits heads and columns instead of rows, as tensor does, and even small ones, to
                save memory.
        """
        mesh, (rows, slots) = jax.sharding.get_abstract_mesh(), cache_shape
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        names = tuple(name for name, kind in types if kind == AxisType.Auto)  # all others are the caller's business
        split_rows = BATCH_AXES if gather_fsdp else ("data",)
        row_axes = tuple(name for name in names if name in split_rows)
        column_axes = tuple(name for name in names if name not in split_rows)
        row_shards, shards = (math.prod(mesh.shape[name] for name in axes) for axes in (row_axes, column_axes))
        if rows % row_shards:
            row_axes, row_shards = (), 1
        split, copies = _divisible(config, shards)
        if gather_fsdp:
            sizes = _bytes_per_step(config, rows * slots // row_shards, jnp.dtype(dtype).itemsize)
            split = "".join(axis for axis in split if sizes[axis] * (1 - 1 / shards) > SMALLEST_SAVING)
        return cls(names, row_axes, column_axes, shards, split, copies if "N" in split else 1)

    def spec(self, axes: str) -> P:
        """Returns the PartitionSpec of an array with these axes: B for rows, and those of the table of parameters.

        Example:
            >>> layout = DecodeLayout(("data", "tensor"), ("data",), ("tensor",), 2, "NKF")
            >>> tuple(layout.spec("B H")), tuple(layout.spec("H F"))
            (('data', None), (None, 'tensor'))
        """
        by = {"B": self.row_axes} | dict.fromkeys(self.split, self.column_axes)
        return P(*(by.get(axis) or None for axis in axes.split()))

    def row_specs(self, tree: Any) -> Any:
        """Returns the PartitionSpecs of arrays whose first axis is the rows; scalars are replicated."""
        return jax.tree.map(lambda x: self.spec("B") if jnp.ndim(x) else P(), tree)

    def weight_bytes(self, text: LanguageModel, head: jax.Array) -> int:
        """Returns the size of the packed weights on a device."""
        sharded = [(head, self.spec("V H")), (text.embed_tokens.weight[...], P())]
        sharded += zip(jax.tree.leaves(text.layers), jax.tree.leaves(self.layer_specs(text.layers)), strict=True)
        return sum(x.nbytes // (self.shards if any(spec) else 1) for x, spec in sharded)

    def layer_specs(self, layer: Any) -> Any:
        """Returns the PartitionSpecs of the weights of a single decoder layer, before they are packed."""

        def spec(path, leaf) -> P:
            row = find_row(f"language_model/layers/{path_name(path)}")
            return self.spec(" ".join(axes[0] for axes in split_axes(row.layer_axes)))

        return jax.tree_util.tree_map_with_path(spec, layer)

    def constrain(self, tree: Any, specs: Any) -> Any:
        """Constrains a tree to PartitionSpecs; returns it unchanged on a single device."""
        return jax.lax.with_sharding_constraint(tree, specs) if self.mesh_axes else tree

    def copy_key_heads(self, x: jax.Array) -> jax.Array:
        """Returns keys or values [..., B, T, K, D] with `key_head_copies` of each head, in adjacent places.

        More devices split the copies than there are heads. Without a constraint, the partitioner would carry that split
        back to the heads themselves, and to RoPE, which cannot run on it.
        """
        if self.key_head_copies == 1:
            return x
        x = self.constrain(x, P(*(None,) * (x.ndim - 4), *self.spec("B T K D")))
        return jnp.repeat(x, self.key_head_copies, axis=-2)

    def on_each_device(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Returns the function, run by each device on its shards; the function itself for a single device."""
        if not self.mesh_axes:
            return function
        axes = set(self.mesh_axes)
        # unchecked: Pallas's interpreter cannot run in a checked shard_map
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)

    # ---- inside `on_each_device`

    def sum(self, x: jax.Array, axis: str) -> jax.Array:
        """Returns x summed over the devices that split an axis."""
        return jax.lax.psum(x, self.column_axes) if axis in self.split else x

    def share_of_residual(self, axis: str) -> float:
        """Returns the factor of a residual that each device adds to its part of a sum over an axis."""
        return 1 / self.shards if axis in self.split else 1.0

    def select_key_heads(self, x: jax.Array) -> jax.Array:
        """Returns from x [..., K, D] the key heads that this device's query heads attend to."""
        if self.key_head_copies == 1:
            return x
        head = jax.lax.axis_index(self.column_axes) // self.key_head_copies
        return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=-2)


SINGLE_DEVICE = DecodeLayout()


def choose_layout(text: LanguageModel, head: jax.Array, cache_shape: tuple[int, int]) -> DecodeLayout:
    """Returns the layout for decoding on the current mesh.

    Each device gets a copy of what fsdp splits, if it has memory for it. If not, fsdp splits heads and columns.

    Args:
        text: the language model.
        head: the weights of the output head [V, H].
        cache_shape: rows and slots of the cache.
    """
    layout = DecodeLayout.on_current_mesh(text.config, cache_shape, head.dtype)
    if "fsdp" not in layout.mesh_axes:
        return layout
    free, needed = _free_memory(head), layout.weight_bytes(text, head)
    if needed <= LARGEST_COPY * free:
        return layout
    gib = 2**30
    warnings.warn(
        f"Decoding needs {needed / gib:.1f} GiB per device for whole weights, and {free / gib:.1f} GiB are free: fsdp "
        "splits heads and columns instead of rows, as tensor does",
        LigerWarning,
        stacklevel=4,
    )
    return DecodeLayout.on_current_mesh(text.config, cache_shape, head.dtype, gather_fsdp=False)


def _free_memory(array: jax.Array) -> float:
    """Returns the free bytes of a device that holds an array; infinity for a CPU and for a traced array."""
    if isinstance(array, jax.core.Tracer):
        return math.inf
    devices: Any = array.sharding.addressable_devices
    memory = min(devices, key=lambda device: device.id).memory_stats()
    return memory["bytes_limit"] - memory["bytes_in_use"] if memory else math.inf


def _divisible(config: TextConfig, shards: int) -> tuple[str, int]:
    """Returns which of F, V, N and K can be split over devices, and how often the cache then holds each key head.

    Each device has the same number of query heads, which attend to the same number of key heads.

    Example:
        >>> from liger_jax import QwenVLConfig
        >>> [_divisible(QwenVLConfig.qwen2_vl_2b().text, shards) for shards in (1, 2, 4, 8)]
        [('', 1), ('FVNK', 1), ('FVN', 2), ('FV', 1)]
    """
    if shards == 1:
        return "", 1
    sizes = {"F": config.intermediate_size, "V": config.vocab_size}
    split = "".join(axis for axis, size in sizes.items() if size % shards == 0)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % shards == 0 and key_heads % shards == 0:
        return split + "NK", 1
    if heads % shards == 0 and shards % key_heads == 0:
        return split + "N", shards // key_heads
    return split, 1


def _bytes_per_step(config: TextConfig, cached_tokens: int, itemsize: int) -> dict[str, int]:
    """Returns the bytes that a step reads and that each axis splits: in a layer, or for V, in the output head.

    Example:
        >>> from liger_jax import QwenVLConfig
        >>> _bytes_per_step(QwenVLConfig.qwen2_vl_2b().text, 2048, 2)
        {'N': 13107200, 'K': 13107200, 'F': 82575360, 'V': 466747392}
    """
    width, heads, key_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = config.head_dim * (2 * width * (heads + key_heads) + 2 * cached_tokens * key_heads)
    numbers = {
        "N": attention,
        "K": attention,
        "F": 3 * width * config.intermediate_size,
        "V": width * config.vocab_size,
    }
    return {axis: itemsize * count for axis, count in numbers.items()}
