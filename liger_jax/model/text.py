"""The language model: embeddings in, hidden states out.

Shapes: B rows, T tokens, H width, N query heads and K key/value heads of size D. The caller supplies attention as a
callback, so that the same layers serve training (attention within a row), prefill (which also returns keys and values) and
decoding (attention to a KV cache).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels as pk
from liger_jax.config import TextConfig
from liger_jax.model.layers import Embedding, Initializer, Linear, RMSNorm, SwiGLU, inverse_frequencies
from liger_jax.model.remat import apply_to_tokens, scan_layers
from liger_jax.model.sequence import set_features, split_positions, splits_sequence
from liger_jax.model.sharding import gather_positions, scatter_positions
from liger_jax.options import DEFAULT_EXECUTION, LayerExecution

# attend(q [B,T,N,D], k [B,T,K,D], v [B,T,K,D]) -> (out [B,T,N,D], any further results for the caller)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Deepstack(NamedTuple):
    """Features of the vision tower that are added to the outputs of the first decoder layers, at placeholder tokens."""

    features: list[jax.Array]  # one array [B, P/4, H] for each of the first layers
    token_positions: jax.Array | None  # [B, P/4] int32: each feature's position in the sequence; dropped if >= T

    def spread_over(self, x: jax.Array) -> Self:
        """Returns the features as arrays [B, T, H], with zeros elsewhere, if a mesh splits the positions of x [B, T, H].

        Features are then gathered once, and not in every layer.
        """
        if self.token_positions is None or not splits_sequence(*x.shape[:2], self.token_positions.shape[1]):
            return self
        return self._replace(
            features=[set_features(jnp.zeros_like(x), self.token_positions, layer) for layer in self.features],
            token_positions=None,
        )

    def add(self, x: jax.Array, features: jax.Array) -> jax.Array:
        """Returns x [B, T, H] with the features [B, P/4, H] of one layer added."""
        if self.token_positions is None:
            return x + features

        def add_to_row(x, positions, features):
            return x.at[positions].add(features.astype(x.dtype), mode="drop", unique_indices=True)

        return jax.vmap(add_to_row)(x, self.token_positions, features)


class SelfAttention(nnx.Module):
    """Grouped-query attention with RoPE, and perhaps a norm of each query and key head: x [B, T, H] to [B, T, H]."""

    def __init__(self, init: Initializer, config: TextConfig, stack):
        width, heads = (config.hidden_size,), (config.num_attention_heads, config.head_dim)
        kv_heads = (config.num_key_value_heads, config.head_dim)
        self.q_proj = Linear(init, width, heads, stack=stack, bias=config.attention_bias)
        self.k_proj = Linear(init, width, kv_heads, stack=stack, bias=config.attention_bias)
        self.v_proj = Linear(init, width, kv_heads, stack=stack, bias=config.attention_bias)
        self.o_proj = Linear(init, heads, width, stack=stack, bias=False)
        norm = functools.partial(RMSNorm, init, config.head_dim, stack=stack, eps=config.rms_norm_eps)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def __call__(self, x, cos, sin, attend: Attend):
        q, k, v = self.q_proj(x), self.k_proj(x), checkpoint_name(self.v_proj(x), "operand")
        if self.q_norm is None or self.k_norm is None:
            q, k = (checkpoint_name(operand, "operand") for operand in pk.rope(q, k, cos, sin))
        else:  # the norms' backward pass needs q and k as they were before
            q, k = pk.qk_norm_rope(
                q, k, self.q_norm.weight[...], self.k_norm.weight[...], cos, sin, eps=self.q_norm.eps
            )
        out, aux = attend(q, k, v)
        return self.o_proj(out), aux


class DecoderLayer(nnx.Module):
    """A pre-norm transformer layer: x [B, T, H] to [B, T, H]."""

    def __init__(self, init: Initializer, config: TextConfig):
        stack = (config.num_hidden_layers,)
        self.input_layernorm = RMSNorm(init, config.hidden_size, stack=stack, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(init, config, stack)
        self.post_attention_layernorm = RMSNorm(init, config.hidden_size, stack=stack, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(init, config.hidden_size, config.intermediate_size, stack=stack, bias=False)

    def __call__(self, x, cos, sin, attend: Attend, execution: LayerExecution = DEFAULT_EXECUTION):
        attended, aux = self.self_attn(gather_positions(self.input_layernorm(x)), cos, sin, attend)
        norm = self.post_attention_layernorm
        normed, x = _add_norm(norm.eps, scatter_positions(attended), x, norm.weight[...])
        mlp = apply_to_tokens(SwiGLU.__call__, self.mlp, gather_positions(normed), execution)
        return x + scatter_positions(mlp), aux


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_norm(eps: float, x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (rms_norm(s), s) with s = x + residual.

    Without a gradient, cuBLAS adds to the residual, in place, and only the norm is left to do. With one, a fused kernel is
    faster: its backward pass also adds the gradient that arrives at s.
    """
    total = x + residual
    return pk.rms_norm(total, weight, eps=eps), total


def _add_norm_forward(eps: float, *operands: jax.Array):
    return jax.vjp(functools.partial(pk.add_rms_norm, eps=eps), *operands)


_add_norm.defvjp(_add_norm_forward, lambda eps, pullback, grads: pullback(grads))


def rotary_tables(config: TextConfig, position_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the M-RoPE tables cos and sin [B, T, D/2] for positions (t, h, w) [B, 3, T].

    Each frequency rotates with one of t, h and w, see `TextConfig.rotary_axes`. The three tables are merged into one here,
    once for all layers.
    """
    axis = np.array(config.rotary_axes)
    position = jnp.take(position_ids.astype(jnp.float32), axis, axis=1)  # [B, D/2, T]
    angle = position.swapaxes(1, 2) * inverse_frequencies(config.rope_theta, len(axis))
    return jnp.cos(angle), jnp.sin(angle)


class LanguageModel(nnx.Module):
    """Token embeddings, decoder layers and final norm."""

    def __init__(self, init: Initializer, config: TextConfig):
        self.config = config
        self.embed_tokens = Embedding(init, config.vocab_size, config.hidden_size)
        self.layers = DecoderLayer(init, config)
        self.norm = RMSNorm(init, config.hidden_size, eps=config.rms_norm_eps)

    def rotary(self, position_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns `rotary_tables` for the model's configuration."""
        return rotary_tables(self.config, position_ids)

    def __call__(
        self,
        x: jax.Array,
        position_ids: jax.Array,
        attend: Attend,
        *,
        deepstack: Deepstack | None = None,
        execution: LayerExecution = DEFAULT_EXECUTION,
        capture: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, Any]:
        """Returns the normed hidden states [B, T, H] for embeddings x [B, T, H], and attend's further results by layer.

        `deepstack`, if given, is added to the outputs of the first layers. `capture`, if given, receives the outputs of all
        layers.
        """
        cos, sin = map(split_positions, self.rotary(position_ids))

        def layer(x, weights: DecoderLayer):
            x, aux = weights(x, cos, sin, attend, execution)
            return x, (aux, None if capture is None else x)

        after_first = None if deepstack is None else (deepstack.add, deepstack.features)
        x, (aux, outputs), _ = scan_layers(layer, x, self.layers, execution, tower="text", after_first=after_first)
        hidden = self.norm(x)
        if capture is not None:
            capture |= {"text_layers": outputs, "final_hidden": hidden}
        return hidden, aux
