"""The layout of transformers' `fast_vlm`, which is also the one we save."""

import re
from pathlib import Path
from typing import Any, Final

from fastvlm.checkpoint.foreign import require, section
from fastvlm.checkpoint.reading import read_json
from fastvlm.config import Config, Fit
from fastvlm.errors import CheckpointError

CLIP_HEAD: Final = "clip_head.safetensors"  # transformers has no place for it and loads strictly
_PROJECTOR: Final = {"1": "fc1", "2": "fc2"}
_PATTERNS: Final = (
    (re.compile(r"(?:model\.)?vision_tower\.(?:timm_model\.)?((?:stem|stages|final_conv)\..+)"), r"vision.\1"),
    (re.compile(r"(?:model\.)?language_model\.(?:model\.)?((?:embed_tokens|layers|norm)\..+)"), r"language.\1"),
    (re.compile(r"(?:model\.)?(?:language_model\.)?lm_head\.weight"), r"language.lm_head.weight"),
)
# What timm lets one change without changing what the encoder computes from given weights.
_HARMLESS: Final = {"layers", "embed_dims", "inference_mode", "mlp_ratios", "layer_scale_init_value", "num_classes"}


def rename(name: str) -> str | None:
    """A stored name to ours; the prefixes of older releases are read too."""
    if match := re.fullmatch(r"(?:model\.)?multi_modal_projector\.linear_([12])\.(weight|bias)", name):
        return f"projector.{_PROJECTOR[match[1]]}.{match[2]}"
    for pattern, ours in _PATTERNS:
        if match := pattern.fullmatch(name):
            return match.expand(ours)
    return None


def to_huggingface(name: str) -> str:
    """Our name to the stored one."""
    part, rest = name.split(".", 1)
    if part == "vision":
        return f"model.vision_tower.timm_model.{rest}"
    if part == "projector":
        return "model.multi_modal_projector." + rest.replace("fc", "linear_")
    return rest if rest.startswith("lm_head.") else f"model.language_model.{rest}"


def check(raw: dict[str, Any], origin: str) -> None:
    """Refuse what this package does not compute.

    Raises:
        CheckpointError: A key of the configuration changes the maths.
    """
    require(raw, origin, "projector_hidden_act", "gelu")
    require(raw, origin, "vision_feature_layer", -1)
    require(raw, origin, "vision_feature_select_strategy", "full")
    require(raw, origin, "multimodal_projector_bias", True)
    require(raw, origin, "quantization_config")
    vision = section(raw, origin, "vision_config")
    require(vision, origin, "model_type", "timm_wrapper")
    architecture = vision.get("architecture", "fastvit_mci3")
    if not isinstance(architecture, str) or not re.fullmatch(r"(timm/)?fastvit_mci[34](\..*)?", architecture):
        raise CheckpointError(f"{origin}: architecture is {architecture!r}; only fastvit_mci3 and _mci4 are supported")
    strange = sorted(section(vision, origin, "model_args").keys() - _HARMLESS)
    if strange:
        raise CheckpointError(f"{origin}: vision_config.model_args has {strange[0]!r}, which is not supported")


def image_settings(folder: Path) -> tuple[int, Fit] | None:
    """Read side and fit from the image processor; None when there is none.

    Raises:
        CheckpointError: The processor does something else to pictures.
    """
    path = folder / "preprocessor_config.json"
    if path.is_file():
        raw = read_json(path)
    elif (path := folder / "processor_config.json").is_file():
        raw = section(read_json(path), str(path), "image_processor")
    else:
        raw = {}
    if not raw:
        return None
    origin = str(path)
    require(raw, origin, "image_mean", [0.0, 0.0, 0.0], [0, 0, 0])
    require(raw, origin, "image_std", [1.0, 1.0, 1.0], [1, 1, 1])
    require(raw, origin, "resample", 3)
    require(raw, origin, "rescale_factor", 1 / 255)
    require(raw, origin, "do_rescale", True)
    require(raw, origin, "do_resize", True)
    return _side(raw, origin), _fit(raw, origin)


