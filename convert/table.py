"""Maps every tensor of a Hugging Face checkpoint to a parameter of this model: one table, read in both directions.

A row says that the hub tensor `hub` has the axes `hub_axes` and holds the parameter at `path`. The parameter's own axes are
in the table of parameters (`liger_jax.model.params`, which also explains the axis names). `{i}` in a hub name is the number
of a layer; the tensors of all layers are stacked along the leading axis of the parameter. `table_of` returns the rows of a
member of the family, in its own spelling; the structure of a model decides which of them exist.

The two sides together are a layout, `hub axes -> parameter axes`. `(N D) H -> H N D` is a torch Linear weight [out, in]
whose outputs are N heads of D numbers: split the first dimension and move H to the front. An axis name denotes the same
size in every row, which `read_sizes` checks against the shapes of a model's parameters.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from liger_jax.errors import UserError
from liger_jax.model.params import find_row, split_axes

LM_HEAD = "lm_head.weight"
EMBEDDING = "language_model/embed_tokens/weight"  # a path: the name depends on the family


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a hub tensor and the parameter that it fills, or one layer of it."""

    hub: str
    hub_axes: str
    path: str

    @property
    def layout(self) -> str:
        """The hub axes and the axes of (one layer of) the parameter.

        >>> Row("visual.merger.mlp.2.weight", "H m", "visual/merger/fc2/kernel").layout
        'H m -> m H'
        """
        return f"{self.hub_axes} -> {find_row(self.path).layer_axes}"

    @property
    def stack(self) -> str | None:
        """The axis along which the parameter stacks layers, or None."""
        return find_row(self.path).stack


