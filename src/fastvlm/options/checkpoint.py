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
    """Write a copy of a model whose language model has 8 or 4 bits a weight, and its encoder perhaps 8."""

    model: Annotated[str, arg(aliases=("--model-path",))]
    """Short name, or a checkpoint folder in any layout we read; it is left as it is."""
    out: str
    """The folder to write."""
    bits: Literal[8, 4] = 8
    """Of each weight; the embedding table, the head, and attention's values and outputs always have 8."""
    encoder_bits: Literal[8] | None = None
    """Of the two wide layers in each block of the encoder, nine tenths of its work; always to the nearest number. With
    --compile, on a CPU that multiplies bytes and in float32, their activations become bytes, too; elsewhere only the
    folder is smaller. By default the encoder stays as it is."""
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
