"""One generation on the device, which the host reads, stops or lets run: a batch of prompts and their new tokens."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Self

import jax
import numpy as np

from liger_jax.config import QwenVLConfig
from liger_jax.errors import UserError
from liger_jax.generation.loop import (
    NEW_TOKENS,
    NON_FINITE,
    FirstStep,
    Generated,
    decode_loop,
    decode_weights,
    first_token_logits,
    init_cache,
    init_decode_state,
    prefill,
    repeat_rows,
)
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.sampling import History, Sampling
from liger_jax.inputs.batch import Batch, bucket
from liger_jax.model import QwenVL
from liger_jax.model.decode_layout import choose_layout
from liger_jax.model.kv_cache import KVCache
from liger_jax.model.sharding import get_mesh, mesh_context, shard_batch, with_auto_axes

CHUNK = 8  # tokens that the device generates while the host reads the previous chunk


class NonFiniteLogitsError(UserError):
    """Raised when logits are NaN or infinite. The other rows' tokens are in `generated`.

    Attributes:
        new_tokens: for each row with such logits, the number of the new token that they were for, counted from 1.
        generated: all new tokens; these rows end before that token.
    """

    def __init__(self, new_tokens: dict[int, int], generated: Generated):
        self.new_tokens, self.generated = new_tokens, generated
        row, number = next(iter(new_tokens.items()))
        super().__init__(f"Row {row}: {self.describe(number)}")

    @staticmethod
    def describe(number: int) -> str:
        return (
            f"The logits of new token {number} are NaN or infinite; expected finite logits: the weights are damaged, or "
            "values exceed the range of their dtype (float16 ends at 65504; bfloat16 has the range of float32)"
        )


def check_prompts(config: QwenVLConfig, batch: Batch, max_new_tokens: int) -> None:
    """Raises UserError unless each row holds one prompt, and prompt and answer fit the model's positions.

    Traced arrays have no values to check.
    """
    if not isinstance(batch, Batch):
        raise UserError(f"batch is a {type(batch).__name__}; expected a Batch, as prepare(model.config, ...) returns")
    if is_traced((batch.segment_ids, batch.position_ids)):
        return  # the caller's responsibility, see `generate`
    segments = np.asarray(batch.segment_ids)
    if segments.max() > 1:
        row = int(np.argmax(segments.max(axis=1)))
        raise UserError(f"Row {row} holds {segments.max()} packed sequences; expected one prompt per row")
    if not segments.any(axis=1).all():
        raise UserError(f"Row {int(np.argmin(segments.any(axis=1)))} has no tokens; expected a prompt in every row")
    last, limit = int(np.asarray(batch.position_ids).max()) + max_new_tokens, config.text.max_position_embeddings
    if last >= limit:
        raise UserError(
            f"The prompts and {max_new_tokens} new tokens reach position {last}; expected at most {limit - 1}, since the "
            f"model's max_position_embeddings is {limit}"
        )


def is_traced(tree: Any) -> bool:
    """Returns whether a tree holds traced arrays, as the arguments of a function under `jax.jit` or `jax.vmap` do."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


