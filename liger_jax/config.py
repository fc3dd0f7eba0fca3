"""The configuration of a Qwen2-VL model, read from any layout of config.json on the hub."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from liger_jax.errors import NotFoundError, UserError
from liger_jax.files import CONFIG, GENERATION_CONFIG, read_json_object

LARGEST_SIZE = 2**31 - 1  # of any dimension, since JAX counts in int32
LARGEST_DEPTH = 10_000  # layers, each of which is a dozen tensors to look for
LARGEST_FLOAT = 3e38  # about float32's


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Configuration of the vision tower. The defaults are those of all published checkpoints, whose files may omit them."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: int = 4
    hidden_size: int = 3584  # the merger's output width, equal to the text model's
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def intermediate_size(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def patch_values(self) -> int:
        """The number of values in a patch, a row of `pixel_values`: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """The number of patches that are merged into one token."""
        return self.spatial_merge_size**2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Configuration of the language model. The defaults are those of the 2B model."""

    vocab_size: int = 151_936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02  # standard deviation of random weights


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """The configuration of a Qwen2-VL model. It is hashable, so it can be a static argument of `jax.jit`.

    `from_hf` reads `eos_token_ids` and `pad_token_id` from the checkpoint's generation_config.json, or else from its
    config.json. The presets have none.

    Raises:
        UserError: values contradict each other.

    Example:
        >>> from liger_jax import Qwen2VLConfig
        >>> Qwen2VLConfig.qwen2_vl_2b().text.hidden_size
        1536
    """

    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool = False
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        text, vision = self.text, self.vision
        _check_numbers("text", text)
        _check_numbers("vision", vision)
        _check_numbers("", self)
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        errors = []
        if heads % kv_heads:
            errors.append(f"text.num_attention_heads is {heads}; expected a multiple of num_key_value_heads {kv_heads}")
        if len(text.mrope_section) != 3 or 2 * sum(text.mrope_section) != text.head_dim:
            errors.append(
                f"text.mrope_section is {text.mrope_section}; expected three numbers with a sum of {text.head_dim / 2:g}, "
                "half of head_dim"
            )
        if vision.embed_dim % vision.num_heads:
            errors.append(
                f"vision.embed_dim is {vision.embed_dim}; expected a multiple of num_heads {vision.num_heads}"
            )
        if vision.head_dim % 4:
            errors.append(
                f"vision head size is {vision.head_dim}; expected a multiple of 4 (two axes, rotated in pairs)"
            )
        if vision.hidden_size != text.hidden_size:
            errors.append(f"vision.hidden_size is {vision.hidden_size}; expected text.hidden_size {text.hidden_size}")
        if errors:
            raise UserError("Not a Qwen2-VL configuration: " + "; and ".join(errors))

    @classmethod
    def qwen2_vl_2b(cls) -> Self:
        return cls(TextConfig(), VisionConfig(hidden_size=1536), tie_word_embeddings=True)

    @classmethod
    def qwen2_vl_7b(cls) -> Self:
        text = TextConfig(
            vocab_size=152_064,
            hidden_size=3584,
            intermediate_size=18_944,
            num_attention_heads=28,
            num_key_value_heads=4,
        )
        return cls(text, VisionConfig())

    @classmethod
    def qwen2_vl_72b(cls) -> Self:
        text = TextConfig(
            vocab_size=152_064,
            hidden_size=8192,
            intermediate_size=29_568,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        )
        return cls(text, VisionConfig(hidden_size=8192))

    @classmethod
    def tiny(cls, vocab_size: int = 320) -> Self:
        """Returns a configuration for CPU tests: 2 + 2 layers, and special tokens at the end of the vocabulary."""
        text = TextConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            mrope_section=(2, 3, 3),
            max_position_embeddings=4096,
        )
        vision = VisionConfig(depth=2, embed_dim=32, num_heads=4, hidden_size=64)
        return cls(
            text=text,
            vision=vision,
            image_token_id=vocab_size - 2,
            video_token_id=vocab_size - 1,
            vision_start_token_id=vocab_size - 5,
            vision_end_token_id=vocab_size - 4,
        )

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> Self:
        """Reads a Hugging Face configuration.

        Supports four layouts: flat, as on the hub (transformers 4.41); flat without default values (4.45 to 4.51); nested
        (4.52 and later); nested with `rope_parameters` (5.x). The end tokens and the padding token are read from
        generation_config.json in the same folder, or else from config.json.

        Args:
            source: a dict, a config.json, or a folder that contains one.

        Raises:
            NotFoundError: there is no config.json.
            UserError: it does not describe a Qwen2-VL model, values contradict each other, or an option is not implemented,
                such as RoPE scaling.

        Example:
            >>> from liger_jax import Qwen2VLConfig
            >>> Qwen2VLConfig.from_hf(Qwen2VLConfig.qwen2_vl_7b().to_hf()) == Qwen2VLConfig.qwen2_vl_7b()
            True
        """
        if isinstance(source, Mapping):
            return _from_dict(cls, source, {})
        if not isinstance(source, str | Path):
            raise UserError(f"source is {source!r:.60}; expected a dict, a {CONFIG}, or a folder that contains one")
        path = Path(source)
        path = path / CONFIG if path.is_dir() else path
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist; expected a {CONFIG}, or a folder that contains one")
        generation_path = path.with_name(GENERATION_CONFIG)
        generation = read_json_object(generation_path) if generation_path.is_file() else {}
        hub = read_json_object(path)
        try:
            return _from_dict(cls, hub, generation)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """Returns the configuration as transformers 5 writes it to config.json (nested, with `rope_parameters`)."""
        text, vision = self.text, self.vision
        special_tokens = {name: getattr(self, name) for name in _SPECIAL_TOKENS}
        text_config = {name: getattr(text, name) for name in _SAME_NAME_TEXT} | {
            "model_type": "qwen2_vl_text",
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": None,
            "eos_token_id": list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
            "rope_parameters": {
                "type": "mrope",
                "rope_type": "default",
                "mrope_section": list(text.mrope_section),
                "rope_theta": text.rope_theta,
            },
        }
        vision_config = {name: getattr(vision, name) for name in _SAME_NAME_VISION} | {
            "model_type": "qwen2_vl_vision",
            "hidden_act": "quick_gelu",
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
        }
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "tie_word_embeddings": self.tie_word_embeddings,
            "text_config": text_config,
            "vision_config": vision_config,
            **special_tokens,
        }


# Fields whose key in a hub file has the same name.
_SAME_NAME_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
)
_SAME_NAME_VISION = (
    "depth",
    "embed_dim",
    "num_heads",
    "mlp_ratio",
    "hidden_size",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "in_channels",
)
_SPECIAL_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_FLOATS = ("rms_norm_eps", "initializer_range")
_OPTIONAL_TEXT = ("head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range")
_REQUIRED_TEXT = tuple(name for name in _SAME_NAME_TEXT if name not in _OPTIONAL_TEXT)


def _check_numbers(part: str, config: Any) -> None:
    """Raises UserError unless the fields of a configuration have the types of its dataclass and values in range."""
    for field in dataclasses.fields(config):
        name, value = ".".join(filter(None, (part, field.name))), getattr(config, field.name)
        largest = LARGEST_DEPTH if field.name in ("num_hidden_layers", "depth") else LARGEST_SIZE
        smallest = 0 if field.name in (*_SPECIAL_TOKENS, "rms_norm_eps", "initializer_range") else 1
        if field.type is int and not (_is_integer(value) and smallest <= value <= largest):
            raise UserError(f"{name} is {value!r:.60}; expected an integer from {smallest} to {largest}")
        if field.type is float and not (_is_number(value) and smallest <= value):
            raise UserError(f"{name} is {value!r:.60}; expected a number from {smallest} to {LARGEST_FLOAT}")
        if field.type == tuple[int, ...] and not (isinstance(value, tuple) and all(map(_is_integer, value))):
            raise UserError(f"{name} is {value!r:.60}; expected a tuple of integers")


def _read_object(name: str, *values: Any) -> Mapping[str, Any]:
    """Returns the first value that is not empty, or {}. Raises UserError unless it is a JSON object."""
    value: Any = next(filter(None, values), {})
    if not isinstance(value, Mapping):
        raise UserError(f"{name} is {value!r:.60}; expected a JSON object")
    return value


def _read_numbers(source: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the values that are set. Whole floats such as 4.0 become integers; the dataclass checks the types."""
    values = {name: source[name] for name in names if source.get(name) is not None}
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() and name not in _FLOATS else value
        for name, value in values.items()
    }


