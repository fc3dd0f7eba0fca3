"""Qwen2-VL: the vision tower's vectors take the placeholders' places among the tokens, and the language model reads on."""

import functools
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import pallas_kernels as pk
from liger_jax.config import Qwen2VLConfig
from liger_jax.inputs.batch import Batch
from liger_jax.model.layers import Embedding, Initializer
from liger_jax.model.remat import DEFAULT_EXECUTION, LayerExecution
from liger_jax.model.sharding import constrain_batch, param_shardings, replicate
from liger_jax.model.text import LanguageModel
from liger_jax.model.vision import VisionTower


class Qwen2VL(nnx.Module):
    """A Qwen2-VL as a pytree of weights: it goes through `jax.jit`, `jax.grad` and optax as it is.

    Example:
        >>> import jax, numpy as np
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, prepare
        >>> model = Qwen2VL.init(Qwen2VLConfig.tiny(), dtype="float32")
        >>> batch = prepare(model.config, input_ids=np.array([[5, 6, 7]]))
        >>> jax.jit(lambda m, b: m(b))(model, batch).shape
        (1, 64, 320)
    """

    def __init__(self, init: Initializer, config: Qwen2VLConfig):
        self.config = config
        self.visual = VisionTower(init, config.vision)
        self.language_model = LanguageModel(init, config.text)
        text = config.text
        self.lm_head = None if config.tie_word_embeddings else Embedding(init, text.vocab_size, text.hidden_size)

    @classmethod
    def init(cls, config: Qwen2VLConfig, *, seed: int = 0, dtype="bfloat16", mesh: Mesh | None = None) -> Self:
        """A model with random weights, made where they live: on the default device, or in parts over `mesh`."""
        return _initialiser(cls, config, jnp.dtype(dtype).name, mesh)(np.uint32(seed % 2**32))

    @classmethod
    def abstract(cls, config: Qwen2VLConfig, *, dtype="bfloat16") -> Self:
        """The model with `jax.ShapeDtypeStruct` in place of weights: shapes without memory."""
        return jax.eval_shape(lambda: cls(Initializer(0, dtype, 1.0), config))

    @property
    def head(self) -> jax.Array:
        """The output weights [V, H]; of a tied model, the embedding."""
        return (self.lm_head or self.language_model.embed_tokens).weight[...]

    def embed(self, batch: Batch, *, loop: LayerExecution = DEFAULT_EXECUTION, keep: dict | None = None) -> jax.Array:
        """-> [B, L, H]: the tokens' embeddings, with the vision tower's vectors in the placeholders' columns."""
        x = constrain_batch(replicate(self.language_model.embed_tokens.weight[...])[batch.input_ids])
        if batch.vision is not None:
            features = self.visual(batch.vision, loop=loop, keep=keep)
            x = jax.vmap(_place)(x, batch.vision.token_columns, features)
        if keep is not None:
            keep["inputs_embeds"] = x
        return x

    def hidden_states(
        self, batch: Batch, *, loop: LayerExecution = DEFAULT_EXECUTION, keep: dict | None = None
    ) -> jax.Array:
        """-> [B, L, H]: what the output head reads. `loop`: how the layers run."""
        x = self.embed(batch, loop=loop, keep=keep)
        attend = functools.partial(attend_row, pk.find_segments(batch.segment_ids, batch.max_segments))
        return self.language_model(x, batch.position_ids, attend, loop=loop, keep=keep)[0]

    def __call__(self, batch: Batch) -> jax.Array:
        """-> logits [B, L, V]; rows and columns of the caller's `input_ids` come first."""
        return self.logits(self.hidden_states(batch))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., H] -> [..., V]."""
        return jnp.einsum("...h,vh->...v", hidden, self.head)

    def activations(self, batch: Batch) -> dict[str, jax.Array]:
        """The output of every layer, to look at.

        patch_embed [B,P,E], vision_blocks [Lv,B,P,E] and features [B,P/4,H] if there are pictures; inputs_embeds [B,L,H],
        text_layers [Lt,B,L,H], final_hidden [B,L,H], logits [B,L,V].
        """
        keep: dict[str, jax.Array] = {}
        keep["logits"] = self.logits(self.hidden_states(batch, keep=keep))
        return keep


def attend_row(segments: pk.Segments, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    """A token sees itself and what comes before it in its own sequence."""
    return pk.attention(q, k, v, causal=True, segment_ids=segments), None


def _place(x: jax.Array, columns: jax.Array, features: jax.Array) -> jax.Array:
    """x [L, H] with row columns[j] replaced by features[j]; columns behind the row are dropped."""
    return x.at[columns].set(features.astype(x.dtype), mode="drop", unique_indices=True)


@functools.lru_cache(maxsize=8)
def _initialiser(cls: type[Qwen2VL], config: Qwen2VLConfig, dtype: str, mesh: Mesh | None) -> Callable[[int], Qwen2VL]:
    """seed -> a model with random weights; compiled once."""
    shardings = None if mesh is None else param_shardings(cls.abstract(config, dtype=dtype), mesh)
    scale = config.text.initializer_range
    return jax.jit(lambda seed: cls(Initializer(seed, dtype, scale), config), out_shardings=shardings)
