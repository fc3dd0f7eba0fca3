"""Generation: prompts in, tokens out, or pieces of text while they come."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from liger_jax.generation.detokenize import StopStrings, TextPieces
from liger_jax.generation.loop import Decoding, Generated, start_decoding
from liger_jax.generation.options import GenerationOptions
from liger_jax.inputs.batch import Batch
from liger_jax.model import Qwen2VL


def generate(
    model: Qwen2VL,
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
) -> np.ndarray | Generated:
    """Continues every row of a batch; -> the new tokens, [B, max_new_tokens] int32, in host memory.

    A row ends at its first end token; what follows in it is `pad_token_id`. The loop stops when all rows have ended.
    Compiles once for each bucket of prompt shapes, and the loop for each of `max_new_tokens`. Switching an option on
    compiles anew; another value of it does not, but for no_repeat_ngram_size, logprobs and num_return_sequences.

    Args:
        batch: prompts, as `prepare` returns them; padded on any side, one sequence a row.
        tokenizer: a `Processor` or a tokenizer of transformers, for `stop_strings`.
        others: see `GenerationOptions`. With `num_return_sequences` n, rows i n to i n + n - 1 continue prompt i. With
            `logprobs`, the result is a `Generated`.

    Raises:
        ValueError: an option out of range, packed rows, a row without tokens, or more positions than the model has.

    Example:
        >>> import numpy as np
        >>> from liger_jax import Qwen2VL, Qwen2VLConfig, generate, prepare
        >>> model = Qwen2VL.init(Qwen2VLConfig.tiny())
        >>> generate(model, prepare(model.config, input_ids=np.array([[5, 6, 7]])), max_new_tokens=4).shape
        (1, 4)
    """
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        bad_words_ids=bad_words_ids,
        stop_strings=stop_strings,
        num_return_sequences=num_return_sequences,
        logprobs=logprobs,
        seed=seed,
    )
    strings = options.all_stop_strings
    if strings and tokenizer is None:
        raise ValueError(
            f"stop_strings is {stop_strings!r} without a tokenizer; expected tokenizer=, to read them with"
        )
    decoding = start_decoding(model, batch, options)
    if strings:
        _stop_at(decoding, strings, tokenizer)
    else:
        decoding.advance(max_new_tokens)
    found = decoding.result()
    return found.tokens if logprobs is None else found


def stream(model: Qwen2VL, batch: Batch, tokenizer: Any, **options: Any) -> Iterator[str]:
    """Continues one prompt; -> pieces of text as they come, together the text of what `generate` returns.

    A character whose bytes are spread over several tokens comes when it is whole. The device runs ahead of the reader by a
    few tokens.

    Args:
        batch: one prompt, as `prepare` returns it.
        tokenizer: a `Processor` or a tokenizer of transformers.
        options: see `GenerationOptions`.

    Raises:
        ValueError: as `generate`, when called; several rows or sequences, or logprobs.

    Example:
        >>> for piece in stream(model, batch, processor, max_new_tokens=64):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    asked = GenerationOptions(**options)
    check_one_answer(asked)
    if batch.shape[0] != 1:
        raise ValueError(f"The batch has {batch.shape[0]} rows; expected one prompt to stream the answer of")
    return read_pieces(start_decoding(model, batch, asked), tokenizer, asked.all_stop_strings, [])


def check_one_answer(options: GenerationOptions) -> None:
    """Raises ValueError for what a stream of text cannot tell."""
    if options.num_return_sequences != 1 or options.logprobs is not None:
        raise ValueError(
            f"num_return_sequences is {options.num_return_sequences} and logprobs {options.logprobs}; expected 1 and None "
            "for a stream of text"
        )


def read_pieces(decoding: Decoding, tokenizer: Any, stop_strings: Sequence[str], tokens: list[int]) -> Iterator[str]:
    """The pieces of a single row's text; its tokens are appended to `tokens` as they are read."""
    pieces, stop = TextPieces(tokenizer), StopStrings(stop_strings, tokenizer)
    for found in decoding:
        for token in found[0, len(tokens) :].tolist():
            tokens.append(token)
            if piece := pieces.push(token):
                yield piece
            if stop.push(token):
                decoding.stopped[0] = True
                break
        if decoding.stopped[0]:
            break
    if piece := pieces.flush():
        yield piece


def _stop_at(decoding: Decoding, strings: Sequence[str], tokenizer: Any) -> None:
    """Runs to the end; each row ends where a string is complete."""
    watch = [StopStrings(strings, tokenizer) for _ in decoding.stopped]
    ends, read = set(np.asarray(decoding.sampling.ends).tolist()), 0
    for found in decoding:
        for row in np.flatnonzero(~decoding.stopped):
            for column in range(read, found.shape[1]):
                if found[row, column] in ends or watch[row].push(int(found[row, column])):
                    decoding.stopped[row], decoding.length[row] = True, column + 1
                    break
        read = found.shape[1]
