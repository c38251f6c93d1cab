"""What is measured: how well a model answers, and how fast."""

from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from tyro.conf import Positional, arg

from fastvlm.errors import InputError
from fastvlm.options.answer import LoadOptions


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
    against: str | None = None
    """Do not mark answers: count those that are equal to this model's in float32, and list the others with the margin
    at which that model chose otherwise. --num-samples is then of all tasks together."""
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
    compile: bool = False
    """Answer with compiled kernels, as `predict --compile` does; at most eight rows a batch are written by them."""
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
    """Time one step of training, beside transformers' where an interpreter with it is named.

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
    compile: bool = False
    """Compile our step with torch.compile, in each round anew."""
    processes: int = 1
    """Besides one process, so many under torchrun that share the batch: by ddp and, where all learns, by fsdp."""
    steps: int = 3
    """Steps a round that are timed, behind one that is not."""
    rounds: int = 3
    """How often each program runs."""
    device: str = "cpu"
    """auto, cpu, cuda, cuda:N or mps."""
    threads: int = 2
    """Of each program on the CPU."""
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
            "processes": (1, 4096),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number between {low} and {high}, got {value!r}")
        if self.batch_size % self.processes:
            raise InputError(f"processes ({self.processes}) must share batch_size ({self.batch_size}) evenly")
        if 2 * self.learned_tokens > self.text_tokens:
            raise InputError(
                f"learned_tokens ({self.learned_tokens}) must be at most half of text_tokens ({self.text_tokens})"
            )
        if self.rival_python is not None and self.learn == "lora":
            raise InputError("--learn lora is ours alone; leave --rival-python out")


LENGTHS: Final = (64, 128, 256, 512, 1024, 2048, 4096)
"""Prompt lengths that are measured by default."""


@dataclass(frozen=True, kw_only=True)
class BenchLatencyOptions:
    """Time each part of an answer: loading, a picture's file, encoding, reading the prompt, the first token, writing.

    0.5b, 1.5b and 7b are written with random weights, which take as long as real ones. The prompt is 15 tokens, the
    picture and 20 tokens; stops are ignored.
    """

    loading: LoadOptions = field(default_factory=LoadOptions)
    image_size: int | None = None
    """Side of the pictures; by default what the model says."""
    batch_size: int = 1
    """Rows that are answered together, each about a picture of its own."""
    tokens: int = 64
    """Tokens that are written in each row."""
    rounds: int = 5
    """How often everything is measured, behind once that is not counted."""
    sizes: tuple[int, ...] = (256, 384, 512, 768, 1024, 1280, 1536)
    """Sides for the cost against size; give it again for more."""
    lengths: tuple[int, ...] = LENGTHS
    """Prompt lengths for the cost against length; give it again for more. Of the default ones those are measured that
    the model's context holds."""
    short: bool = False
    """Leave out the costs against size and length, and the whole command."""
    threads: int | None = None
    """Of each program on the CPU; by default as PyTorch chooses."""
    output: str | None = None
    """Write the results to this JSON file, or into this folder."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range.
        """
        _check(self, batch_size=100_000, tokens=100_000, rounds=1000, threads=4096, image_size=16_384)
        _check_each("sizes", self.sizes, 16_384)
        _check_each("lengths", self.lengths, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class BenchThroughputOptions:
    """Count pictures a second through the encoder in batches, and tokens a second in many rows."""

    loading: LoadOptions = field(default_factory=LoadOptions)
    image_size: int | None = None
    """Side of the pictures; by default what the model says."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Pictures that are encoded together; give it again for more."""
    rows: tuple[int, ...] = (1, 4, 16)
    """Rows that are written together; give it again for more."""
    tokens: int = 32
    """Tokens that are written in each row."""
    rounds: int = 3
    """How often everything is measured, behind once that is not counted."""
    threads: int | None = None
    """Of the program on the CPU; by default as PyTorch chooses."""
    output: str | None = None
    """Write the results to this JSON file, or into this folder."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range.
        """
        _check(self, tokens=100_000, rounds=1000, threads=4096, image_size=16_384)
        _check_each("batch_sizes", self.batch_sizes, 100_000)
        _check_each("rows", self.rows, 100_000)


@dataclass(frozen=True, kw_only=True)
class BenchPeersOptions:
    """Time the same answer by us and by others, in turns, on the same weights.

    Each is a process that loads once and then measures when its turn comes. All must compute the same function, or
    nothing is compared. The prompt is 15 tokens, the picture and 20 tokens; then tokens are written, stops ignored.
    """

    model: str = "0.5b"
    """A checkpoint; 0.5b, 1.5b and 7b are written with random weights, which take as long as real ones."""
    route: tuple[str, ...] = ("default",)
    """How ours runs: default, compile, openvino or compile+openvino; `ROUTE:FOLDER` takes another checkpoint of the
    same model, such as one that `fastvlm quantize` wrote. Give it again for more."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Format of our arithmetic."""
    image_size: int | None = None
    """Side of the picture; by default what the model says."""
    tokens: int = 64
    """Tokens that are written."""
    rounds: int = 5
    """How often each is measured, behind once that is not counted."""
    rival_python: str | None = None
    """An interpreter that has torch, transformers 5 and timm."""
    rival_dtype: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """Formats in which transformers is measured; large models do not fit several times."""
    rival_compile: bool = False
    """Measure transformers once more, its encoder compiled by inductor with frozen weights, in the format of ours."""
    openvino: str | None = None
    """A folder that `fastvlm export openvino` wrote of the same model, run by OpenVINO alone."""
    onnx: str | None = None
    """A folder that `fastvlm export onnx` wrote of the same model, run by ONNX Runtime alone."""
    llava_rounds: int = 2
    """How often LLaVA-OneVision-0.5B at 10 crops is measured, behind one crop that is not counted; 0 leaves it out."""
    threads: int | None = None
    """Of each program on the CPU; by default as PyTorch chooses."""
    output: str | None = None
    """Write the results to this JSON file, or into this folder."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            InputError: A value is out of its range.
        """
        _check(self, tokens=100_000, rounds=1000, threads=4096, image_size=16_384)
        if not 0 <= self.llava_rounds <= 1000:
            raise InputError(f"llava_rounds must be a whole number between 0 and 1000, got {self.llava_rounds!r}")
        if self.rival_compile and self.rival_python is None:
            raise InputError("rival_compile needs transformers; name its interpreter with --rival-python")
        for route in self.route:
            if route.partition(":")[0] not in ROUTES:
                raise InputError(f"route must be one of {', '.join(ROUTES)}, with or without :FOLDER, got {route!r}")


@dataclass(frozen=True, kw_only=True)
class BenchRooflineOptions:
    """Measure what the hardware can do, count what the model needs, and say how far each part is from that limit."""

    loading: LoadOptions = field(default_factory=LoadOptions)
    image_size: int | None = None
    """Side of the picture; by default what the model says."""
    seconds: float = 1.0
    """How long each ceiling is looked for."""
    rounds: int = 5
    """How often each part is measured, behind once that is not counted."""
    tokens: int = 16
    """Tokens that are written."""
    threads: int | None = None
    """Of the program on the CPU; by default as PyTorch chooses."""
    output: str | None = None
    """Write the results to this JSON file, or into this folder."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range.
        """
        _check(self, tokens=100_000, rounds=1000, threads=4096, image_size=16_384)
        if not 0.01 <= self.seconds <= 60:
            raise InputError(f"seconds must be between 0.01 and 60, got {self.seconds!r}")


@dataclass(frozen=True, kw_only=True)
class BenchPaperOptions:
    """Set FastViTHD beside the encoders of the paper: weights, operations, tokens, milliseconds here and in the paper.

    The others are built by timm with random weights; to first tokens leads Qwen2-0.5B, ours, after each of them.
    """

    rival_python: str
    """An interpreter that has torch and timm."""
    loading: LoadOptions = field(default_factory=LoadOptions)
    largest: int = 1024
    """Leave encoders out whose pictures have a longer side than this."""
    rounds: int = 3
    """How often each is measured, behind once that is not counted."""
    threads: int | None = None
    """Of each program on the CPU; by default as PyTorch chooses."""
    output: str | None = None
    """Write the results to this JSON file, or into this folder."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range.
        """
        _check(self, rounds=1000, threads=4096, largest=16_384)


@dataclass(frozen=True, kw_only=True)
class BenchPlotOptions:
    """Draw accuracy against time to first token: the paper's accuracies, the times that `bench paper` measured."""

    results: Annotated[Positional[str], arg(metavar="RESULTS")]
    """The JSON file that `fastvlm bench paper` wrote."""
    out: str = "accuracy-against-ttft"
    """The pictures to write, without `.png` and `.svg`."""


ROUTES: Final = ("default", "compile", "openvino", "compile+openvino")
"""How our own model runs: as it is loaded, with `--compile`, with `--engine openvino`, with both."""


def _check(options: object, **limits: int) -> None:
    """Check that each named field is None or a whole number from 1 to its limit."""
    for name, high in limits.items():
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high):
            raise InputError(f"{name} must be a whole number between 1 and {high}, got {value!r}")


def _check_each(name: str, values: tuple[int, ...], high: int) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise InputError(f"{name} must be whole numbers between 1 and {high}, got {value!r}")
