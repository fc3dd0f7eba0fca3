"""The table of parameters: one row per parameter of the model.

Everything that depends on a parameter's identity is derived from its row: how a mesh splits it (`model.sharding`), whether
LoRA can adapt it and PEFT's name for it (`model.lora`), which part it is frozen with and whether it decays
(`train.optimizer`), its floating-point operations (`train.flops`), and the parameter's side of the checkpoint layout
(`convert.table`, which adds the hub's side). A parameter without a row raises an error.

Axes are space-separated names, one per dimension. Parentheses enclose names that share a dimension, slowest-varying first.
The kernel of a `Linear` separates its input axes from its output axes with an arrow: `L H -> N D` has shape [L, H, N, D] and
maps H to N heads of D numbers. An axis name denotes the same size in every row:

    text    V vocabulary, H width, N query heads, K key/value heads, D head size, F MLP width, L layers
    vision  E width, n heads, d head size, I MLP width, Lv layers; C channels, T frames and P x Q pixels of a patch;
            R entries of the position table; M input width and m hidden width of the mergers (M = m); Ls deepstack mergers
    LoRA    r rank

Names that begin with L are stacking axes: the layers of a tower are one module, and its parameters have one entry per layer.

The table has the rows of the whole family. The structure of a model, which follows from its configuration, decides which of
them exist.
"""

import dataclasses
import re
from typing import Any

import jax

from liger_jax.config import QwenVLConfig
from liger_jax.options import Part


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table."""

    path: str
    axes: str
    part: str
    """The part of the model: vision, merger or text, which can be frozen or trained at separate learning rates; or lora."""
    decays: bool
    """Whether weight decay applies: to kernels and embeddings, as in transformers, and not to norms and biases."""
    target: str | None = None
    """The name of this kernel's `Linear` if LoRA can adapt it: PEFT's for Qwen2-VL, the shortest unambiguous suffix of the
    hub's name. ("proj" alone would also match the patch embedding, which PEFT treats as a convolution.)"""

    @property
    def dimensions(self) -> list[list[str]]:
        """The axis names in each dimension.

        >>> Parameter("kernel", "L (C T) -> E", "vision", True).dimensions
        [['L'], ['C', 'T'], ['E']]
        """
        return split_axes(self.axes.replace("->", ""))

    @property
    def stack(self) -> str | None:
        """The stacking axis, or None for a parameter outside the layers."""
        first = self.axes.split()[0]
        return first if first.startswith("L") else None

    @property
    def layer_axes(self) -> str:
        """The axes of a single layer, without stacking axis and arrow."""
        axes = self.axes.replace("-> ", "")
        return axes.removeprefix(f"{self.stack} ")

    @property
    def is_kernel(self) -> bool:
        """Whether this is the matrix of a `Linear`."""
        return "->" in self.axes

    @property
    def is_vector(self) -> bool:
        """Whether a single layer's parameter is one-dimensional: a norm's weight, or a bias without head axes."""
        return len(split_axes(self.layer_axes)) == 1


