"""From pictures and conversations to batches.

Letters: `P` images, `H, W` pixels, `N` positions, `C` channels of vision, `B` rows, `T` tokens.
"""

import os
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvlm.config import VisionConfig
from fastvlm.errors import FastVLMError, InputError, TrainingError
from fastvlm.image import resize
from fastvlm.prompt import IGNORE, Message, Tokenizer, assistant, tokenize, user
from fastvlm.synth.assets import read_assets
from fastvlm.synth.marks import labels as mark_labels
from fastvlm.synth.studio import SHARES, Studio
from fastvlm.train.marks import encode_marks
from fastvlm.train.packing import pack
from fastvlm.train.skipped import BadSample, Ledger

WORKER_TIMEOUT: Final = 600.0
"""Seconds that a worker process may take for a batch before it is taken to hang."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation about some pictures, ready to be put into a batch."""

    pixels: Tensor
    """uint8, `(P, 3, H, W)`; no pictures where there are `features`."""
    token_ids: list[int]
    labels: list[int]
    task: str
    features: Tensor | None = None
    """What a frozen encoder made of the pictures before, `(P, N, C)`."""
    keys: tuple[str, ...] = ()
    """Names of the pictures in the cache of features, where there is one."""
    marks: Tensor | None = None
    """What is where in the picture, where that is known, `(1, M, 3)`; see `marks`."""

    @property
    def num_pictures(self) -> int:
        """How many pictures the conversation shows."""
        return len(self.pixels) if self.features is None else len(self.features)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the right, so that causal attention needs no mask unless a row holds several conversations."""

    pixels: Tensor
    """uint8, `(P, 3, H, W)`: the pictures of all rows in reading order, but for those whose features are kept."""
    token_ids: Tensor
    """`(B, T)`."""
    labels: Tensor
    """`(B, T)`, `IGNORE` where nothing is learned."""
    tasks: tuple[str, ...]
    """What each row is of."""
    num_samples: int
    """How many samples of the order went into the batch, those that were left out included."""
    segments: Tensor | None = None
    """Which of a row's conversations a token belongs to, `(B, T)`; None where each row is one conversation."""
    features: Tensor | None = None
    """Features that are kept, `(P, N, C)`; of all pictures when `missing` is empty."""
    missing: tuple[int, ...] = ()
    """Where among all pictures those of `pixels` stand, when there is a cache of features; `keys` are their names."""
    keys: tuple[str, ...] = ()
    marks: Tensor | None = None
    """What is where in each picture, `(P, M, 3)`, where that is known of all."""
    bad: tuple[BadSample, ...] = ()
    """What was left out."""

    def pin_memory(self) -> "Batch":
        """Let the loader copy to a GPU while the GPU computes."""
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            token_ids=self.token_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            segments=None if self.segments is None else self.segments.pin_memory(),
            marks=None if self.marks is None else self.marks.pin_memory(),
        )


class SynthDataset(Dataset[Example]):
    """Drawn pictures: example `i` is a pure function of the seed and `i`."""

    def __init__(self, assets: Path, tokenizer: Tokenizer, vision: VisionConfig, *, seed: int, length: int) -> None:
        self.assets, self.tokenizer, self.vision = assets, tokenizer, vision
        self.seed, self.length = seed, length
        self._studio: Studio | None = None  # made in the process that draws
        self._tasks = list(SHARES)
        self._shares = np.cumsum(list(SHARES.values()))
        self._labels = {label: i for i, label in enumerate(mark_labels())}

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
        marks = encode_marks(sample.marks, self._labels, sample.image.size)[None]
        return Example(pixels=pixels, token_ids=tokens.token_ids, labels=tokens.labels, task=task, marks=marks)


