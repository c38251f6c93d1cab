"""Lines of text in handwriting fonts, at any size and angle."""

import math
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFont

from fastvlm.synth import noise
from fastvlm.synth.assets import Assets
from fastvlm.synth.sample import Split
from fastvlm.synth.sprites import turn, turned

STEPS = tuple(round(16 * 1.22**i) for i in range(13))
"""Sizes at which fonts are opened, 16 to 174; other sizes are scaled down from the next larger one."""
CACHED_FONTS = 1024


Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Ink:
    """Written lines, ready to paste."""

    mask: Image.Image
    """`L`, cropped."""
    height: float
    """Of the letters in pixels: less than wished where room was short."""
    letters: tuple[tuple[str, Point], ...]
    """Each character with the middle of its small letters' height, in pixels of the mask; spaces are left out."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the written lines should be like."""

    height: float
    """Of the letters in pixels: of capitals and digits where there are any, else of an x."""
    room: tuple[float, float]
    """Width and height that the lines may take."""
    angle: float
    """In degrees."""


class Scribe:
    """Writes with the fonts of one split."""

    def __init__(self, assets: Assets, split: Split) -> None:
        self._fonts = tuple(font for font in assets.fonts if font.is_heldout == (split == "heldout"))
        self._open = lru_cache(maxsize=CACHED_FONTS)(self._read)
        self._coverage: dict[int, frozenset[str]] = {}

    def choose(self, lines: tuple[str, ...], rng: Random) -> tuple[int, tuple[str, ...]]:
        """Choose a font that has every character; fonts without small letters get the text in capitals."""
        for _ in range(12):
            index = rng.randrange(len(self._fonts))
            written = tuple(line.upper() for line in lines) if self._fonts[index].is_caps_only else lines
            if set("".join(written)) <= self._covered(index):
                break
        return index, written

    def family(self, index: int) -> str:
        """Name of a font that `choose` chose."""
        return self._fonts[index].family

    def write(self, lines: tuple[str, ...], index: int, wish: Wish, rng: Random) -> Ink:
        """Write lines of text.

        Args:
            lines: One or two lines.
            index: Which font.
            wish: How large, and how turned.
            rng: Decides on stroke, spacing and unsteadiness of the hand.

        """
        is_low = not any(char.isupper() or char.isdigit() for line in lines for char in line)
        capital, small = self._ratios(index)
        ratio = small if is_low else capital
        size = next((step for step in STEPS if step >= wish.height / ratio), STEPS[-1])
        font = self._open(index, size)
        ink, letters = self._ink(lines, font, size, 0.5 * small * size, rng)
        scale = wish.height / (size * ratio)
        cos, sin = abs(math.cos(math.radians(wish.angle))), abs(math.sin(math.radians(wish.angle)))
        width, high = ink.width * cos + ink.height * sin, ink.width * sin + ink.height * cos
        scale = min(scale, wish.room[0] / (width + 2), wish.room[1] / (high + 2))
        mask = turn(ink, scale * max(ink.size), wish.angle)
        placed = tuple((char, turned(point, ink.size, mask.size, scale, wish.angle)) for char, point in letters)
        return Ink(mask=mask, height=scale * size * ratio, letters=placed)

    def _ink(
        self, lines: tuple[str, ...], font: ImageFont.FreeTypeFont, size: int, rise: float, rng: Random
    ) -> tuple[Image.Image, list[tuple[str, Point]]]:
        """Write upright and large; return the ink, `L`, cropped, and where each character is in it."""
        pitch = size * rng.uniform(1.0, 1.4)
        stroke = 1 if size > 30 and rng.random() < 0.25 else 0
        is_unsteady = rng.random() < 0.12
        widths = [font.getlength(line) for line in lines]
        canvas = Image.new("L", (round(max(widths) + 1.6 * size), round(pitch * (len(lines) - 1) + 2.6 * size)), 0)
        pen = ImageDraw.Draw(canvas)
        is_centred = rng.random() < 0.5
        letters: list[tuple[str, Point]] = []
        for i, line in enumerate(lines):
            x = 0.8 * size + ((max(widths) - widths[i]) / 2 if is_centred else 0)
            y = 1.5 * size + i * pitch
            if not is_unsteady:
                pen.text((x, y), line, fill=255, font=font, anchor="ls", stroke_width=stroke)
                ends = [x + font.getlength(line[:count]) for count in range(len(line) + 1)]
                letters += [(char, ((ends[j] + ends[j + 1]) / 2, y - rise)) for j, char in enumerate(line)]
                continue
            for char in line:
                dip = rng.uniform(-0.05, 0.05) * size
                pen.text((x, y + dip), char, fill=255, font=font, anchor="ls", stroke_width=stroke)
                letters.append((char, (x + font.getlength(char) / 2, y + dip - rise)))
                x += font.getlength(char) * rng.uniform(0.98, 1.06)
        box = canvas.getbbox() or (0, 0, *canvas.size)
        return canvas.crop(box), [(char, (x - box[0], y - box[1])) for char, (x, y) in letters if char != " "]

    def _ratios(self, index: int) -> tuple[float, float]:
        """Heights of a capital and of a small x in this font, as shares of its size."""
        font = self._open(index, 100)
        return tuple(max(0.2, (box[3] - box[1]) / 100) for box in (font.getbbox("H"), font.getbbox("x")))  # type: ignore[return-value]

    def _covered(self, index: int) -> frozenset[str]:
        if index not in self._coverage:
            font = self._open(index, STEPS[2])
            missing = bytes(font.getmask("\uffff"))
            printable = [chr(code) for code in range(33, 127)]
            self._coverage[index] = frozenset(c for c in printable if bytes(font.getmask(c)) != missing) | {" "}
        return self._coverage[index]

    def _read(self, index: int, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(BytesIO(self._fonts[index].data), size, layout_engine=ImageFont.Layout.BASIC)


def rough(ink: Image.Image, rng: Random) -> Image.Image:
    """Make the ink uneven, as pencil and chalk are."""
    grain = noise.window(ink.size, rng, zoom=(0.6, 1.0)).point([min(255, 130 + value) for value in range(256)])
    return ImageChops.multiply(ink, grain)
