"""The fused decoding step: runs the language model's layers for a single new token per row.

Results equal those of `LanguageModel` with a KV cache, up to rounding. Apart from reading the weights, a decoding step
spends its time on kernel launches; this one needs six per layer for a single row. Weights that are read together are packed
into one array, and LoRA is merged. Adjacent norms, gates, residual adds and cache updates are fused into the matmuls and the
attention; see pallas_kernels.decode_linear and decode_attention.

On a mesh, each device runs the same step on its own rows, heads and columns, see `decode_layout`.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import pallas_kernels as pk
from liger_jax.config import TextConfig
from liger_jax.model.decode_layout import SINGLE_DEVICE, DecodeLayout
from liger_jax.model.kv_cache import KVCache
from liger_jax.model.text import DecoderLayer, LanguageModel


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_norm", "qkv", "qkv_bias", "head_norms", "o", "mlp_norm", "gate_up", "down"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """The weights of one layer, packed for decoding; matrices are [out, in].

    On a mesh, the parts of the devices follow each other along N and F. A device's `qkv` has its own query heads, then its
    key heads and value heads.
    """

    input_norm: jax.Array  # [H]
    qkv: jax.Array  # [(N + 2 K) D, H]
    qkv_bias: jax.Array | None  # [(N + 2 K) D]
    head_norms: tuple[jax.Array, ...]  # of the query heads and of the key heads, each [D]; empty without these norms
    o: jax.Array  # [H, N D]
    mlp_norm: jax.Array  # [H]
    gate_up: jax.Array  # [2, F, H]
    down: jax.Array  # [H, F]

    @classmethod
    def from_layer(cls, layer: DecoderLayer, layout: DecodeLayout = SINGLE_DEVICE) -> Self:
        """Returns the packed weights of a single layer, which has no leading layer axis; on a mesh, one device's part."""
        attention, mlp = layer.self_attn, layer.mlp
        width = layer.input_layernorm.weight.shape[0]
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        kernels = [projection.merged_kernel() for projection in projections]
        biases = [projection.bias[...] for projection in projections if projection.bias is not None]
        for parts in kernels, biases:  # of q, k, v
            parts[1:] = map(layout.select_key_heads, parts[1:])
        packed = (
            jnp.concatenate([kernel.reshape(width, -1) for kernel in kernels], axis=1),
            jnp.stack([mlp.gate_proj.merged_kernel(), mlp.up_proj.merged_kernel()]),
        )
        # concatenate first, then transpose: XLA takes twice as long the other way round
        qkv, gate_up = jax.lax.optimization_barrier(packed)
        return cls(
            input_norm=layer.input_layernorm.weight[...],
            qkv=qkv.T,
            qkv_bias=jnp.concatenate([bias.reshape(-1) for bias in biases]) if biases else None,
            head_norms=tuple(norm.weight[...] for norm in (attention.q_norm, attention.k_norm) if norm is not None),
            o=attention.o_proj.merged_kernel().reshape(-1, width).T,
            mlp_norm=layer.post_attention_layernorm.weight[...],
            gate_up=gate_up.transpose(0, 2, 1),
            down=mlp.down_proj.merged_kernel().T,
        )

    @classmethod
    def specs(cls, layout: DecodeLayout) -> Self:
        """Returns the PartitionSpec of each array."""
        axes = ("H", "N H", "N", "D", "H N", "H", "2 F H", "H F")
        specs: Any = map(layout.spec, axes)
        return cls(*specs)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["embedding", "layers", "norm", "head"],
    meta_fields=["config", "layout"],
)
@dataclasses.dataclass(frozen=True)
class PackedModel:
    """The weights that decoding reads, with separate arrays for each layer.

    A loop that slices stacked layers would copy the slices in every step.
    """

    embedding: jax.Array  # [V, H], whole on each device
    layers: tuple[PackedLayer, ...]
    norm: jax.Array  # [H]
    head: jax.Array  # [V, H]
    config: TextConfig
    layout: DecodeLayout

    @classmethod
    def from_model(cls, text: LanguageModel, head: jax.Array, layout: DecodeLayout = SINGLE_DEVICE) -> Self:
        """Returns the model packed for decoding on the current mesh, with copies of the weights of all layers."""
        layers = tuple(_pack_layer(text.layers, i, layout=layout) for i in range(text.config.num_hidden_layers))
        embedding = text.embed_tokens.weight[...]
        whole = _place_table(embedding, layout, "- H")
        is_shared = head is embedding and "V" not in layout.split
        head = whole if is_shared else _place_table(head, layout, "V H")
        return cls(whole, layers, text.norm.weight[...], head, text.config, layout)

    def specs(self) -> Self:
        """Returns the PartitionSpec of each array."""
        specs: dict[str, Any] = {
            name: self.layout.spec(axes) for name, axes in (("embedding", "- H"), ("norm", "H"), ("head", "V H"))
        }
        return dataclasses.replace(self, layers=(PackedLayer.specs(self.layout),) * len(self.layers), **specs)


