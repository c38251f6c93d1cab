"""Colours by their everyday names."""

from random import Random

RGB = tuple[int, int, int]

NAMED: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 20, 30), (200, 30, 40), (235, 50, 45)),
    "orange": ((255, 165, 0), (255, 140, 0), (245, 125, 25), (250, 150, 40)),
    "yellow": ((255, 255, 0), (255, 220, 0), (250, 230, 60), (240, 210, 40)),
    "green": ((0, 128, 0), (0, 200, 0), (34, 139, 34), (60, 180, 75), (20, 150, 60)),
    "blue": ((0, 0, 255), (30, 80, 220), (30, 144, 255), (65, 105, 225), (20, 60, 160)),
    "purple": ((128, 0, 128), (140, 40, 200), (148, 0, 211), (110, 50, 170)),
    "pink": ((255, 192, 203), (255, 105, 180), (250, 140, 190), (255, 150, 180)),
    "brown": ((139, 69, 19), (165, 82, 45), (120, 70, 30), (101, 60, 25)),
    "black": ((0, 0, 0), (15, 15, 15), (30, 30, 32)),
    "white": ((255, 255, 255), (250, 250, 250)),
    "gray": ((128, 128, 128), (150, 150, 150), (110, 112, 115), (140, 140, 140)),
}
"""Shades that nobody would call by another name."""

PASTEL: dict[str, tuple[RGB, ...]] = {
    "white": ((255, 255, 255), (252, 252, 252)),
    "blue": ((173, 216, 230), (200, 220, 250), (176, 200, 240)),
    "green": ((190, 235, 190), (204, 240, 200), (170, 225, 175)),
    "pink": ((255, 210, 220), (255, 200, 210), (250, 215, 225)),
    "yellow": ((255, 250, 180), (255, 245, 160), (253, 240, 170)),
    "purple": ((220, 200, 245), (215, 195, 240), (225, 205, 250)),
    "gray": ((192, 192, 192), (180, 180, 180), (170, 172, 175)),
}
"""Light shades for backgrounds."""


def shade(name: str, rng: Random, jitter: int = 8) -> RGB:
    """One shade of a named colour."""
    red, green, blue = rng.choice(NAMED[name])
    if rng.random() < 0.4:
        return red, green, blue
    return near((red, green, blue), rng, jitter)


def near(colour: RGB, rng: Random, jitter: int) -> RGB:
    """A colour close to another one."""
    red, green, blue = (min(255, max(0, value + rng.randint(-jitter, jitter))) for value in colour)
    return red, green, blue


def distance(first: RGB, second: RGB) -> float:
    """How unlike two colours look, 0 to about 765 (the low-cost weighting of compuphase.com/cmetric.htm)."""
    mean = (first[0] + second[0]) / 2
    red, green, blue = (a - b for a, b in zip(first, second, strict=True))
    weighted = (2 + mean / 256) * red * red + 4 * green * green + (2 + (255 - mean) / 256) * blue * blue
    return float(weighted**0.5)


def luminance(colour: RGB) -> float:
    """How light a colour is, 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