# fmt: off
_COMMON = (
    Row("model.embed_tokens.weight",                "V H",       "language_model/embed_tokens/weight"),
    Row("model.layers.{i}.input_layernorm.weight",  "H",         "language_model/layers/input_layernorm/weight"),
    Row("model.layers.{i}.self_attn.q_proj.weight", "(N D) H",   "language_model/layers/self_attn/q_proj/kernel"),
    Row("model.layers.{i}.self_attn.q_proj.bias",   "(N D)",     "language_model/layers/self_attn/q_proj/bias"),
    Row("model.layers.{i}.self_attn.k_proj.weight", "(K D) H",   "language_model/layers/self_attn/k_proj/kernel"),
    Row("model.layers.{i}.self_attn.k_proj.bias",   "(K D)",     "language_model/layers/self_attn/k_proj/bias"),
    Row("model.layers.{i}.self_attn.v_proj.weight", "(K D) H",   "language_model/layers/self_attn/v_proj/kernel"),
    Row("model.layers.{i}.self_attn.v_proj.bias",   "(K D)",     "language_model/layers/self_attn/v_proj/bias"),
    Row("model.layers.{i}.self_attn.o_proj.weight", "H (N D)",   "language_model/layers/self_attn/o_proj/kernel"),
    Row("model.layers.{i}.post_attention_layernorm.weight",
                                                    "H",         "language_model/layers/post_attention_layernorm/weight"),
    Row("model.layers.{i}.mlp.gate_proj.weight",    "F H",       "language_model/layers/mlp/gate_proj/kernel"),
    Row("model.layers.{i}.mlp.up_proj.weight",      "F H",       "language_model/layers/mlp/up_proj/kernel"),
    Row("model.layers.{i}.mlp.down_proj.weight",    "H F",       "language_model/layers/mlp/down_proj/kernel"),
    Row("model.norm.weight",                        "H",         "language_model/norm/weight"),
    Row("lm_head.weight",                           "V H",       "lm_head/weight"),
    Row("visual.patch_embed.proj.weight",           "E C T P Q", "visual/patch_embed/kernel"),
    Row("visual.blocks.{i}.norm1.weight",           "E",         "visual/blocks/norm1/weight"),
    Row("visual.blocks.{i}.norm1.bias",             "E",         "visual/blocks/norm1/bias"),
    Row("visual.blocks.{i}.attn.qkv.weight",        "(3 n d) E", "visual/blocks/attn/qkv/kernel"),
    Row("visual.blocks.{i}.attn.qkv.bias",          "(3 n d)",   "visual/blocks/attn/qkv/bias"),
    Row("visual.blocks.{i}.attn.proj.weight",       "E (n d)",   "visual/blocks/attn/proj/kernel"),
    Row("visual.blocks.{i}.attn.proj.bias",         "E",         "visual/blocks/attn/proj/bias"),
    Row("visual.blocks.{i}.norm2.weight",           "E",         "visual/blocks/norm2/weight"),
    Row("visual.blocks.{i}.norm2.bias",             "E",         "visual/blocks/norm2/bias"),
)
_QWEN2 = (
    Row("visual.blocks.{i}.mlp.fc1.weight",         "I E",       "visual/blocks/mlp/fc1/kernel"),
    Row("visual.blocks.{i}.mlp.fc1.bias",           "I",         "visual/blocks/mlp/fc1/bias"),
    Row("visual.blocks.{i}.mlp.fc2.weight",         "E I",       "visual/blocks/mlp/fc2/kernel"),
    Row("visual.blocks.{i}.mlp.fc2.bias",           "E",         "visual/blocks/mlp/fc2/bias"),
    Row("visual.blocks.{i}.mlp.gate_proj.weight",   "I E",       "visual/blocks/mlp/gate_proj/kernel"),
    Row("visual.blocks.{i}.mlp.gate_proj.bias",     "I",         "visual/blocks/mlp/gate_proj/bias"),
    Row("visual.blocks.{i}.mlp.up_proj.weight",     "I E",       "visual/blocks/mlp/up_proj/kernel"),
    Row("visual.blocks.{i}.mlp.up_proj.bias",       "I",         "visual/blocks/mlp/up_proj/bias"),
    Row("visual.blocks.{i}.mlp.down_proj.weight",   "E I",       "visual/blocks/mlp/down_proj/kernel"),
    Row("visual.blocks.{i}.mlp.down_proj.bias",     "E",         "visual/blocks/mlp/down_proj/bias"),
    Row("visual.merger.ln_q.weight",                "E",         "visual/merger/ln_q/weight"),
    Row("visual.merger.ln_q.bias",                  "E",         "visual/merger/ln_q/bias"),
    Row("visual.merger.mlp.0.weight",               "m M",       "visual/merger/fc1/kernel"),
    Row("visual.merger.mlp.0.bias",                 "m",         "visual/merger/fc1/bias"),
    Row("visual.merger.mlp.2.weight",               "H m",       "visual/merger/fc2/kernel"),
    Row("visual.merger.mlp.2.bias",                 "H",         "visual/merger/fc2/bias"),
)
_QWEN3 = (
    Row("model.layers.{i}.self_attn.q_norm.weight", "D",         "language_model/layers/self_attn/q_norm/weight"),
    Row("model.layers.{i}.self_attn.k_norm.weight", "D",         "language_model/layers/self_attn/k_norm/weight"),
    Row("visual.patch_embed.proj.bias",             "E",         "visual/patch_embed/bias"),
    Row("visual.pos_embed.weight",                  "R E",       "visual/position_table/weight"),
    Row("visual.blocks.{i}.mlp.linear_fc1.weight",  "I E",       "visual/blocks/mlp/fc1/kernel"),
    Row("visual.blocks.{i}.mlp.linear_fc1.bias",    "I",         "visual/blocks/mlp/fc1/bias"),
    Row("visual.blocks.{i}.mlp.linear_fc2.weight",  "E I",       "visual/blocks/mlp/fc2/kernel"),
    Row("visual.blocks.{i}.mlp.linear_fc2.bias",    "E",         "visual/blocks/mlp/fc2/bias"),
    Row("visual.merger.norm.weight",                "E",         "visual/merger/ln_q/weight"),
    Row("visual.merger.norm.bias",                  "E",         "visual/merger/ln_q/bias"),
    Row("visual.merger.linear_fc1.weight",          "m M",       "visual/merger/fc1/kernel"),
    Row("visual.merger.linear_fc1.bias",            "m",         "visual/merger/fc1/bias"),
    Row("visual.merger.linear_fc2.weight",          "H m",       "visual/merger/fc2/kernel"),
    Row("visual.merger.linear_fc2.bias",            "H",         "visual/merger/fc2/bias"),
    Row("visual.deepstack_merger_list.{i}.norm.weight",
                                                    "M",         "visual/deepstack/norm/weight"),
    Row("visual.deepstack_merger_list.{i}.norm.bias",
                                                    "M",         "visual/deepstack/norm/bias"),
    Row("visual.deepstack_merger_list.{i}.linear_fc1.weight",
                                                    "m M",       "visual/deepstack/fc1/kernel"),
    Row("visual.deepstack_merger_list.{i}.linear_fc1.bias",
                                                    "m",         "visual/deepstack/fc1/bias"),
    Row("visual.deepstack_merger_list.{i}.linear_fc2.weight",
                                                    "H m",       "visual/deepstack/fc2/kernel"),
    Row("visual.deepstack_merger_list.{i}.linear_fc2.bias",
                                                    "H",         "visual/deepstack/fc2/bias"),
)
# fmt: on


