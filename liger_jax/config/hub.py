"""Reads and writes config.json in every layout of the hub."""

import math
from collections.abc import Mapping
from typing import Any

from liger_jax.config.families import FAMILIES, SPECIAL_TOKENS, TEXT_KEYS, UNSUPPORTED, VISION_KEYS, Family
from liger_jax.config.towers import TextConfig, VisionConfig
from liger_jax.errors import UserError

LARGEST_FLOAT = 3e38  # about float32's
_FLOATS = ("rms_norm_eps", "initializer_range")
_OPTIONAL_TEXT = ("head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range")
_REQUIRED_TEXT = tuple(name for name in TEXT_KEYS if name not in _OPTIONAL_TEXT)


def read_config(hub: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of `QwenVLConfig`, given the content of config.json and of generation_config.json.

    Raises:
        UserError: the model is not of the family, a value is missing or has the wrong form, or an option is not implemented.
            `QwenVLConfig` checks the types and ranges of numbers.
    """
    family = hub.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        *names, last = map(repr, FAMILIES)
        unsupported = _unsupported_member(hub)
        hint = f" ({unsupported} is not supported)" if unsupported else ""
        raise UserError(f"model_type is {family!r:.60}; expected {', '.join(names)} or {last}{hint}")
    member = FAMILIES[family]
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

    text_values = member.text | member.omitted_text | _read_numbers(text, TEXT_KEYS)
    heads, width = text_values["num_attention_heads"], text_values["hidden_size"]
    if is_integer(heads) and heads > 0 and is_integer(width):
        text_values.setdefault("head_dim", width // heads)
    text_values["rope_theta"] = _read_theta(
        rope, text, {"rope_theta": text_values.get("rope_theta", TextConfig.rope_theta)}
    )
    return _read_numbers(hub, SPECIAL_TOKENS) | {
        "text": TextConfig(**text_values, mrope_section=tuple(rope["mrope_section"])),
        "vision": _read_vision(vision, member),
        "tie_word_embeddings": _read_tie(hub, text),
        "eos_token_ids": read_end_tokens(hub, generation),
        "pad_token_id": _read_pad_token(hub, generation),
        "family": family,
    }


def vision_to_hf(vision: VisionConfig, member: Family) -> dict[str, Any]:
    """Returns the vision_config of config.json, without the values that the member fixes."""
    same = {name: getattr(vision, name) for name in VISION_KEYS}
    write = {key: _WRITE.get(key, lambda value, _: value) for key in member.vision_keys}
    return same | {key: write[key](getattr(vision, name), vision) for key, name in member.vision_keys.items()}


def _unsupported_member(hub: Mapping[str, Any]) -> str | None:
    """Returns the name of a member of the family that is not supported, or None for other models."""
    model_type = hub.get("model_type")
    if model_type == "qwen" and "visual" in hub:  # the text models of that name have no vision tower
        return "the first Qwen-VL"
    return next((name for start, name in UNSUPPORTED.items() if str(model_type).startswith(start)), None)


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


def _read_rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    scaling, parameters = (_read_object(name, text.get(name)) for name in ("rope_scaling", "rope_parameters"))
    rope_types = [part.get(name, "default") for part in (scaling, parameters) for name in ("rope_type", "type")]
    differing = [name for name in scaling if parameters.get(name, scaling[name]) != scaling[name]]
    if set(differing) - {"rope_type", "type"}:
        raise UserError(
            f"rope_scaling is {scaling!r:.200} and rope_parameters is {parameters!r:.200}; expected one of them"
        )
    rope = {**scaling, **parameters}
    if any(name not in ("default", "mrope") for name in rope_types) or not isinstance(rope.get("mrope_section"), list):
        raise UserError(
            f"rope_scaling / rope_parameters is {rope!r:.200}; expected type 'mrope' with an mrope_section "
            "(YaRN and other long-context scalings are not implemented)"
        )
    return rope


def _read_vision(vision: Mapping[str, Any], member: Family) -> VisionConfig:
    """Reads a vision_config. Keys that are missing have the values of the published checkpoints, as in transformers."""
    values = {**member.vision, **member.published_vision, **_read_numbers(vision, VISION_KEYS)}
    hub = {**member.omitted_vision, **_read_numbers(vision, tuple(member.vision_keys))}
    for key in filter(hub.__contains__, member.vision_keys):  # mlp_ratio after embed_dim
        values[member.vision_keys[key]] = _READ.get(key, lambda value, _: value)(hub[key], values)
    full, depth = values.get("full_attention_layers"), values.get("depth", VisionConfig.depth)
    if isinstance(full, tuple) and all(map(is_integer, (depth, *full))):
        # other numbers have no effect in transformers
        values["full_attention_layers"] = tuple(sorted({layer for layer in full if 0 <= layer < depth}))
    rope = _read_object("rope_parameters of vision_config", vision.get("rope_parameters"))
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UserError(
            f"vision rope_type is {rope['rope_type']!r:.60}; expected 'axial' (no other value is implemented)"
        )
    return VisionConfig(**values, rope_theta=_read_theta(rope, vision, {"rope_theta": 10_000.0}))


def _read_mlp_ratio(ratio: Any, values: Mapping[str, Any]) -> Any:
    if not is_integer(ratio) or ratio < 1:
        raise UserError(f"vision.mlp_ratio is {ratio!r:.60}; expected an integer from 1")
    width = values.get("embed_dim", VisionConfig.embed_dim)
    return ratio * width if is_integer(width) else VisionConfig.intermediate_size  # the check of embed_dim will fail


def _read_table_side(positions: Any, _: Any) -> int:
    side = math.isqrt(positions) if is_integer(positions) and positions > 0 else 0
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
}
_WRITE = {
    "mlp_ratio": lambda size, vision: size // vision.embed_dim,
    "num_position_embeddings": lambda side, _: side**2,
    "fullatt_block_indexes": lambda layers, _: list(layers),
    "deepstack_visual_indexes": lambda layers, _: list(layers),
}


def _read_theta(*sources: Mapping[str, Any]) -> float:
    theta = _first_value("rope_theta", *sources)
    return float(theta) if is_number(theta) else theta  # the dataclass refuses anything else


def _read_tie(hub: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Returns whether tie_word_embeddings is true at the root or in text_config, which transformers 4 reads."""
    ties = [source["tie_word_embeddings"] for source in (hub, text) if source.get("tie_word_embeddings") is not None]
    for tie in ties:
        if not isinstance(tie, bool):
            raise UserError(f"tie_word_embeddings is {tie!r:.60}; expected true or false")
    return any(ties)


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
    if not all(map(is_integer, listed)):
        raise UserError(f"eos_token_id is {tokens!r:.60}; expected an integer or a list of integers")
    return tuple(listed)


def _read_pad_token(hub: Mapping[str, Any], generation: Mapping[str, Any]) -> int | None:
    """Returns the padding token, from the same places as the end tokens."""
    token = _first_value("pad_token_id", generation, hub, _read_object("text_config", hub.get("text_config")))
    if token is not None and not is_integer(token):
        raise UserError(f"pad_token_id is {token!r:.60}; expected an integer")
    return token


def _first_value(name: str, *sources: Mapping[str, Any]) -> Any:
    """Returns the value of the first source that has one, or None."""
    return next((source[name] for source in sources if source.get(name) is not None), None)


def is_integer(value: Any) -> bool:
    """Returns whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether a value is an int or a float within float32's range, and not a bool."""
    return (is_integer(value) or isinstance(value, float)) and abs(value) < LARGEST_FLOAT
