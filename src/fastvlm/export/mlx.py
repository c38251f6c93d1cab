"""MLX: a folder that mlx-vlm loads, in float16, bfloat16, or with projector and language model in 8 or 4 bits.

Everything has one dtype, as MLX widens what it computes from two. So the BatchNorms, which mlx-vlm keeps apart, are
made to do nothing but add: their scales go into the convolutions before them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from fastvlm.checkpoint.build import norm_tensors
from fastvlm.checkpoint.convert import write_mlx
from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.save import Entry, tensor_entries
from fastvlm.config import VisionConfig
from fastvlm.device import place as place_on
from fastvlm.errors import ExportError
from fastvlm.export.graphs import magnitude
from fastvlm.export.parts import Exported, Request, Source, Tolerance, Written, folded_copy, versions
from fastvlm.export.verify import capacity, draw_pictures, eager_step
from fastvlm.image import to_pixels
from fastvlm.model import fold
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.vision import ConvNorm
from fastvlm.options import ExportOptions, Precision
from fastvlm.predict import Predictor

TOLERANCES: Final[Mapping[Precision, Tolerance]] = {
    "fp16": Tolerance(features=1e-2, cosine=0.9999, logits=1e-2, texts=0.95),
    "bf16": Tolerance(features=1e-1, cosine=0.999, logits=1e-1, texts=0.8),
    "int8": Tolerance(features=1e-1, cosine=0.999, logits=1e-1, texts=0.8),
    "int4": Tolerance(cosine=0.98, logits_cosine=0.8),
}
BITS: Final[Mapping[Precision, int]] = {"int8": 8, "int4": 4}
_BYTES: Final[Mapping[Precision, float]] = {"fp16": 2, "bf16": 2, "int8": 1.1, "int4": 0.6}
_FLOAT16_LIMIT: Final = 65_504 / 2  # other pictures may reach further than those that are drawn


def ready(options: ExportOptions) -> None:
    """Nothing is needed beyond the base install."""


def check(source: Source, request: Request) -> int:
    """Return the most bytes that are written."""
    vision = sum(weight.numel() for weight in source.checkpoint.model.vision.parameters())
    return int(2 * vision + _BYTES[request.precision] * (source.num_parameters - vision)) + 2**24


def write(source: Source, request: Request, place: Path) -> Written:
    """Write the folder.

    Raises:
        ExportError: The precision is `fp16`, and the encoder goes beyond it.
    """
    if request.precision == "fp16":
        _check_float16(source, request)
    dtype = torch.float16 if request.precision == "fp16" else torch.bfloat16
    model = fold.reparameterise(source.load())
    neutralise_norms(model.vision)
    notes = write_mlx(
        place, uniform_entries(model, dtype), source.config, source.tokenizer, bits=BITS.get(request.precision)
    )
    notes.insert(0, "The branches of the vision encoder merged; the scales of its BatchNorms moved into convolutions.")
    notes.append(f"What is not quantised converted to {str(dtype).removeprefix('torch.')}.")
    if not is_standard(source.config.vision):
        vision = source.config.vision
        notes.append(
            "mlx-vlm knows the standard encoder only: set VisionConfig.layers and .embed_dims of "
            f"mlx_vlm.models.fastvlm to {list(vision.depths)} and {list(vision.dims)} before it loads this."
        )
    return Written(notes=notes, versions=versions())


def read(source: Source, request: Request, place: Path, precision: Precision) -> Exported:
    """Load the folder as `fastvlm` loads MLX's layout, quantised weights through the floats they stand for."""
    loaded = load(place, dtype=torch.float32, dequantise=True)
    predictor = Predictor(loaded.model, loaded.tokenizer, place_on("cpu", "float32"))
    return Exported(
        runtime="fastvlm reading the folder, arithmetic in float32",
        tolerance=TOLERANCES[precision],
        encode=lambda pixels: predictor.model.encode(predictor.to_device(pixels)),
        embed=predictor.model.language.embed,
        begin=lambda: eager_step(predictor, capacity(source, request)),
    )


def is_standard(vision: VisionConfig) -> bool:
    """Whether this is the geometry that mlx-vlm and Apple's app have in their code."""
    standard = VisionConfig()
    return (vision.depths, vision.dims, vision.mlp_ratio) == (standard.depths, standard.dims, standard.mlp_ratio)


@torch.no_grad()
def neutralise_norms(module: nn.Module) -> None:
    """Let every BatchNorm behind a convolution only add its bias: exact up to rounding, and its names stay."""
    for branch in module.modules():
        if isinstance(branch, ConvNorm):
            norm = branch.bn
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)  # (out,)
            branch.conv.weight.copy_(branch.conv.weight.double() * scale[:, None, None, None])
            norm.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale)
            norm.weight.fill_(1)
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)


def uniform_entries(model: FastVLM, dtype: torch.dtype) -> dict[str, Entry]:
    """All tensors under our names in one dtype, BatchNorm's too."""
    entries = tensor_entries(model, dtype)
    state = model.state_dict()
    return entries | {name: _entry(state[name], dtype) for name in norm_tensors(model)}


def _entry(tensor: Tensor, dtype: torch.dtype) -> Entry:
    return Entry(tuple(tensor.shape), dtype, lambda: tensor.to(dtype))


def _check_float16(source: Source, request: Request) -> None:
    largest = largest_activation(source, request)
    if not largest <= _FLOAT16_LIMIT:
        raise ExportError(
            f"the encoder computes values up to {largest:,.0f}, and float16 ends at 65,504; take --precision bf16"
        )


@torch.inference_mode()
def largest_activation(source: Source, request: Request, count: int = 2) -> float:
    """Return the largest magnitude that any layer of the encoder computes on drawn pictures."""
    found = [0.0]

    def watch(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(magnitude(output))

    vision = folded_copy(source).vision  # not eager's, whose fused operators hide what is inside
    hooks = [module.register_forward_hook(watch) for module in vision.modules()]
    try:
        for picture in draw_pictures(count):
            pixels = to_pixels(picture.image, size=request.image_size, fit=source.config.vision.fit)
            vision(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return max(found)
