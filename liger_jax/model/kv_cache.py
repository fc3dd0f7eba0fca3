"""The KV cache: keys (after RoPE) and values of the tokens so far, with room for more."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

import pallas_kernels as pk


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "valid"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, in one array per layer.

    Separate arrays are updated in place; a single stacked array would be copied.

    A prompt occupies the first slots, including its padding. New tokens follow in slots that all rows share.
    Keys are stored after RoPE, so the order of the slots does not matter; `valid` alone decides which slots are attended to.
    """

    keys: tuple[jax.Array, ...]  # per layer: [B, S, K, D]
    values: tuple[jax.Array, ...]  # per layer: [B, S, K, D]
    valid: jax.Array  # [B, S] int32: 1 where a slot holds a token

    @classmethod
    def from_prompt(cls, keys: jax.Array, values: jax.Array, segment_ids: jax.Array, room: int) -> Self:
        """Returns a cache of T + room slots from a prompt's keys and values [L, B, T, K, D] and segment_ids [B, T]."""
        layers = range(len(keys))
        valid = (segment_ids > 0).astype(jnp.int32)
        return cls(tuple(keys[i] for i in layers), tuple(values[i] for i in layers), valid).grow(room)

    def grow(self, room: int) -> Self:
        """Returns a cache with `room` additional slots."""
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, room)] + [(0, 0)] * (x.ndim - 2)), self)

    def truncate(self, slots: jax.Array) -> Self:
        """Returns a cache in which only the first `slots` slots are valid."""
        return dataclasses.replace(self, valid=jnp.where(jnp.arange(self.valid.shape[1]) < slots, self.valid, 0))

    def mark_valid(self, slot: jax.Array, segment_ids: jax.Array) -> Self:
        """Returns a cache whose T slots from `slot` on are marked with segment_ids [B, T]: 1 valid, 0 not."""
        return dataclasses.replace(self, valid=jax.lax.dynamic_update_slice(self.valid, segment_ids, (0, slot)))

    def attend(self, layer: int, slot: jax.Array, q, k, v):
        """Computes attention for one token per row: q [B, 1, N, D], k and v [B, 1, K, D]. Its slot must be marked valid.

        Returns:
            The attention output [B, 1, N, D], and the layer's (keys, values) with k and v written to the slot.
        """
        keys, values = self._write(layer, slot, k, v)
        query_segment_ids = jnp.ones(q.shape[:2], jnp.int32)
        return pk.attention(q, keys, values, segment_ids=query_segment_ids, kv_segment_ids=self.valid), (keys, values)

    def attend_chunk(self, layer: int, slot: jax.Array, segment_ids: jax.Array, q, k, v):
        """Computes attention for T tokens per row, whose slots are not marked valid yet.

        The tokens attend to all valid slots, and causally to each other. Returns the same as `attend`.
        """
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