# fmt: off
TABLE = (
    Parameter("language_model/embed_tokens/weight",                   "V H",             "text",   True),
    Parameter("language_model/layers/input_layernorm/weight",         "L H",             "text",   False),
    Parameter("language_model/layers/self_attn/q_proj/kernel",        "L H -> N D",      "text",   True, "q_proj"),
    Parameter("language_model/layers/self_attn/q_proj/bias",          "L N D",           "text",   False),
    Parameter("language_model/layers/self_attn/k_proj/kernel",        "L H -> K D",      "text",   True, "k_proj"),
    Parameter("language_model/layers/self_attn/k_proj/bias",          "L K D",           "text",   False),
    Parameter("language_model/layers/self_attn/v_proj/kernel",        "L H -> K D",      "text",   True, "v_proj"),
    Parameter("language_model/layers/self_attn/v_proj/bias",          "L K D",           "text",   False),
    Parameter("language_model/layers/self_attn/q_norm/weight",        "L D",             "text",   False),
    Parameter("language_model/layers/self_attn/k_norm/weight",        "L D",             "text",   False),
    Parameter("language_model/layers/self_attn/o_proj/kernel",        "L N D -> H",      "text",   True, "o_proj"),
    Parameter("language_model/layers/post_attention_layernorm/weight", "L H",             "text",   False),
    Parameter("language_model/layers/mlp/gate_proj/kernel",           "L H -> F",        "text",   True, "gate_proj"),
    Parameter("language_model/layers/mlp/up_proj/kernel",             "L H -> F",        "text",   True, "up_proj"),
    Parameter("language_model/layers/mlp/down_proj/kernel",           "L F -> H",        "text",   True, "down_proj"),
    Parameter("language_model/norm/weight",                           "H",               "text",   False),
    Parameter("lm_head/weight",                                       "V H",             "text",   True),
    Parameter("visual/patch_embed/kernel",                            "(C T P Q) -> E",  "vision", True),
    Parameter("visual/patch_embed/bias",                              "E",               "vision", False),
    Parameter("visual/position_table/weight",                         "R E",             "vision", True),
    Parameter("visual/blocks/norm1/weight",                           "Lv E",            "vision", False),
    Parameter("visual/blocks/norm1/bias",                             "Lv E",            "vision", False),
    Parameter("visual/blocks/attn/qkv/kernel",                        "Lv E -> 3 n d",   "vision", True, "qkv"),
    Parameter("visual/blocks/attn/qkv/bias",                          "Lv 3 n d",        "vision", False),
    Parameter("visual/blocks/attn/proj/kernel",                       "Lv n d -> E",     "vision", True, "attn.proj"),
    Parameter("visual/blocks/attn/proj/bias",                         "Lv E",            "vision", False),
    Parameter("visual/blocks/norm2/weight",                           "Lv E",            "vision", False),
    Parameter("visual/blocks/norm2/bias",                             "Lv E",            "vision", False),
    Parameter("visual/blocks/mlp/fc1/kernel",                         "Lv E -> I",       "vision", True, "fc1"),
    Parameter("visual/blocks/mlp/fc1/bias",                           "Lv I",            "vision", False),
    Parameter("visual/blocks/mlp/fc2/kernel",                         "Lv I -> E",       "vision", True, "fc2"),
    Parameter("visual/blocks/mlp/fc2/bias",                           "Lv E",            "vision", False),
    Parameter("visual/blocks/mlp/gate_proj/kernel",                   "Lv E -> I",       "vision", True, "visual.gate_proj"),
    Parameter("visual/blocks/mlp/gate_proj/bias",                     "Lv I",            "vision", False),
    Parameter("visual/blocks/mlp/up_proj/kernel",                     "Lv E -> I",       "vision", True, "visual.up_proj"),
    Parameter("visual/blocks/mlp/up_proj/bias",                       "Lv I",            "vision", False),
    Parameter("visual/blocks/mlp/down_proj/kernel",                   "Lv I -> E",       "vision", True, "visual.down_proj"),
    Parameter("visual/blocks/mlp/down_proj/bias",                     "Lv E",            "vision", False),
    Parameter("visual/merger/ln_q/weight",                            "E",               "merger", False),
    Parameter("visual/merger/ln_q/bias",                              "E",               "merger", False),
    Parameter("visual/merger/fc1/kernel",                             "M -> m",          "merger", True, "mlp.0"),
    Parameter("visual/merger/fc1/bias",                               "m",               "merger", False),
    Parameter("visual/merger/fc2/kernel",                             "m -> H",          "merger", True, "mlp.2"),
    Parameter("visual/merger/fc2/bias",                               "H",               "merger", False),
    Parameter("visual/deepstack/norm/weight",                         "Ls M",            "merger", False),
    Parameter("visual/deepstack/norm/bias",                           "Ls M",            "merger", False),
    Parameter("visual/deepstack/fc1/kernel",                          "Ls M -> m",       "merger", True, "deepstack.fc1"),
    Parameter("visual/deepstack/fc1/bias",                            "Ls m",            "merger", False),
    Parameter("visual/deepstack/fc2/kernel",                          "Ls m -> H",       "merger", True, "deepstack.fc2"),
    Parameter("visual/deepstack/fc2/bias",                            "Ls H",            "merger", False),
)
# fmt: on

