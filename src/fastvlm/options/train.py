"""What a training run does, and what it learns from."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from fastvlm.errors import InputError
from fastvlm.options.answer import SEEDS

FRESH: Final = "nano:fresh"
CAPTION_PROMPT: Final = "Describe the image."
Learning = Literal["full", "lora", "frozen"]
"""What learns of a part of a model."""


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
    """Where the named pictures are; one folder for all, or one for each --data and then for each --validation."""
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
    max_tokens: int = 320
    """Positions of a row, image embeddings included; longer samples are left out, drawn ones lose their end."""
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
            "seed": SEEDS,
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
        if self.dense and (set(self.data) != {"synth"} or self.learn_vision != "full"):
            raise InputError("--dense is for a vision encoder that learns in full from drawn pictures (--data synth)")
        if self.batch_norm == "learning" and self.learn_vision == "frozen":
            raise InputError("--batch-norm learning does not go together with --learn-vision frozen")
        if self.batch_norm == "learning" and self.learn_vision == "lora":
            raise InputError(
                "--batch-norm learning does not go together with --learn-vision lora: an adapter holds no statistics"
            )
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
    """Minutes between saved checkpoints."""
    max_bad_fraction: float = 0.01
    """Pairs that cannot be used are left out and listed in bad_samples.jsonl; a larger share of them ends the run."""
    max_skipped: int = 20
    """End the run after so many steps on end whose loss or gradient is not a finite number; each is skipped."""
    resume: bool = False
    """Go on from the state in the output folder, with the options that the run began with."""
    timeout: float = 600.0
    """Seconds after which another process, or a worker that reads pairs, is taken for dead."""
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
            "seed": SEEDS,
            "log_every": (1, 10**9),
            "save_minutes": (0, 1e9),
            "max_bad_fraction": (0, 1),
            "max_skipped": (1, 10**9),
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
