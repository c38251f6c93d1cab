"""Apple's layout (`llava_qwen2`): names and the keys of its configuration."""

import re
from typing import Any, Final

from fastvlm.checkpoint import timm
from fastvlm.checkpoint.foreign import require
from fastvlm.config import Fit
from fastvlm.errors import CheckpointError

VISION: Final = "model.vision_tower.vision_tower.model."
_PROJECTOR: Final = {"0": "fc1", "2": "fc2"}


def rename(name: str) -> str | None:
    """A stored name to ours."""
    if name.startswith(VISION):
        encoder = timm.from_apple(name.removeprefix(VISION))
        return None if encoder is None else f"vision.{encoder}"
    if match := re.fullmatch(r"model\.mm_projector\.([02])\.(weight|bias)", name):
        return f"projector.{_PROJECTOR[match[1]]}.{match[2]}"
    if name == "lm_head.weight":
        return "language.lm_head.weight"
    if match := re.fullmatch(r"model\.((?:embed_tokens|layers|norm)\..+)", name):
        return f"language.{match[1]}"
    return None


def to_apple(name: str) -> str:
    """Our name to the stored one."""
    part, rest = name.split(".", 1)
    if part == "vision":
        return VISION + timm.to_apple(rest)
    if part == "projector":
        return "model.mm_projector." + rest.replace("fc1", "0").replace("fc2", "2")
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def image_size(raw: dict[str, Any], origin: str) -> int | None:
    """The side that the tower's name gives; None when the configuration names no tower."""
    tower = raw.get("mm_vision_tower")
    if tower is None:
        return None
    match = re.fullmatch(r"(?:.*/)?mobileclip_l_(\d{1,5})", tower) if isinstance(tower, str) else None
    if match is None:
        raise CheckpointError(f"{origin}: mm_vision_tower is {tower!r}; expected mobileclip_l_<pixels>")
    return int(match[1])


def fit(raw: dict[str, Any]) -> Fit:
    """How Apple's code squares a picture: padded when the configuration says so, else cropped."""
    return "pad" if raw.get("image_aspect_ratio") == "pad" else "crop"


def check(raw: dict[str, Any], origin: str) -> None:
    """Refuse what this package does not compute.

    Raises:
        CheckpointError: A key of the configuration changes the maths.
    """
    require(raw, origin, "mm_projector_type", "mlp2x_gelu")
    require(raw, origin, "mm_patch_merge_type", "flat")
    require(raw, origin, "mm_use_im_start_end", False)
    require(raw, origin, "s2", False)
    require(raw, origin, "image_aspect_ratio", "pad", "square", "crop")
