"""What an export is made of, and what it becomes: the words that `run`, `verify` and every format share.

Letters: `P` images, `H, W` pixels, `N` positions of an image, `C` channels of vision, `D` width of language, `B` rows,
`T` tokens, `V` vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import requires, version
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from fastvlm.checkpoint.load import Checkpoint
from fastvlm.config import Config
from fastvlm.device import place
from fastvlm.errors import ExportError
from fastvlm.model import fold
from fastvlm.model.fastvlm import FastVLM
from fastvlm.options import Precision
from fastvlm.predict import Predictor
from fastvlm.prompt import Tokenizer

Step = Callable[[Tensor], Tensor]
"""Reads embeddings `(1, T, D)` behind all that it has read; returns the logits of the last position, `(1, V)`."""


@dataclass(frozen=True)
class Source:
    """The model that is exported.

    Attributes:
        checkpoint: As stored: neither folded nor converted. Leave it so; `eager` has copies of its own.
        load: Loads the checkpoint once more, in float32.
    """

    checkpoint: Checkpoint
    load: Callable[[], FastVLM]

    @property
    def config(self) -> Config:
        """What the model is; `image_size` is the export's."""
        return self.checkpoint.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's."""
        return self.checkpoint.tokenizer

    @cached_property
    def eager(self) -> Predictor:
        """What an export has to equal: folded for inference, in float32 on the CPU."""
        return Predictor(self.load(), self.tokenizer, place("cpu", "float32"))

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model."""
        return sum(weight.numel() for weight in self.checkpoint.model.parameters())


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, complete: no value is left to be chosen."""

    precisions: tuple[Precision, ...]
    image_size: int
    """Side of the square that the exported encoder sees."""
    has_dynamic_batch: bool
    """Whether the encoder takes any number of pictures, or one."""
    with_projector: bool
    """Whether the encoder ends in image embeddings `(P, N, D)`; otherwise in features `(P, N, C)`."""

    @property
    def precision(self) -> Precision:
        """The only precision, for formats that write one."""
        (precision,) = self.precisions
        return precision


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an export may be from eager; None is reported but not judged."""

    features: float | None = None
    """Largest difference of what the encoder makes, as a share of its largest value."""
    cosine: float | None = None
    """Least cosine between what the encoder makes of a picture and what eager makes, both flattened."""
    logits: float | None = None
    """Largest difference of logits, as a share of the largest one."""
    same_cache: float | None = None
    """The same beside an eager whose keys and values are rounded as the export keeps them."""
    logits_cosine: float | None = None
    """Least cosine between the logits along an answer, flattened, and eager's."""
    texts: float | None = None
    """Least share of equal greedy answers."""


FLOAT32 = Tolerance(features=1e-4, cosine=0.99999, logits=1e-4, texts=1.0)
"""What every float32 export must reach."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export read back from its files and run by a program of its own; eager takes the place of what is None."""

    runtime: str
    """Name and version of what runs it."""
    tolerance: Tolerance
    encode: Callable[[Tensor], Tensor] | None = None
    """Pixels `(P, 3, H, W)` in [0, 1] to image embeddings `(P, N, D)`, or features `(P, N, C)` without projector."""
    project: Callable[[Tensor], Tensor] | None = None
    """Features `(P, N, C)` to image embeddings `(P, N, D)`, where the encoder ends in features."""
    embed: Callable[[Tensor], Tensor] | None = None
    """Token ids `(1, T)` to embeddings `(1, T, D)`."""
    begin: Callable[[], Step] | None = None
    """Begin a sentence with an empty cache."""
    cache_dtype: torch.dtype | None = None
    """What keys and values of earlier tokens are kept in, where that is not the format of the arithmetic."""
    weights: Callable[[], Mapping[str, bool]] | None = None
    """Whether each of the model's weights was found in the files as it has to be, by name."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format says about the files it wrote."""

    notes: list[str]
    """What was changed, a sentence each, for `CHANGES.md`."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Inputs and outputs of the files, `file: name [shape]`, for the manifest."""
    versions: dict[str, str] = field(default_factory=dict)
    """Packages that wrote the files."""
    ends_in: Literal["image embeddings", "features"] | None = "image embeddings"
    """What the encoder's file gives: `features` before the projector; None where no encoder is written."""


class ImageEncoder(nn.Module):
    """Encoder and, if asked for, projector in one module: what most formats write."""

    def __init__(self, model: FastVLM, *, with_projector: bool) -> None:
        super().__init__()
        self.vision = model.vision
        self.projector: nn.Module = model.projector if with_projector else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `(P, 3, H, W)` to `(P, N, D)`, or to `(P, N, C)` without projector."""
        return self.projector(self.vision(pixels))


def num_image_tokens(source: Source, request: Request) -> int:
    """`N`: how many tokens a picture of the export's size takes."""
    return int((request.image_size // source.config.vision.stride) ** 2)


def folded_copy(source: Source) -> FastVLM:
    """Load the model once more, folded, float32, in the usual memory order: for formats that change weights."""
    return fold.for_inference(source.load()).float()


def needs(extra: str, *packages: str) -> list[ModuleType]:
    """Import the packages of an extra.

    Raises:
        ExportError: One of them is not installed, is another version, or its build does not fit this machine.
    """
    try:
        return [import_module(package) for package in packages]
    except (ImportError, OSError) as error:
        missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
        if any(f"{package}.".startswith(f"{missing}.") for package in packages if "." in missing):
            root = missing.partition(".")[0]
            raise ExportError(
                f"{root} is installed, but has no {missing}; this export needs {_requirement(extra, root)}; "
                f"pip install 'fastvlm[{extra}]'"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"this export needs more packages: {reason}; pip install 'fastvlm[{extra}]'") from error


def _requirement(extra: str, package: str) -> str:
    """What the extra asks of a package, with its versions."""
    lines = (line for line in requires("fastvlm") or () if f"extra == '{extra}'" in line.replace('"', "'"))
    return next((line.partition(";")[0].strip() for line in lines if line.startswith(package)), package)


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed distributions, PyTorch's with them."""
    return {name: version(name) for name in ("torch", *packages)}


def example_pixels(request: Request, num_images: int = 1) -> Tensor:
    """Pixels `(P, 3, H, W)` to trace an encoder with; the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num_images, 3, request.image_size, request.image_size, generator=generator)
