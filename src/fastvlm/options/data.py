"""What is drawn, fetched and looked at before training."""

from dataclasses import dataclass
from typing import Literal

from fastvlm.errors import InputError
from fastvlm.options.train import CAPTION_PROMPT, TrainOptions


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
    """Where the named pictures are; one folder for all --data, or one for each."""
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
