"""The configuration of a Qwen-VL model, read from any layout of config.json on the hub.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL are one model with different switches. `_FAMILIES` lists what each of them fixes and the
keys of its config.json; the model and `prepare` read only the switches.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from liger_jax.errors import NotFoundError, UserError
from liger_jax.files import CONFIG, GENERATION_CONFIG, read_json_object

LARGEST_SIZE = 2**31 - 1  # of any dimension, since JAX counts in int32
LARGEST_DEPTH = 10_000  # layers, each of which is a dozen tensors to look for
LARGEST_FLOAT = 3e38  # about float32's


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Configuration of the vision tower. The defaults are those of Qwen2-VL 7B."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    intermediate_size: int = 5120
    hidden_size: int = 3584  # the merger's output width, equal to the text model's
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    rope_theta: float = 10_000.0
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    mlp: Literal["quick_gelu", "gelu_tanh", "swiglu"] = "quick_gelu"
    patch_bias: bool = False
    position_table_side: int = 0  # side of the square table of learned positions; 0: no table
    window_size: int = 0  # side in pixels of the windows in which patches attend; 0: no windows
    full_attention_layers: tuple[int, ...] = ()  # the layers without windows
    deepstack_layers: tuple[int, ...] = ()  # the layers whose outputs are also added to the first text layers
    # how the time of a video enters: one position per grid row; positions in proportion to seconds; as text in the prompt
    video_time: Literal["frames", "seconds", "text"] = "frames"
    tokens_per_second: float = 1.0  # positions per second of video, with video_time "seconds"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_values(self) -> int:
        """The number of values in a patch, a row of `pixel_values`: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """The number of patches that are merged into one token."""
        return self.spatial_merge_size**2

    @property
    def window_patches(self) -> int:
        """The number of patches in a whole window, or 0 without windows."""
        return (self.window_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Configuration of the language model. The defaults are those of Qwen2-VL 2B."""

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
    attention_bias: bool = True  # of the query, key and value projections
    qk_norm: bool = False  # RMSNorm of each query and key head, before RoPE
    mrope_interleaved: bool = False

    @property
    def rotary_axes(self) -> tuple[int, ...]:
        """The position axis that drives each of the head_dim / 2 frequencies: 0 is time, 1 height, 2 width.

        In blocks of the sizes mrope_section (a, b, c), or interleaved: then frequency 3 j + 1 rotates with the height for
        j < b, frequency 3 j + 2 with the width for j < c, and every other frequency with the time.

        Example:
            >>> TextConfig(head_dim=16, mrope_section=(4, 2, 2)).rotary_axes
            (0, 0, 0, 0, 1, 1, 2, 2)
            >>> TextConfig(head_dim=16, mrope_section=(4, 2, 2), mrope_interleaved=True).rotary_axes
            (0, 1, 2, 0, 1, 2, 0, 0)
        """
        sections = self.mrope_section
        if not self.mrope_interleaved:
            return tuple(axis for axis, size in enumerate(sections) for _ in range(size))
        return tuple(i % 3 if i // 3 < sections[i % 3] else 0 for i in range(sum(sections)))


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
        if self.family not in _FAMILIES:
            raise UserError(f"family is {self.family!r:.60}; expected one of {list(_FAMILIES)}")
        for part, config in (("text", self.text), ("vision", self.vision), ("", self)):
            _check_types(part, config)
        errors = [*_text_errors(self.text), *_vision_errors(self.vision, self.text), *_family_errors(self)]
        if errors:
            raise UserError(f"Not a {_FAMILIES[self.family].name} configuration: " + "; and ".join(errors))

    @classmethod
    def qwen2_vl_2b(cls) -> Self:
        return cls._preset("qwen2_vl", tie=True)

    @classmethod
    def qwen2_vl_7b(cls) -> Self:
        return cls._preset("qwen2_vl", _QWEN2_7B)

    @classmethod
    def qwen2_vl_72b(cls) -> Self:
        return cls._preset("qwen2_vl", _QWEN2_72B)

    @classmethod
    def qwen2_5_vl_3b(cls) -> Self:
        text = {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16}
        return cls._preset("qwen2_5_vl", text, tie=True)

    @classmethod
    def qwen2_5_vl_7b(cls) -> Self:
        return cls._preset("qwen2_5_vl", _QWEN2_7B)

    @classmethod
    def qwen2_5_vl_32b(cls) -> Self:
        text = {"hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64, "vocab_size": 152_064}
        text |= {"num_attention_heads": 40, "num_key_value_heads": 8}
        return cls._preset("qwen2_5_vl", text, {"intermediate_size": 3456})

    @classmethod
    def qwen2_5_vl_72b(cls) -> Self:
        return cls._preset("qwen2_5_vl", _QWEN2_72B, {"intermediate_size": 3456})

    @classmethod
    def qwen3_vl_2b(cls) -> Self:
        text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
        return cls._preset("qwen3_vl", text, _QWEN3_SMALL_VISION, tie=True)

    @classmethod
    def qwen3_vl_4b(cls) -> Self:
        text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
        return cls._preset("qwen3_vl", text, _QWEN3_SMALL_VISION, tie=True)

    @classmethod
    def qwen3_vl_8b(cls) -> Self:
        text = {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32}
        return cls._preset("qwen3_vl", text)

    @classmethod
    def qwen3_vl_32b(cls) -> Self:
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
        if family not in _FAMILIES:
            raise UserError(f"family is {family!r:.60}; expected one of {list(_FAMILIES)}")
        member = _FAMILIES[family]
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
        text, vision, member = self.text, self.vision, _FAMILIES[self.family]
        rope = {"rope_type": "default", "mrope_section": list(text.mrope_section), "rope_theta": text.rope_theta}
        text_config = {name: getattr(text, name) for name in _TEXT_KEYS} | {
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
            "vision_config": _vision_to_hf(vision, member)
            | {
                "model_type": f"{self.family}_vision",
                "hidden_act": member.vision_activation,
                "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
            },
            **{name: getattr(self, name) for name in _SPECIAL_TOKENS},
        }


Qwen2VLConfig = QwenVLConfig


# ---- the members of the family ---------------------------------------------------------------------------------------

# Fields whose key in a hub file has the same name.
_TEXT_KEYS = (
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
_VISION_KEYS = ("depth", "num_heads", "patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels")
_SPECIAL_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_FLOATS = ("rms_norm_eps", "initializer_range", "tokens_per_second")
_OPTIONAL_TEXT = ("head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range")
_REQUIRED_TEXT = tuple(name for name in _TEXT_KEYS if name not in _OPTIONAL_TEXT)


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a member of the family fixes, and the keys of its config.json."""

    name: str
    architecture: str  # its class in transformers
    vision_activation: str  # hidden_act of its vision_config
    vision_keys: Mapping[str, str]  # key in vision_config -> field of VisionConfig, in addition to _VISION_KEYS
    text: dict[str, Any] = dataclasses.field(default_factory=dict)  # the values of switches
    vision: dict[str, Any] = dataclasses.field(default_factory=dict)
    # values of all published checkpoints
    published_text: dict[str, Any] = dataclasses.field(default_factory=dict)
    published_vision: dict[str, Any] = dataclasses.field(default_factory=dict)
    # transformers' values for what a config.json may omit, where they are not the published ones; for vision by its keys
    omitted_text: dict[str, Any] = dataclasses.field(default_factory=dict)
    omitted_vision: dict[str, Any] = dataclasses.field(default_factory=dict)
    # keys with a fixed value
    text_keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    rope_keys: dict[str, Any] = dataclasses.field(default_factory=dict)


_FAMILIES = {
    "qwen2_vl": _Family(
        name="Qwen2-VL",
        architecture="Qwen2VLForConditionalGeneration",
        vision_activation="quick_gelu",
        vision_keys={"embed_dim": "embed_dim", "hidden_size": "hidden_size", "mlp_ratio": "intermediate_size"},
        omitted_vision={"mlp_ratio": 4},
        rope_keys={"type": "mrope"},
    ),
    "qwen2_5_vl": _Family(
        name="Qwen2.5-VL",
        architecture="Qwen2_5_VLForConditionalGeneration",
        vision_activation="silu",
        vision_keys={
            "hidden_size": "embed_dim",
            "intermediate_size": "intermediate_size",
            "out_hidden_size": "hidden_size",
            "window_size": "window_size",
            "fullatt_block_indexes": "full_attention_layers",
            "tokens_per_second": "tokens_per_second",
        },
        vision={"norm": "rms_norm", "mlp": "swiglu", "video_time": "seconds"},
        published_text={"max_position_embeddings": 128_000},
        published_vision={
            "intermediate_size": 3420,
            "window_size": 112,
            "full_attention_layers": (7, 15, 23, 31),
            "tokens_per_second": 2.0,
        },
        omitted_text={"rms_norm_eps": 1e-5},
        # also a hidden_size of 3584, which no published checkpoint has: 1280 is far more likely
        omitted_vision={"tokens_per_second": 4},
        rope_keys={"type": "mrope"},
    ),
    "qwen3_vl": _Family(
        name="Qwen3-VL",
        architecture="Qwen3VLForConditionalGeneration",
        vision_activation="gelu_pytorch_tanh",
        vision_keys={
            "hidden_size": "embed_dim",
            "intermediate_size": "intermediate_size",
            "out_hidden_size": "hidden_size",
            "num_position_embeddings": "position_table_side",
            "deepstack_visual_indexes": "deepstack_layers",
        },
        text={"attention_bias": False, "qk_norm": True, "mrope_interleaved": True},
        vision={"mlp": "gelu_tanh", "patch_bias": True, "video_time": "text"},
        published_text={
            "num_key_value_heads": 8,
            "rope_theta": 5_000_000.0,
            "mrope_section": (24, 20, 20),
            "max_position_embeddings": 262_144,
        },
        published_vision={
            "depth": 27,
            "embed_dim": 1152,
            "intermediate_size": 4304,
            "patch_size": 16,
            "position_table_side": 48,
            "deepstack_layers": (8, 16, 24),
        },
        omitted_text={"head_dim": 128, "rope_theta": 500_000.0, "max_position_embeddings": 128_000},
        text_keys={"attention_bias": False},
        rope_keys={"mrope_interleaved": True},
    ),
}

# Members that are not supported, so that the error can name them.
_UNSUPPORTED = {
    "qwen3_vl_moe": "Qwen3-VL with a mixture of experts",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5 with a mixture of experts",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen_vl": "the first Qwen-VL",
}

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


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_types(part: str, config: Any) -> None:
    """Raises UserError unless the fields of a configuration have the types of its dataclass and values in range."""
    for field in dataclasses.fields(config):
        name, value = ".".join(filter(None, (part, field.name))), getattr(config, field.name)
        largest = LARGEST_DEPTH if field.name in ("num_hidden_layers", "depth") else LARGEST_SIZE
        largest = math.isqrt(largest) if field.name == "position_table_side" else largest
        smallest = 0 if field.name in (*_SPECIAL_TOKENS, *_FROM_ZERO) else 1
        if field.type is int and not (_is_integer(value) and smallest <= value <= largest):
            raise UserError(f"{name} is {value!r:.60}; expected an integer from {smallest} to {largest}")
        if field.type is float and not (_is_number(value) and smallest <= value):
            raise UserError(f"{name} is {value!r:.60}; expected a number from {smallest} to {LARGEST_FLOAT}")
        if field.type == tuple[int, ...] and not (isinstance(value, tuple) and all(map(_is_integer, value))):
            raise UserError(f"{name} is {value!r:.60}; expected a tuple of integers")
        if field.type is bool and not isinstance(value, bool):
            raise UserError(f"{name} is {value!r:.60}; expected True or False")
        if typing.get_origin(field.type) is Literal and value not in typing.get_args(field.type):
            raise UserError(f"{name} is {value!r:.60}; expected one of {list(typing.get_args(field.type))}")


_FROM_ZERO = ("rms_norm_eps", "initializer_range", "position_table_side", "window_size", "tokens_per_second")


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
    member, errors = _FAMILIES[config.family], []
    keys = {
        "text": [*_TEXT_KEYS, "rope_theta", "mrope_section"],
        "vision": [*_VISION_KEYS, "rope_theta", *member.vision_keys.values()],
    }
    for part, switches in (("text", member.text), ("vision", member.vision)):
        for field in dataclasses.fields(getattr(config, part)):
            value, expected = getattr(getattr(config, part), field.name), switches.get(field.name, field.default)
            if field.name not in keys[part] and value != expected:
                errors.append(f"{part}.{field.name} is {value!r:.60}; expected {expected!r}")
            if field.name in keys[part] and field.name in ("window_size", "position_table_side") and not value:
                errors.append(f"{part}.{field.name} is {value}; expected at least 1")
    if "mlp_ratio" in member.vision_keys and config.vision.intermediate_size % config.vision.embed_dim:
        errors.append(
            f"vision.intermediate_size is {config.vision.intermediate_size}; expected a multiple of embed_dim "
            f"{config.vision.embed_dim}"
        )
    return errors


# ---- config.json -----------------------------------------------------------------------------------------------------


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
    family = hub.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        *others, last = map(repr, _FAMILIES)
        unsupported = _UNSUPPORTED.get(family) if isinstance(family, str) else None
        hint = f" ({unsupported} is not supported)" if unsupported else ""
        raise UserError(f"model_type is {family!r:.60}; expected {', '.join(others)} or {last}{hint}")
    member = _FAMILIES[family]
    # nested since transformers 4.52, at the top level before
    text = _read_object("text_config", hub.get("text_config"), hub)
    vision = _read_object("vision_config", hub.get("vision_config"))
    missing = [name for name in _REQUIRED_TEXT if text.get(name) is None]
    if missing:
        raise UserError(f"configuration lacks {missing}; expected them at the top level or in text_config")
    rope = _read_rope(text)
    for tower, name, value, expected in (
        ("text", "hidden_act", text.get("hidden_act", "silu"), "silu"),
        ("vision", "hidden_act", vision.get("hidden_act", member.vision_activation), member.vision_activation),
        ("text", "use_sliding_window", text.get("use_sliding_window") or False, False),
        *(("text", name, text.get(name, value), value) for name, value in member.text_keys.items()),
        *(("text", name, rope.get(name, value), value) for name, value in member.rope_keys.items() if name != "type"),
    ):
        if value != expected:
            raise UserError(f"{tower} {name} is {value!r:.60}; expected {expected!r} (no other value is implemented)")

    text_values = member.text | member.omitted_text | _read_numbers(text, _TEXT_KEYS)
    heads, width = text_values["num_attention_heads"], text_values["hidden_size"]
    if _is_integer(heads) and heads > 0 and _is_integer(width):
        text_values.setdefault("head_dim", width // heads)
    text_values["rope_theta"] = _read_theta(
        rope, text, {"rope_theta": text_values.get("rope_theta", TextConfig.rope_theta)}
    )
    return cls(
        text=TextConfig(**text_values, mrope_section=tuple(rope["mrope_section"])),
        vision=_read_vision(vision, member),
        tie_word_embeddings=_read_tie(hub, text),
        **_read_numbers(hub, _SPECIAL_TOKENS),
        eos_token_ids=read_end_tokens(hub, generation),
        pad_token_id=_read_pad_token(hub, generation),
        family=family,
    )


def _read_rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = {**_read_object("rope_scaling", text.get("rope_scaling"))}
    rope |= _read_object("rope_parameters", text.get("rope_parameters"))
    rope_types = [rope.get("rope_type", "default"), rope.get("type", "mrope")]
    if any(name not in ("default", "mrope") for name in rope_types) or not isinstance(rope.get("mrope_section"), list):
        raise UserError(
            f"rope_scaling / rope_parameters is {rope!r:.200}; expected type 'mrope' with an mrope_section "
            "(YaRN and other long-context scalings are not implemented)"
        )
    return rope


def _read_vision(vision: Mapping[str, Any], member: _Family) -> VisionConfig:
    """Reads a vision_config. Keys that are missing have the values of the published checkpoints, as in transformers."""
    values = {**member.vision, **member.published_vision, **_read_numbers(vision, _VISION_KEYS)}
    hub = {**member.omitted_vision, **_read_numbers(vision, tuple(member.vision_keys))}
    for key in filter(hub.__contains__, member.vision_keys):  # mlp_ratio after embed_dim
        values[member.vision_keys[key]] = _READ.get(key, lambda value, _: value)(hub[key], values)
    full, depth = values.get("full_attention_layers"), values.get("depth", VisionConfig.depth)
    if isinstance(full, tuple) and all(
        map(_is_integer, (depth, *full))
    ):  # other numbers have no effect in transformers
        values["full_attention_layers"] = tuple(sorted({layer for layer in full if 0 <= layer < depth}))
    rope = _read_object("rope_parameters of vision_config", vision.get("rope_parameters"))
    return VisionConfig(**values, rope_theta=_read_theta(rope, {"rope_theta": 10_000.0}))


def _vision_to_hf(vision: VisionConfig, member: _Family) -> dict[str, Any]:
    same = {name: getattr(vision, name) for name in _VISION_KEYS}
    write = {key: _WRITE.get(key, lambda value, _: value) for key in member.vision_keys}
    return same | {key: write[key](getattr(vision, name), vision) for key, name in member.vision_keys.items()}


def _read_mlp_ratio(ratio: Any, values: Mapping[str, Any]) -> Any:
    if not _is_integer(ratio) or ratio < 1:
        raise UserError(f"vision.mlp_ratio is {ratio!r:.60}; expected an integer from 1")
    width = values.get("embed_dim", VisionConfig.embed_dim)
    return ratio * width if _is_integer(width) else VisionConfig.intermediate_size  # the check of embed_dim will fail


def _read_table_side(positions: Any, _: Any) -> int:
    side = math.isqrt(positions) if _is_integer(positions) and positions > 0 else 0
    if not side or side**2 != positions:
        raise UserError(f"vision.num_position_embeddings is {positions!r:.60}; expected a square number from 1")
    return side


def _read_layers(layers: Any, _: Any) -> Any:
    return tuple(layers) if isinstance(layers, list) else layers  # the dataclass refuses anything else


# How a value of vision_config becomes a field, and back, where they are not equal.
_READ = {
    "mlp_ratio": _read_mlp_ratio,
    "num_position_embeddings": _read_table_side,
    "fullatt_block_indexes": _read_layers,
    "deepstack_visual_indexes": _read_layers,
    "tokens_per_second": lambda value, _: float(value) if _is_number(value) else value,
}
_WRITE = {
    "mlp_ratio": lambda size, vision: size // vision.embed_dim,
    "num_position_embeddings": lambda side, _: side**2,
    "fullatt_block_indexes": lambda layers, _: list(layers),
    "deepstack_visual_indexes": lambda layers, _: list(layers),
    "tokens_per_second": lambda value, _: int(value) if value == int(value) else value,
}


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
