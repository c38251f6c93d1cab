"""What happens to pictures before they reach us: cameras, scanners, messengers."""

from io import BytesIO
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from fastvlm.synth import noise
from fastvlm.synth.colours import RGB

CLEAN = 0.38
"""Share of pictures that nothing happens to."""

SHARES = {"jpeg": 0.42, "soften": 0.26, "grain": 0.2, "tone": 0.34, "tilt": 0.06, "vignette": 0.07, "frame": 0.06}
"""How often each happens to the others, independently."""


def degrade(image: Image.Image, rng: Random, *, gentle: bool = False) -> tuple[Image.Image, float]:
    """Spoil a picture a little, never so much that a person could not answer.

    Args:
        image: The picture; may be changed.
        rng: Decides what happens.
        gentle: Spare small details.

    Returns:
        The picture, and by how many degrees it was turned.
    """
    if rng.random() < CLEAN:
        return image, 0.0
    angle = 0.0
    chosen = {name for name, share in SHARES.items() if rng.random() < share}
    if "frame" in chosen:
        _frame(image, rng)
    if "tilt" in chosen:
        angle = rng.uniform(-4, 4)
        image = _tilt(image, angle)
    if "vignette" in chosen:
        image = _vignette(image, rng)
    if "tone" in chosen:
        image = image.point(_tone_table(rng))
    if "soften" in chosen:
        image = _soften(image, rng.uniform(1.15, 1.5 if gentle else 2.3))
    if "grain" in chosen:
        factor = rng.uniform(0.05, 0.25 if gentle else 0.5)
        table = [round(128 + (value - 128) * factor) for value in range(256)] * 3
        image = ImageChops.add(image, noise.grain_window(image.size, rng).point(table), 1, -128)
    if "jpeg" in chosen:
        image = _jpeg(image, rng.randint(55 if gentle else 30, 95))
    return image, angle


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    reread = Image.open(buffer)
    reread.load()
    return reread


def _soften(image: Image.Image, factor: float) -> Image.Image:
    """Blur by making the picture smaller and large again: costs a third of a Gaussian."""
    small = (max(8, round(image.width / factor)), max(8, round(image.height / factor)))
    return image.resize(small, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BILINEAR)


def _tone_table(rng: Random) -> list[int]:
    """Brightness, contrast, gamma and a slight cast, as one table for three channels."""
    contrast, offset, gamma = rng.uniform(0.8, 1.15), rng.uniform(-8, 18), rng.uniform(0.85, 1.2)
    table: list[int] = []
    for _ in range(3):
        gain = contrast * rng.uniform(0.94, 1.06)
        curve = (np.arange(256) / 255) ** gamma * 255
        table += np.clip((curve - 128) * gain + 128 + offset, 0, 255).astype(int).tolist()
    return table


def _tilt(image: Image.Image, angle: float) -> Image.Image:
    """Turn by a few degrees about the middle; the corners take the colour of the border."""
    corner: RGB = image.getpixel((1, 1))  # type: ignore[assignment]
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=corner)


def _vignette(image: Image.Image, rng: Random) -> Image.Image:
    depth = rng.uniform(0.15, 0.45)
    ramp = Image.radial_gradient("L").point([round(255 - depth * max(0, v - 90) * 255 / 165) for v in range(256)])
    return ImageChops.multiply(image, Image.merge("RGB", [ramp.resize(image.size, Image.Resampling.BILINEAR)] * 3))


def _frame(image: Image.Image, rng: Random) -> None:
    """Draw a thin border around the picture, in place."""
    width = max(1, round(max(image.size) * rng.uniform(0.004, 0.02)))
    colour = rng.choice(((0, 0, 0), (255, 255, 255), (128, 128, 128), (120, 80, 40)))
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=colour, width=width)
