"""Tables of Hugging Face: parquet files, and folders that `Dataset.save_to_disk` wrote.

They are read through `datasets` (in the extra `train`), which keeps them memory-mapped. A picture comes as the bytes
that are stored, and is decoded where all others are.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastvlm.errors import InputError
from fastvlm.train.conversations import Conversation


class Table:
    """Rows of a table, whose columns are the keys of a row as `conversations.read_row` reads it."""

    def __init__(self, dataset: Any, path: Path, fingerprint: str, read: Callable[[Any], Conversation]) -> None:
        """Wrap a `datasets.Dataset`, which gives rows as Arrow stores them: pictures are not decoded."""
        self.name, self.fingerprint = path.resolve().name.removesuffix(".parquet"), fingerprint
        self._rows, self._path, self._read = dataset.with_format("arrow"), path, read

    def __len__(self) -> int:
        """Rows of the table."""
        return len(self._rows)

    def origin(self, index: int) -> str:
        """The rows of several parquet files are counted through."""
        return f"{self._path} row {index}"

    def read(self, index: int) -> Conversation:
        """Read a row."""
        return self._read(self._rows[index].to_pylist()[0])


def open_parquet(paths: Sequence[Path], origin: Path, read: Callable[[Any], Conversation]) -> Table:
    """Open parquet files in the order given; `datasets` makes an Arrow copy of them in its cache, once.

    Raises:
        InputError: `datasets` is not installed, or a file cannot be read.
    """
    datasets = _import(origin)
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 20)))  # the end, where parquet keeps what it knows
            digest.update(f"{path.name} {path.stat().st_size} ".encode(errors="surrogateescape") + file.read())
    try:
        with _without_bars(datasets):
            dataset = datasets.Dataset.from_parquet([str(path) for path in paths])
    except Exception as error:  # the library wraps what Arrow raises in classes of its own
        raise InputError(f"{origin}: the parquet files cannot be read: {_cause(error)}") from error
    return Table(dataset, origin, digest.hexdigest(), read)


def is_saved_dataset(folder: Path) -> bool:
    """Say whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def open_saved(folder: Path, read: Callable[[Any], Conversation]) -> Table:
    """Open what `Dataset.save_to_disk` wrote.

    Raises:
        InputError: `datasets` is not installed, the folder holds several splits, or it cannot be read.
    """
    datasets = _import(folder)
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            raise InputError(f"{folder} holds splits; name one: {', '.join(str(folder / split) for split in splits)}")
        state = (folder / "state.json").read_bytes()
        dataset = datasets.Dataset.load_from_disk(str(folder))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: the saved dataset cannot be read: {_cause(error)}") from error
    return Table(dataset, folder, hashlib.sha256(state + f" {len(dataset)}".encode()).hexdigest(), read)


def _import(path: Path) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(f"{path}: reading it needs Hugging Face datasets (pip install 'fastvlm[train]')") from error


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    """Let `datasets` draw no bars meanwhile: the library does not print."""
    were_drawn = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_drawn:
            datasets.enable_progress_bars()


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:160] or type(error).__name__
