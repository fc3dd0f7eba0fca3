"""Generation options: their meaning, their valid values, and the defaults of a checkpoint.

`liger-jax --help` imports this module, so it loads neither JAX nor numpy on import.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from liger_jax.errors import LigerWarning, UserError

if TYPE_CHECKING:
    from liger_jax.config import QwenVLConfig

SAMPLING_FILTERS = ("temperature", "top_k", "top_p", "min_p")
# Entries of generation_config.json that only transformers implements, each with the value that disables it.
UNSUPPORTED = {
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

# {option: the kinds of its numpy dtype, its possible numbers of axes, and both in words}. None is allowed where it is the
# default.
FORMS = {
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "num_return_sequences"), ("iu", (0,), "an integer")),
    **dict.fromkeys(("pad_token_id", "top_k", "no_repeat_ngram_size", "logprobs"), ("iu", (0,), "an integer, or None")),
    **dict.fromkeys(("temperature", "repetition_penalty"), ("iuf", (0,), "a number")),
    **dict.fromkeys(("top_p", "min_p"), ("iuf", (0,), "a number, or None")),
    "eos_token_id": ("iu", (0, 1), "an integer, a list of integers, or None"),
    "do_sample": ("b", (0,), "True or False"),
    "seed": ("iu", (0, 1), "a 64-bit integer, or one per prompt"),
}


def _has_form(value: Any, kinds: str, axes: tuple[int, ...]) -> bool:
    """Returns whether a value can become a numpy array of one of these kinds and numbers of axes. () can become any list."""
    import numpy as np

    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):  # lists of different lengths, ...
        return False
    return array.ndim in axes and (array.dtype.kind in kinds or array.shape == (0,))


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """The options of `generate`, `stream` and `Chat`, with transformers' names and meanings.

    Raises:
        UserError: a value is out of range.

    Example:
        >>> from liger_jax import GenerationOptions
        >>> GenerationOptions(max_new_tokens=8, do_sample=True, top_p=0.9).top_p
        0.9
    """

    max_new_tokens: int = 512
    """Maximum number of new tokens per row."""
    min_new_tokens: int = 0
    """Minimum number of new tokens per row; end tokens are suppressed until then."""
    eos_token_id: int | Sequence[int] | None = None
    """One or more end tokens; None uses the checkpoint's, () uses none."""
    pad_token_id: int | None = None
    """Token that fills a row after its end; None uses the checkpoint's, or else the first end token."""
    do_sample: bool = False
    """Sample from the distribution; otherwise take the most likely token."""
    temperature: float = 1.0
    """Divisor of the logits before sampling; top_k, top_p and min_p are applied after it, in this order."""
    top_k: int | None = None
    """Sample from this many most likely tokens; None disables the filter, 1 takes the most likely token without sampling."""
    top_p: float | None = None
    """Sample from the fewest most likely tokens whose probabilities add up to this; None disables the filter."""
    min_p: float | None = None
    """Sample from the tokens at least this fraction as likely as the most likely token; None disables the filter."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens that have occurred less likely, including those of the prompt."""
    no_repeat_ngram_size: int | None = None
    """No sequence of this many tokens occurs twice, prompt included; None allows all."""
    bad_words_ids: Sequence[Sequence[int]] = ()
    """Token sequences that may not occur. A sequence that is just an end token is ignored."""
    stop_strings: str | Sequence[str] = ()
    """A row ends with the token that completes one of these strings, which may begin or end within a token. Needs a
    tokenizer. The string stays in the result, as in transformers; prompts are not searched."""
    num_return_sequences: int = 1
    """Continuations per prompt, adjacent in the result. The prompt is prefilled once."""
    logprobs: int | None = None
    """Also return each new token's log-probability, and the log-probabilities of this many most likely tokens at its
    position; None returns tokens only. They are the model's own, before penalties, temperature and filters."""
    seed: int | Sequence[int] = 0
    """One number: every row samples differently. One number per prompt: a prompt's samples depend only on its own seed,
    not on the rest of the batch, and equal those of the prompt alone with that number as the seed."""

    def __post_init__(self):
        for name, (kinds, axes, expected) in FORMS.items():
            value = getattr(self, name)
            may_be_none = getattr(type(self), name) is None
            if not (value is None and may_be_none) and not _has_form(value, kinds, axes):
                raise UserError(f"{name} is {value!r:.60}; expected {expected}")
        self._check_lists()
        may_differ = self.num_return_sequences == 1 or self.do_sample
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            (
                "temperature",
                1e-30 <= self.temperature <= 1e30,
                "1e-30 to 1e30 (the most likely token: do_sample=False)",
            ),
            ("top_k", self.top_k is None or self.top_k >= 0, "at least 1, or None or 0 for no limit"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or None"),
            ("repetition_penalty", 1e-30 <= self.repetition_penalty <= 1e30, "1e-30 to 1e30"),
            ("no_repeat_ngram_size", (self.no_repeat_ngram_size or 0) >= 0, "at least 1, or None or 0 for no limit"),
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
            ("num_return_sequences", may_differ, "1 without do_sample (all continuations would be equal)"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0, or None"),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)!s:.60}; expected {expected}")

    def _check_lists(self) -> None:
        words, strings = self.bad_words_ids, self.stop_strings
        if not hasattr(words, "__iter__") or not all(_has_form(word, "iu", (1,)) for word in words):
            raise UserError(f"bad_words_ids is {words!r:.60}; expected a list of token sequences")
        if not all(len(word) for word in words):
            raise UserError(f"bad_words_ids is {words!r:.60}; expected sequences of at least one token")
        if not isinstance(strings, Sequence) or not all(
            isinstance(text, str) and text for text in self.all_stop_strings
        ):
            raise UserError(f"stop_strings is {strings!r:.60}; expected strings of at least one character")

    @property
    def all_stop_strings(self) -> tuple[str, ...]:
        """`stop_strings` as a tuple."""
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)

    @classmethod
    def from_hf(cls, folder: str | Path, **overrides: Any) -> Self:
        """Returns a checkpoint's defaults, read from its generation_config.json as in transformers.

        Warns if neither this file nor config.json has an end token, since every answer is then as long as allowed.

        An option missing from the file has transformers' default: greedy decoding, and top_k 50 if do_sample is set
        without a top_k. One default differs: transformers stops at 20 tokens including the prompt; here the default of
        max_new_tokens applies.

        Args:
            folder: the checkpoint's folder, or its hub id.
            overrides: options that override those of the file.

        Raises:
            NotFoundError: there is neither such a folder nor such a checkpoint on the hub.
            UserError: the file is not a JSON object, or a value is out of range.
        """
        from liger_jax.config import read_end_tokens
        from liger_jax.files import CONFIG, GENERATION_CONFIG, local_folder, read_json_object

        path = local_folder(folder, [GENERATION_CONFIG, CONFIG]) / GENERATION_CONFIG
        stored = read_json_object(path) if path.is_file() else {}
        stored = {name: value for name, value in stored.items() if value is not None}
        if not (stored | overrides).get("do_sample"):  # the filters then have no effect and are not checked
            stored = {name: value for name, value in stored.items() if name not in SAMPLING_FILTERS}
        unsupported = {name: stored[name] for name, off in UNSUPPORTED.items() if stored.get(name, off) != off}
        if unsupported:
            warnings.warn(f"{path}: {unsupported!r:.300} is not implemented and is ignored", LigerWarning, stacklevel=2)
        config_path = path.with_name(CONFIG)
        if (
            overrides.get("eos_token_id") is None
            and config_path.is_file()
            and not read_end_tokens(read_json_object(config_path), stored)
        ):
            warnings.warn(
                f"{path.parent} has no eos_token_id in {GENERATION_CONFIG} or {CONFIG}: every answer runs to "
                "max_new_tokens, unless eos_token_id or a stop string ends it",
                LigerWarning,
                stacklevel=2,
            )
        names = {field.name for field in dataclasses.fields(cls)} - {"seed", "logprobs"}
        values = {name: value for name, value in stored.items() if name in names} | overrides
        if values.get("do_sample"):
            values.setdefault("top_k", 50)
        return cls(**values)

    def resolve_end_tokens(self, config: "QwenVLConfig") -> tuple[int, ...]:
        """Returns the end tokens: those of the options, or else the checkpoint's."""
        import numpy as np

        if self.eos_token_id is None:
            return config.eos_token_ids
        return tuple(int(token) for token in np.atleast_1d(np.asarray(self.eos_token_id, np.int64)))

    def resolve_pad_token(self, config: "QwenVLConfig") -> int:
        """Returns the padding token: that of the options, or else the checkpoint's, the first end token, or 0."""
        pad_token = config.pad_token_id if self.pad_token_id is None else self.pad_token_id
        return next(iter(self.resolve_end_tokens(config)), 0) if pad_token is None else pad_token

    def check_against(self, config: "QwenVLConfig", prompts: int) -> None:
        """Raises UserError if a token is outside the vocabulary, or if there are several seeds but not one per prompt."""
        import numpy as np

        bad_tokens = [token for word in self.bad_words_ids for token in word]
        for token in (*self.resolve_end_tokens(config), self.resolve_pad_token(config), *bad_tokens):
            if not 0 <= token < config.text.vocab_size:
                raise UserError(
                    f"Token id {token} is outside the vocabulary; expected 0 to {config.text.vocab_size - 1}"
                )
        if (self.logprobs or 0) > config.text.vocab_size:
            raise UserError(
                f"logprobs is {self.logprobs}; expected at most {config.text.vocab_size}, the vocabulary size"
            )
        if np.ndim(self.seed) and np.shape(self.seed) != (prompts,):
            raise UserError(
                f"seed has shape {np.shape(self.seed)}; expected one integer, or one for each of {prompts} prompts"
            )

    def single_seed(self) -> int:
        """Returns the seed. Raises UserError if there is one per prompt."""
        if not isinstance(self.seed, Integral):
            raise UserError(f"seed is {self.seed}; expected a single integer")
        return int(self.seed)

    def check_single_text(self) -> None:
        """Raises UserError for options that request more than one text per prompt."""
        for name, expected in (("num_return_sequences", 1), ("logprobs", None)):
            if (value := getattr(self, name)) != expected:
                raise UserError(f"{name} is {value}; expected {expected}, since the answer is one text")


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated. Options that are not given come from the checkpoint's generation_config.json.

    Each of temperature, top_k, top_p and min_p enables sampling and disables those of them that are not given.
    """

    max_new_tokens: int | None = None
    """Maximum length of an answer, in tokens; by default the checkpoint's, or 512."""
    temperature: float | None = None
    """Sample answers at this temperature; 0 always takes the most likely token."""
    top_k: int | None = None
    """Sample from this many most likely tokens."""
    top_p: float | None = None
    """Sample from the fewest most likely tokens whose probabilities add up to this."""
    min_p: float | None = None
    """Sample from the tokens at least this fraction as likely as the most likely token."""
    repetition_penalty: float | None = None
    """Values above 1 make tokens that have occurred less likely, including those of the question."""
    no_repeat_ngram_size: int | None = None
    """No sequence of this many tokens occurs twice."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    seed: int = 0
    """Seed for sampling."""

    def resolve(self, folder: str | Path) -> GenerationOptions:
        """Returns these options, completed by those of a checkpoint (a folder or a hub id)."""
        overrides = {name: value for name, value in vars(self).items() if value not in (None, ())}
        if self.stop:
            overrides["stop_strings"] = overrides.pop("stop")
        if self.temperature == 0:
            overrides = {name: value for name, value in overrides.items() if name not in SAMPLING_FILTERS}
            overrides["do_sample"] = False
        elif overrides.keys() & set(SAMPLING_FILTERS):
            overrides = {"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None} | overrides
        return GenerationOptions.from_hf(folder, **overrides)