def original_name(name: str) -> str:
    """Returns the original hub name of a tensor, given that name or the one that transformers 4.52 and later use.

    Example:
        >>> original_name("model.language_model.norm.weight"), original_name("model.visual.merger.ln_q.bias")
        ('model.norm.weight', 'visual.merger.ln_q.bias')
    """
    return re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))


def current_name(name: str) -> str:
    """Returns the name that transformers 4.52 and later use for a tensor, given that name or the original hub name.

    Example:
        >>> current_name("model.norm.weight"), current_name("visual.merger.ln_q.bias")
        ('model.language_model.norm.weight', 'model.visual.merger.ln_q.bias')
    """
    name = original_name(name)
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", name))


# How the published checkpoints of a member of the family spell the names.
SPELLING: dict[str, Callable[[str], str]] = {
    "qwen2_vl": original_name,
    "qwen2_5_vl": original_name,
    "qwen3_vl": current_name,
}


@functools.cache
def table_of(family: str) -> tuple[Row, ...]:
    """Returns the table of a member of the family.

    Example:
        >>> [table_of(family)[1].hub for family in ("qwen2_5_vl", "qwen3_vl")]
        ['model.layers.{i}.input_layernorm.weight', 'model.language_model.layers.{i}.input_layernorm.weight']
    """
    rows = _COMMON + (_QWEN3 if family == "qwen3_vl" else _QWEN2)
    return tuple(dataclasses.replace(row, hub=SPELLING[family](row.hub)) for row in rows)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _sides(layout: str) -> tuple[list[list[str]], list[list[str]]]:
    hub, _, parameter = layout.partition(" -> ")
    return split_axes(hub), split_axes(parameter)


def _shape(side: list[list[str]], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in axes) for axes in side)


