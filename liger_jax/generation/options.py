"""What people ask of generation: the options, their checks, and the checkpoint's own defaults."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from liger_jax.config import Qwen2VLConfig
from liger_jax.files import local_folder
from liger_jax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """The options of `generate`, `stream` and `Chat`, with transformers' names and meanings.

    Args:
        max_new_tokens, min_new_tokens: an end token is ruled out before the smallest number.
        eos_token_id: one or several end tokens; None: the checkpoint's, () for none.
        pad_token_id: what follows an end token; None: the checkpoint's, or else the first end token.
        do_sample: draw from the distribution; otherwise the most likely token is taken.
        temperature, top_k, top_p, min_p: of the draw, applied in this order; None leaves a filter out. With top_k 1
            nothing is drawn: the most likely token is taken.
        repetition_penalty: above 1 makes tokens that occurred less likely; the prompt's count too.
        no_repeat_ngram_size: no run of so many tokens occurs twice, the prompt's included; None: any may.
        bad_words_ids: sequences of tokens that may not occur; an end token alone is not forbidden.
        stop_strings: a row ends with the token that completes one of them, which may begin or end within a token. Needs a
            tokenizer. The string stays in the result, as in transformers; prompts are not searched.
        num_return_sequences: continuations of each prompt, one after the other in the result; the prompt is read once.
        logprobs: tell the logarithm of each new token's probability, and so many of the most likely tokens at its place;
            None: tokens alone. Probabilities are the model's own, before penalties, temperature and filters.
        seed: a number: rows draw differently from each other. One for each prompt: a prompt's draws then depend on its own
            alone, whatever stands beside it. A prompt alone with a seed draws like a prompt with that seed among many.

    Example:
        >>> from liger_jax.generation.options import GenerationOptions
        >>> GenerationOptions(max_new_tokens=8, do_sample=True, top_p=0.9).top_p
        0.9
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] = ()
    stop_strings: str | Sequence[str] = ()
    num_return_sequences: int = 1
    logprobs: int | None = None
    seed: int | Sequence[int] = 0

    def __post_init__(self):
        """Raises ValueError for a value without a meaning."""
        for name in ("max_new_tokens", "min_new_tokens", "num_return_sequences"):
            if not isinstance(getattr(self, name), int | np.integer):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected an integer")
        for name in ("temperature", "repetition_penalty", "bad_words_ids", "stop_strings"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is None; leave it out for its default")
        one_way = self.num_return_sequences == 1 or self.do_sample
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            ("temperature", self.temperature > 0, "above 0 (for the most likely token: do_sample=False)"),
            ("top_k", self.top_k is None or self.top_k >= 0, "at least 1, or None"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or None"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("no_repeat_ngram_size", (self.no_repeat_ngram_size or 0) >= 0, "at least 1, or None"),
            ("bad_words_ids", all(np.size(word) > 0 for word in self.bad_words_ids), "sequences of at least one token"),
            ("bad_words_ids", all(np.ndim(word) == 1 for word in self.bad_words_ids), "sequences of tokens each"),
            ("seed", np.asarray(self.seed).dtype.kind in "iu", "an integer of 64 bits, or one for each prompt"),
            ("stop_strings", all(self.all_stop_strings), "strings of at least one character"),
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
            ("num_return_sequences", one_way, "1 without do_sample: all would be the same"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0, or None"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")

    @property
    def all_stop_strings(self) -> tuple[str, ...]:
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)

    @classmethod
    def from_hf(cls, folder: str | Path, **others: Any) -> Self:
        """A checkpoint's defaults, as transformers reads its generation_config.json; `others` are set instead of its.

        `folder`: of the checkpoint, or its hub id.

        Without that file, and for what it leaves out, transformers' own defaults: nothing is drawn; where it says
        do_sample and no top_k, that is 50. One default differs: transformers stops at 20 tokens, the prompt among them;
        here max_new_tokens has its own.
        """
        path = local_folder(folder, ["generation_config.json"]) / "generation_config.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            stored = {name: value for name, value in stored.items() if value is not None}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no JSON object: {error}") from error
        if not (stored | others).get("do_sample"):  # they mean nothing then, whatever their values
            stored = {name: value for name, value in stored.items() if name not in _OF_DRAWS}
        unknown = {name: stored[name] for name, off in _NOT_HERE.items() if stored.get(name, off) != off}
        if unknown:
            warnings.warn(f"{path}: {unknown} is not implemented and left out", stacklevel=2)
        names = {field.name for field in dataclasses.fields(cls)} - {"seed", "logprobs"}
        values = {name: value for name, value in stored.items() if name in names} | others
        if values.get("do_sample"):
            values.setdefault("top_k", 50)
        return cls(**values)

    def sampling(self, config: Qwen2VLConfig, prompts: int, rows: int) -> Sampling:
        """The options as arrays for `rows` rows, the first of which continue `prompts` prompts."""
        eos, pad = self._end_and_pad(config)
        ends = np.full(_rounded(len(eos)), -1, np.int32)
        ends[: len(eos)] = eos
        seeds, streams = self._seeds(prompts, rows)
        return Sampling(
            seeds,
            streams,
            ends,
            np.int32(pad),
            do_sample=self.do_sample and self.top_k != 1,
            temperature=np.float32(self.temperature),
            top_k=np.float32(self.top_k) if self.top_k else None,
            top_p=None if self.top_p is None else np.float32(self.top_p),
            min_p=None if self.min_p is None else np.float32(self.min_p),
            repetition_penalty=None if self.repetition_penalty == 1 else np.float32(self.repetition_penalty),
            no_repeat_ngram_size=self.no_repeat_ngram_size or None,
            min_new_tokens=np.int32(self.min_new_tokens) if self.min_new_tokens else None,
            bad_words=_table([word for word in map(tuple, self.bad_words_ids) if word not in {(end,) for end in eos}]),
            logprobs=self.logprobs,
        )

    def check_tokens(self, config: Qwen2VLConfig, prompts: int) -> None:
        """Raises ValueError for a token that the vocabulary has not, or another number of seeds than of prompts."""
        eos, pad = self._end_and_pad(config)
        for token in (*eos, pad, *(token for word in self.bad_words_ids for token in word)):
            if not 0 <= token < config.text.vocab_size:
                raise ValueError(f"Token {token} is no id of the vocabulary, which has {config.text.vocab_size}")
        if (self.logprobs or 0) > config.text.vocab_size:
            raise ValueError(f"logprobs is {self.logprobs}; expected at most {config.text.vocab_size}, the vocabulary")
        if np.ndim(self.seed) and np.shape(self.seed) != (prompts,):
            raise ValueError(
                f"seed has shape {np.shape(self.seed)}; expected a number, or one for each of {prompts} prompts"
            )

    def _end_and_pad(self, config: Qwen2VLConfig) -> tuple[tuple[int, ...], int]:
        eos = config.eos_token_ids if self.eos_token_id is None else _as_tuple(self.eos_token_id)
        pad = config.pad_token_id if self.pad_token_id is None else self.pad_token_id
        return eos, pad if pad is not None else eos[0] if eos else 0

    def _seeds(self, prompts: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Seed and stream of each row: one seed's rows are its streams; a seed of a prompt's own has streams in samples."""
        samples = self.num_return_sequences
        if np.ndim(self.seed) == 0:
            seeds, streams = np.full(rows, np.asarray(self.seed).astype(np.int64)), np.arange(rows)
        else:
            seeds = np.zeros(rows, np.int64)
            seeds[: prompts * samples] = np.repeat(np.asarray(self.seed).astype(np.int64), samples)
            streams = np.arange(rows) % samples
        low, high = (seeds.view(np.uint64) >> np.uint64(shift) & np.uint64(0xFFFFFFFF) for shift in (0, 32))
        mixed = low ^ high * np.uint64(0x9E3779B1)  # a seed below 2^32 is itself
        return mixed.astype(np.uint32), streams.astype(np.int32)


_OF_DRAWS = ("temperature", "top_k", "top_p", "min_p")
# What transformers knows in a generation_config.json and this package does not, and the value that leaves it out.
_NOT_HERE = {
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "min_length": 0,
    "top_h": None,
    "encoder_repetition_penalty": 1.0,
    "renormalize_logits": False,
    "watermarking_config": None,
}


def _as_tuple(values: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.atleast_1d(np.asarray(values, np.int64)))


def _rounded(count: int) -> int:
    """Up to a multiple of 4, so that one token more compiles nothing."""
    return -(-max(count, 1) // 4) * 4


def _table(words: Sequence[Sequence[int]]) -> np.ndarray | None:
    """[W, longest] int32 with the words at the right and -1 in front; more rows and columns than needed, of -1."""
    if not words:
        return None
    longest = max(map(len, words))
    table = np.full((_rounded(len(words)), 1 if longest == 1 else _rounded(longest)), -1, np.int32)
    for row, word in zip(table, words, strict=False):
        row[-len(word) :] = word
    return table
