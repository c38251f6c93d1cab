"""What an export can be: the formats, what each holds and what it cannot honour; and the options of the command."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from tyro.conf import Positional, arg

from fastvlm.errors import InputError

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "q4", "q4f16"]
"""Formats of an export's weights; q4 has 4-bit matrices, q4f16 computes the rest in float16."""


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """What one format can do."""

    reader: str
    """Who runs it."""
    precisions: tuple[Precision, ...]
    """What it can be written in; the first is the default."""
    holds_several: bool = False
    """Whether one folder can hold several precisions."""
    extra: str | None = None
    """The extra of this package that writing takes."""
    is_fixed: bool = False
    """Whether the encoder takes one picture unless asked otherwise."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Options that it cannot honour, and why not."""


EXPORT_FORMATS: Final[Mapping[str, ExportFormat]] = {
    "onnx": ExportFormat(
        reader="ONNX Runtime; transformers.js in Node and in browsers",
        precisions=("fp32", "fp16", "int8", "q4", "q4f16"),
        holds_several=True,
        extra="onnx",
    ),
    "openvino": ExportFormat(reader="OpenVINO; its GenAI VLMPipeline", precisions=("fp32", "fp16"), extra="openvino"),
    "gguf-lm": ExportFormat(
        reader="llama.cpp and what is built on it; language half only",
        precisions=("fp32", "fp16", "bf16", "int8"),
        extra="gguf",
        refuses=dict.fromkeys(("image_size", "batch", "with_projector"), "it holds the language model alone"),
    ),
    "coreml": ExportFormat(
        reader="Core ML: iOS 16 or macOS 13 for the encoder, iOS 18 or macOS 15 for the language model",
        precisions=("fp16", "fp32", "int8"),
        extra="coreml",
        is_fixed=True,
    ),
    "mlx": ExportFormat(
        reader="mlx-vlm 0.7.10",
        precisions=("bf16", "fp16", "int8", "int4"),
        refuses={
            "batch": "mlx-vlm has the program, and it takes any number of pictures",
            "with_projector": "the projector is always there",
        },
    ),
    "ios-bundle": ExportFormat(
        reader="Apple's app for iPhone, iPad and Mac",
        precisions=("fp16", "int8", "int4"),
        extra="coreml",
        is_fixed=True,
        refuses={
            "batch": "Apple's app shows one picture",
            "with_projector": "the projector is among the weights of Apple's app",
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a model for other programs, and prove that it computes the same there.

    The folder gets manifest.json (sizes, tokens, versions, digests) and parity.json (what was compared with what).
    """

    format: Annotated[
        Positional[Literal["onnx", "openvino", "gguf-lm", "coreml", "mlx", "ios-bundle"]],
        arg(metavar="onnx|openvino|gguf-lm|coreml|mlx|ios-bundle"),
    ]
    """Who is to read it."""
    out: str
    """The folder to write."""
    model: Annotated[str, arg(aliases=("--model-path",))] = "nano"
    """Short name, or a checkpoint folder in any layout we read; it is left as it is."""
    vision: str | None = None
    """A second folder or file with the vision encoder, for Apple's iOS bundles."""
    precision: tuple[Precision, ...] = ()
    """Format of the weights; give it again for more of them in onnx. By default fp32 of onnx, openvino and gguf-lm,
    fp16 of coreml and ios-bundle, bf16 of mlx."""
    image_size: int | None = None
    """Side in pixels of the square that the encoder sees; by default what the model says."""
    batch: Literal["1", "dynamic"] | None = None
    """Whether the encoder takes one picture or several at once; by default one in coreml, whose Neural Engine wants
    fixed shapes, and any number elsewhere."""
    with_projector: bool = False
    """Put the projector behind the encoder of coreml, which otherwise ends in features; onnx and openvino have it there
    always."""
    pictures: int | None = None
    """How many pictures are compared; by default 20, and 2 for models of more than 100 million weights."""
    keep: bool = False
    """Keep what was written even if it does not compute the same, to look at it."""
    overwrite: bool = False
    """Replace an export that is there; a folder that holds anything else is left alone."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each value, and that the format can honour it.

        Raises:
            InputError: A value is out of its range, or nothing that the format can do.
        """
        if self.format not in EXPORT_FORMATS:
            raise InputError(f"there is no format {self.format!r}; expected one of {', '.join(EXPORT_FORMATS)}")
        kind = EXPORT_FORMATS[self.format]
        for name, reason in kind.refuses.items():
            if getattr(self, name) not in (None, False):
                raise InputError(f"{self.format} takes no --{name.replace('_', '-')}: {reason}")
        for precision in self.precision:
            if precision not in kind.precisions:
                raise InputError(f"{self.format} has no precision {precision!r}; it has {', '.join(kind.precisions)}")
        if self.image_size is not None and not 1 <= self.image_size <= 16_384:
            raise InputError(f"image_size must be between 1 and 16384, got {self.image_size}")
        if self.pictures is not None and not 1 <= self.pictures <= 10_000:
            raise InputError(f"pictures must be between 1 and 10000, got {self.pictures}")
        if twice := [each for each in self.precision if self.precision.count(each) > 1]:
            raise InputError(f"precision names {twice[0]!r} twice; give each once")
        if len(self.precision) > 1 and not kind.holds_several:
            raise InputError(f"{self.format} holds one precision, got {', '.join(self.precision)}; export each alone")
