"""Keys and values of the tokens so far, with room for those to come."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

import pallas_kernels as pk


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "valid"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """One array a layer: small updates in place, where a single stacked array would be copied.

    A prompt's columns stand in the first slots, wherever its padding is; new tokens follow in slots that all rows share.
    Keys are rotated already, so the order of slots means nothing and `valid` says all.
    """

    keys: tuple[jax.Array, ...]  # a layer: [B, S, K, D]
    values: tuple[jax.Array, ...]  # a layer: [B, S, K, D]
    valid: jax.Array  # [B, S] int32: 1 where there is a token

    @classmethod
    def of_prompt(cls, keys: jax.Array, values: jax.Array, segment_ids: jax.Array, room: int) -> Self:
        """keys, values [layers, B, T, K, D] of a prompt -> a cache of T + room slots."""
        layers = range(len(keys))
        valid = (segment_ids > 0).astype(jnp.int32)
        return cls(tuple(keys[i] for i in layers), tuple(values[i] for i in layers), valid).grow(room)

    def grow(self, room: int) -> Self:
        """The same with `room` more slots."""
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, room)] + [(0, 0)] * (x.ndim - 2)), self)

    def keep(self, slots: jax.Array) -> Self:
        """Forgets all but the first `slots` slots."""
        return dataclasses.replace(self, valid=jnp.where(jnp.arange(self.valid.shape[1]) < slots, self.valid, 0))

    def open_slots(self, slot: jax.Array, segment_ids: jax.Array) -> Self:
        """Makes the slots from `slot` on visible for tokens with segment_ids [B, T]: 1, or 0 for padding."""
        return dataclasses.replace(self, valid=jax.lax.dynamic_update_slice(self.valid, segment_ids, (0, slot)))

    def attend(self, layer: int, slot: jax.Array, q, k, v):
        """Writes k, v [B, 1, K, D] to the open slot; -> what q [B, 1, N, D] sees, and the layer's keys and values."""
        keys, values = self._write(layer, slot, k, v)
        query = jnp.ones(q.shape[:2], jnp.int32)
        return pk.attention(q, keys, values, segment_ids=query, kv_segment_ids=self.valid), (keys, values)

    def attend_many(self, layer: int, slot: jax.Array, segment_ids: jax.Array, q, k, v):
        """`attend` for T tokens, before their slots are open: they see what is valid, and of each other what came before."""
        seen = jnp.concatenate([self.valid, segment_ids], axis=1)
        keys, values = (jnp.concatenate([old[layer], new], axis=1) for old, new in ((self.keys, k), (self.values, v)))
        out = pk.attention(q, keys, values, causal=True, segment_ids=segment_ids, kv_segment_ids=seen)
        return out, self._write(layer, slot, k, v)

    def _write(self, layer: int, slot: jax.Array, k, v):
        start = (0, slot, 0, 0)
        return tuple(
            jax.lax.dynamic_update_slice(old[layer], new, start) for old, new in ((self.keys, k), (self.values, v))
        )
