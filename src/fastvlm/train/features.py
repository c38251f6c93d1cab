"""Features of a frozen encoder, kept on disk: a picture that was seen once is neither decoded nor encoded again.

A file holds the features of one picture, is named by the SHA-256 of the picture's bytes, and lies in a folder named by
all that they depend on besides: the encoder's weights, the size, how a picture is made square, the numbers' format.
Files appear whole (written beside, then renamed), so several runs may share a folder; what they write together is
bounded, and when the bound is reached nothing more is written and nothing is thrown away: a run visits its pictures in
turn, so whatever would be thrown away would be needed first.

Letters: `P` images, `H, W` pixels, `N` positions, `C` channels.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fastvlm.config import VisionConfig
from fastvlm.errors import InputError
from fastvlm.train.data import Batch

_NAME: Final = "features"
_LOCK: Final = "lock"
_TOTAL: Final = "bytes"


def fingerprint(module: nn.Module) -> str:
    """Digest the weights and statistics of a module; it changes when one number does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class FeatureCache:
    """A folder of features that one encoder, whose weights do not change, makes of pictures."""

    def __init__(
        self, folder: Path, encoder: nn.Module, vision: VisionConfig, *, dtype: torch.dtype, max_bytes: int
    ) -> None:
        """Open a folder, which is made if it is not there.

        Args:
            folder: Shared by any number of runs, encoders and picture sizes.
            encoder: What makes the features, in the form in which it makes them.
            vision: The size of its pictures and how they are made square.
            dtype: Format of the features.
            max_bytes: The files of the whole folder never take more.

        Raises:
            InputError: The folder cannot be made.
        """
        facts = f"{fingerprint(encoder)} {vision.image_size} {vision.fit} {dtype} exif=apply alpha=drop"
        self.max_bytes, self._dtype = max_bytes, dtype
        self._shape = (vision.num_image_tokens, vision.out_dim)
        self._root = folder
        self._folder = folder / hashlib.sha256(facts.encode()).hexdigest()[:16]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be a cache of features: {error.strerror or error}") from error

    def key(self, content: bytes) -> str:
        """Name the features of a picture by its file's bytes."""
        return hashlib.sha256(content).hexdigest()

    def load(self, key: str) -> Tensor | None:
        """Read the features `(N, C)` of a picture; None if they are not there, or the file is damaged."""
        try:
            features = load(self._path(key).read_bytes())[_NAME]
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return features if features.shape == self._shape and features.dtype == self._dtype else None

    def store(self, key: str, features: Tensor) -> bool:
        """Write the features `(N, C)` of a picture; return whether there was room. A full disk is no room.

        Raises:
            InputError: They are not what `load` expects.
        """
        if features.shape != self._shape or features.dtype != self._dtype:
            raise InputError(
                f"features are {tuple(features.shape)} {features.dtype}, expected {self._shape} {self._dtype}"
            )
        content = save({_NAME: features.detach().cpu().contiguous()})
        path = self._path(key)
        try:
            # The total is raised before the file is there: whatever is killed here, the bound holds.
            if not path.exists() and not self._reserve(len(content)):
                return False
            path.parent.mkdir(exist_ok=True)
            number, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(content)
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError:
            return False
        return True

    def fill(self, batch: Batch, encode: Callable[[Tensor], Tensor]) -> Batch:
        """Give a batch the features of all its pictures: those that are kept, and the others, which are kept then.

        Args:
            batch: As `collate` makes it of examples with keys.
            encode: From pixels, uint8 `(P, 3, H, W)`, to features `(P, N, C)`.
        """
        num_kept = 0 if batch.features is None else len(batch.features)
        features = torch.empty(num_kept + len(batch.missing), *self._shape, dtype=self._dtype)
        if batch.features is not None:
            is_kept = torch.ones(len(features), dtype=torch.bool)
            is_kept[list(batch.missing)] = False
            features[is_kept] = batch.features
        if batch.missing:
            computed = encode(batch.pixels).detach().to("cpu", self._dtype)
            features[list(batch.missing)] = computed
            for key, row in zip(batch.keys, computed, strict=True):
                self.store(key, row)
        return replace(batch, pixels=batch.pixels[:0], features=features, missing=(), keys=())

    def num_bytes(self) -> int:
        """How much the files of the whole folder take, as it is counted."""
        try:
            return int((self._root / _TOTAL).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return sum(path.stat().st_size for path in self._root.rglob("*.safetensors"))

    def _reserve(self, num_bytes: int) -> bool:
        with FileLock(self._root / _LOCK):
            total = self.num_bytes() + num_bytes
            if total > self.max_bytes:
                return False
            temporary = self._root / f".{_TOTAL}.tmp"
            temporary.write_text(str(total), encoding="ascii")
            os.replace(temporary, self._root / _TOTAL)
        return True

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.safetensors"
