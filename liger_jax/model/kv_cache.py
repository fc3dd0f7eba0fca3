"""The KV cache: keys (after RoPE) and values of the tokens so far, with room for more."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from liger_jax.model.decode_layout import SINGLE_DEVICE, DecodeLayout


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "valid"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, in one array per layer.

    Separate arrays are updated in place; a single stacked array would be copied.

    A prompt occupies the first slots, including its padding. New tokens follow in slots that all rows share.
    Keys are stored after RoPE, so the order of the slots does not matter; `valid` alone decides which slots are attended to.
    """

    keys: tuple[jax.Array, ...]  # per layer: [B, S, K, D]; the layout says how often each key head occurs
    values: tuple[jax.Array, ...]  # like keys
    valid: jax.Array  # [B, S] int32: 1 where a slot holds a token
    layout: DecodeLayout = SINGLE_DEVICE

    @classmethod
    def from_prompt(
        cls,
        keys: jax.Array,
        values: jax.Array,
        segment_ids: jax.Array,
        room: int,
        layout: DecodeLayout = SINGLE_DEVICE,
    ) -> Self:
        """Returns a cache of T + room slots from a prompt's keys and values [L, B, T, K, D] and segment_ids [B, T]."""
        layers = range(len(keys))
        keys, values = (layout.copy_key_heads(x) for x in (keys, values))
        valid = (segment_ids > 0).astype(jnp.int32)
        return cls(tuple(keys[i] for i in layers), tuple(values[i] for i in layers), valid, layout).grow(room)

    def specs(self) -> Self:
        """Returns the PartitionSpecs of the arrays."""
        heads: Any = (self.layout.spec("B S N D"),) * len(
            self.keys
        )  # devices that hold query heads hold their key heads
        valid: Any = self.layout.spec("B S")
        return dataclasses.replace(self, keys=heads, values=heads, valid=valid)

    def constrain(self) -> Self:
        """Constrains the arrays to their layout."""
        return self.layout.constrain(self, self.specs())

    def grow(self, room: int) -> Self:
        """Returns a cache with `room` additional slots."""
        grown = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, room)] + [(0, 0)] * (x.ndim - 2)), self)
        return grown.constrain()

    def truncate(self, slots: jax.Array) -> Self:
        """Returns a cache in which only the first `slots` slots are valid."""
        return dataclasses.replace(self, valid=jnp.where(jnp.arange(self.valid.shape[1]) < slots, self.valid, 0))

    def mark_valid(self, slot: jax.Array, segment_ids: jax.Array) -> Self:
        """Returns a cache whose T slots from `slot` on are marked with segment_ids [B, T]: 1 valid, 0 not."""
        return dataclasses.replace(self, valid=jax.lax.dynamic_update_slice(self.valid, segment_ids, (0, slot)))

    def attend_chunk(self, layer: int, slot: jax.Array, segment_ids: jax.Array, q, k, v):
        """Computes attention for T tokens per row, whose slots are not marked valid yet.

        The tokens attend to all valid slots, and causally to each other: q [B, T, N, D], k and v [B, T, K, D].

        Returns:
            The attention output [B, T, N, D], and the layer's (keys, values) with k and v written to the slots.
        """
        k, v = (self.layout.copy_key_heads(x) for x in (k, v))
        kv_segment_ids = jnp.concatenate([self.valid, segment_ids], axis=1)
        keys, values = (
            jnp.concatenate([cached[layer], new], axis=1) for cached, new in ((self.keys, k), (self.values, v))
        )
        out = pk.attention(q, keys, values, causal=True, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
        return out, self._write(layer, slot, k, v)

    def _write(self, layer: int, slot: jax.Array, k, v) -> tuple[jax.Array, ...]:
        """Returns the layer's keys and values with k and v in the slots from `slot` on."""
        start = (0, slot, 0, 0)
        return tuple(
            jax.lax.dynamic_update_slice(cached[layer], new, start)
            for cached, new in ((self.keys, k), (self.values, v))
        )
