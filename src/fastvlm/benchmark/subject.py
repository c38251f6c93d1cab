"""What every benchmark of answers needs: a folder, our program, a task that all programs take, a large photo."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from fastvlm.accelerate import check
from fastvlm.benchmark.turns import Runner
from fastvlm.checkpoint.create import init_checkpoint
from fastvlm.checkpoint.zoo import resolve
from fastvlm.device import place
from fastvlm.errors import InputError
from fastvlm.options import LoadOptions

BEFORE: Final = tuple(range(40, 55))
"""15 token ids in front of the picture; plain bytes in every vocabulary."""
AFTER: Final = tuple(range(60, 80))
"""20 token ids behind the picture."""
RANDOM: Final = ("0.5b", "1.5b", "7b")
"""Models that are written with random weights, which take as long as real ones."""


def num_threads(wanted: int | None) -> int:
    """The threads that each program gets."""
    return torch.get_num_threads() if wanted is None else wanted


def environment(threads: int) -> dict[str, str]:
    """Variables for all programs alike."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def folder_of(model: str | None, scratch: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The checkpoint's folder; sizes of Apple's models are written there with random weights of seed 0."""
    if model in RANDOM:
        return init_checkpoint(model, 0, scratch / model, dtype=dtype)
    return resolve("nano" if model is None else model)


def check_here(loading: LoadOptions) -> None:
    """Find out whether the route that a model is to be loaded by is here, before anything is written or measured.

    Raises:
        DeviceError: A device, a format, a compiler or an engine is missing.
    """
    placement = place(loading.device, loading.dtype)
    check(placement, is_compiled=loading.compile, engine=loading.engine)


def label(model: str | None) -> str:
    """A short name for a model, for titles and files."""
    return "nano" if model is None else Path(model).name


def start(name: str, folder: Path, loading: LoadOptions, threads: int) -> Runner:
    """Start our program on a folder."""
    fields = asdict(loading) | {"model": None}
    command = [sys.executable, "-m", "fastvlm.benchmark.ours", str(folder), json.dumps(fields)]
    return Runner(name, command, environment(threads))


def side_of(image_size: int | None, hello: dict[str, Any]) -> int:
    """The side of the pictures, checked.

    Raises:
        InputError: It is not a multiple of the encoder's stride.
    """
    side = int(hello["image_size"] if image_size is None else image_size)
    if side % hello["stride"]:
        raise InputError(f"image_size must be a multiple of {hello['stride']}, got {side}")
    return side


def write_task(path: Path, *, side: int, rows: int, stride: int, image_id: int) -> int:
    """Write what is asked: `pixels` `(B, 3, H, W)` and `token_ids` `(B, T)`: 15 ids, the picture's, 20 ids.

    Returns:
        `T`.
    """
    number = (side // stride) ** 2
    token_ids = torch.tensor([[*BEFORE, *[image_id] * number, *AFTER]] * rows)
    pixels = torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(0))
    save_file({"token_ids": token_ids, "pixels": pixels}, path)
    return token_ids.shape[1]


def write_photo(path: Path, *, width: int = 4000, height: int = 3000) -> bytes:
    """Draw a JPEG of 12 megapixels that is about as large as a camera's; return its bytes."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 100, width // 100, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = generator.normal(0, 4, (height, width, 1)).astype(np.int16)
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path.read_bytes()


def copies(content: bytes, folder: Path, number: int, stem: str) -> Sequence[Path]:
    """The same picture in files of different bytes (behind its end), so that nothing kept of one serves another."""
    paths = [folder / f"{stem}-{index}.jpg" for index in range(number)]
    for index, path in enumerate(paths):
        path.write_bytes(content + index.to_bytes(4, "big"))
    return paths
