"""Where samples come from: files and folders, recognised by what is in them, whose samples can be read in any order.

Because every sample has a number, an order of samples is an order of numbers: a run can begin again at any of them, and
any process can read any of them.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from fastvlm.errors import InputError
from fastvlm.options import CAPTION_PROMPT
from fastvlm.train.conversations import Conversation, Picture, PictureFolder, read_row
from fastvlm.train.tables import is_saved_dataset, open_parquet, open_saved
from fastvlm.train.tars import TarFiles

PICTURE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTION_SUFFIXES: Final = (".txt", ".caption")
METADATA: Final = ("metadata.jsonl", "metadata.csv")
"""What a folder of pictures may hold, as Hugging Face's `imagefolder` has it: a row a picture, with its `file_name`."""
_MAX_CAPTION_BYTES: Final = 1 << 20
_NUM_MEASURED: Final = 1000  # samples of a list whose pictures are looked at for its fingerprint
_BOM: Final = b"\xef\xbb\xbf"


class Source(Protocol):
    """Samples with numbers."""

    name: str
    """What the log calls it."""

    @property
    def fingerprint(self) -> str:
        """Changes when the samples, or their order, do."""

    def __len__(self) -> int:
        """How many samples there are."""

    def origin(self, index: int) -> str:
        """Where sample `index` stands: file and row."""

    def read(self, index: int) -> Conversation:
        """Read sample `index`, but not its pictures.

        Raises:
            InputError: The sample cannot be used; the message does not repeat its origin.
        """


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become conversations."""

    images: PictureFolder
    caption_prompt: str = CAPTION_PROMPT

    def row(self, row: Any, shown: Sequence[Picture] | None = None) -> Conversation:
        """Read a row of JSON or of a table; `shown` are the pictures that lie beside it."""
        return read_row(row, self.images.find, caption_prompt=self.caption_prompt, shown=shown)


def open_source(path: Path, reading: Reading) -> Source:
    """Open what `path` is: JSON, JSONL, CSV, TSV, parquet, a WebDataset tar, a saved dataset, or a folder of such.

    A file is recognised by its first bytes, a folder by what it holds: parquet files, tars, a data set that Hugging
    Face's `datasets` saved, or pictures with `metadata.csv`, `metadata.jsonl` or a text of the same name beside each.

    Raises:
        InputError: There is nothing, or nothing of these kinds, or it has no samples.
    """
    try:
        source = _open_folder(path, reading) if path.is_dir() else _open_file(path, reading)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{path}: {reason}; --data names files or folders of samples") from error
    if not len(source):
        raise InputError(f"{path}: no samples")
    return source


def _open_file(path: Path, reading: Reading) -> Source:
    if path.exists() and not path.is_file():  # nobody may write to a pipe
        raise InputError(f"{path} is neither a file nor a folder; --data names files or folders of samples")
    with path.open("rb") as file:
        head = file.read(512).removeprefix(_BOM)
    if head.startswith(b"PAR1"):
        return open_parquet([path], path, reading.row)
    if head[257:262] == b"ustar":
        return TarFiles([path], path, reading.row)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")):
        raise InputError(f"{path} is compressed, and samples in it cannot be read in any order; unpack it first")
    suffix, first = path.suffix.lower(), head.lstrip()[:1]
    if suffix in (".jsonl", ".ndjson") or (first == b"{" and suffix not in (".csv", ".tsv")):
        return JsonLines(path, reading.row)
    if suffix == ".json" or first == b"[":
        return Rows(path, _read_json(path), reading.row)
    if suffix in (".csv", ".tsv"):
        return Rows(path, _read_csv(path, "\t" if suffix == ".tsv" else ","), reading.row)
    raise InputError(f"{path}: not a kind of data that is read; expected JSON, JSONL, CSV, parquet, a tar or a folder")


def _open_folder(path: Path, reading: Reading) -> Source:
    if is_saved_dataset(path):
        return open_saved(path, reading.row)
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    tables = [path / name for name in names if name.endswith(".parquet")]
    tars = [path / name for name in names if name.endswith(".tar")]
    metadata = [path / name for name in names if name in METADATA]
    kinds = [found for found in (tables, tars, metadata) if found]
    if len(kinds) > 1 or len(metadata) > 1:
        raise InputError(f"{path} holds {kinds[0][0].name} and {kinds[-1][-1].name}; name the one to read")
    if tables:
        return open_parquet(tables, path, reading.row)
    if tars:
        return TarFiles(tars, path, reading.row)
    if metadata:
        inside = Reading(images=PictureFolder(folder=path), caption_prompt=reading.caption_prompt)
        return _open_file(metadata[0], inside)
    pictures = sorted(entry for entry in path.rglob("*") if entry.suffix.lower() in PICTURE_SUFFIXES)
    if not any(_caption_of(picture) for picture in pictures):
        rows = [name for name in names if name.endswith((".json", ".jsonl", ".csv", ".tsv"))]
        hint = f"name the file {path / rows[0]}" if rows else "expected tars, parquet files, or pictures with captions"
        raise InputError(f"{path}: no samples in this folder; {hint}")
    return CaptionFolder(path, pictures, reading.row)


class Rows:
    """A list of rows in memory."""

    def __init__(self, path: Path, rows: Sequence[Any], read: Callable[[Any], Conversation]) -> None:
        self.name, self._path, self._rows, self._read = path.stem, path, rows, read
        self._digest = _digest_file(path)

    @property
    def fingerprint(self) -> str:
        """Of the file, and of how large the pictures are that its rows name."""
        return _with_pictures(self._digest, self)

    def __len__(self) -> int:
        """Rows of the file."""
        return len(self._rows)

    def origin(self, index: int) -> str:
        """Rows are counted from 0, behind a table's head."""
        return f"{self._path} row {index}"

    def read(self, index: int) -> Conversation:
        """Read a row."""
        return self._read(self._rows[index])


