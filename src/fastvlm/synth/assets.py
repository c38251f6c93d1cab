"""The fonts, emoji and words that nano's pictures are drawn from, read from a folder on disk.

`fastvlm data assets` writes that folder; nothing here touches the network.
"""

import functools
import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.errors import InputError
from fastvlm.folders import user_cache
from fastvlm.synth.kinds import KINDS

FORMAT = 1
"""Raised when the way the folder is made changes, so that older folders are made again."""
MANIFEST = "manifest.json"
REMEDY = "run `fastvlm data assets`"


@dataclass(frozen=True, kw_only=True)
class FontFace:
    """One handwriting font."""

    family: str
    data: bytes
    """The font file (woff2): `ImageFont.truetype(io.BytesIO(data), size)`."""
    is_heldout: bool
    """Never trained on; evaluation pictures use it."""
    is_caps_only: bool
    """Its lower-case letters are capitals, so a picture cannot show which was meant."""


@dataclass(frozen=True, kw_only=True)
class Assets:
    """Everything that pictures are drawn from."""

    fonts: tuple[FontFace, ...]
    emoji: dict[str, tuple[np.ndarray, ...]]
    """Kind name -> sprites `(H, W, 4)` uint8, RGBA, cropped to what is visible, longest side 128. Those of the kind's
    own codepoint come first (Noto first of all), then those of its other emoji."""
    words: tuple[str, ...]
    """Lower-case English words of 1 to 14 letters in three bands, commonest band first, each band sorted."""


def is_heldout_word(word: str) -> bool:
    """Say whether a word belongs to evaluation; training never draws it. One word in ten, decided by its letters."""
    return zlib.crc32(word.encode("utf-8")) % 10 == 0


def default_folder() -> Path:
    """Return the folder of the assets: `FASTVLM_ASSETS`, or a folder of this user's cache."""
    if chosen := os.environ.get("FASTVLM_ASSETS"):
        return Path(chosen).expanduser()
    return user_cache() / "assets"


def read_lock() -> dict[str, Any]:
    """Return the list of pinned packages that the assets come from (`assets.json` next to this file)."""
    lock: dict[str, Any] = json.loads(resources.files("fastvlm.synth").joinpath("assets.json").read_text("utf-8"))
    return lock


@functools.cache
def lock_digest() -> str:
    """Return a digest of all that decides what the folder holds: the pinned packages, the kinds, and the format."""
    text = json.dumps([FORMAT, read_lock(), [(k.name, k.codepoint, k.also) for k in KINDS]], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def is_complete(folder: Path) -> bool:
    """Say whether `folder` holds the assets of this version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("digest") == lock_digest()


def read_assets(folder: Path) -> Assets:
    """Read all assets of a folder.

    Args:
        folder: what `fastvlm data assets` has written.

    Returns:
        Fonts, sprites and words; plain bytes, arrays and strings, so that other processes may be handed them.

    Raises:
        InputError: when the folder is missing, incomplete, or of another version.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"no fonts and emoji in {folder}: {REMEDY}")
    if not is_complete(folder):
        raise InputError(f"the fonts and emoji in {folder} are of another version: {REMEDY}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        fonts = tuple(
            FontFace(
                family=row["family"],
                data=(folder / "fonts" / row["file"]).read_bytes(),
                is_heldout=row["is_heldout"],
                is_caps_only=row["is_caps_only"],
            )
            for row in manifest["fonts"]
        )
        words = tuple((folder / "words.txt").read_text("utf-8").split())
        emoji = _read_sprites(folder / "emoji.npz", manifest["sprites"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"the fonts and emoji in {folder} are damaged ({error}): remove it and {REMEDY}") from error
    return Assets(fonts=fonts, emoji=emoji, words=words)


def _read_sprites(path: Path, rows: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, ...]]:
    """Cut the one long array of all pixels into sprites: kind name -> `(H, W, 4)` arrays."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        pixels = archive["pixels"]
    found: dict[str, list[np.ndarray]] = {kind.name: [] for kind in KINDS}
    start = 0
    for row in rows:
        shape = (int(row["height"]), int(row["width"]), 4)
        end = start + shape[0] * shape[1] * 4
        found[row["kind"]].append(pixels[start:end].reshape(shape))
        start = end
    if start != pixels.size or not all(found.values()):
        raise ValueError("emoji.npz and manifest.json do not agree")
    return {name: tuple(sprites) for name, sprites in found.items()}