@functools.partial(jax.jit, static_argnames="layout")
def _pack_layer(layers: DecoderLayer, i: jax.Array, *, layout: DecodeLayout) -> PackedLayer:
    """Returns layer i of the stack, packed. A small program that runs once per layer replaces a large one for all layers."""
    layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), layers)
    pack = functools.partial(PackedLayer.from_layer, layout=layout)
    return layout.on_each_device(pack, (layout.layer_specs(layer),), PackedLayer.specs(layout))(layer)


def _place_table(table: jax.Array, layout: DecodeLayout, axes: str) -> jax.Array:
    """Returns a table [V, H] in its layout for decoding: itself if it is whole on each device and remains so."""
    spec = layout.spec(axes)
    is_whole = not isinstance(table, jax.core.Tracer) and table.sharding.is_fully_replicated
    if not layout.mesh_axes or (is_whole and not any(spec)):
        return table
    return _constrain(table, layout=layout, spec=spec)


@functools.partial(jax.jit, static_argnames=("layout", "spec"))
def _constrain(table: jax.Array, *, layout: DecodeLayout, spec: PartitionSpec) -> jax.Array:
    return layout.constrain(table, spec)


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

    On a mesh, it is called on each device, inside `DecodeLayout.on_each_device`.

    Args:
        model: the packed weights.
        x: [B, H], the embeddings of the tokens.
        cos: [B, D/2], RoPE table for their positions; see `rotary_tables`.
        sin: like cos.
        cache: the KV cache, filled up to `slot`. As the carry of a loop, it is updated in place.
        slot: int scalar, the slot of the new token.
        implementation: implementation of the operations, see pallas_kernels.

    Returns:
        Logits [B, V], those of the device's part of the vocabulary; and the cache with the slot filled and marked valid.
    """
    options: dict[str, Any] = {"eps": model.config.rms_norm_eps, "implementation": implementation}
    all_keys, all_values = [], []
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        arrays = layer, x, cos, sin, keys, values, cache.valid, slot
        x, keys, values = _decode_layer(*arrays, layout=model.layout, **options)
        all_keys.append(keys)
        all_values.append(values)
    cache = cache.mark_valid(slot, jnp.ones((len(x), 1), jnp.int32))
    cache = dataclasses.replace(cache, keys=tuple(all_keys), values=tuple(all_values))
    return pk.norm_linear(x, model.norm, model.head, **options), cache


@functools.partial(
    jax.jit, static_argnames=("layout", "eps", "implementation")
)  # traced and lowered once for all layers
def _decode_layer(layer: PackedLayer, x, cos, sin, keys, values, valid, slot, *, layout, eps, implementation):
    """Returns the layer's output for x [B, H], and its keys and values including those of the new token."""
    options: dict[str, Any] = {"implementation": implementation}

    def add_to_residual(y, weight, x, axis):
        """Returns x + y @ weight.T, summed over the devices that each hold a part of the axis."""
        scale = layout.share_of_residual(axis)
        return layout.sum(pk.linear_add(y, weight, x, residual_scale=scale, **options), axis)

    qkv = pk.norm_linear(x, layer.input_norm, layer.qkv, layer.qkv_bias, eps=eps, **options)
    qkv = qkv.reshape(len(x), -1, keys.shape[-1])
    arrays = qkv, cos, sin, keys, values, valid, slot, *layer.head_norms
    out, keys, values = pk.decode_attention(*arrays, eps=eps, **options)
    x = add_to_residual(out.reshape(len(x), -1), layer.o, x, "N")
    gated = pk.norm_swiglu(x, layer.mlp_norm, layer.gate_up, eps=eps, **options)
    return add_to_residual(gated, layer.down, x, "F"), keys, values
