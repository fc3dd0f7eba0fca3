"""Keys and values of the tokens so far, with room for those to come."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

import pallas_kernels as pk


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values", "valid"], meta_fields=["prompt_length"]
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """One array a layer: small updates in place, where a single stacked array would be copied.

    Slot i < prompt_length holds column i of the prompt, wherever its padding is; new tokens follow in slots that all rows
    share. Keys are rotated already, so the order of slots means nothing and `valid` says all.
    """

    keys: tuple[jax.Array, ...]  # a layer: [B, S, K, D]
    values: tuple[jax.Array, ...]  # a layer: [B, S, K, D]
    valid: jax.Array  # [B, S] int32: 1 where there is a token
    prompt_length: int

    @classmethod
    def of_prompt(cls, keys: jax.Array, values: jax.Array, segment_ids: jax.Array, room: int) -> Self:
        """keys, values [layers, B, T, K, D] of a prompt -> a cache of T + room slots."""
        grow = [(0, 0), (0, room), (0, 0), (0, 0)]
        layers = range(len(keys))
        return cls(
            tuple(jnp.pad(keys[i], grow) for i in layers),
            tuple(jnp.pad(values[i], grow) for i in layers),
            jnp.pad((segment_ids > 0).astype(jnp.int32), grow[:2]),
            keys.shape[2],
        )

    def open_slot(self, step: jax.Array) -> Self:
        """Makes the slot of new token number `step` visible."""
        slot = self.prompt_length + step
        column = jnp.ones((self.valid.shape[0], 1), jnp.int32)
        return dataclasses.replace(self, valid=jax.lax.dynamic_update_slice(self.valid, column, (0, slot)))

    def attend(self, layer: int, step: jax.Array, q, k, v):
        """Writes k, v [B, 1, K, D] to the open slot; -> what q [B, 1, N, D] sees, and the layer's keys and values."""
        start = (0, self.prompt_length + step, 0, 0)
        keys = jax.lax.dynamic_update_slice(self.keys[layer], k, start)
        values = jax.lax.dynamic_update_slice(self.values[layer], v, start)
        query = jnp.ones(q.shape[:2], jnp.int32)
        return pk.attention(q, keys, values, segment_ids=query, kv_segment_ids=self.valid), (keys, values)