def collate(  # noqa: PLR0913  (how rows are padded and checked)
    examples: Sequence[Example],
    *,
    max_tokens: int,
    pad_id: int,
    image_id: int,
    num_image_tokens: int,
    is_fixed: bool = False,
    is_packed: bool = False,
    image_size: int = 64,
) -> Batch:
    """Put examples into one batch of rows as long as the longest; what is over `max_tokens` loses its end.

    Args:
        examples: What to put together; none makes a batch of one row in which nothing is learned.
        max_tokens: Most positions of a row.
        pad_id: What stands behind a row's end.
        image_id: The placeholder, to be counted.
        num_image_tokens: Placeholders a picture.
        is_fixed: Make every row `max_tokens` long, so that a compiled step sees one shape.
        is_packed: Put several conversations into a row, as far as they fit; see `packing`.
        image_size: Side of the pictures, for a batch that has none.

    Raises:
        InputError: The pictures of an example do not match its placeholders, or do not fit into `max_tokens`.
    """
    lengths = [min(len(example.token_ids), max_tokens) for example in examples]
    rows = pack(lengths, max_tokens) if is_packed else [[i] for i in range(len(examples))]
    width = max_tokens if is_fixed else max((sum(lengths[i] for i in row) for row in rows), default=1)
    token_ids = torch.full((max(1, len(rows)), width), pad_id)
    labels = torch.full_like(token_ids, IGNORE)
    segments = torch.full_like(token_ids, -1) if is_packed else None
    for at, row in enumerate(rows):
        begin = 0
        for number, i in enumerate(row):
            kept = _check_slots(examples[i], lengths[i], image_id, num_image_tokens)
            token_ids[at, begin : begin + kept] = torch.tensor(examples[i].token_ids[:kept])
            labels[at, begin : begin + kept] = torch.tensor(examples[i].labels[:kept])
            if segments is not None:
                segments[at, begin : begin + kept] = number
                labels[at, begin] = IGNORE  # or the end of one conversation would learn the begin of the next
            begin += kept
    ordered = [examples[i] for row in rows for i in row]
    no_pixels = torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8)
    features, missing, keys = _kept_features(ordered)
    return Batch(
        pixels=torch.cat([example.pixels for example in ordered] or [no_pixels]),
        token_ids=token_ids,
        labels=labels,
        tasks=tuple(_task([examples[i].task for i in row]) for row in rows) or ("nothing",),
        num_samples=len(examples),
        segments=segments,
        features=features,
        missing=missing,
        keys=keys,
        marks=_marks(ordered),
    )


def _check_slots(example: Example, kept: int, image_id: int, num_image_tokens: int) -> int:
    num_slots = example.token_ids[:kept].count(image_id)
    if num_slots != example.num_pictures * num_image_tokens:
        raise InputError(
            f"an example of {len(example.token_ids)} tokens has {num_slots} image placeholders in its first "
            f"{kept}, its {example.num_pictures} pictures make {example.num_pictures * num_image_tokens}; "
            f"raise max_tokens"
        )
    return kept


def _kept_features(examples: Sequence[Example]) -> tuple[Tensor | None, tuple[int, ...], tuple[str, ...]]:
    """What the cache gave, and the places among all pictures and the names of those that it did not."""
    kept: list[Tensor] = []
    missing: list[int] = []
    keys: list[str] = []
    begin = 0
    for example in examples:
        if example.features is not None:
            kept.append(example.features)
        elif example.keys:
            missing += range(begin, begin + example.num_pictures)
            keys += example.keys
        begin += example.num_pictures
    return torch.cat(kept) if kept else None, tuple(missing), tuple(keys)


def _marks(examples: Sequence[Example]) -> Tensor | None:
    marks = [example.marks for example in examples if example.marks is not None]
    return torch.cat(marks) if marks and len(marks) == len(examples) else None


def _task(tasks: Sequence[str]) -> str:
    return tasks[0] if len(set(tasks)) == 1 else "mixed"


