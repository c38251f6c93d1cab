"""A pool of random fields, drawn once per process and recombined by cropping, turning and stretching."""

from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image

POOL = 96
FIELD_SIDE = 160
GRAIN_SIDE = 768


@lru_cache(maxsize=POOL)
def field(index: int) -> Image.Image:
    """A smooth random field, `L`: octaves of value noise; the same for the same index in every process."""
    rng = np.random.default_rng((101, index))
    cells = int(rng.integers(2, 7))
    falloff = float(rng.uniform(0.4, 0.7))
    total = np.zeros((FIELD_SIDE, FIELD_SIDE), np.float32)
    weight = 1.0
    while cells < FIELD_SIDE:
        coarse = Image.fromarray(rng.random((cells, cells), np.float32))
        total += weight * np.asarray(coarse.resize((FIELD_SIDE, FIELD_SIDE), Image.Resampling.BICUBIC))
        cells, weight = cells * 2, weight * falloff
    low, high = np.percentile(total, (1, 99))
    return Image.fromarray((np.clip((total - low) / (high - low), 0, 1) * 255).astype(np.uint8))


@lru_cache(maxsize=4)
def grain(index: int) -> Image.Image:
    """Pixel noise around 128, `RGB` for an odd index and grey for an even one."""
    rng = np.random.default_rng((202, index))
    shape = (GRAIN_SIDE, GRAIN_SIDE, 3 if index % 2 else 1)
    values = np.clip(rng.normal(128, 40, shape), 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (GRAIN_SIDE, GRAIN_SIDE, 3))))


def window(
    size: tuple[int, int], rng: Random, *, zoom: tuple[float, float] = (0.3, 1.0), stretch: float = 1.0
) -> Image.Image:
    """Cut a window out of some field and enlarge it to `size`; `stretch` > 1 draws it out sideways."""
    source = field(rng.randrange(POOL))
    if rng.random() < 0.5:
        source = source.transpose(rng.choice((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90)))
    share = rng.uniform(*zoom)
    wide = min(float(FIELD_SIDE), max(4.0, FIELD_SIDE * share / stretch))
    high = max(4.0, FIELD_SIDE * share)
    left, top = rng.uniform(0, FIELD_SIDE - wide), rng.uniform(0, FIELD_SIDE - high)
    return source.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + wide, top + high))


def grain_window(size: tuple[int, int], rng: Random) -> Image.Image:
    """A window of pixel noise, `RGB`."""
    source = grain(rng.randrange(4))
    width, height = min(size[0], GRAIN_SIDE), min(size[1], GRAIN_SIDE)
    left, top = rng.randint(0, GRAIN_SIDE - width), rng.randint(0, GRAIN_SIDE - height)
    cut = source.crop((left, top, left + width, top + height))
    return cut if cut.size == size else cut.resize(size)
