"""The vision tower: patches of images and video frames in, one feature vector per 2 x 2 patches out.

Shapes: B rows, P patches per row (of several images and frames, then padding), E width, n heads of size d. A patch attends
only to patches of its own image or frame, which have the same segment id.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels as pk
from liger_jax.config import VisionConfig
from liger_jax.inputs.batch import Vision
from liger_jax.model.layers import Initializer, LayerNorm, Linear, inverse_frequencies
from liger_jax.model.remat import apply_to_tokens, scan_layers
from liger_jax.model.sharding import constrain_batch
from liger_jax.options import DEFAULT_EXECUTION, LayerExecution


class VisionAttention(nnx.Module):
    """Attention within images and frames, with axial RoPE: x [B, P, E] to [B, P, E]."""

    def __init__(self, init: Initializer, config: VisionConfig, stack):
        heads, width = (config.num_heads, config.head_dim), (config.embed_dim,)
        self.qkv = Linear(init, width, (3, *heads), stack=stack, bias=True)
        self.proj = Linear(init, heads, width, stack=stack, bias=True)

    def __call__(self, x, cos, sin, segments: pk.Segments):
        q, k, v = self.qkv.unstacked(x)
        q, k = pk.rope(q, k, cos, sin)
        q, k, v = (checkpoint_name(operand, "operand") for operand in (q, k, v))
        return self.proj(pk.attention(q, k, v, segment_ids=segments))


class VisionMLP(nnx.Module):
    """MLP with quick GELU: x [B, P, E] to [B, P, E]."""

    def __init__(self, init: Initializer, config: VisionConfig, stack):
        width, hidden = (config.embed_dim,), (config.intermediate_size,)
        self.fc1 = Linear(init, width, hidden, stack=stack, bias=True)
        self.fc2 = Linear(init, hidden, width, stack=stack, bias=True)

    def __call__(self, x):
        return self.fc2(pk.quick_gelu(self.fc1(x)))


class VisionBlock(nnx.Module):
    """A pre-norm transformer layer: x [B, P, E] to [B, P, E]."""

    def __init__(self, init: Initializer, config: VisionConfig):
        stack = (config.depth,)
        self.norm1 = LayerNorm(init, config.embed_dim, stack=stack)
        self.attn = VisionAttention(init, config, stack)
        self.norm2 = LayerNorm(init, config.embed_dim, stack=stack)
        self.mlp = VisionMLP(init, config, stack)

    def __call__(self, x, cos, sin, segments: pk.Segments, execution: LayerExecution = DEFAULT_EXECUTION):
        x = checkpoint_name(x + self.attn(self.norm1(x), cos, sin, segments), "residual")
        return x + apply_to_tokens(VisionMLP.__call__, self.mlp, self.norm2(x), execution)


class PatchMerger(nnx.Module):
    """Merges each four neighbouring (consecutive) patches into a vector of the text width: x [B, P, E] to [B, P/4, H]."""

    def __init__(self, init: Initializer, config: VisionConfig):
        merged = (config.embed_dim * config.merge_unit,)
        self.ln_q = LayerNorm(init, config.embed_dim)
        self.fc1 = Linear(init, merged, merged, bias=True)
        self.fc2 = Linear(init, merged, (config.hidden_size,), bias=True)

    def __call__(self, x):
        x = self.ln_q(x)
        x = constrain_batch(x.reshape(x.shape[0], -1, self.fc1.kernel.shape[0]))
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, transformer blocks and merger: turns patches into features of the text model's width."""

    def __init__(self, init: Initializer, config: VisionConfig):
        self.config = config
        self.patch_embed = Linear(init, (config.patch_values,), (config.embed_dim,), bias=False)
        self.blocks = VisionBlock(init, config)
        self.merger = PatchMerger(init, config)

    def rotary(self, position_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the axial RoPE tables cos and sin [B, P, d/2] for positions (h, w) [B, P, 2].

        The first half of the frequencies rotates with h, the patch's row in the image, the second half with w, its column.
        """
        inv_freq = inverse_frequencies(self.config.rope_theta, self.config.head_dim // 4)
        angle = position_ids.astype(jnp.float32)[..., None] * inv_freq  # [B, P, 2, d/4]
        angle = angle.reshape(*position_ids.shape[:-1], -1)
        return jnp.cos(angle), jnp.sin(angle)

    def __call__(
        self,
        vision: Vision,
        *,
        execution: LayerExecution = DEFAULT_EXECUTION,
        capture: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Returns the features [B, P/4, H]. `capture`, if given, receives the outputs of all layers."""
        patches = self.patch_embed(vision.pixel_values.astype(self.patch_embed.kernel.dtype))
        cos, sin = self.rotary(vision.position_ids)
        segments = pk.find_segments(vision.segment_ids, vision.max_segments)

        def layer(x, block: VisionBlock):
            x = block(x, cos, sin, segments, execution)
            return x, None if capture is None else x

        x, blocks = scan_layers(layer, patches, self.blocks, execution, tower="vision")
        features = self.merger(x)
        if capture is not None:
            capture |= {"patch_embed": patches, "vision_blocks": blocks, "features": features}
        return features
