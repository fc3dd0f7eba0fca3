"""LoRA: a frozen model's matrix products learn a low-rank addition each.

    y = x W + bias + scale (x A) B      A [*in, r] random, B [r, *out] zero at first; scale = alpha / r

The layers of a tower are one stacked module, and so are their A and B: [layers, *in, r] and [layers, r, *out].
`convert.save_adapter` writes A and B for PEFT, `convert.load_adapter` reads them.
"""

import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liger_jax.model import Qwen2VL
from liger_jax.model.layers import Linear, LoRA
from liger_jax.model.params import param_paths
from liger_jax.model.sharding import get_mesh, param_shardings
from liger_jax.train.optimizer import param_group

# What can be adapted: PEFT's name for it, as short as it means one thing only, and the path of the `Linear`. These are
# all that PEFT's "all-linear" stands for. (Plain "proj" would be the patch embedding, too, a convolution in PEFT's eyes.)
TEXT_TARGETS = {
    "q_proj": "language_model/layers/self_attn/q_proj",
    "k_proj": "language_model/layers/self_attn/k_proj",
    "v_proj": "language_model/layers/self_attn/v_proj",
    "o_proj": "language_model/layers/self_attn/o_proj",
    "gate_proj": "language_model/layers/mlp/gate_proj",
    "up_proj": "language_model/layers/mlp/up_proj",
    "down_proj": "language_model/layers/mlp/down_proj",
}
TARGETS = TEXT_TARGETS | {
    "qkv": "visual/blocks/attn/qkv",
    "attn.proj": "visual/blocks/attn/proj",
    "fc1": "visual/blocks/mlp/fc1",
    "fc2": "visual/blocks/mlp/fc2",
    "mlp.0": "visual/merger/fc1",
    "mlp.2": "visual/merger/fc2",
}


def add_lora(
    model: Qwen2VL,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: str | Collection[str] = tuple(TEXT_TARGETS),
    rslora: bool = False,
    seed: int = 0,
    dtype="float32",
) -> Qwen2VL:
    """The model with matrices A and B beside its weights; its outputs stay what they are until B is trained.

    A is uniform in +-1 / sqrt(inputs), as PEFT makes it. The weights are shared with `model`, not copied. Train A and B
    alone with `liger_jax.train.optimizer.make_optimizer(..., freeze=BASE)`.

    Args:
        model: one without LoRA; on a mesh, A and B are split as the weights are.
        rank: columns of A and rows of B.
        alpha: the addition is multiplied with alpha / rank.
        targets: PEFT's names of what is adapted, some of `TARGETS`; "all-linear" for all of them. By default the text
            tower's.
        rslora: multiply with alpha / sqrt(rank) instead.
        seed: of the random numbers in A.
        dtype: of A and B. float32 whatever the weights' (PEFT's autocast_adapter_dtype): small steps are not rounded
            away. Products are computed in the dtype of the activations.

    Returns:
        A new model.

    Raises:
        ValueError: an unknown target or none, a rank or alpha that is not positive, a model that has LoRA already.

    Example:
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig
        >>> model = add_lora(Qwen2VL.init(Qwen2VLConfig.tiny()), rank=4, targets=["q_proj", "v_proj"])
        >>> model.language_model.layers.self_attn.q_proj.lora.a.shape
        (2, 64, 4)
    """
    names = _checked(targets)
    if lora_config(model) is not None:
        raise ValueError("The model has LoRA already; merge_lora makes it part of the weights")
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank is {rank} and alpha {alpha}; expected a rank of at least 1 and an alpha over 0")
    model = jax.tree.map(lambda leaf: leaf, model)  # modules of its own, the same arrays

    def make(seed):
        keys = dict(zip(TARGETS, jax.random.split(jax.random.key(seed), len(TARGETS)), strict=True))
        fresh = {name: _fresh(_linear(model, TARGETS[name]), keys[name], rank, jnp.dtype(dtype)) for name in names}
        return {f"{TARGETS[name]}/lora": LoRA(a, b, alpha=alpha, rslora=rslora) for name, (a, b) in fresh.items()}

    mesh, seed = get_mesh(model), np.uint32(seed % 2**32)
    shardings = None if mesh is None else param_shardings(jax.eval_shape(make, seed), mesh)
    for path, lora in jax.jit(make, out_shardings=shardings)(seed).items():
        _linear(model, path.removesuffix("/lora")).lora = lora
    return model


