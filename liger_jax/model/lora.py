"""LoRA: low-rank updates to the frozen weights of a model.

    y = x W + bias + scale (x A) B      A [*in, r] random, B [r, *out] initially zero; scale = alpha / r

The layers of a tower are one stacked module, and so are their A and B: [layers, *in, r] and [layers, r, *out].
`convert.save_adapter` writes A and B for PEFT, and `convert.load_adapter` reads them.
"""

import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liger_jax.errors import UserError
from liger_jax.model import QwenVL
from liger_jax.model.layers import Linear, LoRA
from liger_jax.model.params import TABLE, param_group, param_paths
from liger_jax.model.sharding import get_mesh, param_shardings, with_auto_axes, with_axes_of

# The name of each `Linear` that LoRA can adapt, and its path. PEFT's "all-linear" means all that a model has. The names are
# PEFT's for Qwen2-VL.
TARGETS = {row.target: row.path.removesuffix("/kernel") for row in TABLE if row.target}
TEXT_TARGETS = {row.target: row.path.removesuffix("/kernel") for row in TABLE if row.target and row.part == "text"}
# PEFT's names for the vision layers of Qwen3-VL, which calls all of them linear_fc1 and linear_fc2.
ALIASES = {
    f"{prefix}linear_fc{i}": tuple(name[i - 1] for name in names)
    for i in (1, 2)
    for prefix, names in (
        ("mlp.", [("fc1", "fc2")]),
        ("merger.", [("mlp.0", "mlp.2")]),
        ("", [("fc1", "fc2"), ("mlp.0", "mlp.2"), ("deepstack.fc1", "deepstack.fc2")]),
    )
}

LARGEST_RANK = 2**20  # far above the size of any layer


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Shape and scale of a model's LoRA.

    Raises:
        UserError: No target or an unknown one, or a rank or alpha that is not positive.

    Example:
        >>> LoraOptions(rank=4, targets=["v_proj", "q_proj"]).targets
        ('q_proj', 'v_proj')
    """

    rank: int = 8
    """Rank of the update: A has this many columns, B this many rows."""
    alpha: float = 16
    """Numerator of the scale, alpha / rank."""
    targets: str | Collection[str] = tuple(TEXT_TARGETS)
    """Names of the adapted layers, some of `TARGETS` or `ALIASES`, or "all-linear". Stored in the order of `TARGETS`."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""

    def __post_init__(self):
        names = {self.targets} if isinstance(self.targets, str) else set(self.targets)
        names = {target for name in names for target in ALIASES.get(name, (name,))}
        if names != {"all-linear"} and (not names or names - TARGETS.keys()):
            raise UserError(f"targets is {self.targets!r}; expected 'all-linear' or some of {list(TARGETS)}")
        if not 1 <= self.rank <= LARGEST_RANK:
            raise UserError(f"rank is {self.rank}; expected at least 1 and at most {LARGEST_RANK}")
        if not 0 < self.alpha < 1e30:  # also false for NaN
            raise UserError(f"alpha is {self.alpha!s:.60}; expected above 0, within the range of float32")
        object.__setattr__(self, "targets", tuple(name for name in ("all-linear", *TARGETS) if name in names))

    def for_model(self, model: QwenVL) -> Self:
        """Returns the options with the names of all layers of the model in place of "all-linear".

        Raises:
            UserError: The model has no layer of one of the names.
        """
        names = find_targets(model)
        if self.targets == ("all-linear",):
            return dataclasses.replace(self, targets=tuple(names))
        if missing := [name for name in self.targets if name not in names]:
            raise UserError(
                f"targets has {missing}, which the model lacks; expected 'all-linear' or some of {list(names)}"
            )
        return self


def add_lora(
    model: QwenVL,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: str | Collection[str] = tuple(TEXT_TARGETS),
    rslora: bool = False,
    seed: int = 0,
    dtype="float32",
) -> QwenVL:
    """Returns the model with LoRA matrices A and B added to some of its layers.

    Its outputs do not change until B is trained. A is uniform in +-1 / sqrt(inputs), as in PEFT. The weights are shared with
    `model`, not copied. To train A and B alone, freeze all other parts: `make_optimizer(..., freeze=PARTS)` with
    `liger_jax.model.params.PARTS`.

    Args:
        model: without LoRA. On a mesh, A and B are split as the weights are.
        rank: rank of the update, the number of A's columns and of B's rows.
        alpha: numerator of the scale, alpha / rank.
        targets: names of the layers to adapt, some of `TARGETS` or `ALIASES`, or "all-linear" for all of them. By default,
            those of the text tower.
        rslora: scale by alpha / sqrt(rank) instead.
        seed: seed for the random numbers in A.
        dtype: dtype of A and B. The default is float32 for weights of any dtype (PEFT's autocast_adapter_dtype), so that
            small updates are not rounded away. Matmuls run in the dtype of the activations.

    Returns:
        A new model.

    Raises:
        UserError: No target, an unknown one, or one that the model lacks; a rank or alpha that is not positive; or a model
            that already has LoRA.

    Source: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685

    Example:
        >>> from liger_jax import QwenVL, QwenVLConfig
        >>> model = add_lora(QwenVL.init(QwenVLConfig.tiny()), rank=4, targets=["q_proj", "v_proj"])
        >>> model.language_model.layers.self_attn.q_proj.lora.a.shape
        (2, 64, 4)
    """
    options = LoraOptions(rank, alpha, targets, rslora).for_model(model)
    if lora_config(model) is not None:
        raise UserError("The model already has LoRA; expected one without, as merge_lora returns it")
    model = jax.tree.map(lambda leaf: leaf, model)  # new modules, the same arrays

    def init(seed):
        names = find_targets(model)
        keys = dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))
        loras = {}
        for name in options.targets:
            path = TARGETS[name]
            a, b = _init_matrices(_get_linear(model, path), keys[name], options.rank, jnp.dtype(dtype))
            loras[f"{path}/lora"] = LoRA(a, b, alpha=options.alpha, rslora=options.rslora)
        return loras

    mesh, seed_bits = get_mesh(model), np.uint32(seed % 2**32)
    shardings = None if mesh is None else param_shardings(jax.eval_shape(init, seed_bits), mesh)
    for path, lora in jax.jit(init, out_shardings=shardings)(seed_bits).items():
        _get_linear(model, path.removesuffix("/lora")).lora = lora
    return model