def hub_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of the hub tensor (of one layer).

    Example:
        >>> hub_shape("(N D) H -> H N D", {"N": 12, "D": 128, "H": 1536})
        (1536, 1536)
    """
    return _shape(_sides(layout)[0], sizes)


def _rearrange(array: Any, before: list[list[str]], after: list[list[str]], sizes: Mapping[str, int]) -> Any:
    source, target = list(itertools.chain(*before)), list(itertools.chain(*after))
    split = array.reshape([sizes[axis] for axis in source])
    return split.transpose([source.index(axis) for axis in target]).reshape(_shape(after, sizes))


def to_parameter(layout: str, tensor: Any, sizes: Mapping[str, int]) -> Any:
    """Rearranges a hub tensor, a numpy or JAX array, into (one layer of) the parameter."""
    hub, parameter = _sides(layout)
    return _rearrange(tensor, hub, parameter, sizes)


def to_hub(layout: str, value: Any, sizes: Mapping[str, int]) -> Any:
    """Rearranges (one layer of) a parameter into the hub tensor: the inverse of `to_parameter`."""
    hub, parameter = _sides(layout)
    return _rearrange(value, parameter, hub, sizes)


def hub_partition(layout: str, spec: Sequence[Any]) -> list[Any]:
    """Returns the mesh axes that split each dimension of the hub tensor, so that devices receive their parameter's part.

    `spec` names the mesh axes of each dimension of (one layer of) the parameter. A hub dimension of several axes can only
    be split along its slowest one; if the parameter is split along another, the hub dimension stays whole.
    """
    hub, parameter = _sides(layout)
    mesh_axes = {axes[0]: names for axes, names in zip(parameter, spec, strict=False) if len(axes) == 1}
    return [mesh_axes.get(axes[0]) for axes in hub]


# ---- sizes -----------------------------------------------------------------------------------------------------------


def read_sizes(
    shapes: Mapping[str, tuple[int, ...]], patch: tuple[int, int, int], table: Sequence[Row]
) -> dict[str, int]:
    """Returns the size of each axis of the table, including the numbers of layers, read from the shapes of parameters.

    Args:
        shapes: {parameter path: shape}, of all parameters or some.
        patch: channels, frames and side length of a patch, which `visual/patch_embed/kernel` has in one dimension.
        table: that of the family, or of an adapter.

    Raises:
        UserError: a path is not in the table, or shapes contradict each other.
    """
    unknown = sorted(shapes.keys() - {row.path for row in table})
    if unknown:
        raise UserError(
            f"{unknown} have no tensors in a Hugging Face checkpoint; expected paths like {table[0].path!r}"
        )
    channels, frames, side = patch
    sizes = {"3": 3, "C": channels, "T": frames, "P": side, "Q": side}
    for path, shape in shapes.items():
        dimensions = find_row(path).dimensions
        if len(dimensions) != len(shape):
            raise UserError(f"{path} has shape {tuple(shape)}; expected {len(dimensions)} dimensions")
        for axes, length in zip(dimensions, shape, strict=True):
            if len(axes) == 1:
                sizes.setdefault(axes[0], length)
            expected = math.prod(sizes[axis] for axis in axes)
            if length != expected:
                raise UserError(
                    f"{path} has shape {tuple(shape)}; expected {expected} where it has {length} ({' '.join(axes)})"
                )
    return sizes


@dataclasses.dataclass(frozen=True)
class HubTensor:
    """One tensor of a checkpoint: the parameter of `row`, or one layer of it."""

    name: str
    row: Row
    layer: int | None
    shape: tuple[int, ...]


def hub_tensors(paths: Iterable[str], sizes: Mapping[str, int], table: Sequence[Row]) -> list[HubTensor]:
    """Returns every hub tensor of the parameters at these paths, sorted by layer."""
    paths = set(paths)
    tensors = [
        HubTensor(row.hub.replace("{i}", str(layer)), row, layer, hub_shape(row.layout, sizes))
        for row in table
        if row.path in paths
        for layer in (range(sizes[row.stack]) if row.stack else [None])
    ]
    return sorted(tensors, key=lambda tensor: (tensor.row.stack or "", tensor.layer or 0))


def from_stack(layout: str, value: Any, layer: int | None, sizes: Mapping[str, int]) -> Any:
    """Returns the hub tensor of one layer of a stacked parameter, or of a parameter that is not stacked (layer None)."""
    return to_hub(layout, value if layer is None else value[layer], sizes)
