"""From tokens to text while they come: pieces of whole characters, and strings that end an answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character


class TextPieces:
    """Turns one row's tokens into text, piece by piece. A character whose bytes have not all come is held back.

    The pieces together are the text of all tokens.

    Args:
        tokenizer: a `Processor` or a tokenizer of transformers.

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
        self._tokens: list[int] = []
        self.held = ""  # the text of tokens that are held back, as far as it can be told

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(UNFINISHED):
            self.held = text
            return ""
        self._tokens, self.held = [], ""
        return text

    def flush(self) -> str:
        """What is left when no token follows."""
        text, self._tokens, self.held = self.held, [], ""
        return text


class StopStrings:
    """Watches one row's text, its special tokens written out, for the first of some strings to be complete."""

    def __init__(self, strings: Sequence[str], tokenizer: Any):
        self._strings = strings
        self._pieces = TextPieces(tokenizer, skip_special_tokens=False) if strings else None
        self._behind = max(map(len, strings), default=1) - 1  # characters that may belong to a string not yet complete
        self._tail = ""

    def push(self, token: int) -> bool:
        """Whether this token completes a string."""
        if self._pieces is None:
            return False
        text = self._tail + self._pieces.push(token)
        self._tail = text[max(len(text) - self._behind, 0) :]
        return any(string in text + self._pieces.held for string in self._strings)
