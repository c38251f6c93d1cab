"""Names of the vision encoder: Apple's and MobileCLIP's against timm's, which are ours."""

import re
from typing import Any, Final

from fastvlm.checkpoint.reading import Weights
from fastvlm.checkpoint.translate import Parts, Source, plain_source
from fastvlm.config import VisionConfig
from fastvlm.errors import CheckpointError

# Apple numbers everything between stem and head in one row; both attention stages have a positional encoding.
_STAGE_OF: Final = {0: 0, 1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 3, 8: 4, 9: 4, 10: 4}
_BLOCKS: Final = (0, 2, 4, 7, 10)
_DOWNSAMPLE: Final = (None, 1, 3, 5, 8)
_POSITIONS: Final = (None, None, None, 6, 9)

_PREFIXES: Final = ("module.", "visual.", "trunk.", "image_encoder.", "model.")  # in the order they occur
_TEXT: Final = ("text_encoder.", "text.", "logit_scale", "logit_bias", "token_embedding.", "transformer.")

_WORDS: Final = {
    "patch_embed": "stem",
    "convffn": "mlp",
    "conv_exp": "final_conv",
    "lkb_reparam": "reparam_conv",
    "lkb_origin": "large_conv",
    "rbr_conv": "conv_kxk",
    "rbr_scale": "conv_scale",
    "rbr_skip": "identity",
    "reduce": "fc1",
    "expand": "fc2",
    "pe": "pos_enc",
}


def from_apple(name: str) -> str | None:
    """Apple's name of an encoder tensor to timm's; None when it is not Apple's."""
    words = name.split(".")
    if words[0] == "network":
        return _from_network(words)
    if words[0] in ("patch_embed", "conv_exp", "head"):
        return ".".join(_timm_words(words))
    return None


def _from_network(words: list[str]) -> str | None:
    if len(words) < 3 or not words[1].isdecimal() or int(words[1]) not in _STAGE_OF:
        return None
    index, rest = int(words[1]), words[2:]
    stage = f"stages.{_STAGE_OF[index]}"
    part = "blocks" if index in _BLOCKS else "downsample" if index in _DOWNSAMPLE else "pos_emb"
    return ".".join([stage, part, *_timm_words(rest)])


def _timm_words(words: list[str]) -> list[str]:
    words = [_WORDS.get(word, word) for word in words]
    return [*words, "gamma"] if words[-1].startswith("layer_scale") else words


def to_apple(name: str) -> str:
    """The encoder's name in timm to Apple's."""
    name = name.removesuffix(".gamma")
    name = re.sub(r"^stem\.", "patch_embed.", name)
    name = re.sub(r"^final_conv\.", "conv_exp.", name)
    name = name.replace("se.fc1.", "se.reduce.").replace("se.fc2.", "se.expand.")
    if not (match := re.match(r"stages\.(\d+)\.(\w+)\.(.*)", name)):
        return _apple_branches(name)
    stage, part, rest = int(match[1]), match[2], match[3]
    index = {"blocks": _BLOCKS, "downsample": _DOWNSAMPLE, "pos_emb": _POSITIONS}[part][stage]
    if part == "downsample":
        rest = re.sub(r"^proj\.0\.reparam_conv\.", "proj.0.lkb_reparam.", rest)
    return _apple_branches(f"network.{index}.{rest.replace('mlp.', 'convffn.')}")


def _apple_branches(name: str) -> str:
    for word in ("large_conv", "conv_kxk", "conv_scale", "identity", "pos_enc"):
        apple = next(key for key, value in _WORDS.items() if value == word)
        name = re.sub(rf"\b{word}\b", apple, name)
    return name


def encoder_name(name: str) -> str | None:
    """The name of a tensor in an encoder file, MobileCLIP's or timm's, to ours; None when it is neither."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name.split(".")[0] in ("stem", "stages", "final_conv"):
        return name
    if name in ("head.fc.weight", "head.fc.bias"):
        return name
    return from_apple(name)


def translate_encoder(weights: Weights) -> Parts:
    """Give the tensors of an encoder file our names; what belongs to a text encoder beside it is left out.

    Raises:
        CheckpointError: Its head is not the CLIP projection.
    """
    parts = Parts(str(weights.origin))
    for stored_name in weights.entries:
        name = encoder_name(stored_name)
        if name is None:
            if not stored_name.startswith(_TEXT):
                parts.unexpected.append(stored_name)
        elif name == "head.fc.weight":
            parts.put("vision.head.proj", _transposed(plain_source(weights, stored_name)))
        elif name == "head.fc.bias":
            if weights.read(stored_name).any():
                raise CheckpointError(f"{weights.origin}: {stored_name!r} is not zero; expected a CLIP projection")
        else:
            parts.put(f"vision.{name}", plain_source(weights, stored_name))
    return parts


def encoder_config(config: VisionConfig) -> dict[str, Any]:
    """What timm calls this encoder, and the pictures that it sees: in [0, 1], neither shifted nor scaled."""
    return {
        "architecture": "fastvit_mci3",
        "num_classes": config.clip_dim or 0,
        "num_features": config.out_dim,
        "model_args": {
            "embed_dims": list(config.dims),
            "inference_mode": config.is_reparameterised,
            "layers": list(config.depths),
            "mlp_ratios": [config.mlp_ratio] * len(config.dims),
        },
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "interpolation": "bicubic",
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            "classifier": "head.fc",
        },
    }


def _transposed(source: Source) -> Source:
    return Source(source.stored_name, source.shape[::-1], lambda: source.read().T.contiguous(), source.forget)
