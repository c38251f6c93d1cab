"""The paper's figures (FastVLM, arXiv 2412.13303, version 2), as they are printed there.

Milliseconds were measured on a MacBook Pro with an M1 Max: encoders by Core ML on the Neural Engine, the language model
by MLX on the GPU in float16; a time to first token is the sum of the two, without text (section 4, "Benchmarking").
Accuracy is the mean of GQA, TextVQA, POPE, DocVQA and SeedBench with Qwen2-0.5B, trained by LLaVA-1.5's recipe; it and
the times to first token are read from the curves of figure 1a, to about 0.1 points and 3 ms. Encoder times are those
of table 10, table 4's (34.4, 71.9, 89.9 ms) for ConvNeXt below 768 pixels; they contradict each other about FastViTHD,
so that 512 pixels have no time here.
"""

from dataclasses import dataclass
from typing import Final

SOURCE: Final = "arXiv 2412.13303v2, figure 1a, tables 4 and 10; M1 Max"
LANGUAGE: Final = "0.5b"
"""The language model behind all of these encoders, Qwen2-0.5B."""
HEADLINE: Final = {"LLaVA-OneVision-0.5B": 14123.8, "FastVLM-0.5B": 166.8}
"""Milliseconds to first token behind "85 times faster": table 6 and table 10, 10 crops against 1024 pixels."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """An encoder at one size of pictures."""

    image_size: int
    tokens: int
    encoder_ms: float | None
    ttft_ms: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A vision encoder of the paper."""

    name: str
    timm: str
    """What timm calls it."""
    parameters_m: float
    """Millions, as the paper gives them."""
    points: tuple[Point, ...]


def _points(*rows: tuple[int, int, float | None, float, float]) -> tuple[Point, ...]:
    return tuple(
        Point(image_size=size, tokens=tokens, encoder_ms=encoder_ms, ttft_ms=ttft_ms, accuracy=accuracy)
        for size, tokens, encoder_ms, ttft_ms, accuracy in rows
    )


FASTVITHD: Final = "FastViTHD"

ENCODERS: Final = (
    Encoder(
        name=FASTVITHD,
        timm="fastvit_mci3",
        parameters_m=125,
        points=_points(
            (256, 16, 6.8, 32, 48.4),
            (512, 64, None, 50, 52.5),
            (768, 144, 54.8, 96, 54.5),
            (1024, 256, 116.3, 167, 55.9),
        ),
    ),
    Encoder(
        name="ConvNeXt-L",
        timm="convnext_large_mlp",
        parameters_m=200,
        points=_points(
            (320, 100, 34.4, 63, 49.0),
            (512, 256, 71.9, 120, 52.2),
            (768, 576, 164.3, 292, 54.4),
            (1024, 1024, 696.1, 942, 55.3),
        ),
    ),
    Encoder(
        name="ConvNeXt-XXL",
        timm="convnext_xxlarge",
        parameters_m=846,
        points=_points((256, 64, 89.9, 119, 51.9)),
    ),
    Encoder(
        name="ViT-L/14",
        timm="vit_large_patch14_clip_336",
        parameters_m=304,
        points=_points((336, 576, 127.4, 256, 47.3)),
    ),
    Encoder(
        name="SigLIP-SO400M",
        timm="vit_so400m_patch14_siglip_384",
        parameters_m=430,
        points=_points((384, 729, 272.1, 535, 55.5)),
    ),
)