def _from_dict(cls, hub: Mapping[str, Any], generation: Mapping[str, Any]) -> Any:
    if hub.get("model_type") != "qwen2_vl":
        raise UserError(f"model_type is {hub.get('model_type')!r:.60}; expected 'qwen2_vl'")
    # nested since transformers 4.52, at the top level before
    text = _read_object("text_config", hub.get("text_config"), hub)
    vision = _read_object("vision_config", hub.get("vision_config"))
    missing = [name for name in _REQUIRED_TEXT if text.get(name) is None]
    if missing:
        raise UserError(f"configuration lacks {missing}; expected them at the top level or in text_config")
    for tower, name, value, expected in (
        ("text", "hidden_act", text.get("hidden_act", "silu"), "silu"),
        ("vision", "hidden_act", vision.get("hidden_act", "quick_gelu"), "quick_gelu"),
        ("text", "use_sliding_window", text.get("use_sliding_window") or False, False),
    ):
        if value != expected:
            raise UserError(f"{tower} {name} is {value!r:.60}; expected {expected!r} (no other value is implemented)")

    rope = {**_read_object("rope_scaling", text.get("rope_scaling"))}
    rope |= _read_object("rope_parameters", text.get("rope_parameters"))
    rope_types = [rope.get("rope_type", "default"), rope.get("type", "mrope")]
    if any(name not in ("default", "mrope") for name in rope_types) or not isinstance(rope.get("mrope_section"), list):
        raise UserError(
            f"rope_scaling / rope_parameters is {rope!r:.200}; expected type 'mrope' with an mrope_section "
            "(YaRN and other long-context scalings are not implemented)"
        )
    text_values = _read_numbers(text, _SAME_NAME_TEXT)
    heads, width = text_values["num_attention_heads"], text_values["hidden_size"]
    if _is_integer(heads) and heads > 0 and _is_integer(width):
        text_values.setdefault("head_dim", width // heads)
    text_config = TextConfig(
        **text_values,
        rope_theta=_read_theta(rope, text, {"rope_theta": 1_000_000.0}),
        mrope_section=tuple(rope["mrope_section"]),
    )
    vision_rope = _read_object("rope_parameters of vision_config", vision.get("rope_parameters"))
    vision_config = VisionConfig(
        **_read_numbers(vision, _SAME_NAME_VISION),
        rope_theta=_read_theta(vision_rope, {"rope_theta": 10_000.0}),
    )
    return cls(
        text=text_config,
        vision=vision_config,
        tie_word_embeddings=_read_tie(hub, text),
        **_read_numbers(hub, _SPECIAL_TOKENS),
        eos_token_ids=read_end_tokens(hub, generation),
        pad_token_id=_read_pad_token(hub, generation),
    )


def _read_theta(*sources: Mapping[str, Any]) -> float:
    theta = _first_value("rope_theta", *sources)
    return float(theta) if _is_number(theta) else theta  # the dataclass refuses anything else


def _read_tie(hub: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Returns tie_word_embeddings of the root, or else of text_config; without a value, False."""
    tie = _first_value("tie_word_embeddings", hub, text)
    if tie is not None and not isinstance(tie, bool):
        raise UserError(f"tie_word_embeddings is {tie!r:.60}; expected true or false")
    return bool(tie)


def read_end_tokens(hub: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns a checkpoint's end tokens: those of generation_config.json, of the root of config.json, or of text_config.

    Raises:
        UserError: `eos_token_id` is neither an integer nor a list of integers.

    Example:
        >>> read_end_tokens({"text_config": {"eos_token_id": 7}}, {})
        (7,)
    """
    tokens = _first_value("eos_token_id", generation, hub, _read_object("text_config", hub.get("text_config")))
    listed = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    if not all(map(_is_integer, listed)):
        raise UserError(f"eos_token_id is {tokens!r:.60}; expected an integer or a list of integers")
    return tuple(listed)


def _read_pad_token(hub: Mapping[str, Any], generation: Mapping[str, Any]) -> int | None:
    """Returns the padding token, from the same places as the end tokens."""
    token = _first_value("pad_token_id", generation, hub, _read_object("text_config", hub.get("text_config")))
    if token is not None and not _is_integer(token):
        raise UserError(f"pad_token_id is {token!r:.60}; expected an integer")
    return token


def _first_value(name: str, *sources: Mapping[str, Any]) -> Any:
    """Returns the value of the first source that has one, or None."""
    return next((source[name] for source in sources if source.get(name) is not None), None)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and abs(value) < LARGEST_FLOAT
