"""The vision tower: patches of images and video frames in, one feature vector per 2 x 2 patches out.

Shapes: B rows, P patches per row (of several images and frames, then padding), E width, n heads of size d. A patch attends
only to patches of its own image or frame, which have the same segment id, and in some layers only to those of its window.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels as pk
from liger_jax.config import VisionConfig
from liger_jax.inputs.batch import Vision
from liger_jax.model.by_rows import divides_rows, run_by_rows
from liger_jax.model.layers import Embedding, Initializer, LayerNorm, Linear, RMSNorm, SwiGLU, inverse_frequencies
from liger_jax.model.remat import apply_to_tokens, scan_layers, unstack
from liger_jax.model.sequence import attend_by_heads, attend_in_blocks, split_positions, splits_sequence
from liger_jax.model.sharding import (
    axes_size,
    constrain_batch,
    gather_positions,
    replicate,
    scatter_positions,
    sequence_axes,
)
from liger_jax.options import DEFAULT_EXECUTION, LayerExecution

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v [B, P, n, d] -> [B, P, n, d]


class VisionAttention(nnx.Module):
    """Attention within images, frames or windows, with axial RoPE: x [B, P, E] to [B, P, E]."""

    def __init__(self, init: Initializer, config: VisionConfig, stack):
        heads, width = (config.num_heads, config.head_dim), (config.embed_dim,)
        self.qkv = Linear(init, width, (3, *heads), stack=stack, bias=True)
        self.proj = Linear(init, heads, width, stack=stack, bias=True)

    def __call__(self, x, cos, sin, attend: Attend):
        q, k, v = self.qkv.unstacked(x)
        q, k = pk.rope(q, k, cos, sin)
        q, k, v = (checkpoint_name(operand, "operand") for operand in (q, k, v))
        return self.proj(attend(q, k, v))


class VisionMLP(nnx.Module):
    """MLP with a variant of GELU: x [B, P, E] to [B, P, E]."""

    def __init__(self, init: Initializer, config: VisionConfig, stack):
        width, hidden = (config.embed_dim,), (config.intermediate_size,)
        self.fc1 = Linear(init, width, hidden, stack=stack, bias=True)
        self.fc2 = Linear(init, hidden, width, stack=stack, bias=True)
        self.activation = {"quick_gelu": pk.quick_gelu, "gelu_tanh": pk.gelu_tanh}[config.mlp]

    def __call__(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class VisionBlock(nnx.Module):
    """A pre-norm transformer layer: x [B, P, E] to [B, P, E]."""

    def __init__(self, init: Initializer, config: VisionConfig):
        stack = (config.depth,)
        self.norm1 = make_norm(init, config, stack=stack)
        self.attn = VisionAttention(init, config, stack)
        self.norm2 = make_norm(init, config, stack=stack)
        self.mlp = make_mlp(init, config, stack)

    def __call__(self, x, cos, sin, attend: Attend, execution: LayerExecution = DEFAULT_EXECUTION):
        attended = self.attn(gather_positions(self.norm1(x)), cos, sin, attend)
        x = checkpoint_name(x + scatter_positions(attended), "residual")
        mlp = apply_to_tokens(type(self.mlp).__call__, self.mlp, gather_positions(self.norm2(x)), execution)
        return x + scatter_positions(mlp)


class PatchMerger(nnx.Module):
    """Merges each four neighbouring (consecutive) patches into a vector of the text width: x [B, P, E] to [B, P/4, H]."""

    def __init__(self, init: Initializer, config: VisionConfig):
        merged = (config.embed_dim * config.merge_unit,)
        self.ln_q = make_norm(init, config)
        self.fc1 = Linear(init, merged, merged, bias=True)
        self.fc2 = Linear(init, merged, (config.hidden_size,), bias=True)

    def __call__(self, x):
        x = self.ln_q(x)
        x = constrain_batch(x.reshape(x.shape[0], -1, self.fc1.kernel.shape[0]))
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class DeepstackMergers(nnx.Module):
    """One merger for each deepstack layer. They merge patches as `PatchMerger` does, and normalize after merging."""

    def __init__(self, init: Initializer, config: VisionConfig):
        stack, merged = (len(config.deepstack_layers),), (config.embed_dim * config.merge_unit,)
        self.norm = LayerNorm(init, *merged, stack=stack)
        self.fc1 = Linear(init, merged, merged, stack=stack, bias=True)
        self.fc2 = Linear(init, merged, (config.hidden_size,), stack=stack, bias=True)

    def __call__(self, x):
        """Returns x [B, P, E], merged to [B, P/4, H] by one of the mergers."""
        x = self.norm(constrain_batch(x.reshape(x.shape[0], -1, self.fc1.kernel.shape[0])))
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, transformer blocks and mergers: turns patches into features of the text model's width."""

    def __init__(self, init: Initializer, config: VisionConfig):
        self.config = config
        self.patch_embed = Linear(init, (config.patch_values,), (config.embed_dim,), bias=config.patch_bias)
        table_size = config.position_table_side**2
        self.position_table = Embedding(init, table_size, config.embed_dim) if table_size else None
        self.blocks = VisionBlock(init, config)
        self.merger = PatchMerger(init, config)
        self.deepstack = DeepstackMergers(init, config) if config.deepstack_layers else None

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
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Returns the features [B, P/4, H], and those of each deepstack layer, of the same shape.

        `capture`, if given, receives the outputs of all layers. On a mesh that splits heads over `tensor`, each device runs
        the whole tower on a part of the rows if they divide.
        """
        if capture is None and divides_rows(len(vision.segment_ids)):
            return run_by_rows(lambda parts, rows: parts["visual"](rows, execution=execution), {"visual": self}, vision)
        config = self.config
        pixels = split_positions(vision.pixel_values)
        patches = x = self.patch_embed(pixels.astype(self.patch_embed.kernel.dtype))
        if self.position_table is not None:
            lookup = map(split_positions, (vision.table_indices, vision.table_weights))
            x = x + interpolate(self.position_table.weight[...], *lookup).astype(x.dtype)
        x = constrain_batch(x)
        cos, sin = map(split_positions, self.rotary(vision.position_ids))
        attend_within = make_attention(vision, config)
        full = config.full_attention_layers if config.window_size else range(config.depth)
        kinds = ["frame" if i in full else "window" for i in range(config.depth)]

        def layer(x, block: VisionBlock, kind: str):
            x = block(x, cos, sin, attend_within[kind], execution)
            return x, None if capture is None else x

        x, blocks, tapped = scan_layers(
            layer, x, self.blocks, execution, tower="vision", kinds=kinds, taps=config.deepstack_layers
        )
        features = self.merger(x)
        mergers = () if self.deepstack is None else unstack(self.deepstack)
        deepstack = [merger(x) for merger, x in zip(mergers, tapped, strict=True)]
        if capture is not None:
            capture |= {"patch_embed": patches, "vision_blocks": blocks, "features": features}
            capture |= {"deepstack": jnp.stack(deepstack)} if deepstack else {}
        return features, deepstack


def make_norm(init: Initializer, config: VisionConfig, *, stack=()) -> LayerNorm | RMSNorm:
    """Returns a norm of the tower's width."""
    if config.norm == "rms_norm":
        return RMSNorm(init, config.embed_dim, stack=stack, eps=1e-6)
    return LayerNorm(init, config.embed_dim, stack=stack)


