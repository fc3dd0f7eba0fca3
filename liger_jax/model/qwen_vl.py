"""Qwen-VL: the vision tower's features replace the embeddings of placeholder tokens, and the language model reads both."""

import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import pallas_kernels as pk
from liger_jax.config import QwenVLConfig
from liger_jax.errors import UserError
from liger_jax.inputs.batch import Batch
from liger_jax.model.by_rows import divides_rows
from liger_jax.model.layers import Embedding, Initializer
from liger_jax.model.sequence import attend_by_heads, set_features, split_positions
from liger_jax.model.sharding import (
    constrain_batch,
    constrain_batch_and_seq,
    param_shardings,
    replicate,
    run_on_auto_axes,
)
from liger_jax.model.summary import summarize
from liger_jax.model.text import Deepstack, LanguageModel
from liger_jax.model.vision import VisionTower
from liger_jax.options import DEFAULT_EXECUTION, LayerExecution


class QwenVL(nnx.Module):
    """A Qwen-VL model: a pytree of weights, which `jax.jit`, `jax.grad` and optax accept directly.

    Example:
        >>> import jax, numpy as np
        >>> from liger_jax import QwenVL, QwenVLConfig, prepare
        >>> model = QwenVL.init(QwenVLConfig.tiny(), dtype="float32")
        >>> batch = prepare(model.config, input_ids=np.array([[5, 6, 7]]))
        >>> jax.jit(lambda m, b: m(b))(model, batch).shape
        (1, 64, 320)
    """

    def __init__(self, init: Initializer, config: QwenVLConfig):
        self.config = config
        self.visual = VisionTower(init, config.vision)
        self.language_model = LanguageModel(init, config.text)
        text = config.text
        self.lm_head = None if config.tie_word_embeddings else Embedding(init, text.vocab_size, text.hidden_size)

    @classmethod
    def init(cls, config: QwenVLConfig, *, seed: int = 0, dtype="bfloat16", mesh: Mesh | None = None) -> Self:
        """Returns a model with random weights.

        Args:
            config: the model's configuration.
            seed: seed for the random weights.
            dtype: dtype of the weights.
            mesh: the devices to create the weights on, split as `liger_jax.model.sharding` describes. None uses the default
                device.
        """
        return _compiled_init(cls, config, jnp.dtype(dtype).name, mesh)(np.uint32(seed % 2**32))

    @classmethod
    def abstract(cls, config: QwenVLConfig, *, dtype="bfloat16") -> Self:
        """Returns the model with `jax.ShapeDtypeStruct` in place of weights: shapes without memory."""
        return jax.eval_shape(lambda: cls(Initializer(0, dtype, 1.0), config))

    @property
    def head(self) -> jax.Array:
        """The weights of the output head [V, H]; in a tied model, the input embeddings."""
        return (self.lm_head or self.language_model.embed_tokens).weight[...]

    def embed(
        self, batch: Batch, *, execution: LayerExecution = DEFAULT_EXECUTION, capture: dict | None = None
    ) -> tuple[jax.Array, Deepstack | None]:
        """Returns the token embeddings [B, T, H], with the vision tower's features in place of placeholders.

        Also returns the features that the first decoder layers add, or None if there are none.
        """
        ids = split_positions(batch.input_ids)
        x = constrain_batch(replicate(self.language_model.embed_tokens.weight[...])[ids])
        deepstack = None
        if batch.vision is not None:
            positions = batch.vision.token_positions
            features, deeper = self.visual(batch.vision, execution=execution, capture=capture)
            deepstack = Deepstack(deeper, positions).spread_over(x) if deeper else None
            # split as the features are, so that setting them moves nothing
            constrain = constrain_batch_and_seq if divides_rows(len(x)) else constrain_batch
            x = constrain(set_features(constrain(x), positions, features))
        if capture is not None:
            capture["inputs_embeds"] = x
        return x, deepstack

    def hidden_states(
        self, batch: Batch, *, execution: LayerExecution = DEFAULT_EXECUTION, capture: dict | None = None
    ) -> jax.Array:
        """Returns the input of the output head [B, T, H].

        Args:
            batch: as `prepare` returns it.
            execution: how the layers run.
            capture: if given, receives the outputs of all layers; see `activations`.
        """
        # with capture, results are whole: the first dimension of some is that of the layers
        rows_of = batch.input_ids if capture is None else None
        options = {"execution": execution, "capture": capture is not None}
        hidden, results = run_on_auto_axes(_hidden_states, self, batch, rows_of=rows_of, **options)
        if capture is not None:
            capture |= results
        return hidden

    def __call__(self, batch: Batch) -> jax.Array:
        """Returns logits [B, T, V]. The first rows and positions are those of the caller's `input_ids`; padding follows."""
        return self.logits(self.hidden_states(batch))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits [..., V] for hidden states [..., H]. Those of a batch [B, T, V] are split like the batch."""
        return run_on_auto_axes(_logits, hidden, self.head, rows_of=hidden)

    def activations(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns the output of every layer, for inspection.

        patch_embed [B,P,E], vision_blocks [Lv,B,P,E], features [B,P/4,H] and, with deepstack, deepstack [Ls,B,P/4,H] if the
        batch has images; inputs_embeds [B,T,H], text_layers [L,B,T,H] before deepstack is added, final_hidden [B,T,H],
        logits [B,T,V]. On Explicit axes, all of them are whole.
        """
        capture: dict[str, jax.Array] = {}
        capture["logits"] = self.logits(self.hidden_states(batch, capture=capture))
        return capture

    def summary(self, batch: Batch | None = None) -> str:
        """Returns a table of the model's parameters and, for a batch, of the shapes of its activations.

        Each parameter has a line with its path, axes (see `liger_jax.model.params`), shape, dtype and number of elements.
        Nothing is computed, and the model may be abstract.

        Example:
            >>> from liger_jax import QwenVL, QwenVLConfig
            >>> QwenVL.abstract(QwenVLConfig.qwen2_vl_2b()).summary().splitlines()[-1].split()
            ['total:', '4,213.3', 'MiB', '2,208,985,600']
        """
        return summarize(self, batch)

    @property
    def _nnx_tabulate_id(self) -> int:
        """Set by `nnx.tabulate` before it replaces the methods of the class, which it leaves replaced when it fails."""
        raise AttributeError("_nnx_tabulate_id")

    @_nnx_tabulate_id.setter
    def _nnx_tabulate_id(self, value: int) -> None:
        raise UserError("nnx.tabulate cannot show the arguments of this model's methods; expected model.summary(batch)")


