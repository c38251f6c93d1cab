"""From pictures and conversations to batches.

Letters: `P` images, `H, W` pixels, `B` rows, `T` tokens.
"""

import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvlm.config import VisionConfig
from fastvlm.errors import FastVLMError, InputError
from fastvlm.image import resize
from fastvlm.prompt import IGNORE, Message, Tokenizer, assistant, tokenize, user
from fastvlm.synth.assets import read_assets
from fastvlm.synth.studio import SHARES, Studio


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation about some pictures, ready to be put into a batch."""

    pixels: Tensor
    """uint8, `(P, 3, H, W)`."""
    token_ids: list[int]
    labels: list[int]
    task: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the right, so that causal attention needs no mask."""

    pixels: Tensor
    """uint8, `(P, 3, H, W)`: the pictures of all rows in reading order."""
    token_ids: Tensor
    """`(B, T)`."""
    labels: Tensor
    """`(B, T)`, `IGNORE` where nothing is learned."""
    tasks: tuple[str, ...]

    def pin_memory(self) -> "Batch":
        """Let the loader copy to a GPU while the GPU computes."""
        return Batch(
            pixels=self.pixels.pin_memory(),
            token_ids=self.token_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            tasks=self.tasks,
        )


class SynthDataset(Dataset[Example]):
    """Drawn pictures: example `i` is a pure function of the seed and `i`."""

    def __init__(self, assets: Path, tokenizer: Tokenizer, vision: VisionConfig, *, seed: int, length: int) -> None:
        self.assets, self.tokenizer, self.vision = assets, tokenizer, vision
        self.seed, self.length = seed, length
        self._studio: Studio | None = None  # made in the process that draws
        self._tasks = list(SHARES)
        self._shares = np.cumsum(list(SHARES.values()))

    def __len__(self) -> int:
        """How many examples a run may ask for."""
        return self.length

    def __getitem__(self, index: int) -> Example:
        """Draw example `index`."""
        if self._studio is None:
            self._studio = Studio(read_assets(self.assets), side=self.vision.image_size)
        unit = zlib.crc32(f"{self.seed}/{index}".encode()) / 2**32
        task = self._tasks[min(int(np.searchsorted(self._shares, unit, side="right")), len(self._tasks) - 1)]
        sample = self._studio.sample(self.seed * 1_000_000_007 + index, split="train", task=task)
        square = resize(sample.image, size=self.vision.image_size, fit=self.vision.fit)  # (H, W, 3)
        messages: list[Message] = []
        for turn in sample.turns:
            messages += [user(turn.question, num_images=0 if messages else 1), assistant(turn.answer)]
        tokens = tokenize(messages, self.tokenizer, self.vision.num_image_tokens, add_generation_prompt=False)
        pixels = torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))[None]
        return Example(pixels=pixels, token_ids=tokens.token_ids, labels=tokens.labels, task=task)


def collate(  # noqa: PLR0913  (how rows are padded and checked)
    examples: Sequence[Example],
    *,
    max_tokens: int,
    pad_id: int,
    image_id: int,
    num_image_tokens: int,
    is_fixed: bool = False,
) -> Batch:
    """Put examples into one batch of rows as long as the longest; what is over `max_tokens` loses its end.

    Args:
        examples: What to put together.
        max_tokens: Most positions of a row.
        pad_id: What stands behind a row's end.
        image_id: The placeholder, to be counted.
        num_image_tokens: Placeholders a picture.
        is_fixed: Make every row `max_tokens` long, so that a compiled step sees one shape.

    Raises:
        InputError: The pictures of an example do not match its placeholders, or do not fit into `max_tokens`.
    """
    width = max_tokens if is_fixed else min(max_tokens, max(len(example.token_ids) for example in examples))
    token_ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORE)
    for row, example in enumerate(examples):
        kept = min(len(example.token_ids), max_tokens)
        num_slots = example.token_ids[:kept].count(image_id)
        if num_slots != len(example.pixels) * num_image_tokens:
            raise InputError(
                f"an example of {len(example.token_ids)} tokens has {num_slots} image placeholders in its first "
                f"{kept}, its {len(example.pixels)} pictures make {len(example.pixels) * num_image_tokens}; "
                f"raise max_tokens"
            )
        token_ids[row, :kept] = torch.tensor(example.token_ids[:kept])
        labels[row, :kept] = torch.tensor(example.labels[:kept])
    return Batch(
        pixels=torch.cat([example.pixels for example in examples]),
        token_ids=token_ids,
        labels=labels,
        tasks=tuple(example.task for example in examples),
    )


class _Caught(Dataset[Example | FastVLMError]):
    """Gives an error as a value: raised in a worker process, it would arrive as a page of traceback."""

    def __init__(self, dataset: Dataset[Example]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Example | FastVLMError:
        try:
            return self.dataset[index]
        except FastVLMError as error:
            return error


def _collate_caught(
    items: Sequence[Example | FastVLMError], *, collate_fn: Callable[[Sequence[Example]], Batch]
) -> Batch | FastVLMError:
    examples: list[Example] = []
    for item in items:
        if isinstance(item, FastVLMError):
            return item
        examples.append(item)
    try:
        return collate_fn(examples)
    except FastVLMError as error:
        return error


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears Ctrl-C too, and ends the workers
    torch.set_num_threads(1)


def batches(  # noqa: PLR0913  (how to read, in what order, in how many processes)
    dataset: Dataset[Example],
    *,
    indices: Sequence[int],
    batch_size: int,
    num_workers: int,
    collate_fn: Callable[[Sequence[Example]], Batch],
    pin: bool,
) -> Iterator[Batch]:
    """Read `indices` in order, `batch_size` at a time, in worker processes where there are any.

    Raises:
        FastVLMError: An example cannot be made; the same error in a worker process as in this one.
    """
    loader: DataLoader[Example | FastVLMError] = DataLoader(
        _Caught(dataset),
        batch_size=batch_size,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=partial(_collate_caught, collate_fn=collate_fn),
        drop_last=True,
        pin_memory=pin,
        worker_init_fn=_start_worker if num_workers else None,
        prefetch_factor=2 if num_workers else None,
        persistent_workers=False,
    )
    for item in loader:
        if isinstance(item, FastVLMError):
            raise item
        yield item
