"""Files of a checkpoint folder, read without trusting them: safetensors, JSON, zip archives.

Weights are memory-mapped: a tensor that is kept as stored costs no copy, and nothing is allocated before a header has
been checked against the length of its file. Pickles are never opened.
"""

import contextlib
import ctypes
import json
import math
import mmap
import re
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastvlm.checkpoint.archive import unpack
from fastvlm.errors import CheckpointError

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U32": torch.uint32,
}
MAX_HEADER_BYTES: Final = 16 * 2**20  # the largest model needs 0.1 MB; parsing takes ten times its length
MAX_JSON_BYTES: Final = 4 * 2**20
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
BESIDE: Final = (
    "clip_head.safetensors",
    "train_state.safetensors",
    "adapter_model.safetensors",
)  # not the model itself
LICENCES: Final = re.compile(r"(LICEN[CS]E|NOTICE|ACKNOWLEDGEMENT|README|COPYING|USE_POLICY|CHANGES)", re.IGNORECASE)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, too large, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; is this a checkpoint folder?") from error
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES // 2**20} MiB")
    return _parse_object(raw, str(path))


def _parse_object(raw: bytes, origin: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key occurs twice")
        return values

    try:
        content = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} holds a {type(content).__name__}; expected a JSON object")
    return content


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: bytes `start` to `stop` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Stored]:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: The header contradicts itself or the length of the file.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            if start == b"version ":
                raise CheckpointError(
                    f"{path}: a pointer of Git LFS, not the weights; run `git lfs pull`, or download the file itself"
                )
            length = int.from_bytes(start, "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: the header should take {length} bytes, the file has {size}; is the download complete?"
                )
            header = _parse_object(file.read(length), f"the header of {path}")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    begin = 8 + length
    entries = {name: _entry(path, name, fields, begin) for name, fields in header.items()}
    position = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: {name!r} {kind}; the file is damaged")
        position = entry.stop
    if position != size:
        raise CheckpointError(f"{path}: the tensors end at byte {position}, the file at {size}; is it complete?")
    return entries


def _entry(path: Path, name: str, fields: Any, begin: int) -> Stored:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise CheckpointError(f"{path}: {name!r} has no dtype, shape and data_offsets in the header")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name!r} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not _is_counts(shape) or len(shape) > 8 or not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name!r} has shape {shape!r} at {offsets!r}; expected whole numbers"[:300])
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    found = offsets[1] - offsets[0]
    if found != num_bytes:
        raise CheckpointError(
            f"{path}: {name!r} of shape {shape} and dtype {dtype} needs {num_bytes} bytes, has {found}"
        )
    return Stored(path, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


class Weights:
    """All tensors of a folder, by the names under which they are stored; read one at a time."""

    def __init__(self, files: list[Path], origin: Path) -> None:
        """Map `files`; `origin` names the folder or file in errors."""
        self.origin = origin
        self.entries: dict[str, Stored] = {}
        for path in files:
            for name, entry in read_header(path).items():
                if name in self.entries:
                    raise CheckpointError(f"{path}: {name!r} is also in {self.entries[name].file.name}; remove one")
                self.entries[name] = entry
        self._maps = {path: _map(path) for path in files}  # at once, as the folder may be a temporary one

    @classmethod
    def open(cls, folder: Path) -> "Weights":
        """Find the weights of a folder: one file, shards with an index, or every safetensors file in it.

        Raises:
            CheckpointError: There are none, or the index names what is not there.
        """
        if folder.is_file():
            return cls([folder], folder)
        if (folder / SINGLE).is_file():
            return cls([folder / SINGLE], folder / SINGLE)
        if (folder / INDEX).is_file():
            return _open_shards(folder)
        files = sorted(path for path in folder.glob("*.safetensors") if path.name not in BESIDE)
        if not files:
            raise CheckpointError(_no_weights(folder))
        return cls(files, files[0] if len(files) == 1 else folder)

    def read(self, name: str) -> Tensor:
        """Return a tensor that shares memory with the file; changing it does not change the file."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        mapped = self._maps[entry.file]
        if entry.start % dtype.itemsize:  # other writers may not align; a view would be undefined behaviour
            raw = bytearray(mapped[entry.start : entry.stop])
            return torch.frombuffer(raw, dtype=dtype, count=count).view(entry.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def forget(self, name: str) -> None:
        """Give back the memory behind a tensor that was copied; the file still holds it."""
        entry = self.entries[name]
        _forget(self._maps[entry.file], entry.start, entry.stop)

    def forget_copied(self, tensor: Tensor) -> None:
        """Do what `forget` does for a tensor that `read` returned; of any other nothing is given back.

        Whoever reads it again reads the file: what was changed in it is lost.
        """
        for mapped in self._maps.values():
            start = tensor.data_ptr() - ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            if 0 <= start < len(mapped):
                _forget(mapped, start, start + tensor.nbytes)

    def fingerprint(self) -> str:
        """Tell checkpoints apart in milliseconds: a hash of all names, shapes and the first bytes of each tensor."""
        digest = sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape} ".encode())
            digest.update(self._maps[entry.file][entry.start : min(entry.stop, entry.start + 256)])
        return digest.hexdigest()[:16]


def _forget(mapped: mmap.mmap, start: int, stop: int) -> None:
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and stop - start >= mmap.PAGESIZE:
        mapped.madvise(mmap.MADV_DONTNEED, start, (stop - start) // mmap.PAGESIZE * mmap.PAGESIZE)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped: {error}") from error


def _open_shards(folder: Path) -> Weights:
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map")
    for place in places.values():
        if not is_plain_name(place) or not place.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {place!r}; expected the plain name of a .safetensors file beside it")
    missing = sorted({place for place in places.values() if not (folder / place).is_file()})
    if missing:
        raise CheckpointError(f"{index} names {missing[0]}, which is not there{_more(missing)}; is the copy complete?")
    weights = Weights([folder / place for place in sorted(set(places.values()))], index)
    for name, place in places.items():
        if name not in weights.entries or weights.entries[name].file.name != place:
            raise CheckpointError(f"{index} looks for {name!r} in {place}, which does not hold it")
    return weights


def is_plain_name(name: Any) -> bool:
    """Whether a name from a file stays in the folder it is looked up in, on every system."""
    return isinstance(name, str) and re.fullmatch(r"[\w][\w.+-]*", name) is not None and ".." not in name


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if pickles:
        return f"{folder} has its weights in {pickles[0]}, a pickle, which could run code; convert it to .safetensors"
    return f"{folder} has no .safetensors file; is this a checkpoint folder?"


def licence_files(folder: Path) -> tuple[Path, ...]:
    """The licence, acknowledgement and readme files of a folder."""
    if not folder.is_dir():
        return ()
    found = (path for path in folder.iterdir() if LICENCES.match(path.name) and path.is_file())
    return tuple(sorted(path for path in found if path.suffix.lower() in ("", ".md", ".txt", ".rst", ".pdf")))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Give the folder of a checkpoint; a zip archive is unpacked into a private temporary folder that goes afterwards.

    Tensors stay readable when the folder is gone: they are mapped.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_dir() or path.suffix == ".safetensors":
        yield path
        return
    if not zipfile.is_zipfile(path):
        raise CheckpointError(_not_an_archive(path))
    with tempfile.TemporaryDirectory(prefix="fastvlm-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "checkpoint"
        unpack(path, folder)
        yield folder


def _not_an_archive(path: Path) -> str:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return f"{path} is a pickle, which could run code; convert it to .safetensors"
    return f"{path} is neither a folder, a .safetensors file nor a zip archive"
