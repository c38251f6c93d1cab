"""What is done with checkpoints: listing, pulling, making, rewriting, exporting, sending them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastvlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelsListOptions:
    """List nano and Apple's models, and say which are here."""

    json: bool = False
    """Print a JSON list."""


@dataclass(frozen=True, kw_only=True)
class ModelsShowOptions:
    """Show what is known of a model: where it comes from, its licence, where it is."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Short name, archive's name, or repository on the hub."""
    json: bool = False
    """Print a JSON object."""


@dataclass(frozen=True, kw_only=True)
class ModelsPullOptions:
    """Download, verify and unpack a model; a download that was cut goes on where it ended."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Short name, archive's name, or repository on the hub; `all` is Apple's six archives."""
    accept_license: bool = False
    """Accept the model's licence without being asked."""
    base_url: str | None = None
    """A mirror of Apple's server with the same file names."""
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True, kw_only=True)
class ModelsInitOptions:
    """Write a checkpoint of random weights, for benchmarks and tests."""

    preset: Annotated[Positional[Literal["0.5b", "1.5b", "7b", "nano"]], arg(metavar="0.5b|1.5b|7b|nano")]
    """Which model's sizes."""
    out: str
    """The folder to write."""
    seed: int = 0
    """Draws the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Format of the weights; BatchNorm stays in float32."""
    overwrite: bool = False
    """Replace a checkpoint that is there; a folder that holds anything else is left alone."""

    def __post_init__(self) -> None:
        """Check the seed.

        Raises:
            InputError: It is out of its range.
        """
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be between 0 and {2**63 - 1}, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Rewrite a checkpoint in another layout."""

    model: Annotated[str, arg(aliases=("--model-path",))]
    """Short name, or a checkpoint folder in any layout we read."""
    to: Literal["hf", "apple", "mlx"]
    """transformers' layout (which is ours), that of Apple's code, or mlx-vlm's."""
    out: str
    """The folder to write."""
    vision: str | None = None
    """A second folder or file with the vision encoder, for Apple's iOS bundles."""
    model_base: str | None = None
    """The model that an adapter given as --model is merged into; by default the one that the adapter names."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Convert the weights; by default each stays as stored. BatchNorm stays in float32."""
    overwrite: bool = False
    """Replace a checkpoint that is there; a folder that holds anything else is left alone."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Write a copy of a model whose language model has 8 or 4 bits a weight; encoder and projector stay as they are."""

    model: Annotated[str, arg(aliases=("--model-path",))]
    """Short name, or a checkpoint folder in any layout we read; it is left as it is."""
    out: str
    """The folder to write."""
    bits: Literal[8, 4] = 8
    """Of each weight; the embedding table, the head, and attention's values and outputs always have 8."""
    group_size: Literal[32, 64, 128] | None = None
    """Inputs that share a scale; by default a whole row for 8 bits and 32 for 4."""
    rounding: Literal["nearest", "gptq"] | None = None
    """To the nearest number, or so that later weights make good what earlier ones lose (GPTQ), for drawn pictures that
    are read first; by default nearest for 8 bits, gptq for 4."""
    pictures: int = 128
    """How many are read for gptq; `fastvlm data assets` fetches what they are drawn with."""
    overwrite: bool = False
    """Replace a checkpoint that is there; a folder that holds anything else is left alone."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check the number of pictures.

        Raises:
            InputError: It is out of its range.
        """
        if not 1 <= self.pictures <= 100_000:
            raise InputError(f"pictures must be between 1 and 100000, got {self.pictures}")


Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "q4", "q4f16"]
"""Formats of an export's weights; q4 has 4-bit matrices, q4f16 computes the rest in float16."""


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
    """Format of the weights; give it again for more of them, where the format holds several. By default the first
    that docs/export.md names: fp32 of onnx, openvino and gguf-lm, fp16 of coreml and ios-bundle, bf16 of mlx."""
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
        """Check each value.

        Raises:
            InputError: A value is out of its range.
        """
        if self.image_size is not None and not 1 <= self.image_size <= 16_384:
            raise InputError(f"image_size must be between 1 and 16384, got {self.image_size}")
        if self.pictures is not None and not 1 <= self.pictures <= 10_000:
            raise InputError(f"pictures must be between 1 and 10000, got {self.pictures}")
        if len(set(self.precision)) != len(self.precision):
            raise InputError(f"precision names {self.precision[0]!r} twice; give each once")


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Send a checkpoint folder to the Hugging Face hub; without --upload, only show what would be sent.

    Weights, settings, licences and the card go; training state, logs and options stay. HF_TOKEN says who is sending.
    """

    model: str
    """The folder: a trained model, an encoder or an adapter."""
    to: Annotated[str, arg(metavar="OWNER/NAME")]
    """The repository; made where it is missing."""
    upload: bool = False
    """Really send."""
    private: bool = False
    """Make a repository that is missing private."""
    license: str | None = None
    """The hub's name of the licence, such as apache-2.0, where no file of the folder says it."""
    message: str = "Upload with fastvlm push"
    """Of the commit."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check that this machine can run fastvlm: one line a check, ok, warn or FAIL."""

    device: str = "auto"
    """The device to check: auto, cpu, cuda, cuda:N or mps."""
    json: bool = False
    """Print a JSON list of the checks."""