def _side(raw: dict[str, Any], origin: str) -> int:
    size, crop = _edges(raw.get("size"), origin, "size"), _edges(raw.get("crop_size"), origin, "crop_size")
    if not raw.get("do_center_crop", True) or not crop:
        crop = size
    edges = size | crop
    if len(edges) != 1:
        raise CheckpointError(f"{origin}: size {sorted(size)} and crop_size {sorted(crop)}; expected one and the same")
    return edges.pop()


def _edges(value: Any, origin: str, key: str) -> set[int]:
    values = list(value.values()) if isinstance(value, dict) else [] if value is None else [value]
    values = [edge for edge in values if edge is not None]
    if any(type(edge) is not int for edge in values):
        raise CheckpointError(f"{origin}: {key} is {str(value)[:80]}; expected whole numbers")
    return set(values)


def _fit(raw: dict[str, Any], origin: str) -> Fit:
    kind = str(raw.get("image_processor_type") or raw.get("feature_extractor_type") or "CLIPImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in ("LlavaImageProcessor", "CLIPImageProcessor", "CLIPFeatureExtractor"):
        raise CheckpointError(f"{origin}: image_processor_type is {kind!r}; expected LlavaImageProcessor or CLIP's")
    if kind == "LlavaImageProcessor" and raw.get("do_pad"):
        return "pad"
    if raw.get("do_center_crop", True):
        return "crop"
    size = raw.get("size")
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return "stretch"
    raise CheckpointError(f"{origin}: do_center_crop is false, so pictures would not be square")


def preprocessor_config(config: Config) -> dict[str, Any]:
    """What `preprocessor_config.json` says, so that transformers makes our pixels."""
    side, fit = config.vision.image_size, config.vision.fit
    square = {"height": side, "width": side}
    return {
        "crop_size": square,
        "do_center_crop": fit != "stretch",
        "do_convert_rgb": True,
        "do_normalize": True,
        **({"do_pad": True} if fit == "pad" else {}),
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "LlavaImageProcessor" if fit == "pad" else "CLIPImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": square if fit == "stretch" else {"shortest_edge": side},
    }


def processor_config(config: Config) -> dict[str, Any]:
    """What `processor_config.json` says: how many tokens a picture takes."""
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": 0,
        "patch_size": config.vision.stride,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "full",
    }


def model_config(config: Config, *, eos_id: int, bos_id: int, dtype: str) -> dict[str, Any]:
    """What `config.json` says."""
    vision, language = config.vision, config.language
    model_args: dict[str, Any] = {
        "embed_dims": list(vision.dims),
        "inference_mode": vision.is_reparameterised,
        "layers": list(vision.depths),
    }
    if vision.mlp_ratio != 4:
        model_args["mlp_ratios"] = [vision.mlp_ratio] * len(vision.dims)
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "dtype": dtype,
        "image_seq_length": vision.num_image_tokens,
        "image_token_index": config.image_token_id,
        "model_type": "fast_vlm",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {
            "attention_dropout": 0.0,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "hidden_act": "silu",
            "hidden_size": language.dim,
            "initializer_range": 0.02,
            "intermediate_size": language.mlp_dim,
            "layer_types": ["full_attention"] * language.num_layers,
            "max_position_embeddings": language.max_positions,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": language.num_heads,
            "num_hidden_layers": language.num_layers,
            "num_key_value_heads": language.num_kv_heads,
            "pad_token_id": None,
            "rms_norm_eps": language.norm_eps,
            "rope_parameters": {"rope_theta": language.rope_theta, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": language.tied,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": language.vocab_size,
        },
        "tie_word_embeddings": language.tied,
        "vision_config": {
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": vision.out_dim,
            "initializer_range": 0.02,
            "label_names": ["LABEL_0", "LABEL_1"],
            "model_args": model_args,
            "model_type": "timm_wrapper",
            "num_classes": 2,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
