"""Which tensor of a Hugging Face checkpoint is which parameter of this model: one table, read in both directions.

A row says: the tensor called `hub` is the parameter at `path`, rearranged as `layout` says. `{i}` in a hub name is the
number of a layer; those tensors are stacked along a leading axis of the parameter, which `layout` does not mention.

A layout is written `hub axes -> parameter axes`, one letter an axis, brackets around axes that lie in one dimension,
the slowest first. `(N D) H -> H N D` is a torch Linear weight [out, in] whose outputs are N heads of D numbers: split
the first dimension, move H to the front. A letter means the same number in all rows, which is checked when the numbers
are taken from a model's shapes.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table."""

    hub: str
    path: str
    layout: str

    @property
    def stack(self) -> str | None:
        """Whose layers are stacked in this parameter: `model.layers`, `visual.blocks` or None."""
        return self.hub.partition(".{i}.")[0] if "{i}" in self.hub else None


# fmt: off
TABLE = (
    # text: V vocabulary, H hidden, N heads, K key/value heads, D head size, F intermediate
    Row("model.embed_tokens.weight", "language_model/embed_tokens/weight", "V H -> V H"),
    Row("model.layers.{i}.input_layernorm.weight", "language_model/layers/input_layernorm/weight", "H -> H"),
    Row("model.layers.{i}.self_attn.q_proj.weight", "language_model/layers/self_attn/q_proj/kernel", "(N D) H -> H N D"),
    Row("model.layers.{i}.self_attn.q_proj.bias", "language_model/layers/self_attn/q_proj/bias", "(N D) -> N D"),
    Row("model.layers.{i}.self_attn.k_proj.weight", "language_model/layers/self_attn/k_proj/kernel", "(K D) H -> H K D"),
    Row("model.layers.{i}.self_attn.k_proj.bias", "language_model/layers/self_attn/k_proj/bias", "(K D) -> K D"),
    Row("model.layers.{i}.self_attn.v_proj.weight", "language_model/layers/self_attn/v_proj/kernel", "(K D) H -> H K D"),
    Row("model.layers.{i}.self_attn.v_proj.bias", "language_model/layers/self_attn/v_proj/bias", "(K D) -> K D"),
    Row("model.layers.{i}.self_attn.o_proj.weight", "language_model/layers/self_attn/o_proj/kernel", "H (N D) -> N D H"),
    Row("model.layers.{i}.post_attention_layernorm.weight",
        "language_model/layers/post_attention_layernorm/weight", "H -> H"),
    Row("model.layers.{i}.mlp.gate_proj.weight", "language_model/layers/mlp/gate_proj/kernel", "F H -> H F"),
    Row("model.layers.{i}.mlp.up_proj.weight", "language_model/layers/mlp/up_proj/kernel", "F H -> H F"),
    Row("model.layers.{i}.mlp.down_proj.weight", "language_model/layers/mlp/down_proj/kernel", "H F -> F H"),
    Row("model.norm.weight", "language_model/norm/weight", "H -> H"),
    Row("lm_head.weight", "lm_head/weight", "V H -> V H"),
    # vision: E width, n heads, d head size, I intermediate, M merged width; a patch has C channels, T frames, P x Q pixels
    Row("visual.patch_embed.proj.weight", "visual/patch_embed/kernel", "E C T P Q -> (C T P Q) E"),
    Row("visual.blocks.{i}.norm1.weight", "visual/blocks/norm1/weight", "E -> E"),
    Row("visual.blocks.{i}.norm1.bias", "visual/blocks/norm1/bias", "E -> E"),
    Row("visual.blocks.{i}.attn.qkv.weight", "visual/blocks/attn/qkv/kernel", "(3 n d) E -> E 3 n d"),
    Row("visual.blocks.{i}.attn.qkv.bias", "visual/blocks/attn/qkv/bias", "(3 n d) -> 3 n d"),
    Row("visual.blocks.{i}.attn.proj.weight", "visual/blocks/attn/proj/kernel", "E (n d) -> n d E"),
    Row("visual.blocks.{i}.attn.proj.bias", "visual/blocks/attn/proj/bias", "E -> E"),
    Row("visual.blocks.{i}.norm2.weight", "visual/blocks/norm2/weight", "E -> E"),
    Row("visual.blocks.{i}.norm2.bias", "visual/blocks/norm2/bias", "E -> E"),
    Row("visual.blocks.{i}.mlp.fc1.weight", "visual/blocks/mlp/fc1/kernel", "I E -> E I"),
    Row("visual.blocks.{i}.mlp.fc1.bias", "visual/blocks/mlp/fc1/bias", "I -> I"),
    Row("visual.blocks.{i}.mlp.fc2.weight", "visual/blocks/mlp/fc2/kernel", "E I -> I E"),
    Row("visual.blocks.{i}.mlp.fc2.bias", "visual/blocks/mlp/fc2/bias", "E -> E"),
    Row("visual.merger.ln_q.weight", "visual/merger/ln_q/weight", "E -> E"),
    Row("visual.merger.ln_q.bias", "visual/merger/ln_q/bias", "E -> E"),
    Row("visual.merger.mlp.0.weight", "visual/merger/fc1/kernel", "m M -> M m"),  # square: m = M
    Row("visual.merger.mlp.0.bias", "visual/merger/fc1/bias", "m -> m"),
    Row("visual.merger.mlp.2.weight", "visual/merger/fc2/kernel", "H m -> m H"),
    Row("visual.merger.mlp.2.bias", "visual/merger/fc2/bias", "H -> H"),
)
# fmt: on


