"""Pictures and their captions for stage 0: which pair comes when, how it is read, and batches of them.

The order of the pairs and their crops are functions of the seed and of how many came before: a run can go on anywhere.

Letters: `P` pictures, as many as captions; `H, W` pixels; `T` tokens.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvlm.errors import InputError
from fastvlm.image import resize
from fastvlm.options import PretrainOptions
from fastvlm.prompt import Tokenizer
from fastvlm.train.data import alive, start_worker
from fastvlm.train.skipped import BadSample, Ledger
from fastvlm.train.sources import Source


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture and its caption."""

    pixels: Tensor
    """uint8, `(3, H, W)`."""
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows of equal number: captions padded on the right. There may be none."""

    pixels: Tensor
    """uint8, `(P, 3, H, W)`."""
    token_ids: Tensor
    """`(P, T)`."""
    lengths: Tensor
    """`(P,)`."""
    num_drawn: int
    """How many pairs of the order went into the batch, those that were left out included."""
    bad: tuple[BadSample, ...] = ()
    """What was left out."""

    def first(self, num: int) -> "Pairs":
        """Keep the first so many pairs."""
        return Pairs(
            pixels=self.pixels[:num],
            token_ids=self.token_ids[:num],
            lengths=self.lengths[:num],
            num_drawn=self.num_drawn,
            bad=self.bad,
        )


class PairDataset(Dataset[Pair | BadSample]):
    """Pairs of several sources by number; one that cannot be used is a `BadSample`."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, options: PretrainOptions, size: int) -> None:
        """Take sources that stand one behind another, and the side of the pictures."""
        self.sources, self.tokenizer, self.options, self.size = sources, tokenizer, options, size

    def __len__(self) -> int:
        """Pairs of all sources."""
        return sum(map(len, self.sources))

    def __getitem__(self, item: tuple[int, int | None]) -> Pair | BadSample:
        """Read pair `item[0]`; crop it as the number `item[1]` of the run, or show all of it."""
        index, number = item
        source, row = locate(self.sources, index)
        try:
            image, caption = _read(source, row)
            token_ids = self.tokenizer.encode_text(caption)[: self.options.max_tokens - 1]
        except (InputError, OSError) as error:
            reason = " ".join(str(error).split())
            return BadSample(index=index, offset=0, reason=f"{source.origin(row)}: {reason}")
        if number is not None:
            image = _cropped(image, random.Random(f"{self.options.seed}/{number}"), self.options.min_crop)
        square = resize(image, size=self.size, fit="pad")  # (H, W, 3)
        pixels = torch.from_numpy(square.copy()).permute(2, 0, 1)
        return Pair(pixels=pixels, token_ids=[*token_ids, self.tokenizer.end_of_text_id])

    def source_of(self, index: int) -> str:
        """Name the source of a pair."""
        return locate(self.sources, index)[0].name


def locate(sources: Sequence[Source], index: int) -> tuple[Source, int]:
    """Find the source of pair `index`, the sources standing one behind another, and its number there."""
    for source in sources:
        if index < len(source):
            return source, index
        index -= len(source)
    raise IndexError(index)


def caption_of(messages: Sequence[Any]) -> str:
    """What is said of the picture last.

    Raises:
        InputError: Nothing is.
    """
    text = "".join(part for part in messages[-1].content if isinstance(part, str)) if messages else ""
    if not text.strip():
        raise InputError("no caption")
    return text.strip()


def _read(source: Source, row: int) -> tuple[Image.Image, str]:
    conversation = source.read(row)
    caption = caption_of(conversation.messages)
    if not conversation.pictures:
        raise InputError("no picture")
    return conversation.pictures[0].read(), caption


def _cropped(image: Image.Image, rng: random.Random, min_crop: float) -> Image.Image:
    """A random part of a picture, as wide for its height as the whole."""
    side = math.sqrt(rng.uniform(min_crop, 1.0))
    width, height = (max(1, round(side * extent)) for extent in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def split(total: int, heldout: int, seed: int) -> tuple[list[int], list[int]]:
    """Choose which pairs are learned and which, at most a tenth, only measured; a function of the seed."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(heldout, total // 10)
    return order[count:], order[:count]


def order_of(learned: Sequence[int], seed: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Give the pairs that come as numbers `first` to `last` of the run, each with its number.

    Epochs stand behind one another, each in an order of its own.
    """
    for epoch in range(first // len(learned), -(-last // len(learned))):
        order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        begin = epoch * len(learned)
        yield from ((learned[i], begin + k) for k, i in enumerate(order) if first <= begin + k < last)


def batches(
    dataset: PairDataset,
    items: Iterable[tuple[int, int | None]],
    batch_size: int,
    *,
    drop_last: bool,
    ledger: Ledger | None = None,
) -> Iterator[Pairs]:
    """Read pairs in order, in worker processes where there are any; a batch is smaller by what cannot be used.

    Args:
        dataset: What to read.
        items: Which pairs, each with its number in the run, or None to show all of the picture.
        batch_size: Pairs a batch.
        drop_last: Leave a last batch that is smaller.
        ledger: Counts the pairs that cannot be used; without one they are left out.

    Raises:
        InputError: Too many pairs cannot be used.
        TrainingError: A worker process died or hangs.
    """
    workers = dataset.options.workers
    loader: DataLoader[Pair | BadSample] = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=items,
        num_workers=workers,
        collate_fn=partial(_collate, pad_id=dataset.tokenizer.end_of_text_id, size=dataset.size),
        drop_last=drop_last,
        worker_init_fn=start_worker if workers else None,
        timeout=dataset.options.timeout if workers else 0,
        generator=torch.Generator(),  # or it would draw from the one that a resumed run goes on with
    )
    for batch in alive(loader):
        if ledger is not None:
            ledger.take(batch.num_drawn, batch.bad)
        yield batch


def _collate(items: Sequence[Pair | BadSample], pad_id: int, size: int) -> Pairs:
    pairs = [item for item in items if isinstance(item, Pair)]
    width = max((len(pair.token_ids) for pair in pairs), default=1)
    rows = [pair.token_ids + [pad_id] * (width - len(pair.token_ids)) for pair in pairs]
    no_pixels = torch.zeros(0, 3, size, size, dtype=torch.uint8)
    return Pairs(
        pixels=torch.stack([pair.pixels for pair in pairs]) if pairs else no_pixels,
        token_ids=torch.tensor(rows, dtype=torch.long).view(len(pairs), width),
        lengths=torch.tensor([len(pair.token_ids) for pair in pairs], dtype=torch.long),
        num_drawn=len(items),
        bad=tuple(
            BadSample(index=item.index, offset=offset, reason=item.reason)
            for offset, item in enumerate(items)
            if isinstance(item, BadSample)
        ),
    )
