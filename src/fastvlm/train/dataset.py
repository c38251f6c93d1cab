"""From sources to examples: messages to token ids and labels, pictures to pixels or to features that were kept."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvlm.config import VisionConfig
from fastvlm.errors import InputError
from fastvlm.image import resize
from fastvlm.options import CAPTION_PROMPT
from fastvlm.prompt import IGNORE, Tokenizer, Tokens, tokenize
from fastvlm.train.conversations import Conversation, PictureFolder
from fastvlm.train.data import Example
from fastvlm.train.features import FeatureCache
from fastvlm.train.mixture import Order, Part
from fastvlm.train.skipped import is_too_many, too_many
from fastvlm.train.sources import Reading, Source, open_source

logger = logging.getLogger(__name__)
SURVEYED = 2_000
"""Samples that are looked at before a run begins."""


class ConversationDataset(Dataset[Example]):
    """The samples of all sources, numbered through; one that cannot be used is an `InputError` that says why."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        vision: VisionConfig,
        *,
        max_tokens: int | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        """Read samples for a model.

        Args:
            sources: Where they come from.
            tokenizer: Of the model.
            vision: How large its pictures are and how they are made square.
            max_tokens: Samples with more positions cannot be used; their answers would be cut off.
            cache: Features of pictures that a frozen encoder has seen before.
        """
        self.sources, self.tokenizer, self.vision = list(sources), tokenizer, vision
        self.max_tokens, self.cache = max_tokens, cache
        self.sizes = [len(source) for source in sources]
        self._ends = [sum(self.sizes[: i + 1]) for i in range(len(sources))]

    def __len__(self) -> int:
        """Samples of all sources."""
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """Changes when the samples or their order do."""
        return hashlib.sha256("\n".join(source.fingerprint for source in self.sources).encode()).hexdigest()

    def order(self, *, seed: int, length: int, weights: Sequence[float] | None = None) -> Order:
        """Say in which order a run draws the samples; see `Order`."""
        return Order(self.sizes, weights, seed=seed, length=length)

    def source_of(self, index: int) -> str:
        """Name the source of a sample."""
        return self._find(index)[0].name

    def origin(self, index: int) -> str:
        """Say where a sample stands: file and row."""
        source, at = self._find(index)
        return source.origin(at)

    def conversation(self, index: int) -> Conversation:
        """Read a sample without its pictures.

        Raises:
            InputError: It cannot be used.
        """
        source, at = self._find(index)
        try:
            return source.read(at)
        except InputError as error:
            raise InputError(f"{source.origin(at)}: {error}") from error
        except OSError as error:
            raise InputError(f"{source.origin(at)}: {(error.strerror or str(error)).lower()}") from error

    def tokens(self, index: int, conversation: Conversation) -> Tokens:
        """Make a conversation's token ids and labels.

        Raises:
            InputError: It is too long, or cannot be encoded.
        """
        num = self.vision.num_image_tokens
        try:
            tokens = tokenize(conversation.messages, self.tokenizer, num, add_generation_prompt=False)
        except InputError as error:
            raise InputError(f"{self.origin(index)}: {error}") from error
        if self.max_tokens is not None and len(tokens.token_ids) > self.max_tokens:
            raise InputError(
                f"{self.origin(index)}: {len(tokens.token_ids)} tokens, {num} for each of {len(conversation.pictures)} "
                f"pictures, are more than {self.max_tokens}; raise --max-tokens"
            )
        assert any(label != IGNORE for label in tokens.labels), "a conversation has an answer"
        return tokens

    def __getitem__(self, index: int) -> Example:
        """Read a sample with its pictures.

        Raises:
            InputError: It cannot be used: what it is, or one of its pictures.
        """
        conversation = self.conversation(index)
        tokens = self.tokens(index, conversation)
        try:
            pixels, features, keys = self._pictures(conversation)
        except InputError as error:
            raise InputError(f"{self.origin(index)}: {error}") from error
        return Example(
            pixels=pixels,
            token_ids=tokens.token_ids,
            labels=tokens.labels,
            task=self.source_of(index),
            features=features,
            keys=keys,
        )

    def survey(self, max_fraction: float) -> None:
        """Read some samples, spread over all, without their pictures, so that a run that cannot succeed does not begin.

        Raises:
            InputError: Too many of them cannot be used; see `is_too_many`.
        """
        size = len(self)
        chosen = range(size) if size <= SURVEYED else [i * size // SURVEYED for i in range(SURVEYED)]
        reasons = []
        unread: dict[str, list[int]] = {}
        for index in chosen:
            try:
                conversation = self.conversation(index)
                self.tokens(index, conversation)
            except InputError as error:
                reasons.append(str(error))
            else:
                for key in conversation.unread:
                    unread.setdefault(key, []).append(index)
        for key, found in unread.items():
            more = f", in {len(found)} of {len(chosen)} samples that were looked at" if len(found) > 1 else ""
            logger.warning(
                "%s: `%s` is not read, the answers are learned without it%s", self.origin(found[0]), key, more
            )
        if is_too_many(len(reasons), len(chosen), size, max_fraction):
            raise InputError(too_many(reasons, len(chosen), max_fraction))

    def _find(self, index: int) -> tuple[Source, int]:
        which = bisect_right(self._ends, index)
        return self.sources[which], index - (self._ends[which - 1] if which else 0)

    def _pictures(self, conversation: Conversation) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        """Give pixels `(P, 3, H, W)`, or the features `(P, N, C)` of all pictures; and their keys in the cache."""
        side = self.vision.image_size
        pixels = torch.zeros(0, 3, side, side, dtype=torch.uint8)
        pictures = conversation.pictures
        keys: tuple[str, ...] = ()
        if self.cache is not None and pictures:
            keys = tuple(self.cache.key(picture.read_bytes()) for picture in pictures)
            kept = [self.cache.load(key) for key in keys]
            if all(features is not None for features in kept):
                return pixels, torch.stack([features for features in kept if features is not None]), keys
        if pictures:
            squares = [resize(picture.read(), size=side, fit=self.vision.fit) for picture in pictures]
            pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
        return pixels, None, keys


def open_dataset(  # noqa: PLR0913  (how samples become examples)
    parts: Sequence[Part],
    tokenizer: Tokenizer,
    vision: VisionConfig,
    *,
    max_tokens: int | None = None,
    caption_prompt: str = CAPTION_PROMPT,
    allow_absolute: bool = False,
    cache: FeatureCache | None = None,
) -> ConversationDataset:
    """Open the sources that the user names.

    Raises:
        InputError: One of them is not there, or nothing that is read.
    """
    sources: list[Source] = []
    for part in parts:
        images = PictureFolder(folder=Path(part.images), allow_absolute=allow_absolute)
        sources.append(open_source(part.path, Reading(images=images, caption_prompt=caption_prompt)))
    return ConversationDataset(sources, tokenizer, vision, max_tokens=max_tokens, cache=cache)