def original_name(name: str) -> str:
    """The original hub name of a tensor, also when transformers 4.52 or later named it.

    Example:
        >>> original_name("model.language_model.norm.weight"), original_name("model.visual.merger.ln_q.bias")
        ('model.norm.weight', 'visual.merger.ln_q.bias')
    """
    return re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))


def current_name(name: str) -> str:
    """The name that transformers 4.52 and later have for a tensor of this original name.

    Example:
        >>> current_name("model.norm.weight"), current_name("visual.merger.ln_q.bias")
        ('model.language_model.norm.weight', 'model.visual.merger.ln_q.bias')
    """
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", name))


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _side(side: str) -> list[list[str]]:
    """`(N D) H` -> [[N, D], [H]]: the axes in each dimension."""
    return [group.split() if group else [axis] for group, axis in re.findall(r"\(([^)]*)\)|(\w+)", side)]


def _sides(layout: str) -> tuple[list[list[str]], list[list[str]]]:
    hub, _, parameter = layout.partition(" -> ")
    return _side(hub), _side(parameter)


def _shape(side: list[list[str]], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in axes) for axes in side)


def hub_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the hub tensor (of one layer).

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
    """A hub tensor as (one layer of) the parameter. numpy or JAX array in, the same kind out."""
    hub, parameter = _sides(layout)
    return _rearrange(tensor, hub, parameter, sizes)


def to_hub(layout: str, value: Any, sizes: Mapping[str, int]) -> Any:
    """(One layer of) a parameter as the hub tensor: the inverse of `to_parameter`."""
    hub, parameter = _sides(layout)
    return _rearrange(value, parameter, hub, sizes)


def hub_partition(layout: str, spec: Sequence[Any]) -> list[Any]:
    """How to cut the hub tensor over a mesh so that each device gets the part of its parameter.

    `spec` names the mesh axes of each dimension of (one layer of) the parameter. A hub dimension of several axes can
    only be cut along its slowest one; where the parameter is cut along another, the hub tensor stays whole there.
    """
    hub, parameter = _sides(layout)
    cut = {axes[0]: names for axes, names in zip(parameter, spec, strict=False) if len(axes) == 1}
    return [cut.get(axes[0]) for axes in hub]


# ---- sizes -----------------------------------------------------------------------------------------------------------


def read_sizes(
    shapes: Mapping[str, tuple[int, ...]], patch: tuple[int, int, int], table: Sequence[Row] = TABLE
) -> dict[str, int]:
    """What each letter of the table stands for, and how many layers are stacked, from the shapes of the parameters.

    Args:
        shapes: {parameter path: shape}; need not hold every parameter.
        patch: channels, frames and side length of a patch, which `visual/patch_embed/kernel` holds in one dimension.

    Raises:
        ValueError: a path that is not in the table, or shapes that contradict each other.
    """
    rows = {row.path: row for row in table}
    unknown = sorted(shapes.keys() - rows.keys())
    if unknown:
        raise ValueError(
            f"No tensor of a Hugging Face checkpoint corresponds to {unknown}; expected paths such as {table[0].path!r}"
        )
    channels, frames, side = patch
    sizes = {"3": 3, "C": channels, "T": frames, "P": side, "Q": side}
    for path, shape in shapes.items():
        row = rows[path]
        dimensions = ([[row.stack]] if row.stack else []) + _sides(row.layout)[1]
        if len(dimensions) != len(shape):
            raise ValueError(f"{path}: expected {len(dimensions)} dimensions, found shape {tuple(shape)}")
        for axes, length in zip(dimensions, shape, strict=True):
            if len(axes) == 1:
                sizes.setdefault(axes[0], length)
            expected = math.prod(sizes[axis] for axis in axes)
            if length != expected:
                raise ValueError(
                    f"{path} has shape {tuple(shape)}; expected {expected} where it has {length} ({' '.join(axes)})"
                )
    return sizes


@dataclasses.dataclass(frozen=True)
class HubTensor:
    """One tensor of a checkpoint: the parameter of `row`, or layer `layer` of it."""

    name: str
    row: Row
    layer: int | None
    shape: tuple[int, ...]


def hub_tensors(paths: Iterable[str], sizes: Mapping[str, int], table: Sequence[Row] = TABLE) -> list[HubTensor]:
    """Every tensor that these parameters correspond to; what belongs to one layer stands together."""
    wanted = set(paths)
    tensors = [
        HubTensor(row.hub.replace("{i}", str(layer)), row, layer, hub_shape(row.layout, sizes))
        for row in table
        if row.path in wanted
        for layer in (range(sizes[row.stack]) if row.stack else [None])
    ]
    return sorted(tensors, key=lambda tensor: (tensor.row.stack or "", tensor.layer or 0))


def from_stack(layout: str, value: Any, layer: int | None, sizes: Mapping[str, int]) -> Any:
    """The hub tensor of one layer of a whole parameter; layer None: the parameter has none."""
    return to_hub(layout, value if layer is None else value[layer], sizes)