class JsonLines:
    """A JSON object a line; what is kept in memory is where the lines begin."""

    def __init__(self, path: Path, read: Callable[[Any], Conversation]) -> None:
        self.name, self._path, self._read = path.stem, path, read
        begins, numbers, at = [], [], 0
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip().removeprefix(_BOM):
                    begins.append(at)
                    numbers.append(number)
                at += len(line)
        self._begins, self._numbers = np.array(begins, dtype=np.int64), np.array(numbers, dtype=np.int64)
        self._digest = digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Of the file, and of how large the pictures are that its lines name."""
        return _with_pictures(self._digest, self)

    def __len__(self) -> int:
        """Lines that are not empty."""
        return len(self._begins)

    def origin(self, index: int) -> str:
        """Lines are counted from 1, as editors do."""
        return f"{self._path} line {self._numbers[index]}"

    def read(self, index: int) -> Conversation:
        """Read a line."""
        with self._path.open("rb") as file:
            file.seek(int(self._begins[index]))
            line = file.readline()
        try:
            row = json.loads(line.removeprefix(_BOM).decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"not a line of JSON in UTF-8: {_short(error)}") from error
        return self._read(row)


class CaptionFolder:
    """Pictures, each with its caption in a text file of the same name beside it."""

    def __init__(self, folder: Path, pictures: Sequence[Path], read: Callable[..., Conversation]) -> None:
        self.name, self._pictures, self._read = folder.resolve().name, pictures, read
        listed = "\n".join(f"{path.relative_to(folder).as_posix()} {_sizes(path)}" for path in pictures)
        self.fingerprint = hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()

    def __len__(self) -> int:
        """Pictures in the folder and its folders."""
        return len(self._pictures)

    def origin(self, index: int) -> str:
        """The picture."""
        return str(self._pictures[index])

    def read(self, index: int) -> Conversation:
        """Read a caption."""
        path = self._pictures[index]
        if (place := _caption_of(path)) is None:
            raise InputError(f"no caption beside it; expected {path.with_suffix(CAPTION_SUFFIXES[0]).name}")
        with place.open("rb") as file:
            raw = file.read(_MAX_CAPTION_BYTES + 1)
        if len(raw) > _MAX_CAPTION_BYTES:
            raise InputError(f"{place.name} has more than {_MAX_CAPTION_BYTES:,} bytes")
        try:
            caption = raw.removeprefix(_BOM).decode().strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{place.name} is not UTF-8 text (byte {error.start})") from error
        return self._read({"caption": caption}, [Picture(name=str(path), path=path)])


def _caption_of(picture: Path) -> Path | None:
    places = (picture.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    return next((place for place in places if place.is_file()), None)


def _sizes(picture: Path) -> str:
    """Bytes of a picture and of its caption."""
    paths = (picture, _caption_of(picture))
    return " ".join("-" if path is None else str(path.stat().st_size) for path in paths)


def _with_pictures(digest: str, source: Source) -> str:
    """Add to a fingerprint the sizes of pictures that rows in equal distances name; to ask for all takes long."""
    step = max(1, -(-len(source) // _NUM_MEASURED))
    lines = [digest, *(_picture_sizes(source, index) for index in range(0, len(source), step))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _picture_sizes(source: Source, index: int) -> str:
    """Bytes of each picture that a sample names."""
    try:
        paths = [picture.path for picture in source.read(index).pictures]
        return " ".join("-" if path is None else str(path.stat().st_size) for path in paths)
    except (InputError, OSError):
        return "unusable"


def _read_json(path: Path) -> list[Any]:
    raw = path.read_bytes().removeprefix(_BOM)
    try:
        rows = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON or JSONL file: {_short(error)}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of conversations, got {type(rows).__name__}")
    return rows


def _read_csv(path: Path, delimiter: str) -> list[dict[str | None, Any]]:
    """Rows by the names in the head: an empty cell says nothing, and cells without a name are listed under None."""
    try:
        text = path.read_bytes().removeprefix(_BOM).decode()
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        return [{name: None if cell == "" else cell for name, cell in row.items()} for row in rows]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV file: {_short(error)}") from error


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
