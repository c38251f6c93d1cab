"""What one answer is: how a model is loaded, pictures are read, words are chosen."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, get_args

from tyro.conf import arg

from fastvlm.config import FITS, Fit
from fastvlm.errors import InputError

Engine = Literal["torch", "openvino"]
"""What runs the vision encoder."""
Exif = Literal["apply", "ignore"]
Alpha = Literal["drop", "white"]
SEEDS: Final = (-(2**63), 2**63 - 1)


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How an answer is written; the defaults are greedy."""

    max_new_tokens: Annotated[int, arg(aliases=("--max-tokens",))] = 256
    """Most tokens that an answer may have."""
    temperature: Annotated[float, arg(aliases=("--temp",))] = 0.0
    """0 picks the likeliest token; higher is more varied."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample among so many of the likeliest tokens; 0 is all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens in the prompt or the answer by this (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that the answer already has."""
    frequency_penalty: float = 0.0
    """Subtract this times a token's count in the answer so far."""
    seed: int | None = None
    """Of the sampling; None differs each time."""
    stop: tuple[str, ...] = ()
    """End the answer before any of these strings."""
    num_beams: int = 1
    """Search so many answers side by side and keep the likeliest."""
    prompt_lookup: int = 0
    """Guess up to so many tokens by what followed the last two before, and check them in one step: the greedy answer,
    sooner where it copies; 0 guesses none."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range.
        """
        ranges = {
            "max_new_tokens": (1, 1_000_000),
            "temperature": (0, 100),
            "top_p": (1e-6, 1),
            "top_k": (0, 10_000_000),
            "min_p": (0, 1),
            "repetition_penalty": (0.01, 100),
            "presence_penalty": (-100, 100),
            "frequency_penalty": (-100, 100),
            "num_beams": (1, 64),
            "prompt_lookup": (0, 256),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            kind = int if name in ("max_new_tokens", "top_k", "num_beams", "prompt_lookup") else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                whole = "a whole number " if kind is int and isinstance(value, float) else ""
                raise InputError(f"{name} must be {whole}between {low} and {high}, got {value!r}")
        if 0 < self.temperature < 1e-3:
            raise InputError(f"temperature must be 0 or at least 0.001, got {self.temperature!r}")
        if self.seed is not None and not _is_whole(self.seed, *SEEDS):
            raise InputError(f"seed must be a whole number between {SEEDS[0]} and {SEEDS[1]}, got {self.seed!r}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop must be a list of texts, got {self.stop!r}")
        if "" in self.stop:
            raise InputError("a stop string is empty; give at least one character")
        if self.num_beams > 1 and self.temperature > 0:
            raise InputError(
                f"num_beams ({self.num_beams}) searches; it does not go with temperature ({self.temperature})"
            )
        if self.prompt_lookup and (self.num_beams > 1 or self.temperature > 0):
            raise InputError(
                f"prompt_lookup ({self.prompt_lookup}) needs temperature 0 and num_beams 1, "
                f"got temperature {self.temperature} and num_beams {self.num_beams}"
            )


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How pictures are read and made square."""

    image_size: int | None = None
    """Side in pixels, a multiple of 64: fewer are faster (512 px are 64 tokens); by default what the model says."""
    fit: Fit | None = None
    """pad (black bars), crop (centre) or stretch; by default what the model's preprocessor says."""
    exif: Exif = "apply"
    """Turn photos as their EXIF says, or ignore it as Apple's predict.py does."""
    alpha: Alpha = "drop"
    """Drop transparency as Apple does, or put the picture on white."""
    max_pixels: int = 100_000_000
    """Refuse pictures with more pixels than this."""

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            InputError: A value is out of its range.
        """
        if self.image_size is not None and not _is_whole(self.image_size, 1, 16_384):
            raise InputError(f"image_size must be a whole number between 1 and 16384, got {self.image_size!r}")
        if not _is_whole(self.max_pixels, 1, sys.maxsize):
            raise InputError(f"max_pixels must be a whole number of 1 or more, got {self.max_pixels!r}")
        if self.fit not in (None, *FITS):
            raise InputError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")
        for name, known in (("exif", get_args(Exif)), ("alpha", get_args(Alpha))):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ReuseOptions:
    """How much of what was computed is kept, so that it is not computed again."""

    feature_cache: int = 256
    """MiB of image embeddings that are kept, the last used ones (a picture of 1024 px takes 0.5 to 2); 0 keeps none."""
    prefix_cache: int = 512
    """MiB of keys and values that are kept, so that what begins as before is not read again; 0 keeps none."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range.
        """
        for name in ("feature_cache", "prefix_cache"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**20:
                raise InputError(f"{name} must be between 0 and {2**20} MiB, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Which model answers, and where it runs."""

    model: Annotated[str | None, arg(aliases=("--model-path",))] = None
    """Short name (see `fastvlm models list`), or a checkpoint folder in any layout we read; by default nano."""
    model_base: str | None = None
    """The model that an adapter given as --model belongs to; by default the one that the adapter names."""
    vision: str | None = None
    """A second folder or file with the vision encoder, for Apple's iOS bundles."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Format of the weights; auto is bfloat16 where the hardware multiplies it faster."""
    compile: bool = False
    """Write answers with kernels in C++ for this processor, or in Triton for an NVIDIA GPU; the first time they are
    built, in seconds, and kept."""
    engine: Engine = "torch"
    """What runs the vision encoder: PyTorch, or OpenVINO where it is installed (the extra openvino)."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Answer a question about pictures, or about none.

    The answer goes to standard output as it is written, everything else to standard error.
    """

    image: Annotated[tuple[str, ...], arg(aliases=("--image-file",), metavar="FILE|URL")] = ()
    """Path or http(s) address of a picture, or `-` for standard input; give it again for more pictures."""
    prompt: str | None = None
    """The question; by default, where there is a picture, "Describe the image."."""
    video: str | None = None
    """A GIF, an animated WebP or PNG, a folder of pictures or, with PyAV installed, a video file."""
    frames: int = 8
    """How many frames of the video are read, evenly from its start to its end."""
    system: str | None = None
    """System prompt instead of "You are a helpful assistant."."""
    conv_mode: Literal["qwen_2"] = "qwen_2"
    """Apple's name of the prompt template; there is one."""
    json: bool = False
    """Print one JSON object instead of the text."""
    quiet: bool = False
    """Nothing on standard error but errors."""
    loading: LoadOptions = field(default_factory=LoadOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    pictures: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        """Check that the options go together.

        Raises:
            InputError: There is nothing to ask, or too much.
        """
        if self.video is not None and self.image:
            raise InputError("--video and --image do not go together; give one of them")
        if self.prompt is None and self.video is None and not self.image:
            raise InputError("nothing to ask: give --image, --prompt or both")
        if self.prompt is not None and not self.prompt.strip() and self.video is None and not self.image:
            raise InputError(
                "nothing to ask: --prompt is empty, and there is no picture; give --image, --prompt or both"
            )
        if not 1 <= self.frames <= 1000:
            raise InputError(f"frames must be between 1 and 1000, got {self.frames}")
        if self.image.count("-") > 1:
            raise InputError("--image - was given twice; standard input can be read once")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Talk with a model about pictures; what was read stays in memory from turn to turn.

    A line is a question. Commands begin with a slash: /image, /reset, /system, /help, /quit.
    """

    image: Annotated[tuple[str, ...], arg(aliases=("--image-file",), metavar="FILE|URL")] = ()
    """Path or http(s) address of a picture for the first question; give it again for more."""
    system: str | None = None
    """System prompt instead of "You are a helpful assistant."."""
    quiet: bool = False
    """No greeting, no timings."""
    loading: LoadOptions = field(default_factory=LoadOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    pictures: ImageOptions = field(default_factory=ImageOptions)
    reuse: ReuseOptions = field(default_factory=ReuseOptions)