class _Caught(Dataset[Example | BadSample | FastVLMError]):
    """Gives an error as a value: raised in a worker process, it would arrive as a page of traceback."""

    def __init__(self, dataset: Dataset[Example]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Example | BadSample | FastVLMError:
        try:
            return self.dataset[index]
        except InputError as error:
            return BadSample(index=index, offset=0, reason=" ".join(str(error).split()))
        except FastVLMError as error:
            return error


def _collate_caught(
    items: Sequence[Example | BadSample | FastVLMError], *, collate_fn: Callable[[Sequence[Example]], Batch]
) -> Batch | FastVLMError:
    examples: list[Example] = []
    bad: list[BadSample] = []
    for offset, item in enumerate(items):
        if isinstance(item, FastVLMError):
            return item
        if isinstance(item, BadSample):
            bad.append(replace(item, offset=offset))
        else:
            examples.append(item)
    try:
        return replace(collate_fn(examples), bad=tuple(bad), num_samples=len(items))
    except FastVLMError as error:
        return error


def start_worker(_: int) -> None:
    """Let a worker process leave Ctrl-C and SIGTERM to the main one, and compute with one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears Ctrl-C too, and ends the workers
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # SIGTERM to the whole group, as batch systems send it, is for the main process alone
    torch.set_num_threads(1)


def batches(  # noqa: PLR0913  (how to read, in what order, in how many processes)
    dataset: Dataset[Example],
    *,
    indices: Sequence[int],
    batch_size: int,
    num_workers: int,
    collate_fn: Callable[[Sequence[Example]], Batch],
    pin: bool,
    ledger: Ledger | None = None,
    timeout: float = WORKER_TIMEOUT,
) -> Iterator[Batch]:
    """Read `indices` in order, `batch_size` at a time, in worker processes where there are any.

    A batch covers `batch_size` positions of the order, whatever is bad among them: samples that cannot be used are left
    out, and the others stay where they are. A batch without a usable sample comes as a row in which nothing is learned.

    Args:
        dataset: What to read.
        indices: Which samples, in which order.
        batch_size: Samples a batch; what is left over at the end is not read.
        num_workers: Processes; 0 reads in this one.
        collate_fn: Puts examples together, also none.
        pin: Put tensors where a GPU can fetch them.
        ledger: Counts the samples that cannot be used; without it the first one is an error.
        timeout: Seconds that a batch may take in a worker process.

    Raises:
        FastVLMError: An example cannot be made, the same error in a worker process as in this one; too many samples
            cannot be used; or a worker process died or hangs.
    """
    loader: DataLoader[Example | BadSample | FastVLMError] = DataLoader(
        _Caught(dataset),
        batch_size=batch_size,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=partial(_collate_caught, collate_fn=collate_fn),
        drop_last=True,
        pin_memory=pin,
        worker_init_fn=start_worker if num_workers else None,
        prefetch_factor=2 if num_workers else None,
        persistent_workers=False,
        timeout=timeout if num_workers else 0,
        generator=torch.Generator(),  # or it would draw from the one that a resumed run goes on with
    )
    for item in alive(loader):
        if isinstance(item, FastVLMError):
            raise item
        if ledger is not None:
            ledger.take(item.num_samples, item.bad)
        elif item.bad:
            raise InputError(item.bad[0].reason)
        yield item


def lost_worker(error: BaseException) -> TrainingError | None:
    """Say in one line that a worker process died or hangs, if that is what an error is about.

    PyTorch raises when the process dies, wherever this one is then.
    """
    reason = " ".join(str(error).split())
    if not reason.startswith("DataLoader "):
        return None
    return TrainingError(
        f"reading data failed: {reason:.200}; often memory runs out: give fewer --workers, "
        f"and --resume to go on from the last checkpoint"
    )


def alive(loader: DataLoader[Any]) -> Iterator[Any]:
    """Give what a loader gives.

    Raises:
        TrainingError: One of its worker processes died or hangs.
    """
    iterator = iter(loader)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if (lost := lost_worker(error)) is not None:
                raise lost from error
            raise
        yield item