def merge_lora(model: Qwen2VL) -> Qwen2VL:
    """The model with W + scale A B, computed in float32, in place of W, and without A and B.

    Raises:
        ValueError: the model has no LoRA.

    Example:
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig
        >>> model = Qwen2VL.init(Qwen2VLConfig.tiny())
        >>> jax.tree.structure(merge_lora(add_lora(model))) == jax.tree.structure(model)
        True
    """
    found = lora_config(model)
    if found is None:
        raise ValueError("The model has no LoRA to merge")
    model = jax.tree.map(lambda leaf: leaf, model)
    for name in found["targets"]:
        linear = _linear(model, TARGETS[name])
        kernel, lora = linear.kernel[...], linear.lora
        stacked = kernel.ndim > linear.in_axes + linear.out_axes
        placed = {"scale": lora.scale, "stacked": stacked, "sharding": kernel.sharding}
        linear.kernel = nnx.Param(_merged(kernel, lora.a[...], lora.b[...], **placed))
        linear.lora = None
    return model


def lora_config(model: Qwen2VL) -> dict[str, Any] | None:
    """What `add_lora` was told, {"rank", "alpha", "targets", "rslora"}; None for a model without LoRA.

    Example:
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig
        >>> model = jax.eval_shape(add_lora, Qwen2VL.abstract(Qwen2VLConfig.tiny()))  # shapes without memory
        >>> lora_config(model)["rank"], len(lora_config(model)["targets"])
        (8, 7)
    """
    loras = {name: lora for name, path in TARGETS.items() if (lora := _linear(model, path).lora) is not None}
    if not loras:
        return None
    first = next(iter(loras.values()))
    return {"rank": first.rank, "alpha": first.alpha, "targets": list(loras), "rslora": first.rslora}


def adapted_parts(model: Qwen2VL) -> set[str]:
    """The parts of the model that have LoRA, see `liger_jax.train.optimizer.BASE`."""
    return {param_group(path.split("/lora/")[0] + "/") for path in lora_leaves(model)}


def lora_leaves(tree: Any) -> dict[str, Any]:
    """{path: leaf} of all A and B in a model, its gradients, or anything with such paths."""
    return {path: leaf for path, leaf in param_paths(tree).items() if "/lora/" in path}


def _checked(targets: str | Collection[str]) -> list[str]:
    """The names that `targets` stands for, in the order of `TARGETS`."""
    names = {targets} if isinstance(targets, str) else set(targets)
    if names == {"all-linear"}:
        return list(TARGETS)
    if not names or names - TARGETS.keys():
        raise ValueError(f"targets is {targets!r}; expected 'all-linear' or some of {list(TARGETS)}")
    return [name for name in TARGETS if name in names]


def _linear(model: Qwen2VL, path: str) -> Linear:
    return functools.reduce(getattr, path.split("/"), model)


def _fresh(linear: Linear, key: jax.Array, rank: int, dtype) -> tuple[jax.Array, jax.Array]:
    """A [*stack, *in, rank] and B [*stack, rank, *out] for a kernel [*stack, *in, *out]."""
    shape = linear.kernel.shape
    stack, outputs = shape[: -linear.in_axes - linear.out_axes], shape[-linear.out_axes :]
    inputs = shape[len(stack) : -linear.out_axes]
    bound = 1 / math.sqrt(math.prod(inputs))
    a = jax.random.uniform(key, (*stack, *inputs, rank), jnp.float32, -bound, bound)
    return a.astype(dtype), jnp.zeros((*stack, rank, *outputs), dtype)


@functools.partial(jax.jit, static_argnames=("scale", "stacked", "sharding"))
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, *, scale: float, stacked: bool, sharding) -> jax.Array:
    def one(layer):
        kernel, a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in layer)
        return (kernel + scale * jnp.tensordot(a, b, axes=1, precision="highest")).astype(layer[0].dtype)

    # layer by layer: a whole stack in float32 would be twice the kernel
    merged = jax.lax.map(one, (kernel, a, b)) if stacked else one((kernel, a, b))
    return jax.lax.with_sharding_constraint(merged, sharding)
