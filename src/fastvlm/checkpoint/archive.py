"""Unpacking a downloaded zip: the useful members only, verified, and nothing outside the folder.

An archive comes from the network, so it is believed in nothing: each entry's name and kind is checked before the
first byte is written, sizes are counted while unpacking, and the folder appears under its name only when all is there.
"""

import errno
import io
import json
import os
import re
import shutil
import stat
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from safetensors import SafetensorError, safe_open

from fastvlm.errors import CheckpointError

_CHUNK = 1 << 20
_MAX_DIRECTORY = 1 << 20  # bytes of the zip's list of contents: some 10,000 entries
_SMALL = 1 << 20  # a member up to this size may be as repetitive as it likes

_KEPT_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja"})
_KEPT_IN_MLPACKAGE = frozenset({".json", ".mlmodel", ".bin"})  # Core ML's weight.bin is plain numbers, not a pickle
_KEPT_NOTICES = re.compile(r"(licen[cs]e|notice|acknowledgements)[\w-]*(\.(txt|md))?", re.IGNORECASE)
_JUNK = frozenset({"__MACOSX", ".DS_Store"})
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class UnpackLimits:
    """How much an archive may hold before it is refused."""

    max_entries: int = 4096
    max_bytes: int = 64 << 30
    """Of all members together, unpacked; the 7B model is 16 GB."""
    max_ratio: int = 100
    """Unpacked over packed size of one member; weights shrink by a tenth, tokenizers by 5, bombs by 1000."""


def unpack(archive: Path, folder: Path, *, limits: UnpackLimits | None = None) -> None:
    """Unpack the useful members of a checkpoint's zip into a folder that does not exist yet.

    Kept are weights, JSON, text, licences and Core ML packages; never code or pickles. One folder around everything,
    as in Apple's zips, is stripped. Member CRCs and safetensors headers are verified.

    Raises:
        CheckpointError: The archive is damaged, hostile, or holds no weights; nothing is left behind.
        OSError: The disk is full or cannot be written.
    """
    limits = limits or UnpackLimits()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    try:
        with _CappedFile(archive) as file, zipfile.ZipFile(file) as opened:
            members = _members(archive, opened, limits)
            _check_space(archive, folder.parent, sum(info.file_size for info in members.values()))
            for name, info in members.items():
                _write_member(archive, opened, info, partial / name)
        check_folder(partial)
        partial.replace(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{archive}: not a sound zip archive ({error}); pull it again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Check that a folder holds weights, each safetensors header fits its file, and no shard is missing.

    Raises:
        CheckpointError: Naming the file and what is wrong with it.
    """
    weights = sorted(folder.rglob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{folder}: no .safetensors file inside; pickled weights (.bin, .pth) are never read")
    for path in weights:
        try:
            with safe_open(path, framework="np") as opened:  # reads the header and compares it with the file's length
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a sound safetensors file ({_one_line(error)}); pull it again"
            ) from error
    for path in sorted(folder.rglob("*.safetensors.index.json")):
        try:
            names = set(json.loads(path.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected a JSON object with a 'weight_map'; pull it again") from error
        if missing := sorted(str(name) for name in names if not (path.parent / str(name)).is_file()):
            raise CheckpointError(f"{path}: names {missing[0]!r}, which is not there; pull it again")


class _CappedFile(io.FileIO):
    """A file of which no more than a chunk is read at once.

    `zipfile` reads its whole list of contents in one piece and makes an object of each entry before anyone can count
    them: a million entries would cost half a gigabyte.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes, refusing what only a hostile list of contents would ask for."""
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of contents has {size} bytes, at most {_MAX_DIRECTORY} are read")
        return super().read(_MAX_DIRECTORY if size is None or size < 0 else size) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a place, refusing one that no file has; the system's own error would look like a broken disk."""
        if whence == os.SEEK_SET and not 0 <= offset < 1 << 62:
            raise zipfile.BadZipFile(f"an entry lies at {offset}")
        return super().seek(offset, whence)


def _members(archive: Path, opened: zipfile.ZipFile, limits: UnpackLimits) -> dict[str, zipfile.ZipInfo]:
    """Check every entry; return those that are kept, by the name they get."""
    infos = opened.infolist()
    if len(infos) > limits.max_entries:
        raise CheckpointError(f"{archive}: {len(infos)} entries, expected at most {limits.max_entries}")
    seen: dict[str, bool] = {}  # folded name: is it a folder?
    for info in infos:
        _check_entry(archive, info, limits)
        folded = unicodedata.normalize("NFC", info.filename.rstrip("/")).casefold()
        if folded in seen:
            raise CheckpointError(f"{archive}: two entries are named {info.filename!r}")
        seen[folded] = info.is_dir()
    for folded in seen:  # "a" and "a/b": the first cannot be a file
        for parent in PurePosixPath(folded).parents:
            if seen.get(str(parent)) is False:
                raise CheckpointError(f"{archive}: entry {folded!r} lies inside a file")
    kept = [info for info in infos if not info.is_dir() and _is_useful(PurePosixPath(info.filename))]
    if (total := sum(info.file_size for info in kept)) > limits.max_bytes:
        raise CheckpointError(f"{archive}: unpacks to {total} bytes, expected at most {limits.max_bytes}")
    top = _top_folder(kept)
    return {info.filename.removeprefix(top): info for info in kept}


def _check_entry(archive: Path, info: zipfile.ZipInfo, limits: UnpackLimits) -> None:
    name = info.orig_filename  # `filename` is what is left after zipfile has cut and mended it
    parts = name.removesuffix("/").split("/")
    if (
        name != info.filename
        or any(part in ("", ".", "..") for part in parts)  # the first is empty when the name is absolute
        or any(character in '\\:*?"<>|' or ord(character) < 32 for character in name)
        or any(part.endswith((".", " ")) or _WINDOWS_DEVICE.fullmatch(part) for part in parts)
        or max(len(part.encode(errors="replace")) for part in parts) > 255
        or len(name) > 1024
    ):
        raise CheckpointError(f"{archive}: entry {name[:200]!r} is not a plain relative name; the archive is refused")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise CheckpointError(f"{archive}: entry {name!r} is a link or a device; the archive is refused")
    if info.flag_bits & 0x1:
        raise CheckpointError(f"{archive}: entry {name!r} is encrypted; the archive is refused")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f"{archive}: entry {name!r} is neither stored nor deflated; the archive is refused")
    if info.file_size > max(_SMALL, limits.max_ratio * info.compress_size):
        raise CheckpointError(
            f"{archive}: entry {name!r} unpacks from {info.compress_size} to {info.file_size} bytes, "
            f"expected at most {limits.max_ratio} times as much; the archive is refused"
        )