def make_mlp(init: Initializer, config: VisionConfig, stack) -> SwiGLU | VisionMLP:
    """Returns the MLP of a block."""
    if config.mlp == "swiglu":
        return SwiGLU(init, config.embed_dim, config.intermediate_size, stack=stack, bias=True)
    return VisionMLP(init, config, stack)


def make_attention(vision: Vision, config: VisionConfig) -> dict[str, Attend]:
    """Returns the attention of each kind of layer: within frames, and within windows.

    A window lies in a block of `window_patches` slots (see `liger_jax.inputs.layout`), so attention within windows is a
    dense batch of blocks. There are padding slots between the windows of a frame.
    """
    rows, patches = vision.segment_ids.shape
    devices = axes_size(sequence_axes())
    # where no device's part of a row ends within a frame, frames need no communication, as windows never do
    whole_frames = splits_sequence(rows, patches) and vision.parts % devices == 0
    run = functools.partial(attend_in_blocks, patches // devices) if whole_frames else attend_by_heads
    if vision.window_ids is None:
        slots = vision.max_segments if whole_frames else None
        segments = vision.segment_ids if whole_frames else pk.find_segments(vision.segment_ids, vision.max_segments)

        def attend_to_frames(q, k, v, segments):
            return pk.attention(q, k, v, segment_ids=segments, max_segments=slots)

        return {"frame": lambda q, k, v: run(attend_to_frames, q, k, v, segments)}
    size, window_ids, segment_ids = config.window_patches, vision.window_ids, vision.segment_ids

    def attend_to_sparse_frames(q, k, v, ids):
        return pk.attention(q, k, v, segment_ids=ids, kv_segment_ids=ids)

    def attend_to_windows(q, k, v, ids):
        blocks = (x.reshape(-1, size, *x.shape[2:]) for x in (q, k, v))
        return pk.attention(*blocks, segment_ids=ids.reshape(-1, size)).reshape(q.shape)

    return {
        "frame": lambda q, k, v: run(attend_to_sparse_frames, q, k, v, segment_ids),
        "window": lambda q, k, v: attend_in_blocks(size, attend_to_windows, q, k, v, window_ids),
    }


def interpolate(table: jax.Array, indices: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns sum_c weights[..., c] table[indices[..., c]], [B, P, E] float32, for a table [R, E] and c = 1 to 4."""
    table = replicate(table).astype(jnp.float32)
    corners = [weights[..., c, None] * table[indices[..., c]] for c in range(indices.shape[-1])]
    return functools.reduce(jnp.add, corners)
