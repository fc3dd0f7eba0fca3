"""The configuration of a whole model: its presets, its checks, and reading and writing it."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from liger_jax.config.families import FAMILIES, SPECIAL_TOKENS, TEXT_KEYS, VISION_KEYS
from liger_jax.config.hub import LARGEST_FLOAT, is_integer, is_number, read_config, vision_to_hf
from liger_jax.config.towers import TextConfig, VisionConfig
from liger_jax.errors import NotFoundError, UserError
from liger_jax.files import CONFIG, GENERATION_CONFIG, read_json_object

LARGEST_SIZE = 2**31 - 1  # of any dimension, since JAX counts in int32
LARGEST_DEPTH = 10_000  # layers, each of which is a dozen tensors to look for
# Fields that may be 0.
_FROM_ZERO = ("rms_norm_eps", "initializer_range", "position_table_side", "window_size", "tokens_per_second")
# Text models that Qwen2-VL and Qwen2.5-VL share.
_QWEN2_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_QWEN2_72B = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_QWEN3_SMALL_VISION = {"depth": 24, "embed_dim": 1024, "intermediate_size": 4096, "deepstack_layers": (5, 11, 17)}


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """The configuration of a Qwen-VL model. It is hashable, so it can be a static argument of `jax.jit`.

    `from_hf` reads `eos_token_ids` and `pad_token_id` from the checkpoint's generation_config.json, or else from its
    config.json. The presets have none.

    Raises:
        UserError: values contradict each other.

    Example:
        >>> from liger_jax import QwenVLConfig
        >>> QwenVLConfig.qwen2_vl_2b().text.hidden_size
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
    family: str = "qwen2_vl"  # the model_type of its config.json

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise UserError(f"family is {self.family!r:.60}; expected one of {list(FAMILIES)}")
        for part, config in (("text", self.text), ("vision", self.vision), ("", self)):
            _check_types(part, config)
        errors = [*_text_errors(self.text), *_vision_errors(self.vision, self.text), *_family_errors(self)]
        if errors:
            raise UserError(f"Not a {FAMILIES[self.family].name} configuration: " + "; and ".join(errors))

    @classmethod
    def qwen2_vl_2b(cls) -> Self:
        """Returns the configuration of Qwen2-VL 2B."""
        return cls._preset("qwen2_vl", tie=True)

    @classmethod
    def qwen2_vl_7b(cls) -> Self:
        """Returns the configuration of Qwen2-VL 7B."""
        return cls._preset("qwen2_vl", _QWEN2_7B)

    @classmethod
    def qwen2_vl_72b(cls) -> Self:
        """Returns the configuration of Qwen2-VL 72B."""
        return cls._preset("qwen2_vl", _QWEN2_72B)

    @classmethod
    def qwen2_5_vl_3b(cls) -> Self:
        """Returns the configuration of Qwen2.5-VL 3B."""
        text = {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16}
        return cls._preset("qwen2_5_vl", text, tie=True)

    @classmethod
    def qwen2_5_vl_7b(cls) -> Self:
        """Returns the configuration of Qwen2.5-VL 7B."""
        return cls._preset("qwen2_5_vl", _QWEN2_7B)

    @classmethod
    def qwen2_5_vl_32b(cls) -> Self:
        """Returns the configuration of Qwen2.5-VL 32B."""
        text = {"hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64, "vocab_size": 152_064}
        text |= {"num_attention_heads": 40, "num_key_value_heads": 8}
        return cls._preset("qwen2_5_vl", text, {"intermediate_size": 3456})

    @classmethod
    def qwen2_5_vl_72b(cls) -> Self:
        """Returns the configuration of Qwen2.5-VL 72B."""
        return cls._preset("qwen2_5_vl", _QWEN2_72B, {"intermediate_size": 3456})

    @classmethod
    def qwen3_vl_2b(cls) -> Self:
        """Returns the configuration of Qwen3-VL 2B."""
        text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
        return cls._preset("qwen3_vl", text, _QWEN3_SMALL_VISION, tie=True)

    @classmethod
    def qwen3_vl_4b(cls) -> Self:
        """Returns the configuration of Qwen3-VL 4B."""
        text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
        return cls._preset("qwen3_vl", text, _QWEN3_SMALL_VISION, tie=True)

    @classmethod
    def qwen3_vl_8b(cls) -> Self:
        """Returns the configuration of Qwen3-VL 8B."""
        text = {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32}
        return cls._preset("qwen3_vl", text)

    @classmethod
    def qwen3_vl_32b(cls) -> Self:
        """Returns the configuration of Qwen3-VL 32B."""
        text = {"hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64}
        return cls._preset("qwen3_vl", text)

    @classmethod
    def tiny(cls, vocab_size: int = 320, *, family: str = "qwen2_vl") -> Self:
        """Returns a configuration for CPU tests: 2 to 4 layers, and special tokens at the end of the vocabulary.

        It has everything that the family has: windows and layers without, deepstack, a head size other than
        hidden_size / num_attention_heads.

        Example:
            >>> from liger_jax import QwenVLConfig
            >>> QwenVLConfig.tiny(family="qwen3_vl").vision.deepstack_layers
            (0, 2)
        """
        text: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 160}
        text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        text |= {"mrope_section": (2, 3, 3), "max_position_embeddings": 4096}
        vision: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 4, "intermediate_size": 128}
        match family:
            case "qwen2_5_vl":
                vision |= {"depth": 4, "intermediate_size": 60, "full_attention_layers": (1, 3)}
            case "qwen3_vl":
                text |= {"num_hidden_layers": 3, "head_dim": 32, "mrope_section": (6, 5, 5)}
                vision |= {"depth": 4, "intermediate_size": 72, "deepstack_layers": (0, 2), "position_table_side": 4}
        return dataclasses.replace(
            cls._preset(family, text, vision),
            image_token_id=vocab_size - 2,
            video_token_id=vocab_size - 1,
            vision_start_token_id=vocab_size - 5,
            vision_end_token_id=vocab_size - 4,
        )

    @classmethod
    def _preset(
        cls, family: str, text: Mapping[str, Any] = {}, vision: Mapping[str, Any] = {}, *, tie: bool = False
    ) -> Self:
        """Returns the configuration with these values, and elsewhere those of the family's published checkpoints."""
        if family not in FAMILIES:
            raise UserError(f"family is {family!r:.60}; expected one of {list(FAMILIES)}")
        member = FAMILIES[family]
        text_config = TextConfig(**{**member.text, **member.published_text, **text})
        values = {"hidden_size": text_config.hidden_size} | member.vision | member.published_vision
        return cls(text_config, VisionConfig(**{**values, **vision}), tie_word_embeddings=tie, family=family)

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
            UserError: it does not describe a model of the family, values contradict each other, or an option is not
                implemented, such as RoPE scaling.

        Example:
            >>> from liger_jax import QwenVLConfig
            >>> QwenVLConfig.from_hf(QwenVLConfig.qwen3_vl_8b().to_hf()) == QwenVLConfig.qwen3_vl_8b()
            True
        """
        if isinstance(source, Mapping):
            return cls(**read_config(source, {}))
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
            return cls(**read_config(hub, generation))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """Returns the configuration as transformers 5 writes it to config.json (nested, with `rope_parameters`)."""
        text, vision, member = self.text, self.vision, FAMILIES[self.family]
        rope = {"rope_type": "default", "mrope_section": list(text.mrope_section), "rope_theta": text.rope_theta}
        text_config = {name: getattr(text, name) for name in TEXT_KEYS} | {
            "model_type": f"{self.family}_text",
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": None,
            "eos_token_id": list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
            "rope_parameters": rope | member.rope_keys,
        }
        return {
            "architectures": [member.architecture],
            "model_type": self.family,
            "tie_word_embeddings": self.tie_word_embeddings,
            "text_config": text_config | member.text_keys,
            "vision_config": vision_to_hf(vision, member)
            | {
                "model_type": f"{self.family}_vision",
                "hidden_act": member.vision_activation,
                "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
            },
            **{name: getattr(self, name) for name in SPECIAL_TOKENS},
        }


Qwen2VLConfig = QwenVLConfig


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_types(part: str, config: Any) -> None:
    """Raises UserError unless the fields of a configuration have the types of its dataclass and values in range."""
    for field in dataclasses.fields(config):
        name, value = ".".join(filter(None, (part, field.name))), getattr(config, field.name)
        largest = LARGEST_DEPTH if field.name in ("num_hidden_layers", "depth") else LARGEST_SIZE
        largest = math.isqrt(largest) if field.name == "position_table_side" else largest
        smallest = 0 if field.name in (*SPECIAL_TOKENS, *_FROM_ZERO) else 1
        if field.type is int and not (is_integer(value) and smallest <= value <= largest):
            raise UserError(f"{name} is {value!r:.60}; expected an integer from {smallest} to {largest}")
        if field.type is float and not (is_number(value) and smallest <= value):
            raise UserError(f"{name} is {value!r:.60}; expected a number from {smallest} to {LARGEST_FLOAT}")
        if field.type == tuple[int, ...] and not (isinstance(value, tuple) and all(map(is_integer, value))):
            raise UserError(f"{name} is {value!r:.60}; expected a tuple of integers")
        if field.type is bool and not isinstance(value, bool):
            raise UserError(f"{name} is {value!r:.60}; expected True or False")
        if typing.get_origin(field.type) is Literal and value not in typing.get_args(field.type):
            raise UserError(f"{name} is {value!r:.60}; expected one of {list(typing.get_args(field.type))}")


def _text_errors(text: TextConfig) -> list[str]:
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    errors = []
    if heads % kv_heads:
        errors.append(f"text.num_attention_heads is {heads}; expected a multiple of num_key_value_heads {kv_heads}")
    sections = text.mrope_section
    if len(sections) != 3 or min(sections) < 0 or 2 * sum(sections) != text.head_dim:
        errors.append(
            f"text.mrope_section is {sections}; expected three numbers with a sum of {text.head_dim / 2:g}, half of head_dim"
        )
    return errors


def _vision_errors(vision: VisionConfig, text: TextConfig) -> list[str]:
    errors = []
    if vision.embed_dim % vision.num_heads:
        errors.append(f"vision.embed_dim is {vision.embed_dim}; expected a multiple of num_heads {vision.num_heads}")
    if vision.head_dim % 4:
        errors.append(f"vision head size is {vision.head_dim}; expected a multiple of 4 (two axes, rotated in pairs)")
    if vision.hidden_size != text.hidden_size:
        errors.append(f"vision.hidden_size is {vision.hidden_size}; expected text.hidden_size {text.hidden_size}")
    token = vision.patch_size * vision.spatial_merge_size
    if vision.window_size % token:
        errors.append(
            f"vision.window_size is {vision.window_size}; expected a multiple of {token}, the side of a token"
        )
    for name in ("full_attention_layers", "deepstack_layers"):
        layers = getattr(vision, name)
        if list(layers) != sorted(set(layers)) or not all(0 <= layer < vision.depth for layer in layers):
            errors.append(f"vision.{name} is {layers!s:.60}; expected increasing numbers from 0 to {vision.depth - 1}")
    if vision.full_attention_layers and not vision.window_size:
        errors.append(
            f"vision.full_attention_layers is {vision.full_attention_layers!s:.60}; expected none without windows"
        )
    if len(vision.deepstack_layers) > text.num_hidden_layers:
        errors.append(
            f"vision.deepstack_layers is {vision.deepstack_layers!s:.60}; expected no more than there are text layers, "
            f"{text.num_hidden_layers}"
        )
    return errors


def _family_errors(config: QwenVLConfig) -> list[str]:
    """Returns an error for each value that a config.json of the family cannot express."""
    member, errors = FAMILIES[config.family], []
    keys = {
        "text": [*TEXT_KEYS, "rope_theta", "mrope_section"],
        "vision": [*VISION_KEYS, "rope_theta", *member.vision_keys.values()],
    }
    for part, switches in (("text", member.text), ("vision", member.vision)):
        for field in dataclasses.fields(getattr(config, part)):
            value, expected = getattr(getattr(config, part), field.name), switches.get(field.name, field.default)
            if field.name not in keys[part] and value != expected:
                errors.append(f"{part}.{field.name} is {value!r:.60}; expected {expected!r}")
            if field.name in keys[part] and field.name in ("window_size", "position_table_side") and not value:
                errors.append(f"{part}.{field.name} is {value}; expected at least 1")
    text = config.text
    if not member.free_head_dim and text.head_dim * text.num_attention_heads != text.hidden_size:
        errors.append(
            f"text.head_dim is {text.head_dim}; expected hidden_size / num_attention_heads, "
            f"{text.hidden_size} / {text.num_attention_heads}"
        )
    if "mlp_ratio" in member.vision_keys and config.vision.intermediate_size % config.vision.embed_dim:
        errors.append(
            f"vision.intermediate_size is {config.vision.intermediate_size}; expected a multiple of embed_dim "
            f"{config.vision.embed_dim}"
        )
    return errors
