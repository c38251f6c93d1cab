"""One archive, from an address to a folder: resumed, locked, compared with what came the first time, unpacked."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastvlm.checkpoint.archive import unpack
from fastvlm.errors import CheckpointError, DownloadError, FastVLMError
from fastvlm.fetch import download

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are here and, when the server told it, the bytes that there are."""

_RECORD = "sha256.json"
_LOG = logging.getLogger(__name__)


def pull_archive(url: str, root: Path, *, notice: str, progress: Progress | None = None) -> Path:
    """Download a zip and unpack it to `root/<its name>`; return that folder.

    Args:
        url: Where the zip is.
        root: The folder of all models; downloads under way lie in `root/.downloads`.
        notice: Written beside the weights, when the archive brings no notice of its own.
        progress: Told how far the download is.

    Raises:
        DownloadError: The network or the disk does not allow it, or the archive is not what it was the first time.
        CheckpointError: The archive is damaged, hostile, or no model.
    """
    name = url.rsplit("/", 1)[-1]
    folder = root / name.removesuffix(".zip")
    downloads = root / ".downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with _locked(downloads / f"{name}.lock", f"{name}: another process is pulling it"):
            if not (folder / "config.json").is_file():  # else the process that we waited for has done it
                _pull(url, downloads / name, folder, notice, progress)
    except OSError as error:
        reason = error.strerror or error
        raise DownloadError(f"{root}: cannot be written ({reason}); make room or set FASTVLM_MODELS") from error
    return folder


def recorded_sha256(root: Path, name: str) -> str | None:
    """Return the digest that an archive had when it was first seen here, in hexadecimal.

    Raises:
        CheckpointError: The record cannot be read.
    """
    entry = _read_record(root).get(name)
    return entry["sha256"] if entry is not None else None


def _pull(url: str, archive: Path, folder: Path, notice: str, progress: Progress | None) -> None:
    root = folder.parent
    _read_record(root)  # an unreadable record shall be known before gigabytes are fetched
    if archive.exists():  # a process was killed between download and unpacking
        sha256 = _digest(archive)
    else:
        sha256 = download(url, archive, progress=_with_space_check(archive, progress))
    unpacked = archive.with_name(folder.name)
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        _compare(root, archive.name, sha256, url)
        unpack(archive, unpacked)
        if not (unpacked / "config.json").is_file():
            raise CheckpointError(f"{archive}: no config.json inside, so not a model; is {url} the right address?")
        if not any(unpacked.glob("NOTICE*")):
            (unpacked / "NOTICE.txt").write_text(notice, encoding="utf-8")
        _record(root, archive, sha256, url)
        unpacked.replace(folder)
    except FastVLMError:
        archive.unlink()  # it is of no use, and shall not be taken for a finished download next time
        raise
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()


@contextmanager
def _locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock that the system drops when this process ends, however it ends."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _LOG.warning("%s; waiting for it", busy)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _with_space_check(archive: Path, progress: Progress | None) -> Progress:
    """Stop a download for which there is no room, as soon as the server tells its length."""

    def check(num_bytes: int, total: int | None) -> None:
        free = shutil.disk_usage(archive.parent).free
        if total is not None and (needed := 2 * total - num_bytes) > free:  # the archive's rest, then what it holds
            raise DownloadError(
                f"{archive.parent}: {archive.name} needs about {needed} bytes, {free} are free; "
                "make room or set FASTVLM_MODELS"
            )
        if progress is not None:
            progress(num_bytes, total)

    return check


def _compare(root: Path, name: str, sha256: str, url: str) -> None:
    known = _read_record(root).get(name)
    if known is not None and known["sha256"] != sha256:
        raise DownloadError(
            f"{name}: its sha256 is {sha256}, but {known['sha256']} was recorded on {known['first_seen']}: "
            f"{url} changed or was tampered with; to accept it, remove the entry from {root / _RECORD} and pull again"
        )


def _record(root: Path, archive: Path, sha256: str, url: str) -> None:
    """Trust on first use: write down what was computed, once."""
    with _locked(root / ".downloads" / f"{_RECORD}.lock", f"{_RECORD}: another process is writing it"):
        record = _read_record(root)
        record.setdefault(
            archive.name,
            {
                "sha256": sha256,
                "bytes": archive.stat().st_size,
                "url": url,
                "first_seen": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
        partial = root / f"{_RECORD}.partial"
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(root / _RECORD)


def _read_record(root: Path) -> dict[str, Any]:
    path = root / _RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_bytes())
        if not all({"sha256", "first_seen"} <= entry.keys() for entry in record.values()):
            raise ValueError("an entry has no sha256 or no first_seen")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a record of digests ({error}); repair it or move it away") from error
    return record


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