Qwen2VL = QwenVL


def _hidden_states(
    model: QwenVL, batch: Batch, *, execution: LayerExecution, capture: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns `QwenVL.hidden_states`, and the outputs of all layers, or none of them."""
    captured: dict[str, jax.Array] = {}
    options: dict[str, Any] = {"execution": execution, "capture": captured if capture else None}
    x, deepstack = model.embed(batch, **options)
    attend = functools.partial(causal_attention, pk.find_segments(batch.segment_ids, batch.max_segments))
    hidden, _ = model.language_model(x, batch.position_ids, attend, deepstack=deepstack, **options)
    return hidden, captured


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    logits = jnp.einsum("...h,vh->...v", hidden, head)
    return constrain_batch(logits) if hidden.ndim == 3 else logits


def causal_attention(segments: pk.Segments, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    """Computes attention of each token to itself and to the earlier tokens of its own sequence."""

    def attend(q, k, v, segments):
        return pk.attention(q, k, v, causal=True, segment_ids=segments)

    return attend_by_heads(attend, q, k, v, segments), None


@functools.lru_cache(maxsize=8)
def _compiled_init(cls: type[QwenVL], config: QwenVLConfig, dtype: str, mesh: Mesh | None) -> Callable[..., Any]:
    """Returns a jitted function that maps a seed to a model with random weights. Caching it avoids recompilation."""
    shardings = None if mesh is None else param_shardings(cls.abstract(config, dtype=dtype), mesh)
    scale = config.text.initializer_range
    return jax.jit(lambda seed: cls(Initializer(seed, dtype, scale), config), out_shardings=shardings)
