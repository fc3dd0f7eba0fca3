"""Converts tokens to text as they are generated: in pieces of whole characters, and with strings that end an answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

INCOMPLETE = "\ufffd"  # a tokenizer decodes an incomplete character to this


class TextPieces:
    """Decodes one row's tokens incrementally, in pieces that add up to the text of all tokens.

    A character whose bytes have not all arrived is held back.

    Args:
        tokenizer: a `Processor` or a tokenizer of transformers.
        skip_special_tokens: leave special tokens out of the text.

    Example:
        >>> from liger_jax.demo.tokenizer import train_tokenizer
        >>> from liger_jax.generation.detokenize import TextPieces
        >>> tokenizer = train_tokenizer([])
        >>> pieces = TextPieces(tokenizer)
        >>> [pieces.push(token) for token in tokenizer("aé")["input_ids"]]
        ['a', '', 'é']
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True):
        self._decode = lambda tokens: tokenizer.decode(np.array(tokens), skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []  # tokens held back
        self.held = ""  # their text, ending in an incomplete character

    def push(self, token: int) -> str:
        """Adds a token and returns the text that it completes, which may be empty."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(INCOMPLETE):
            self.held = text
            return ""
        self._tokens, self.held = [], ""
        return text

    def flush(self) -> str:
        """Returns the text that is still held back after the last token."""
        text, self._tokens, self.held = self.held, [], ""
        return text


class StopStrings:
    """Detects when the text of one row, special tokens included, completes any of several strings."""

    def __init__(self, strings: Sequence[str], tokenizer: Any):
        self._strings = strings
        self._pieces = TextPieces(tokenizer, skip_special_tokens=False) if strings else None
        self._tail_length = max(map(len, strings), default=1) - 1  # characters that may begin a stop string
        self._tail = ""

    def push(self, token: int) -> bool:
        """Adds a token and returns whether it completes a string."""
        if self._pieces is None:
            return False
        text = self._tail + self._pieces.push(token)
        self._tail = text[max(len(text) - self._tail_length, 0) :]
        return any(string in text + self._pieces.held for string in self._strings)
