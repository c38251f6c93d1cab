"""What is measured: how well a model answers, and how fast."""

from dataclasses import dataclass
from typing import Literal

from fastvlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure a model on pictures and questions that no training has seen."""

    model: str = "nano"
    """Short name, hub id, or a folder with a checkpoint."""
    tasks: tuple[str, ...] = ("nano",)
    """`nano` for all seven, or any of counting, reading, emoji, description, yes_no, colour, place."""
    num_samples: int = 1000
    """Pictures a task."""
    seed: int = 0
    """Which block of the held-out pictures; 0 is the one that is reported."""
    output: str | None = None
    """Write the results to this JSON file."""
    samples: str | None = None
    """Write each question, the right answer and the one given to this JSONL file."""
    failures: str | None = None
    """Write the pictures that were answered wrong to this folder."""
    image_size: int | None = None
    """Side of the square that the encoder sees; by default what the model says."""
    max_new_tokens: int = 48
    """Most tokens that an answer may have."""
    batch_size: int = 32
    """Pictures that are answered together."""
    workers: int = 1
    """Processes that draw pictures while the model answers; 0 draws between the answers."""
    assets: str | None = None
    """Folder of fonts and emoji; by default the one that `fastvlm data assets` fills."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """Format of the arithmetic: auto, float32 or bfloat16."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range.
        """
        ranges = {
            "num_samples": (1, 1_000_000),
            "seed": (0, 1_000_000),
            "max_new_tokens": (1, 1_000_000),
            "batch_size": (1, 100_000),
            "workers": (0, 1024),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be between {low} and {high}, got {value!r}")
        if not self.tasks:
            raise InputError("no tasks given; name at least one, for example nano")


@dataclass(frozen=True, kw_only=True)
class BenchTrainOptions:
    """Time one step of training on the CPU, beside transformers' where an interpreter with it is named.

    Both programs take the same weights and the same batch, in turns, in processes of their own.
    """

    model: str = "nano"
    """A checkpoint; 0.5b, 1.5b and 7b are written with random weights, which take as long as real ones."""
    image_size: int = 512
    """Side of the pictures."""
    batch_size: int = 4
    """Rows, each with one picture."""
    text_tokens: int = 64
    """Positions of text in a row."""
    learned_tokens: int = 32
    """How many of them, at the end, are learned."""
    learn: Literal["full", "lora"] = "full"
    """All of the model; or the projector, and updates of rank 16 in the language model."""
    checkpoint_activations: bool = False
    """Compute activations again instead of keeping them."""
    steps: int = 3
    """Steps a round that are timed, behind one that is not."""
    rounds: int = 3
    """How often each program runs."""
    threads: int = 2
    """Of each program."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of the arithmetic."""
    rival_python: str | None = None
    """An interpreter that has torch, transformers 5 and timm; without one, only ours is timed."""
    output: str | None = None
    """Write the results to this JSON file."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range, or two contradict each other.
        """
        ranges = {
            "image_size": (1, 16_384),
            "batch_size": (1, 100_000),
            "text_tokens": (4, 100_000),
            "learned_tokens": (1, 100_000),
            "steps": (1, 10_000),
            "rounds": (1, 1000),
            "threads": (1, 4096),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number between {low} and {high}, got {value!r}")
        if 2 * self.learned_tokens > self.text_tokens:
            raise InputError(
                f"learned_tokens ({self.learned_tokens}) must be at most half of text_tokens ({self.text_tokens})"
            )
        if self.rival_python is not None and self.learn == "lora":
            raise InputError("--learn lora is ours alone; leave --rival-python out")
