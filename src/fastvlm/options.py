"""What one run does: a frozen dataclass a command; its fields are the command's flags, its docstrings their help."""

from dataclasses import dataclass
from typing import Literal

from fastvlm.config import FITS, Fit
from fastvlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a model on conversations about pictures, in one process."""

    output: str
    """Folder for the trained checkpoint, its training state and the log."""
    data: tuple[str, ...] = ("synth",)
    """`synth` draws nano's pictures; otherwise LLaVA JSON or JSONL files."""
    image_folder: str = "."
    """Where the pictures that the files name are."""
    model: str = "nano:fresh"
    """A checkpoint to go on from, or `nano:fresh` for random weights."""
    image_size: int | None = None
    """Side of the square that the encoder sees; by default what the model says."""
    assets: str | None = None
    """Folder of fonts and emoji for `synth`; by default the one that `fastvlm data assets` fills."""
    steps: int = 12_000
    """Optimizer steps of the whole run."""
    minutes: float | None = None
    """Let the schedule follow the clock instead, and end after so many minutes."""
    batch_size: int = 256
    """Conversations a step."""
    lr: float = 1e-3
    """Highest learning rate of AdamW; warms up, then follows a cosine to zero."""
    warmup: float = 0.03
    """Share of the run in which the learning rate rises."""
    weight_decay: float = 0.05
    """Decay of matrices and kernels."""
    max_tokens: int = 192
    """Positions of a row, image embeddings included."""
    workers: int = 2
    """Processes that draw or read pictures; 0 does it between the steps."""
    seed: int = 0
    """Of the first weights and of the order and content of the data."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """Format of the arithmetic (the weights are float32): auto, float32 or bfloat16."""
    compile: bool = False
    """Compile the step with torch.compile: faster after a minute or more."""
    log_every: int = 20
    """Steps between lines of the log."""
    save_minutes: float = 5.0
    """Minutes between saved checkpoints."""
    resume: bool = False
    """Go on from the state in the output folder."""
    quiet: bool = False
    """No progress lines."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How an answer is written; the defaults are greedy."""

    max_new_tokens: int = 256
    """Most tokens that an answer may have."""
    temperature: float = 0.0
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
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise InputError(f"{name} must be between {low:g} and {high:g}, got {value!r}")
        if "" in self.stop:
            raise InputError("a stop string is empty; give at least one character")
        if self.num_beams > 1 and self.temperature > 0:
            raise InputError(
                f"num_beams ({self.num_beams}) searches; it does not go with temperature ({self.temperature})"
            )


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How pictures are read and made square."""

    image_size: int | None = None
    """Side in pixels, a multiple of 64: fewer are faster (512 px are 64 tokens); by default what the model says."""
    fit: Fit | None = None
    """pad (black bars), crop (centre) or stretch; by default what the model's preprocessor says."""
    exif: Literal["apply", "ignore"] = "apply"
    """Turn photos as their EXIF says, or ignore it as Apple's predict.py does."""
    alpha: Literal["drop", "white"] = "drop"
    """Drop transparency as Apple does, or put the picture on white."""
    max_pixels: int = 100_000_000
    """Refuse pictures with more pixels than this."""

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            InputError: A value is out of its range.
        """
        if self.image_size is not None and not 1 <= self.image_size <= 16_384:
            raise InputError(f"image_size must be between 1 and 16384, got {self.image_size}")
        if self.max_pixels < 1:
            raise InputError(f"max_pixels must be 1 or more, got {self.max_pixels}")
        if self.fit not in (None, *FITS):
            raise InputError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")