def _is_useful(name: PurePosixPath) -> bool:
    if _JUNK & set(name.parts) or name.name.startswith("._"):
        return False
    suffix = name.suffix.lower()
    if any(part.endswith(".mlpackage") for part in name.parts[:-1]):
        return suffix in _KEPT_IN_MLPACKAGE
    return suffix in _KEPT_SUFFIXES or _KEPT_NOTICES.fullmatch(name.name) is not None


def _top_folder(kept: list[zipfile.ZipInfo]) -> str:
    """Return `"name/"` if everything lies in one folder, else nothing."""
    tops = {info.filename.split("/", 1)[0] if "/" in info.filename else "" for info in kept}
    top = tops.pop() if len(tops) == 1 else ""
    return f"{top}/" if top and not top.endswith(".mlpackage") else ""


def _write_member(archive: Path, opened: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(info) as source, path.open("xb") as target:
        num_bytes = _copy(source, target, info.file_size)
        os.fsync(target.fileno())
    if num_bytes != info.file_size:
        raise CheckpointError(
            f"{archive}: entry {info.filename!r} has {num_bytes} bytes, {info.file_size} were promised; pull it again"
        )


def _copy(source: IO[bytes], target: IO[bytes], limit: int) -> int:
    """Copy to the end, where `zipfile` compares the CRC, but no more than one chunk past the limit."""
    num_bytes = 0
    while num_bytes <= limit and (chunk := source.read(_CHUNK)):
        target.write(chunk)
        num_bytes += len(chunk)
    return num_bytes


def _check_space(archive: Path, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(errno.ENOSPC, f"{archive.name} unpacks to {num_bytes} bytes, {free} are free")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
