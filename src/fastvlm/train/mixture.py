"""Which sample comes at which position: of one source or of several, with weights or as one pool, by a seed.

Position `p` is computed from the seed and `p`, so a run can begin again anywhere, and processes can share one order.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray

from fastvlm.errors import InputError
from fastvlm.options import TrainOptions

BLOCK: Final = 10_000
"""In so many positions each source has exactly its share."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a mixture as the user names it."""

    path: Path
    images: Path
    weight: float | None


def parse_parts(data: Sequence[str], image_folders: Sequence[str]) -> list[Part]:
    """Read `FILE` or `FILE:WEIGHT`, each with the folder of its pictures.

    Args:
        data: What to read; a weight is a share, and shares need not add up to 1.
        image_folders: One for all, or one for each.

    Raises:
        InputError: There is nothing, a weight is not above 0, some have weights and some not, or the numbers differ.
    """
    if not data:
        raise InputError("no data; name a file or a folder with --data")
    folders = list(image_folders) * (len(data) if len(image_folders) == 1 else 1)
    if len(folders) != len(data):
        raise InputError(
            f"--image-folder was given {len(folders)} times for {len(data)} --data; give one, or one for each"
        )
    parts = []
    for name, folder in zip(data, folders, strict=True):
        if "\0" in name + folder:
            raise InputError(f"{name!r} and {folder!r}: not names of files or folders")
        path, weight = _split_weight(name)
        parts.append(Part(path=Path(path).expanduser(), images=Path(folder).expanduser(), weight=weight))
    if len({part.weight is None for part in parts}) > 1:
        bare = next(part.path for part in parts if part.weight is None)
        raise InputError(f"--data {bare} has no weight and others do; give each one, as in {bare}:0.5")
    return parts


def parts_of(options: TrainOptions) -> tuple[list[Part], list[Part]]:
    """Read what a run learns and what it is validated on, as `parse_parts` does.

    The folders of pictures are one for all, or one for each `data` and behind them one for each `validation`.

    Raises:
        InputError: As `parse_parts`.
    """
    folders, num = options.image_folder, len(options.data)
    if not options.validation:
        return parse_parts(options.data, folders), []
    if len(folders) == 1:
        return parse_parts(options.data, folders), parse_parts(options.validation, folders)
    if len(folders) != num + len(options.validation):
        raise InputError(
            f"--image-folder was given {len(folders)} times for {num} --data and {len(options.validation)} "
            f"--validation; give one, or one for each, those of --validation last"
        )
    return parse_parts(options.data, folders[:num]), parse_parts(options.validation, folders[num:])


def _split_weight(name: str) -> tuple[str, float | None]:
    path, colon, text = name.rpartition(":")
    if not colon or not path or Path(name).exists():
        return name, None
    try:
        weight = float(text)
    except ValueError:
        return name, None  # a file whose name has a colon, or C:\data
    if not 0 < weight < math.inf:
        raise InputError(f"--data {name}: a weight must be above 0, got {text}")
    return path, weight


class Order(Sequence[int]):
    """The numbers of the samples in the order in which a run draws them.

    Without weights the sources are one pool, and each epoch is a permutation of it. With weights, each 10,000 positions
    hold every source by its share in an order that is shuffled, and each source comes in permutations of its own.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, *, seed: int, length: int) -> None:
        """Take the sizes of the sources, whose samples are numbered through.

        Raises:
            InputError: A weight is so small that its source would never come.
        """
        self._sizes, self._seed, self._positions = list(sizes), seed, range(length)
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._quotas = None if weights is None else _quotas(weights)
        self._permutations: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._block: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """How many positions there are."""
        return len(self._positions)

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> Self: ...

    def __getitem__(self, at: int | slice) -> int | Self:
        """Give the sample at a position, or the order of a slice, for example of what is left or of one process."""
        if isinstance(at, slice):
            part = type(self).__new__(type(self))
            part.__dict__.update(self.__dict__, _positions=self._positions[at], _permutations={})
            return part
        return self._sample(self._positions[at])

    def _sample(self, position: int) -> int:
        if self._quotas is None:
            epoch, at = divmod(position, sum(self._sizes))
            return int(self._permutation(-1, epoch)[at])
        block, at = divmod(position, BLOCK)
        sources, ranks = self._blocked(block)
        source = int(sources[at])
        epoch, at = divmod(block * self._quotas[source] + int(ranks[at]), self._sizes[source])
        return self._starts[source] + int(self._permutation(source, epoch)[at])

    def _permutation(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Of one source, or of all (-1); only the last one of each is kept."""
        if source not in self._permutations or self._permutations[source][0] != epoch:
            size = sum(self._sizes) if source < 0 else self._sizes[source]
            # All together keep the order that runs have had before there were weights.
            seed = self._seed + epoch if source < 0 else _seed(self._seed, "epoch", source, epoch)
            self._permutations[source] = epoch, _shuffled(size, seed)
        return self._permutations[source][1]

    def _blocked(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give for each position of a block its source, and how many of that source came before in the block."""
        if self._block is None or self._block[0] != block:
            assert self._quotas is not None
            in_order = np.repeat(np.arange(len(self._quotas)), self._quotas)
            sources = in_order[_shuffled(BLOCK, _seed(self._seed, "block", block))]
            ranks = np.empty(BLOCK, dtype=np.int64)
            for source, quota in enumerate(self._quotas):
                ranks[sources == source] = np.arange(quota)
            self._block = block, sources, ranks
        return self._block[1], self._block[2]


def _quotas(weights: Sequence[float]) -> list[int]:
    """How often each source comes in a block: rounded so that they add up to it."""
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    quotas = [int(share) for share in exact]
    by_rest = sorted(range(len(weights)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_rest[: BLOCK - sum(quotas)]:
        quotas[i] += 1
    if 0 in quotas:
        weight = weights[quotas.index(0)]
        raise InputError(f"weight {weight:g} is less than one sample in {BLOCK:,}; raise it or leave that data out")
    return quotas


def _shuffled(size: int, seed: int) -> NDArray[np.int64]:
    order: NDArray[np.int64] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()
    return order


def _seed(*facts: int | str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, facts)).encode()).digest()[:8]) >> 1
