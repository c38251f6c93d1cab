"""Foreign configuration files: the keys that change the maths are read or refused by name, the rest is ignored."""

from collections.abc import Mapping
from typing import Any

from fastvlm.config import LanguageConfig
from fastvlm.errors import CheckpointError, ConfigError


def require(raw: Mapping[str, Any], origin: str, key: str, *allowed: Any) -> None:
    """Refuse any other value under a key; a missing key and null mean the usual.

    Raises:
        CheckpointError: The value is another one.
    """
    value = raw.get(key)
    if value is not None and not any(type(value) is type(item) and value == item for item in allowed):
        expected = " or ".join(repr(item) for item in allowed) or "a folder without it"
        raise CheckpointError(f"{origin}: {key} is {_short(value)}; only {expected} is supported")


def section(raw: Mapping[str, Any], origin: str, key: str) -> dict[str, Any]:
    """The object under a key, empty when it is missing."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin}: {key} is {_short(value)}; expected an object")
    return value


def whole_number(raw: Mapping[str, Any], origin: str, key: str) -> int:
    """The whole number under a key that must be there."""
    value = raw.get(key)
    if type(value) is not int:
        raise CheckpointError(f"{origin}: {key} is {_short(value)}; expected a whole number")
    return value


def number(value: Any, origin: str, key: str) -> float:
    """A positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"{origin}: {key} is {_short(value)}; expected a positive number")
    return float(value)


def language_config(raw: Mapping[str, Any], origin: str, *, tied: bool) -> LanguageConfig:
    """Read Qwen2's keys.

    Raises:
        CheckpointError: A key is missing, absurd, or changes the maths in a way that is not supported.
    """
    require(raw, origin, "hidden_act", "silu")
    require(raw, origin, "use_sliding_window", False)
    require(raw, origin, "attention_bias", True)
    require(raw, origin, "mlp_bias", False)
    require(raw, origin, "quantization_config")
    require(raw, origin, "model_type", "qwen2", "llava_qwen2", "llava-qwen2", "fastvlm")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError(f"{origin}: layer_types is {_short(layer_types)}; only 'full_attention' is supported")
    num_heads = whole_number(raw, origin, "num_attention_heads")
    try:
        config = LanguageConfig(
            dim=whole_number(raw, origin, "hidden_size"),
            num_layers=whole_number(raw, origin, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=whole_number({"num_key_value_heads": num_heads, **raw}, origin, "num_key_value_heads"),
            mlp_dim=whole_number(raw, origin, "intermediate_size"),
            vocab_size=whole_number(raw, origin, "vocab_size"),
            tied=tied,
            rope_theta=_rope_theta(raw, origin),
            norm_eps=number(raw.get("rms_norm_eps", 1e-6), origin, "rms_norm_eps"),
            max_positions=whole_number({"max_position_embeddings": 32_768, **raw}, origin, "max_position_embeddings"),
        )
    except (ConfigError, ZeroDivisionError) as error:
        raise CheckpointError(f"{origin}: {error}") from error
    require(raw, origin, "head_dim", config.head_dim)
    return config


def _rope_theta(raw: Mapping[str, Any], origin: str) -> float:
    scaling, parameters = section(raw, origin, "rope_scaling"), section(raw, origin, "rope_parameters")
    for key, values in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        kind = values.get("rope_type", values.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{origin}: {key} is of type {_short(kind)}; only 'default' is supported")
        require(values, origin, "partial_rotary_factor", 1.0, 1)
    require(raw, origin, "partial_rotary_factor", 1.0, 1)
    theta = parameters.get("rope_theta", scaling.get("rope_theta", raw.get("rope_theta")))
    return number(theta, origin, "rope_theta")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
