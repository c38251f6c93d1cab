"""WebDataset tars: the files of a sample stand together and are called alike up to the first dot.

The headers are read once; then any sample is read where it lies, so that no order of reading needs another program.
"""

import hashlib
import json
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm.errors import InputError
from fastvlm.train.conversations import MAX_PICTURE_BYTES, Conversation, Picture

_PICTURES: Final = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
_CAPTIONS: Final = frozenset({"txt", "caption"})
_MAX_TEXT_BYTES: Final = 1 << 26
_BLOCK: Final = 512


@dataclass(frozen=True)
class _Member:
    ending: str
    """What stands behind the first dot of the name, in small letters: `jpg`, `1.png`, `json`."""
    offset: int
    size: int
    """-1 for a link, a device or a file with holes."""

    @property
    def kind(self) -> str:
        return self.ending.rpartition(".")[2]


@dataclass(frozen=True)
class _Sample:
    key: str
    members: tuple[_Member, ...]


class TarFiles:
    """One tar or several, in the order of their names, samples in the order in which they lie in them.

    A sample has one text, `.json` (a row as `conversations.read_row` reads it) or `.txt` (a caption), and the pictures
    beside it are those that it shows, in the order in which they lie.

    Raises:
        InputError: A file is no tar, or is cut off.
    """

    def __init__(self, paths: Sequence[Path], origin: Path, read: Callable[..., Conversation]) -> None:
        self.name, self._paths, self._read = origin.resolve().name.removesuffix(".tar"), list(paths), read
        self._samples = [_index(path) for path in paths]
        self._ends = [sum(map(len, self._samples[: i + 1])) for i in range(len(paths))]
        digest = hashlib.sha256()
        for path, samples in zip(paths, self._samples, strict=True):
            digest.update(f"{path.name} {path.stat().st_size} {samples!r}".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        """Samples in all tars."""
        return self._ends[-1] if self._ends else 0

    def origin(self, index: int) -> str:
        """The tar, and what the sample's files are called."""
        path, sample = self._find(index)
        return f"{path} sample {sample.key!r}"

    def read(self, index: int) -> Conversation:
        """Read a sample's text, and the bytes of its pictures.

        Raises:
            InputError: It has no text or two, or a file of it cannot be read.
        """
        path, sample = self._find(index)
        texts = [member for member in sample.members if member.kind == "json" or member.kind in _CAPTIONS]
        if len(texts) != 1:
            found = ", ".join(member.ending for member in sample.members)
            raise InputError(f"expected one .json or .txt beside the pictures, got {found:.80}")
        with path.open("rb") as file:

            def content(member: _Member, most: int) -> bytes:
                if not 0 <= member.size <= most:
                    what = "is no plain file" if member.size < 0 else f"has {member.size:,} bytes, more than {most:,}"
                    raise InputError(f"{sample.key}.{member.ending} {what}")
                file.seek(member.offset)
                return file.read(member.size)

            text = content(texts[0], _MAX_TEXT_BYTES)
            pictures = [
                Picture(name=f"{sample.key}.{member.ending}", content=content(member, MAX_PICTURE_BYTES))
                for member in sample.members
                if member.kind in _PICTURES
            ]
        try:
            row = json.loads(text) if texts[0].kind == "json" else {"caption": text.decode().strip()}
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{sample.key}.{texts[0].ending} cannot be read: {reason:.100}") from error
        return self._read(row, pictures)

    def _find(self, index: int) -> tuple[Path, _Sample]:
        which = bisect_right(self._ends, index)
        before = self._ends[which - 1] if which else 0
        return self._paths[which], self._samples[which][index - before]


def _index(path: Path) -> list[_Sample]:
    """Read the headers of a tar; hidden files and folders are no samples."""
    samples: list[_Sample] = []
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # which would keep every header
                is_plain = info.isreg() and not info.issparse()
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK if info.isreg() else info.offset_data
                folder, slash, name = info.name.rpartition("/")
                base, _, ending = name.partition(".")
                if info.isdir() or not base or base.startswith("__"):
                    continue
                key = f"{folder}{slash}{base}"
                member = _Member(ending.lower(), info.offset_data, info.size if is_plain else -1)
                if samples and samples[-1].key == key:
                    samples[-1] = _Sample(key, (*samples[-1].members, member))
                else:
                    samples.append(_Sample(key, (member,)))
    except tarfile.TarError as error:
        raise InputError(f"{path}: not a tar, or damaged: {error}") from error
    _check_end(path, end)
    return samples


def _check_end(path: Path, end: int) -> None:
    """Where `tarfile` cannot read a header it stops in silence, as if the archive ended there."""
    with path.open("rb") as file:
        file.seek(end)
        following = file.read(_BLOCK)
    if following.strip(b"\0") or path.stat().st_size < end:
        raise InputError(f"{path}: the tar is cut off or damaged behind byte {end:,}; make or fetch it again")
