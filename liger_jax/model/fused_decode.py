"""The fused decoding step: runs the language model's layers for a single new token per row.

Results equal those of `LanguageModel` with a KV cache, up to rounding. Apart from reading the weights, a decoding step
spends its time on kernel launches; this one needs six per layer for a single row. Weights that are read together are packed
into one array. Adjacent norms, gates, residual adds and cache updates are fused into the matmuls and the attention; see
pallas_kernels.decode_linear and decode_attention.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from liger_jax.model.kv_cache import KVCache
from liger_jax.model.text import DecoderLayer, LanguageModel


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_norm", "qkv", "qkv_bias", "head_norms", "o", "mlp_norm", "gate_up", "down"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """The weights of one layer, packed for decoding; matrices are [out, in]."""

    input_norm: jax.Array  # [H]
    qkv: jax.Array  # [(N + 2 K) D, H]
    qkv_bias: jax.Array | None  # [(N + 2 K) D]
    head_norms: tuple[jax.Array, ...]  # of the query heads and of the key heads, each [D]; empty without these norms
    o: jax.Array  # [H, N D]
    mlp_norm: jax.Array  # [H]
    gate_up: jax.Array  # [2, F, H]
    down: jax.Array  # [H, F]

    @classmethod
    def from_layer(cls, layer: DecoderLayer) -> Self:
        """Returns the packed weights of a single layer, which has no leading layer axis and no LoRA."""
        attention, mlp = layer.self_attn, layer.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        width = layer.input_layernorm.weight.shape[0]
        biases = [p.bias[...].reshape(-1) for p in projections if p.bias is not None]
        packed = (
            jnp.concatenate([p.kernel[...].reshape(width, -1) for p in projections], axis=1),
            jnp.stack([mlp.gate_proj.kernel[...], mlp.up_proj.kernel[...]]),
        )
        # concatenate first, then transpose: XLA takes twice as long the other way round
        qkv, gate_up = jax.lax.optimization_barrier(packed)
        return cls(
            input_norm=layer.input_layernorm.weight[...],
            qkv=qkv.T,
            qkv_bias=jnp.concatenate(biases) if biases else None,
            head_norms=tuple(norm.weight[...] for norm in (attention.q_norm, attention.k_norm) if norm is not None),
            o=attention.o_proj.kernel[...].reshape(-1, width).T,
            mlp_norm=layer.post_attention_layernorm.weight[...],
            gate_up=gate_up.transpose(0, 2, 1),
            down=mlp.down_proj.kernel[...].T,
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "norm", "head"], meta_fields=["eps"])
@dataclasses.dataclass(frozen=True)
class PackedModel:
    """The weights that `decode_step` reads, with separate arrays for each layer.

    A loop that slices stacked layers would copy the slices in every step.
    """

    layers: tuple[PackedLayer, ...]
    norm: jax.Array  # [H]
    head: jax.Array  # [V, H]
    eps: float

    @classmethod
    def from_model(cls, text: LanguageModel, head: jax.Array) -> Self:
        """Returns the model packed for decoding, with copies of the weights of all layers."""
        layers = tuple(_pack_layer(text.layers, i) for i in range(text.config.num_hidden_layers))
        return cls(layers, text.norm.weight[...], head, text.norm.eps)


@jax.jit
def _pack_layer(layers: DecoderLayer, i: jax.Array) -> PackedLayer:
    """Returns layer i of the stack, packed. A small program that runs once per layer replaces a large one for all layers."""
    layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), layers)
    return PackedLayer.from_layer(layer)


def decode_step(
    model: PackedModel,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: KVCache,
    slot: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, KVCache]:
    """Runs all layers on one new token per row and writes its keys and values to the cache.

    Args:
        model: the packed weights.
        x: [B, H], the embeddings of the tokens.
        cos: [B, D/2], RoPE table for their positions; see `LanguageModel.rotary`.
        sin: like cos.
        cache: the KV cache, filled up to `slot`. As the carry of a loop, it is updated in place.
        slot: int scalar, the slot of the new token.
        implementation: implementation of the operations, see pallas_kernels.

    Returns:
        Logits [B, V], and the cache with the slot filled and marked valid.
    """
    all_keys, all_values = [], []
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        x, keys, values = _decode_layer(layer, x, cos, sin, keys, values, cache.valid, slot, model.eps, implementation)
        all_keys.append(keys)
        all_values.append(values)
    cache = cache.mark_valid(slot, jnp.ones((len(x), 1), jnp.int32))
    cache = dataclasses.replace(cache, keys=tuple(all_keys), values=tuple(all_values))
    return pk.norm_linear(x, model.norm, model.head, eps=model.eps, implementation=implementation), cache


@functools.partial(jax.jit, static_argnames=("eps", "implementation"))  # traced and lowered once for all layers
def _decode_layer(layer: PackedLayer, x, cos, sin, keys, values, valid, slot, eps, implementation):
    """Returns the layer's output for x [B, H], and its keys and values including those of the new token."""
    options = {"implementation": implementation}
    qkv = pk.norm_linear(x, layer.input_norm, layer.qkv, layer.qkv_bias, eps=eps, **options)
    qkv = qkv.reshape(len(x), -1, keys.shape[-1])
    arrays = qkv, cos, sin, keys, values, valid, slot, *layer.head_norms
    out, keys, values = pk.decode_attention(*arrays, eps=eps, **options)
    x = pk.linear_add(out.reshape(len(x), -1), layer.o, x, **options)
    gated = pk.norm_swiglu(x, layer.mlp_norm, layer.gate_up, eps=eps, **options)
    return pk.linear_add(gated, layer.down, x, **options), keys, values
