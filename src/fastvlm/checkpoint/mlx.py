"""mlx-vlm's layout and Apple's iOS bundle: channels last, weights perhaps quantised."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from fastvlm.checkpoint import timm
from fastvlm.checkpoint.packed import SETTINGS, translate_packed
from fastvlm.checkpoint.reading import Weights
from fastvlm.checkpoint.translate import Parts, Source, plain_source

VISION: Final = "vision_tower.vision_model."
_PROJECTOR: Final = {"0": "fc1", "2": "fc2"}
GROUP_SIZE: Final = 64  # what mlx-vlm and Apple's bundles take


def rename(name: str) -> str | None:
    """A stored name to ours; the endings of quantised tensors stay."""
    if name.startswith(VISION):
        encoder = timm.from_apple(name.removeprefix(VISION).replace("patch_embed.blocks.", "patch_embed."))
        return None if encoder is None else f"vision.{encoder}"
    if match := re.fullmatch(r"(?:mm_projector\.|multi_modal_projector\.linear_)([02])\.(\w+)", name):
        return f"projector.{_PROJECTOR[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"language_model\.(?:model\.)?((?:embed_tokens|layers|norm)\..+)", name):
        return f"language.{match[1]}"
    if match := re.fullmatch(r"language_model\.(lm_head\..+)", name):
        return f"language.{match[1]}"
    return None


def to_mlx(name: str) -> str | None:
    """Our name to the stored one; None for what mlx-vlm leaves out."""
    if name.endswith(".num_batches_tracked"):
        return None
    part, rest = name.split(".", 1)
    if part == "vision":
        return VISION + re.sub(r"^patch_embed\.", "patch_embed.blocks.", timm.to_apple(rest))
    if part == "projector":
        return "mm_projector." + rest.replace("fc1", "0").replace("fc2", "2")
    return f"language_model.{rest}" if rest.startswith("lm_head.") else f"language_model.model.{rest}"


def to_channels_last(tensor: Tensor, name: str) -> Tensor:
    """A tensor of ours as MLX keeps it: convolutions `(out, k, k, in)`, layer scales `(1, 1, C)`."""
    if tensor.ndim == 4:
        return tensor.permute(0, 2, 3, 1)
    return tensor.permute(1, 2, 0) if name.endswith(".gamma") else tensor


def translate_mlx(weights: Weights, raw: dict[str, Any], origin: str, *, keep_packed: bool) -> Parts:
    """Give tensors our names and our order of axes; see `packed.translate_packed`.

    Raises:
        CheckpointError: The quantisation is of a kind that is not read.
    """
    parts = translate_packed(
        weights, raw, origin, rename=rename, dequantise=dequantise, plain=_channels_first, keep_packed=keep_packed
    )
    for name in [name for name in parts.sources if name.endswith(".bn.running_var")]:
        count = name.replace("running_var", "num_batches_tracked")  # MLX has no such counter
        parts.sources.setdefault(count, Source(count, (), partial(torch.tensor, 0), lambda: None))
    return parts


def _channels_first(weights: Weights, stored_name: str, name: str) -> Source:
    plain = plain_source(weights, stored_name)
    if len(plain.shape) == 4:
        out_dim, height, width, in_dim = plain.shape
        return Source(
            stored_name,
            (out_dim, in_dim, height, width),
            lambda: plain.read().permute(0, 3, 1, 2).contiguous(),
            plain.forget,
        )
    if name.endswith(".gamma") and len(plain.shape) == 3:
        return Source(stored_name, plain.shape[::-1], lambda: plain.read().reshape(-1, 1, 1), plain.forget)
    return plain


def dequantise(packed: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Turn packed numbers into floats: number x scale + bias, one scale and bias a group.

    Args:
        packed: Numbers of `bits` bits one after the other, low bits first, `(rows, columns * bits / 32)`, uint32.
        scales: `(rows, groups)`, in the dtype in which MLX computes: it rounds the product and the sum.
        biases: `(rows, groups)`, of the same dtype.
        bits: How many a number takes.

    Returns:
        `(rows, columns)`, of the dtype of the scales.
    """
    rows = packed.shape[0]
    if 32 % bits == 0:
        words = packed.view(torch.int32)
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        numbers = (words[:, :, None] >> shifts) & (2**bits - 1)  # the mask drops the copies of the sign
    else:  # a number may lie across two words: take them apart bit by bit
        single = (packed.contiguous().view(torch.uint8)[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        weights = 2 ** torch.arange(bits, dtype=torch.int32)
        numbers = (single.view(rows, -1, bits).int() * weights).sum(-1)
    grouped = numbers.reshape(rows, scales.shape[1], -1).to(scales.dtype)
    return (grouped * scales[..., None] + biases[..., None]).view(rows, -1)


def quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack a matrix as MLX does, in groups of 64 columns; `dequantise` is the way back.

    The end of a group's range that is farther from zero is met exactly, and so is zero (`affine_quantize` of MLX).

    Args:
        weight: `(rows, columns)`; columns are a multiple of the group.
        bits: 4 or 8.

    Returns:
        Packed numbers `(rows, columns * bits / 32)`, uint32; scales and biases `(rows, groups)`, of the weight's dtype.
    """
    rows = weight.shape[0]
    groups = weight.float().view(rows, -1, GROUP_SIZE)
    low, high = groups.amin(-1), groups.amax(-1)  # (rows, groups)
    is_low_farther = low.abs() > high.abs()
    width = ((high - low) / (2**bits - 1)).clamp(min=1e-7)
    scale = torch.where(is_low_farther, width, -width)
    edge = torch.where(is_low_farther, low, high)
    steps = (edge / scale).round()
    scale = torch.where(steps == 0, scale, edge / steps)
    bias = torch.where(steps == 0, torch.zeros_like(edge), edge)
    numbers = ((groups - bias[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1).int()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    words = (numbers.view(rows, -1, 32 // bits) << shifts).sum(-1, dtype=torch.int32)  # bits do not overlap
    return words.view(torch.uint32), scale.to(weight.dtype), bias.to(weight.dtype)


class Quantised:
    """The three tensors of one quantised matrix, made when they are asked for: the packed one is not kept."""

    def __init__(self, make: Callable[[], Tensor], bits: int) -> None:
        self._make, self._bits = make, bits
        self._small: tuple[Tensor, Tensor] | None = None

    def packed(self) -> Tensor:
        """Return the numbers."""
        packed, scales, biases = quantise(self._make(), self._bits)
        self._small = scales, biases
        return packed

    def scales(self) -> Tensor:
        """Return one scale a group."""
        return self._both()[0]

    def biases(self) -> Tensor:
        """Return one bias a group."""
        return self._both()[1]

    def _both(self) -> tuple[Tensor, Tensor]:
        if self._small is None:
            self.packed()
        assert self._small is not None
        return self._small


def can_quantise(stored_name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is a matrix of projector or language model whose rows are whole groups."""
    is_matrix = stored_name.endswith(".weight") and len(shape) == 2 and shape[1] % GROUP_SIZE == 0
    return is_matrix and not stored_name.startswith("vision_tower.")


def quantisation(bits: int | None) -> dict[str, Any]:
    """What `config.json` says of it, under both names that readers look for."""
    return {} if bits is None else {key: {"group_size": GROUP_SIZE, "bits": bits} for key in SETTINGS}