def merge_lora(model: QwenVL) -> QwenVL:
    """Returns the model with W + scale A B, computed in float32, in place of W, and without A and B.

    Raises:
        UserError: The model has no LoRA.

    Example:
        >>> from liger_jax import QwenVL, QwenVLConfig
        >>> model = QwenVL.init(QwenVLConfig.tiny())
        >>> jax.tree.structure(merge_lora(add_lora(model))) == jax.tree.structure(model)
        True
    """
    options = lora_config(model)
    if options is None:
        raise UserError("The model has no LoRA to merge; expected one with LoRA, as add_lora returns it")
    mesh, model = get_mesh(model), with_auto_axes(jax.tree.map(lambda leaf: leaf, model))
    for name in options.targets:
        linear = _get_linear(model, TARGETS[name])
        kernel = linear.kernel[...]
        stacked = kernel.ndim > linear.in_axes + linear.out_axes
        linear.kernel = nnx.Param(_merge(kernel, linear.lora, stacked=stacked, sharding=kernel.sharding))
        linear.lora = None
    return model if mesh is None else with_axes_of(mesh, model)


def lora_config(model: QwenVL) -> LoraOptions | None:
    """Returns the options of the model's LoRA, as given to `add_lora`, or None for a model without LoRA.

    Example:
        >>> from liger_jax import QwenVL, QwenVLConfig
        >>> model = jax.eval_shape(add_lora, QwenVL.abstract(QwenVLConfig.tiny()))  # shapes without memory
        >>> lora_config(model).rank, len(lora_config(model).targets)
        (8, 7)
    """
    loras = {
        name: lora for name, path in find_targets(model).items() if (lora := _get_linear(model, path).lora) is not None
    }
    if not loras:
        return None
    first = next(iter(loras.values()))
    return LoraOptions(first.rank, first.alpha, tuple(loras), first.rslora)


def find_targets(model: QwenVL) -> dict[str, str]:
    """Returns the names and paths of the layers of a model that LoRA can adapt: some of `TARGETS`, in that order.

    Example:
        >>> from liger_jax import QwenVL, QwenVLConfig
        >>> list(find_targets(QwenVL.abstract(QwenVLConfig.tiny(family="qwen3_vl"))))[-4:]
        ['mlp.0', 'mlp.2', 'deepstack.fc1', 'deepstack.fc2']
    """
    paths = param_paths(model)
    return {name: path for name, path in TARGETS.items() if f"{path}/kernel" in paths}


def adapted_parts(model: QwenVL) -> set[str]:
    """Returns the parts of the model that have LoRA: some of `liger_jax.model.params.PARTS`."""
    return {param_group(path.partition("/lora/")[0] + "/kernel") for path in lora_leaves(model)}


def lora_leaves(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} for all A and B in a model, its gradients, or any pytree with such paths."""
    return {path: leaf for path, leaf in param_paths(tree).items() if "/lora/" in path}


def _get_linear(model: Any, path: str) -> Linear:
    return functools.reduce(getattr, path.split("/"), model)


def _init_matrices(linear: Linear, key: jax.Array, rank: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns A [*stack, *in, rank] and B [*stack, rank, *out] for a kernel [*stack, *in, *out]."""
    shape = linear.kernel.shape
    stack, outputs = shape[: -linear.in_axes - linear.out_axes], shape[-linear.out_axes :]
    inputs = shape[len(stack) : -linear.out_axes]
    bound = 1 / math.sqrt(math.prod(inputs))
    a = jax.random.uniform(key, (*stack, *inputs, rank), jnp.float32, -bound, bound)
    return a.astype(dtype), jnp.zeros((*stack, rank, *outputs), dtype)


@functools.partial(jax.jit, static_argnames=("stacked", "sharding"))
def _merge(kernel: jax.Array, lora: LoRA, *, stacked: bool, sharding) -> jax.Array:
    """Returns kernel + scale A B in the kernel's dtype."""
    # layer by layer: a whole stack in float32 would take twice the kernel's memory
    merged = jax.lax.map(lambda layer: layer[1].merge(layer[0]), (kernel, lora)) if stacked else lora.merge(kernel)
    return jax.lax.with_sharding_constraint(merged, sharding)
