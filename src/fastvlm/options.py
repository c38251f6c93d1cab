"""What one run does: a frozen dataclass a command; its fields are the command's flags, its docstrings their help."""

from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, get_args

from tyro.conf import Positional, arg

from fastvlm.config import FITS, Fit
from fastvlm.errors import InputError

FRESH: Final = "nano:fresh"
CAPTION_PROMPT: Final = "Describe the image."
Learning = Literal["full", "lora", "frozen"]
"""What learns of a part of a model."""
_SEEDS: Final = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a model on conversations about pictures, in one process."""

    output: str
    """Folder for the trained checkpoint, its training state and the log."""
    stage: Literal["1", "1.5", "2", "3", "lora"] | None = None
    """Take the values of a stage of the paper's recipe, or of LLaVA's lora; 0 is `fastvlm pretrain`."""
    config: str | None = None
    """A TOML file whose keys are these flags; flags come before it, it comes before the stage."""
    data: tuple[str, ...] = ("synth",)
    """`synth` draws nano's pictures; otherwise files or folders of samples (docs/data.md), as NAME or NAME:WEIGHT."""
    image_folder: tuple[str, ...] = (".",)
    """Where the pictures that the files name are; one for all --data, or one for each."""
    allow_absolute_paths: bool = False
    """Let rows name pictures by their whole path, anywhere on this machine."""
    caption_prompt: str = CAPTION_PROMPT
    """What is asked about pictures that have only a caption."""
    max_bad_fraction: float = 0.01
    """Samples that cannot be used are left out and listed in bad_samples.jsonl; a larger share of them ends the run."""
    pack: bool = False
    """Put several conversations into a row of --max-tokens positions; they do not see one another."""
    feature_cache: str | None = None
    """With a frozen vision encoder: a folder that keeps its features, so that no picture is encoded twice."""
    feature_cache_gb: float = 50.0
    """The folder of features never takes more."""
    model: str = FRESH
    """A checkpoint to go on from, or `nano:fresh` for random weights."""
    encoder: str | None = None
    """Instead of --model, with --language: a vision encoder to start from, as Apple, MobileCLIP or timm name it."""
    language: str | None = None
    """Instead of --model, with --encoder: a Qwen2 folder to start from; the projector between them is fresh."""
    image_size: int | None = None
    """Side of the square that the encoder sees; by default what the model says."""
    assets: str | None = None
    """Folder of fonts and emoji for `synth`; by default the one that `fastvlm data assets` fills."""
    steps: int = 12_000
    """Optimizer steps of the whole run."""
    epochs: float | None = None
    """Instead of --steps: how often all of --data is learned."""
    minutes: float | None = None
    """Let the schedule follow the clock instead, and end after so many minutes."""
    batch_size: int = 256
    """Conversations a step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for the matrices (arXiv 2502.16982), which from scratch learns faster."""
    dense: float = 0.0
    """With drawn pictures: weight of a loss by which the vision encoder learns what is where; 0.5 trained nano."""
    lr: float = 1e-3
    """Highest learning rate; warms up, then follows a cosine to zero."""
    warmup: float = 0.03
    """Share of the run in which the learning rate rises."""
    weight_decay: float = 0.05
    """Decay of matrices and kernels."""
    max_tokens: int = 192
    """Positions of a row, image embeddings included."""
    workers: int = 2
    """Processes that draw or read pictures; 0 does it between the steps."""
    learn_vision: Learning = "full"
    """Whether the vision encoder's weights all learn (full), low-rank updates of them (lora) or nothing (frozen)."""
    learn_projector: Learning = "full"
    """The same of the projector."""
    learn_language: Learning = "full"
    """The same of the language model."""
    vision_lr: float | None = None
    """Highest learning rate of the vision encoder; by default --lr."""
    projector_lr: float | None = None
    """Highest learning rate of the projector; by default --lr."""
    language_lr: float | None = None
    """Highest learning rate of the language model; by default --lr."""
    batch_norm: Literal["auto", "frozen", "learning"] = "auto"
    """Whether BatchNorm's statistics follow the data; auto is learning for nano:fresh, else frozen."""
    lora_rank: int = 16
    """Rank of the updates of parts that learn by lora (arXiv 2106.09685)."""
    lora_alpha: float = 32.0
    """The updates are scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Share of an update's inputs that is dropped while learning."""
    accumulate: int = 1
    """Compute a step's conversations in so many pieces: the same step in less memory."""
    clip: float = 1.0
    """Longest gradient; a longer one is shortened to it."""
    checkpoint_activations: bool = False
    """Compute activations again when they are needed instead of keeping them: slower, in much less memory."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: each process has the whole model (ddp), or its share of weights and moments (fsdp)."""
    timeout: float = 600.0
    """Seconds after which a process, or a worker that reads data, is taken for dead."""
    seed: int = 0
    """Of the first weights and of the order and content of the data."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of the arithmetic, a frozen encoder's too; the weights that learn are float32."""
    compile: bool = False
    """Compile the step with torch.compile: faster after a minute or more."""
    log_every: int = 20
    """Steps between lines of the log."""
    validation: tuple[str, ...] = ()
    """Conversations that are not learned, as --data names them: their loss is measured, the first are answered."""
    validate_every: int = 500
    """Steps between validations."""
    validation_samples: int = 256
    """Most conversations of a validation's loss."""
    shown_answers: int = 4
    """Answers that each validation writes to samples.jsonl."""
    tensorboard: bool = False
    """Write the curves for TensorBoard too, to tensorboard/ in the output folder (extra `train`)."""
    wandb: bool = False
    """Send the curves to Weights & Biases too, where `wandb` is installed."""
    save_minutes: float = 5.0
    """Minutes between saved checkpoints."""
    save_steps: int | None = None
    """Save after so many steps instead."""
    keep: int = 2
    """Saved checkpoints that are kept, the newest."""
    max_skipped: int = 20
    """End the run after so many steps on end whose loss or gradient is not a finite number; each is skipped."""
    resume: bool = False
    """Go on from the state in the output folder, with the options that the run began with."""
    allow_change: bool = False
    """Resume although options or data are not those that the run began with."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            InputError: A value is out of its range, or two contradict each other.
        """
        wholes: dict[str, tuple[int, int]] = {
            "lora_rank": (1, 65_536),
            "accumulate": (1, 1_000_000),
            "validate_every": (1, 10**9),
            "validation_samples": (1, 10**9),
            "shown_answers": (0, 1000),
            "keep": (1, 1_000_000),
            "max_skipped": (1, 10**9),
            "steps": (1, 10**9),
            "batch_size": (1, 1_000_000),
            "max_tokens": (1, 1_000_000),
            "workers": (0, 1024),
            "seed": _SEEDS,
            "log_every": (1, 10**9),
        }
        numbers: dict[str, tuple[float, float]] = {
            "epochs": (1e-9, 1e6),
            "minutes": (1e-6, 1e6),
            "lr": (1e-12, 1e3),
            "vision_lr": (1e-12, 1e3),
            "projector_lr": (1e-12, 1e3),
            "language_lr": (1e-12, 1e3),
            "lora_alpha": (1e-6, 1e6),
            "lora_dropout": (0, 0.999),
            "clip": (1e-9, 1e9),
            "timeout": (1, 1e7),
            "warmup": (0, 0.999),
            "weight_decay": (0, 1e3),
            "save_minutes": (0, 1e9),
            "max_bad_fraction": (0, 1),
            "feature_cache_gb": (0, 1e6),
            "dense": (0, 1e3),
        }
        for name, (low, high) in wholes.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number between {low} and {high}, got {value!r}")
        for name, (least, most) in numbers.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(f"{name} must be between {least} and {most}, got {value!r}")
        if self.image_size is not None and not 1 <= self.image_size <= 16_384:
            raise InputError(f"image_size must be between 1 and 16384, got {self.image_size}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"dtype must be auto, float32 or bfloat16 for training, got {self.dtype!r}")
        if self.save_steps is not None and not 1 <= self.save_steps <= 10**9:
            raise InputError(f"save_steps must be between 1 and 10^9, got {self.save_steps}")
        if self.batch_size % self.accumulate:
            raise InputError(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        learning = (self.learn_vision, self.learn_projector, self.learn_language)
        if unknown := [mode for mode in learning if mode not in get_args(Learning)]:
            raise InputError(f"a part learns full, lora or is frozen, got {unknown[0]!r}")
        if set(learning) == {"frozen"}:
            raise InputError("vision encoder, projector and language model are all frozen: nothing would learn")
        if "lora" in learning and self.model == FRESH:
            raise InputError("low-rank updates (lora) need a --model with weights to update")
        if self.learn_language == "full" and "lora" in learning:
            raise InputError(
                "with a language model that learns in full there is no small adapter; let it learn by lora"
            )
        if self.optimizer not in ("adamw", "muon"):
            raise InputError(f"optimizer must be adamw or muon, got {self.optimizer!r}")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise InputError("--optimizer muon needs whole matrices: it does not go together with --parallel fsdp")
        if self.dense and (self.data != ("synth",) or self.learn_vision != "full"):
            raise InputError("--dense is for a vision encoder that learns in full from drawn pictures (--data synth)")
        if self.batch_norm == "learning" and self.learn_vision == "frozen":
            raise InputError("--batch-norm learning does not go together with --learn-vision frozen")
        if (self.encoder is None) != (self.language is None):
            raise InputError("--encoder and --language go together: give both, or --model")
        if self.encoder is not None and self.model != FRESH:
            raise InputError(f"--model {self.model!r} does not go together with --encoder and --language")


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Pretrain a vision encoder on pictures and their captions: stage 0, as CLIP, without teachers.

    The result is a folder that `fastvlm train --encoder` takes, and that timm reads.
    """

    output: str
    """Folder for the encoder, the text tower, the training state and the log."""
    config: str | None = None
    """A TOML file whose keys are these flags; flags come before it."""
    data: tuple[str, ...]
    """What `fastvlm train --data` reads; of each sample the first picture and what is said of it last count."""
    image_folder: str = "."
    """Where the pictures that the files name are."""
    encoder: str = "mci3"
    """mci3 (FastViTHD), mci4 or nano for random weights; or an encoder file or folder to go on from."""
    image_size: int = 256
    """Side of the square that the encoder sees."""
    clip_dim: int = 768
    """Width of the embedding in which pictures and captions meet; an encoder that has one keeps its own."""
    text_dim: int = 512
    """Width of the text tower, a multiple of 64."""
    text_layers: int = 12
    """Layers of the text tower."""
    max_tokens: int = 77
    """Most tokens of a caption; the rest of a longer one is not read."""
    steps: int = 10_000
    """Optimizer steps of the whole run."""
    batch_size: int = 1024
    """Pairs a step, in all processes; every other caption of the batch is a wrong one, so more are better."""
    lr: float = 1e-3
    """Highest learning rate of AdamW; warms up, then follows a cosine to zero."""
    warmup: float = 0.01
    """Share of the run in which the learning rate rises."""
    weight_decay: float = 0.2
    """Decay of matrices and kernels."""
    min_crop: float = 0.6
    """Least share of a picture's area that is shown while learning, at a random place; 1 shows all of it."""
    heldout: int = 1000
    """Pairs that are never learned, on which recall is measured at the end; at most a tenth of all."""
    workers: int = 2
    """Processes that read pictures; 0 reads them between the steps."""
    seed: int = 0
    """Of the first weights, the order, the crops and which pairs are held out."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of the arithmetic; the weights that learn are float32."""
    log_every: int = 20
    """Steps between lines of the log."""
    save_minutes: float = 10.0
    """Minutes between saved states."""
    resume: bool = False
    """Go on from the state in the output folder, with the options that the run began with."""
    timeout: float = 600.0
    """Seconds after which another process is taken for dead."""
    quiet: bool = False
    """No progress lines."""

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            InputError: A value is out of its range.
        """
        ranges: dict[str, tuple[float, float]] = {
            "image_size": (1, 16_384),
            "clip_dim": (1, 65_536),
            "text_dim": (64, 65_536),
            "text_layers": (1, 1024),
            "max_tokens": (2, 32_768),
            "steps": (1, 10**9),
            "batch_size": (2, 1_000_000),
            "lr": (1e-12, 1e3),
            "warmup": (0, 0.999),
            "weight_decay": (0, 1e3),
            "min_crop": (0.01, 1),
            "heldout": (0, 1_000_000),
            "workers": (0, 1024),
            "seed": _SEEDS,
            "log_every": (1, 10**9),
            "save_minutes": (0, 1e9),
            "timeout": (1, 1e7),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise InputError(f"{name} must be between {low} and {high}, got {value!r}")
        if self.text_dim % 64:
            raise InputError(f"text_dim must be a multiple of 64, the width of a head, got {self.text_dim}")
        if not self.data:
            raise InputError("no data given; name files or folders of pictures and captions with --data")


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
                raise InputError(f"{name} must be between {low} and {high}, got {value!r}")
        if 0 < self.temperature < 1e-3:
            raise InputError(f"temperature must be 0 or at least 0.001, got {self.temperature!r}")
        if self.seed is not None and not _SEEDS[0] <= self.seed <= _SEEDS[1]:
            raise InputError(f"seed must be between {_SEEDS[0]} and {_SEEDS[1]}, got {self.seed}")
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
    """Format of the weights; auto is bfloat16 where the hardware multiplies it, else float32."""


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
    that docs/export.md names."""
    image_size: int | None = None
    """Side in pixels of the square that the encoder sees; by default what the model says."""
    batch: Literal["1", "dynamic"] | None = None
    """Whether the encoder takes one picture or several at once; by default one in coreml, whose Neural Engine wants
    fixed shapes, and any number elsewhere."""
    with_projector: bool = False
    """Put the projector behind the encoder of coreml, whose readers expect features; other formats have it there."""
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


@dataclass(frozen=True, kw_only=True)
class DataSynthOptions:
    """Draw nano's pictures and questions: a folder of pictures and a LLaVA JSON that `fastvlm train --data` reads."""

    out: str
    """The folder to write."""
    num: int = 100
    """How many pictures."""
    seed: int = 0
    """The same seed draws the same pictures."""
    split: Literal["train", "heldout"] = "train"
    """`heldout` uses fonts, words and wordings that training never sees."""
    task: Literal["counting", "reading", "emoji", "description", "yes_no", "colour", "place"] | None = None
    """Draw one task only."""
    image_size: int = 384
    """Pictures are about as large as this: the side that the model will see."""
    assets: str | None = None
    """Folder of fonts and emoji; by default the one that `fastvlm data assets` fills."""
    preview: bool = False
    """Also write preview.png, a contact sheet of the first pictures."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range.
        """
        if not 1 <= self.num <= 10_000_000:
            raise InputError(f"num must be between 1 and 10000000, got {self.num}")
        if not 64 <= self.image_size <= 4096:
            raise InputError(f"image_size must be between 64 and 4096, got {self.image_size}")


@dataclass(frozen=True, kw_only=True)
class DataAssetsOptions:
    """Fetch the pinned fonts, emoji and words that nano's pictures are drawn from (needs npm)."""

    folder: str | None = None
    """Where they go; by default FASTVLM_ASSETS, or a folder of this user's cache."""
    update_lock: bool = False
    """Maintenance: after a version in src/fastvlm/synth/assets.json was changed, write each package's sha256 there."""
    quiet: bool = False
    """No progress lines."""


@dataclass(frozen=True, kw_only=True)
class DataCheckOptions:
    """Show samples as a model will see them, what is learned of them and what is not, and count what is wrong.

    The flags are those of `fastvlm train`. Exit status 2 when more than --max-bad-fraction cannot be used.
    """

    data: tuple[str, ...]
    """A file or folder of samples (docs/data.md), as NAME or NAME:WEIGHT; give it again for more."""
    image_folder: tuple[str, ...] = TrainOptions.image_folder
    """Where the pictures that the files name are; one for all --data, or one for each."""
    allow_absolute_paths: bool = False
    """Let rows name pictures by their whole path, anywhere on this machine."""
    caption_prompt: str = CAPTION_PROMPT
    """What is asked about pictures that have only a caption."""
    max_bad_fraction: float = TrainOptions.max_bad_fraction
    """Share of samples that may be unusable."""
    max_tokens: int = TrainOptions.max_tokens
    """Positions of a row, image embeddings included; longer samples cannot be used."""
    model: str = "nano"
    """Whose tokenizer and picture size: short name, hub id, or a folder with a checkpoint."""
    image_size: int | None = None
    """Side of the square that the encoder sees; by default what the model says."""
    show: tuple[int, ...] = ()
    """Show the sample of this number, counted from 0 through all data; give it again for more. By default 3 of them."""
    limit: int | None = None
    """Check at most so many samples, spread over all."""
    skip_pictures: bool = False
    """See only that the pictures are there, without decoding them."""
    workers: int = TrainOptions.workers
    """Processes that read; 0 reads in the main one."""
    json: bool = False
    """Print one JSON object instead of the text."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        """Check each number's range.

        Raises:
            InputError: A value is out of its range.
        """
        ranges = {"max_tokens": (1, 1_000_000), "workers": (0, 1024), "limit": (1, 10**9), "max_bad_fraction": (0, 1)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} must be between {low} and {high}, got {value!r}")


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
