"""Samples that cannot be used: counted, named, skipped at the same position on every run; too many of them end it."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm.errors import InputError

BAD_SAMPLES: Final = "bad_samples.jsonl"
_FEW: Final = 10  # bad samples that may come together by chance

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that was left out of a batch."""

    index: int
    """Its number in the data set."""
    offset: int
    """Its place among the samples that were drawn for the batch."""
    reason: str
    """Where it stands and what is wrong with it, on one line."""


class Ledger:
    """Counts what is skipped, writes it down, and stops the run when it is too much.

    `is_too_many` says what is too much; each sample counts once, however often it is drawn. It depends on positions
    alone, not on batches or worker processes.
    """

    def __init__(  # noqa: PLR0913  (what is counted, and what is told)
        self,
        size: int,
        *,
        max_fraction: float,
        position: int = 0,
        file: Path | None = None,
        source_of: Callable[[int], str] = str,
        place: Callable[[int], int] = lambda number: number,
    ) -> None:
        """Begin, or go on.

        Args:
            size: How many samples the data set has.
            max_fraction: How many of them may be bad, as a share.
            position: How many samples of the order were drawn before; what `file` says of later ones is dropped.
            file: Gets a line of JSON for each bad sample, when it is met for the first time.
            source_of: From a sample's number to what holds it: of each, the first bad sample is logged.
            place: From how many samples this process has drawn to how many of the order were, where several processes
                share one; each then counts its own.
        """
        self.size, self.max_fraction, self._begin, self._drawn = size, max_fraction, position, 0
        self._file, self._source_of, self._place = file, source_of, place
        self._bad: dict[int, str] = {}
        self._warned: set[str] = set()
        if file is not None:
            self._read(file)

    def __len__(self) -> int:
        """How many different samples were skipped."""
        return len(self._bad)

    @property
    def position(self) -> int:
        """How many samples of the order were drawn."""
        return self._begin + self._place(self._drawn)

    def take(self, num_drawn: int, bad: Sequence[BadSample]) -> None:
        """Count the samples that were drawn for a batch, and those of them that were left out.

        Raises:
            InputError: There are too many bad ones.
        """
        for sample in bad:
            position = self._begin + self._place(self._drawn + sample.offset)
            if sample.index not in self._bad:
                self._bad[sample.index] = sample.reason
                self._write(position, sample)
            drawn = min(self.size, position + 1)
            if is_too_many(len(self._bad), drawn, self.size, self.max_fraction):
                raise InputError(too_many(list(self._bad.values()), drawn, self.max_fraction))
        self._drawn += num_drawn

    def _write(self, position: int, sample: BadSample) -> None:
        source = self._source_of(sample.index)
        if source not in self._warned:
            self._warned.add(source)
            more = f"; others will be in {self._file}" if self._file is not None else ""
            logger.warning("%s; skipped%s", _encodable(sample.reason), more)
        if self._file is not None:
            row = {"position": position, "index": sample.index, "reason": sample.reason}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _read(self, path: Path) -> None:
        """Take up what an earlier part of the run wrote; what comes again, and a line that was cut, are dropped."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        kept = []
        for line in lines:
            try:
                row = json.loads(line)
                position, index, reason = int(row["position"]), int(row["index"]), str(row["reason"])
            except (ValueError, KeyError, TypeError):
                continue
            if position < self._begin:
                self._bad[index] = reason
                kept.append(line + "\n")
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)


def _encodable(text: str) -> str:
    """Write half characters, as the names of files may have, as escapes: not every log can hold them."""
    return text.encode(errors="backslashreplace").decode()


def is_too_many(num_bad: int, num_seen: int, size: int, max_fraction: float) -> bool:
    """Say whether more than `max_fraction` of `size` samples are bad, of which `num_seen` were looked at.

    Of a part, twice that share may be bad, and at least twenty: a part is worse than the whole by chance.
    """
    return num_bad > min(max_fraction * size, 2 * max(max_fraction * num_seen, _FEW))


def bad_samples_of(rank: int) -> str:
    """Name the file of one of several processes."""
    return BAD_SAMPLES if rank == 0 else BAD_SAMPLES.replace(".", f".{rank}.")


def too_many(reasons: Sequence[str], num_samples: int, max_fraction: float) -> str:
    """Say on one line that too many samples are bad, and what is wrong with the first."""
    return (
        f"{len(reasons)} of {num_samples} samples cannot be used, more than --max-bad-fraction {max_fraction:g} "
        f"allows; the first: {reasons[0]}"
    )