class DecodeSession:
    """The generation of one batch on the device: its KV cache, and the new tokens so far.

    Iterate over `chunks` to read tokens as they are generated, or call `run` to generate all of them. Then `result` returns
    all tokens.

    Compiled programs run in this order: `prefill`, `first_token_logits`, `init_cache`, `init_decode_state`, `decode_loop`.

    Attributes:
        rows: number of rows, `num_return_sequences` for each prompt.
        cache: the KV cache, which a chat extends with its next turn.
        sampling: the options as arrays.
    """

    def __init__(
        self,
        model: QwenVL,
        cache: KVCache,
        first_step: "FirstStep",
        options: GenerationOptions,
        input_ids: np.ndarray,
        segment_ids: np.ndarray,
    ):
        """Chooses each row's first token.

        Args:
            model: the model.
            cache: filled with the prompts, each `num_return_sequences` times, with room for the new tokens.
            first_step: logits and positions of the first new tokens, with the rows of the cache.
            options: generation options.
            input_ids: [prompts, L], the whole prompts, padded on any side.
            segment_ids: [prompts, L], 0 for padding.
        """
        prompts, samples, padded_rows = len(input_ids), options.num_return_sequences, len(first_step.empty)
        self.model, self.cache, self.rows = model, cache, prompts * samples
        self.sampling = Sampling.from_options(options, model.config, prompts, padded_rows)
        self._limit = options.max_new_tokens
        self._stopped = np.zeros(self.rows, bool)
        self._length = np.full(self.rows, self._limit)
        history = None
        if self.sampling.needs_history:
            padding = [(0, padded_rows // samples - prompts), (0, 0)]
            ids, segments = (np.pad(array, padding).repeat(samples, axis=0) for array in (input_ids, segment_ids))
            history = History.from_prompts(ids, segments, cache.valid.shape[1])
        self._mesh, self._weights, self._requested = get_mesh((model, cache)), None, 1
        with mesh_context(self._mesh):
            room = bucket(self._limit, NEW_TOKENS)
            self._state, self._snapshot = init_decode_state(
                first_step, self.sampling, history, room=room, layout=cache.layout
            )
            if self._limit > 1:  # copied while the device runs the prefill
                self._weights = decode_weights(model, cache.layout)

    @classmethod
    def start(cls, model: QwenVL, batch: Batch, options: GenerationOptions) -> Self:
        """Runs the prefill of a batch of prompts and chooses each row's first token."""
        check_prompts(model.config, batch, options.max_new_tokens)
        model, prompts = with_auto_axes(model), (np.asarray(batch.input_ids), np.asarray(batch.segment_ids))
        options.check_against(model.config, len(prompts[0]))
        mesh = get_mesh(model)  # flattening a model takes 0.1 ms, for which the device waits
        batch = shard_batch(dataclasses.replace(batch, labels=None), mesh)
        with mesh_context(mesh or get_mesh(batch)):
            hidden, keys_values = prefill(model, batch)
            first_step = first_token_logits(model, hidden, batch.position_ids, batch.segment_ids, np.int32(0))
            room = bucket(options.max_new_tokens, NEW_TOKENS)
            layout = choose_layout(model.language_model, model.head, (batch.shape[0], batch.shape[1] + room))
            cache = init_cache(*keys_values, batch.segment_ids, room=room, layout=layout)
            if options.num_return_sequences > 1:
                cache, first_step = repeat_rows((cache, first_step), options.num_return_sequences)
        return cls(model, cache, first_step, options, *prompts)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yields the new tokens [rows, 1 or more] as they are generated, until all rows have ended.

        The first chunk is a single token. The device is one chunk ahead of the reader. A row whose logits are not finite
        ends with the token NON_FINITE.
        """
        read, finished = 0, False
        try:
            while not finished:
                snapshot, requested = self._snapshot, self._requested
                if requested > 1:  # the first token does not wait for the compilation of the loop
                    self._advance(CHUNK)
                tokens, step, done = jax.device_get((snapshot[0].tokens, *snapshot[1:]))
                yield tokens[: self.rows, read:step]
                read = step
                finished = requested == self._limit or (done[: self.rows] | self._stopped).all()
                if requested == 1 and not finished:
                    self._advance(CHUNK)
        finally:
            self._weights = None  # they are a copy of most weights, and a chat keeps the session for its cache

    def stop(self, row: int, length: int) -> None:
        """Ends a row after its first `length` tokens."""
        self._stopped[row], self._length[row] = True, length

    def run(self) -> None:
        """Generates all tokens, without waiting for the device."""
        self._advance(self._limit)

    def result(self) -> Generated:
        """Waits for the device and returns all tokens, with None for log-probabilities that were not requested.

        Raises:
            NonFiniteLogitsError: the logits of a row were NaN or infinite.
        """
        generated = jax.device_get(self._snapshot[0])
        after_end = np.arange(self._limit) >= self._length[:, None]

        def cut(array, fill):  # on the host: slicing on the device would compile for each length
            array = np.array(array[: self.rows, : self._limit])
            array[after_end] = fill
            return array

        fills = (self.sampling.pad_token, 0, 0, 0)
        generated = Generated(
            *(array if array is None else cut(array, fill) for array, fill in zip(generated, fills, strict=True))
        )
        failed = generated.tokens == NON_FINITE
        if failed.any():
            generated.tokens[failed] = self.sampling.pad_token
            raise NonFiniteLogitsError({int(row): int(step) + 1 for row, step in np.argwhere(failed)}, generated)
        return generated

    def _advance(self, tokens: int) -> None:
        """Dispatches up to `tokens` more tokens per row, without waiting for the device."""
        if self._requested == self._limit:
            return
        self._requested = min(self._requested + tokens, self._limit)
        stopped = np.ones(len(self.sampling.seeds), bool)
        stopped[: self.rows] = self._stopped
        with mesh_context(self._mesh):
            self._weights = self._weights or decode_weights(self.model, self.cache.layout)
            self.cache, self._state, self._snapshot = decode_loop(
                self._weights,
                self.cache,
                self._state,
                self.sampling,
                stopped=stopped,
                until=np.int32(self._requested),
            )