PARTS: tuple[Part, ...] = ("vision", "merger", "text")  # in the order in which data passes through them


def _lora_rows(kernel: Parameter) -> tuple[Parameter, Parameter]:
    """Returns the rows of A and B for a kernel: `L H -> N D` becomes `L H -> r` and `L r -> N D`."""
    module = kernel.path.removesuffix("/kernel")
    stack = f"{kernel.stack} " if kernel.stack else ""
    inputs, outputs = kernel.axes.removeprefix(stack).split(" -> ")
    return (
        Parameter(f"{module}/lora/a", f"{stack}{inputs} -> r", "lora", True),
        Parameter(f"{module}/lora/b", f"{stack}r -> {outputs}", "lora", True),
    )


_ROWS = {row.path: row for row in TABLE}
_ROWS |= {row.path: row for kernel in TABLE if kernel.target for row in _lora_rows(kernel)}
_ROOTS = {path.split("/")[0] for path in _ROWS}


def find_row(path: str) -> Parameter:
    """Returns the row of a parameter. The path may have a prefix, as in an optimizer's state.

    Raises:
        LookupError: The table has no row for the parameter.

    Example:
        >>> find_row("opt_state/0/mu/language_model/layers/mlp/up_proj/kernel").axes
        'L H -> F'
        >>> find_row("visual/merger/fc2/lora/b").axes
        'r -> H'
    """
    steps = path.split("/")
    for start in range(len(steps)):
        if row := _ROWS.get("/".join(steps[start:])):
            return row
    raise LookupError(f"{path} has no row in the table of parameters; expected one in liger_jax/model/params.py")


def is_parameter_path(path: str) -> bool:
    """Returns whether a path, perhaps after a prefix, leads into the model, so that the table must have a row for it."""
    return not _ROOTS.isdisjoint(path.split("/"))


def param_group(path: str) -> str:
    """Returns the part that a parameter is trained with: vision, merger, text or lora.

    Example:
        >>> param_group("visual/merger/fc1/kernel"), param_group("visual/merger/fc1/lora/a")
        ('merger', 'lora')
    """
    return find_row(path).part


def axis_sizes(config: QwenVLConfig) -> dict[str, int]:
    """Returns the size of each axis of the table for a configuration.

    Example:
        >>> axis_sizes(QwenVLConfig.qwen2_vl_2b())["F"]
        8960
    """
    text, vision = config.text, config.vision
    merged = vision.embed_dim * vision.merge_unit
    return {
        "V": text.vocab_size,
        "H": text.hidden_size,
        "N": text.num_attention_heads,
        "K": text.num_key_value_heads,
        "D": text.head_dim,
        "F": text.intermediate_size,
        "L": text.num_hidden_layers,
        "E": vision.embed_dim,
        "n": vision.num_heads,
        "d": vision.head_dim,
        "I": vision.intermediate_size,
        "Lv": vision.depth,
        "M": merged,
        "m": merged,
        "Ls": len(vision.deepstack_layers),
        "R": vision.position_table_side**2,
        "C": vision.in_channels,
        "T": vision.temporal_patch_size,
        "P": vision.patch_size,
        "Q": vision.patch_size,
        "3": 3,
    }


def split_axes(axes: str) -> list[list[str]]:
    """Returns the axis names in each dimension.

    Example:
        >>> split_axes("(N D) H")
        [['N', 'D'], ['H']]
    """
    return [group.split() if group else [axis] for group, axis in re.findall(r"\(([^)]*)\)|(\w+)", axes)]


# ---- paths -----------------------------------------------------------------------------------------------------------


def param_paths(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} for a model, its gradients, or any other pytree.

    Example:
        >>> param_paths({"a": {"b": 1}})
        {'a/b': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple) -> str:
    """Returns a key path as text, without the last step into the value of an NNX Param."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
