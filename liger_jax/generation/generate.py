"""Generates from prompts: all tokens at once, or pieces of text while they are generated."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liger_jax.errors import UserError
from liger_jax.generation.detokenize import StopStrings, TextPieces
from liger_jax.generation.loop import NON_FINITE, Generated
from liger_jax.generation.options import GenerationOptions
from liger_jax.generation.session import DecodeSession, is_traced
from liger_jax.generation.traced import generate_traced
from liger_jax.inputs.batch import Batch
from liger_jax.model import QwenVL
from liger_jax.model.sharding import is_inside_trace


def generate(
    model: QwenVL,
    batch: Batch,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int | None = None,
    bad_words_ids: Sequence[Sequence[int]] = (),
    stop_strings: str | Sequence[str] = (),
    tokenizer: Any = None,
    num_return_sequences: int = 1,
    logprobs: int | None = None,
    seed: int | Sequence[int] = 0,
) -> np.ndarray | jax.Array | Generated:
    """Generates a continuation of every row of a batch.

    A row ends at its first end token; `pad_token_id` fills the rest. Generation stops when all rows have ended.
    Compiles once per bucket of prompt shapes, and the decode loop once per bucket of `max_new_tokens`. Enabling an option
    recompiles; changing its value does not, except for no_repeat_ngram_size, logprobs and num_return_sequences.

    Inside `jax.jit`, `jax.vmap` or `jax.shard_map`, prefill and decoding become part of the caller's program, with the same
    tokens. Model, batch and seed may be traced; the other options are constants. The values of a traced batch cannot be
    checked: a row without tokens gives padding; positions that exceed the model's, and packed rows, give meaningless tokens.

    Args:
        model: the model.
        batch: prompts, as `prepare` returns them; padded on any side, one prompt per row.
        tokenizer: a `Processor` or a tokenizer of transformers; needed for `stop_strings`.

    The other arguments are the fields of `GenerationOptions`.

    Returns:
        The new tokens [B, max_new_tokens] int32, in host memory (or traced). With `num_return_sequences` n, rows i n to
        i n + n - 1 continue prompt i. With `logprobs`, a `Generated` instead.

    Raises:
        UserError: an option is out of range, a row is packed or empty, or prompt and answer exceed the model's positions.
        NonFiniteLogitsError: logits are NaN or infinite. (Traced, the row ends with padding instead.)

    Example:
        >>> import numpy as np
        >>> from liger_jax import QwenVL, QwenVLConfig, generate, prepare
        >>> model = QwenVL.init(QwenVLConfig.tiny())
        >>> generate(model, prepare(model.config, input_ids=np.array([[5, 6, 7]])), max_new_tokens=4).shape
        (1, 4)
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "batch", "tokenizer")}
    if is_inside_trace(model, batch, options):
        return _generate_traced(model, batch, options)
    return generate_with(model, batch, GenerationOptions(**options), tokenizer)


def _generate_traced(model: QwenVL, batch: Batch, options: dict[str, Any]) -> jax.Array | Generated:
    """Generates as `generate` does, inside a function that JAX traces."""
    seed = None
    if is_traced(options["seed"]):
        seed, options = jnp.asarray(options["seed"]), options | {"seed": 0}
        if seed.dtype.kind not in "iu" or seed.shape not in ((), batch.shape[:1]):
            raise UserError(
                f"seed is {seed.dtype} with shape {seed.shape}; expected one integer, or one for each of "
                f"{batch.shape[0]} prompts"
            )
    for name, value in options.items():
        if is_traced(value):
            raise UserError(f"{name} is traced by JAX; expected a constant (under jax.jit: static_argnames={name!r})")
    if options["stop_strings"]:
        raise UserError(
            f"stop_strings is {options['stop_strings']!r}; expected none inside a function that JAX traces, where no text "
            "can be compared: call generate outside of it, or use eos_token_id"
        )
    generated = generate_traced(model, batch, GenerationOptions(**options), seed)
    return generated.tokens if options["logprobs"] is None else generated


def generate_with(
    model: QwenVL, batch: Batch, options: GenerationOptions, tokenizer: Any = None
) -> np.ndarray | Generated:
    """Generates as `generate` does, with the options as one value."""
    strings = options.all_stop_strings
    if strings and tokenizer is None:
        raise UserError(f"tokenizer is None; expected a tokenizer for stop_strings {options.stop_strings!r}")
    session = DecodeSession.start(model, batch, options)
    if strings:
        _stop_at_strings(session, strings, tokenizer)
    else:
        session.run()
    generated = session.result()
    return generated.tokens if options.logprobs is None else generated


def _stop_at_strings(session: DecodeSession, strings: Sequence[str], tokenizer: Any) -> None:
    """Generates all tokens; a row ends at its first end token or complete stop string."""
    detectors = {row: StopStrings(strings, tokenizer) for row in range(session.rows)}  # of unfinished rows
    end_tokens, length = {NON_FINITE, *np.asarray(session.sampling.end_tokens).tolist()}, 0
    for chunk in session.chunks():
        for row, detector in list(detectors.items()):
            for count, token in enumerate(chunk[row].tolist(), start=length + 1):
                if token in end_tokens or detector.push(token):
                    session.stop(row, count)
                    del detectors[row]
                    break
        length += chunk.shape[1]


def stream(model: QwenVL, batch: Batch, tokenizer: Any, **options: Any) -> Iterator[str]:
    """Yields the text of one prompt's continuation in pieces while it is generated.

    Joined, the pieces are the text of the tokens that `generate` returns. A character whose bytes are spread over several
    tokens is yielded whole. The device runs a few tokens ahead of the reader.

    Args:
        model: the model.
        batch: one prompt, as `prepare` returns it.
        tokenizer: a `Processor` or a tokenizer of transformers.
        options: the fields of `GenerationOptions`.

    Raises:
        UserError: raised by the call itself, as by `generate`; also for several rows, num_return_sequences above 1, or
            logprobs.

    Example:
        >>> for piece in stream(model, batch, processor, max_new_tokens=64):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    if is_inside_trace(model, batch, options):
        raise UserError(
            "stream is called inside a function that JAX traces; expected a call outside, or generate inside"
        )
    generation_options = GenerationOptions(**options)
    generation_options.check_single_text()
    if batch.shape[0] != 1:
        raise UserError(f"The batch has {batch.shape[0]} rows; expected 1, since only one answer can be streamed")
    session = DecodeSession.start(model, batch, generation_options)
    return stream_text(session, tokenizer, generation_options.all_stop_strings, [])


def stream_text(
    session: DecodeSession, tokenizer: Any, stop_strings: Sequence[str], tokens: list[int]
) -> Iterator[str]:
    """Yields the text of a session with one row in pieces, and appends its tokens to `tokens` as they are read."""
    pieces, detector = TextPieces(tokenizer), StopStrings(stop_strings, tokenizer)
    for chunk in session.chunks():
        for token in chunk[0].tolist():
            if token == NON_FINITE:
                session.result()  # raises
            tokens.append(token)
            if piece := pieces.push(token):
                yield piece
            if detector.push(token):
                session.stop(0, len(tokens))
                break
    if piece := pieces.flush():
        yield piece
