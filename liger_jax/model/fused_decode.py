"""One step of generation: the language model's layers for a single new token a row.

What `LanguageModel` with a cache computes, but for roundings, for one row in six launches a layer: launches are what a
step's time goes to beside its weights. Those that are read together lie in one array, and what stands beside a product or
the cache is done in the same pass; see pallas_kernels.decode_linear and decode_attention.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from liger_jax.model.kv_cache import Cache
from liger_jax.model.text import DecoderLayer, LanguageModel


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_norm", "qkv", "qkv_bias", "o", "mlp_norm", "gate_up", "down"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """The weights of a layer, as decoding reads them: [out, in]."""

    input_norm: jax.Array  # [H]
    qkv: jax.Array  # [(N + 2 K) D, H]
    qkv_bias: jax.Array  # [(N + 2 K) D]
    o: jax.Array  # [H, N D]
    mlp_norm: jax.Array  # [H]
    gate_up: jax.Array  # [2, I, H]
    down: jax.Array  # [H, I]

    @classmethod
    def of(cls, layer: DecoderLayer) -> Self:
        """The weights of a single layer, without a leading axis and without LoRA."""
        attention, mlp = layer.self_attn, layer.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        width = layer.input_layernorm.weight.shape[0]
        together = (
            jnp.concatenate([p.kernel[...].reshape(width, -1) for p in projections], axis=1),
            jnp.stack([mlp.gate_proj.kernel[...], mlp.up_proj.kernel[...]]),
        )
        # put together first, then transposed: the other way round XLA does it twice as slowly
        qkv, gate_up = jax.lax.optimization_barrier(together)
        return cls(
            input_norm=layer.input_layernorm.weight[...],
            qkv=qkv.T,
            qkv_bias=jnp.concatenate([p.bias[...].reshape(-1) for p in projections]),
            o=attention.o_proj.kernel[...].reshape(-1, width).T,
            mlp_norm=layer.post_attention_layernorm.weight[...],
            gate_up=gate_up.transpose(0, 2, 1),
            down=mlp.down_proj.kernel[...].T,
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "norm", "head"], meta_fields=["eps"])
@dataclasses.dataclass(frozen=True)
class PackedModel:
    """What `decode_step` reads of a model: arrays of their own for each layer, in the order they are read.

    A loop that slices a stack of layers would copy the slice in each step.
    """

    layers: tuple[PackedLayer, ...]
    norm: jax.Array  # [H]
    head: jax.Array  # [V, H]
    eps: float

    @classmethod
    def of(cls, text: LanguageModel, head: jax.Array) -> Self:
        """Copies all weights of the layers once, before decoding."""
        layers = tuple(_packed(text.layers, i) for i in range(text.config.num_hidden_layers))
        return cls(layers, text.norm.weight[...], head, text.norm.eps)


@jax.jit
def _packed(layers: DecoderLayer, i: jax.Array) -> PackedLayer:
    """Layer i of the stack: a small program that runs for each of them, rather than a large one for all."""
    one = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), layers)
    return PackedLayer.of(one)


def decode_step(
    model: PackedModel,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: Cache,
    slot: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, Cache]:
    """A new token of each row goes through all layers, and into a slot of the cache.

    Args:
        x: [B, H], the tokens' embeddings.
        cos: [B, D/2], of their positions; see `LanguageModel.rotary`.
        sin: as cos.
        cache: filled up to the slot. Updated in place where it is a loop's carry.
        slot: int, a scalar: where the token goes.
        implementation: of the operations, see pallas_kernels.

    Returns:
        Logits [B, V], and the cache with the slot filled and open.
    """
    all_keys, all_values = [], []
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        x, keys, values = _layer(layer, x, cos, sin, keys, values, cache.valid, slot, model.eps, implementation)
        all_keys.append(keys)
        all_values.append(values)
    cache = cache.open_slots(slot, jnp.ones((len(x), 1), jnp.int32))
    cache = dataclasses.replace(cache, keys=tuple(all_keys), values=tuple(all_values))
    return pk.norm_linear(x, model.norm, model.head, eps=model.eps, implementation=implementation), cache


@functools.partial(jax.jit, static_argnames=("eps", "implementation"))  # traced and lowered once for all layers
def _layer(layer: PackedLayer, x, cos, sin, keys, values, valid, slot, eps, implementation):
    """x [B, H] -> x, and the layer's keys and values with those of the new token."""
    run = {"implementation": implementation}
    qkv = pk.norm_linear(x, layer.input_norm, layer.qkv, layer.qkv_bias, eps=eps, **run)
    qkv = qkv.reshape(len(x), -1, keys.shape[-1])
    out, keys, values = pk.decode_attention(qkv, cos, sin, keys, values, valid, slot, **run)
    x = pk.linear_add(out.reshape(len(x), -1), layer.o, x, **run)
    gated = pk.norm_swiglu(x, layer.mlp_norm, layer.gate_up, eps=eps, **run)
    return pk.linear_add(gated, layer.down, x, **run), keys, values
