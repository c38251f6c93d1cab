"""Emoji and shapes at any size and angle, from copies scaled down beforehand."""

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageFilter

from fastvlm.synth import shapes
from fastvlm.synth.assets import Assets
from fastvlm.synth.colours import RGB

SMALLEST_LEVEL = 12


@dataclass(frozen=True)
class Sprite:
    """A thing ready to paste: what to paint through which mask, in order; all of one size."""

    layers: tuple[tuple[Image.Image | RGB, Image.Image], ...]
    mask: Image.Image
    """All that the thing covers, `L`; an outlined shape covers its inside."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, corners of the rotated square included."""
        return self.mask.size

    def paste(self, image: Image.Image, corner: tuple[int, int]) -> None:
        """Draw the sprite with its upper left corner at `corner`."""
        for paint, mask in self.layers:
            if isinstance(paint, Image.Image):
                image.paste(paint, corner, mask)
            else:
                image.paste(paint, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)

    def paste_shadow(self, image: Image.Image, corner: tuple[int, int], offset: int, darkness: float) -> None:
        """Draw the soft shadow that the sprite would throw."""
        lowest = self.layers[0][1]  # the line of an outlined shape: its inside throws no shadow
        soft = lowest.reduce(max(1, min(5, min(lowest.size) // 10)))
        soft = soft.point([round(value * darkness) for value in range(256)])
        grown = (self.mask.width + offset, self.mask.height + offset)
        image.paste((0, 0, 0), (corner[0] + offset, corner[1] + offset), soft.resize(grown, Image.Resampling.BILINEAR))


class Sprites:
    """Draws things; keeps every picture it has scaled down."""

    def __init__(self, assets: Assets) -> None:
        self._assets = assets
        self._emoji: dict[tuple[str, int], list[Image.Image]] = {}
        self._shapes: dict[tuple[str, str], list[Image.Image]] = {}

    def num_designs(self, name: str) -> int:
        """How many ways there are to draw this emoji."""
        return len(self._assets.emoji[name])

    def mean_colour(self, name: str) -> RGB:
        """The colour that an emoji has on the whole, in its first design."""
        pixels = self._assets.emoji[name][0][::4, ::4].reshape(-1, 4).astype(np.float32)
        weights = pixels[:, 3:] / max(1.0, float(pixels[:, 3].sum()))
        red, green, blue = (int(value) for value in (pixels[:, :3] * weights).sum(axis=0))
        return red, green, blue

    def emoji(self, name: str, design: int, size: float, angle: float, is_mirrored: bool = False) -> Sprite:
        """Draw an emoji whose longer side is `size` pixels."""
        key = name, design
        if key not in self._emoji:
            self._emoji[key] = _halve(_crop(Image.fromarray(self._assets.emoji[name][design], "RGBA")).convert("RGBa"))
        drawn = turn(_level(self._emoji[key], size), size, angle, is_mirrored).convert("RGBA")
        mask = drawn.getchannel("A")
        return Sprite(layers=((drawn, mask),), mask=mask)

    def shape(self, name: str, paints: tuple[tuple[str, RGB], ...], size: float, angle: float) -> Sprite:
        """Draw a shape of `size` pixels: each of `shapes.STYLES` in its colour, in order."""
        layers = tuple((colour, self._shape_mask(name, style, size, angle)) for style, colour in paints)
        return Sprite(layers=layers, mask=self._shape_mask(name, "filled", size, angle))

    def _shape_mask(self, name: str, style: str, size: float, angle: float) -> Image.Image:
        key = name, style
        if key not in self._shapes:
            self._shapes[key] = _halve(shapes.draw_mask(name, style))
        return turn(_level(self._shapes[key], size), size, angle, False)


def with_halo(sprite: Sprite, colour: RGB, width: int) -> Sprite:
    """The sprite on a rim of one colour, like a sticker, so that it stands out from any background."""
    padded = Image.new("L", (sprite.size[0] + 2 * width, sprite.size[1] + 2 * width), 0)
    padded.paste(sprite.mask, (width, width))
    rim = padded.filter(ImageFilter.MaxFilter(2 * width + 1))
    layers: list[tuple[Image.Image | RGB, Image.Image]] = [(colour, rim)]
    for paint, mask in sprite.layers:
        wide = Image.new("L", padded.size, 0)
        wide.paste(mask, (width, width))
        if isinstance(paint, Image.Image):
            canvas = Image.new(paint.mode, padded.size, 0)
            canvas.paste(paint, (width, width))
            layers.append((canvas, wide))
        else:
            layers.append((paint, wide))
    return Sprite(layers=tuple(layers), mask=rim)


def any_angle(rng: Random, largest: float) -> float:
    """An angle for one thing in degrees: often upright, else anything up to `largest`."""
    return 0.0 if rng.random() < 0.25 else rng.uniform(-largest, largest)


def _crop(image: Image.Image) -> Image.Image:
    """Cut the empty border off, so that sizes mean what one sees."""
    box = image.getchannel("A").point([0] * 24 + [255] * 232).getbbox()
    return image.crop(box) if box else image


def _halve(image: Image.Image) -> list[Image.Image]:
    """The image and its halves, largest first, down to `SMALLEST_LEVEL` pixels."""
    levels = [image]
    while max(levels[-1].size) >= 2 * SMALLEST_LEVEL:
        levels.append(levels[-1].reduce(2))
    return levels


def _level(levels: list[Image.Image], size: float) -> Image.Image:
    """The smallest copy that needs no enlarging: bilinear sampling is smooth down to half."""
    return next((level for level in reversed(levels) if max(level.size) >= size), levels[0])


def turn(image: Image.Image, size: float, angle: float, is_mirrored: bool = False) -> Image.Image:
    """Scale the longer side to `size` and rotate by `angle` degrees, the result just large enough."""
    scale = size / max(image.size)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    wide, high = image.width * scale, image.height * scale
    width = max(3, math.ceil(wide * abs(cos) + high * abs(sin)) + 1)
    height = max(3, math.ceil(wide * abs(sin) + high * abs(cos)) + 1)
    sign = -1.0 if is_mirrored else 1.0
    a, b, c, d = sign * cos / scale, sign * -sin / scale, sin / scale, cos / scale
    across = image.width / 2 - a * width / 2 - b * height / 2
    down = image.height / 2 - c * width / 2 - d * height / 2
    bilinear = Image.Resampling.BILINEAR
    return image.transform((width, height), Image.Transform.AFFINE, (a, b, across, c, d, down), bilinear)


def turned(
    point: tuple[float, float], before: tuple[int, int], after: tuple[int, int], scale: float, angle: float
) -> tuple[float, float]:
    """Where a point of an image of size `before` is once `turn` has made it one of size `after`."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = scale * (point[0] - before[0] / 2), scale * (point[1] - before[1] / 2)
    return after[0] / 2 + cos * x + sin * y, after[1] / 2 - sin * x + cos * y
