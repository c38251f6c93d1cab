"""Plain geometric shapes: names, and masks drawn once."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 256  # of a finished mask; drawn at twice that and halved for smooth edges
MARGIN = 4


@dataclass(frozen=True)
class Shape:
    """A shape that people have a word for, and how far it may turn before the word is wrong."""

    name: str
    plural: str
    turn: int
    """Largest rotation in degrees: a square on its corner is a diamond, a cross on its side is an x."""
    smallest: float
    """As a share of the picture's side: a tiny hexagon is a circle to everybody."""
    rivals: frozenset[str]
    """Names that must not share a picture with it."""


SHAPES = (
    Shape("circle", "circles", 0, 0.03, frozenset({"oval", "hexagon", "pentagon", "ball", "ring", "moon"})),
    Shape("square", "squares", 28, 0.03, frozenset({"diamond", "rectangle"})),
    Shape("triangle", "triangles", 180, 0.03, frozenset()),
    Shape("star", "stars", 180, 0.035, frozenset({"sparkles", "starfish"})),
    Shape("heart", "hearts", 60, 0.035, frozenset()),
    Shape("diamond", "diamonds", 12, 0.035, frozenset({"square", "rectangle", "gem", "kite"})),
    Shape("cross", "crosses", 20, 0.035, frozenset()),
    Shape("moon", "moons", 90, 0.04, frozenset({"circle", "banana"})),
    Shape("pentagon", "pentagons", 20, 0.07, frozenset({"circle", "hexagon", "oval"})),
    Shape("hexagon", "hexagons", 30, 0.07, frozenset({"circle", "pentagon", "oval"})),
    Shape("rectangle", "rectangles", 30, 0.04, frozenset({"square", "diamond"})),
    Shape("oval", "ovals", 60, 0.04, frozenset({"circle", "hexagon", "pentagon", "egg"})),
)
COMMON = ("circle", "square", "triangle", "star", "heart")
"""The shapes that others draw most."""

STYLES = {"filled": 0.0, "thick": 0.09, "thin": 0.05, "hairline": 0.03}
"""Name of a line to its width as a share of the shape; 0 fills."""


def draw_mask(name: str, style: str) -> Image.Image:
    """Draw one shape, upright, as an `L` mask of `SIDE` pixels."""
    side = 2 * SIDE
    low, high = 2 * MARGIN, side - 2 * MARGIN
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    if style == "filled":
        if name == "circle":
            pen.ellipse((low, low, high, high), fill=255)
        elif name == "oval":
            pen.ellipse((low, side * 0.22, high, side * 0.78), fill=255)
        elif name == "moon":
            pen.ellipse((low, low, high, high), fill=255)
            pen.ellipse((low + side * 0.32, low - side * 0.02, high + side * 0.26, high - side * 0.06), fill=0)
        else:
            pen.polygon([(low + x * (high - low), low + y * (high - low)) for x, y in _corners(name)], fill=255)
        return mask.reduce(2)
    # An outline is the shape less a smaller copy of it; lines on the border of a polygon would leave gaps at corners.
    width = STYLES[style] * side
    if name in {"circle", "oval"}:
        top = low if name == "circle" else side * 0.22
        pen.ellipse((low, top, high, side - top), outline=255, width=round(width))
    else:
        points = [
            (side / 2 + (x - 0.5) * (high - low - width), side / 2 + (y - 0.5) * (high - low - width))
            for x, y in _corners(name)
        ]
        pen.line([*points, points[0], points[1]], fill=255, width=round(width), joint="curve")
    return mask.reduce(2)


def has_outline(name: str) -> bool:
    """Whether the shape is still that shape when only its outline is drawn."""
    return name != "moon"


def _corners(name: str) -> list[tuple[float, float]]:
    """The corners of a shape in the unit square."""
    match name:
        case "square":
            return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
        case "rectangle":
            return [(0, 0.24), (1, 0.24), (1, 0.76), (0, 0.76)]
        case "triangle":
            return [(0.5, 0.04), (1, 0.92), (0, 0.92)]
        case "diamond":
            return [(0.5, 0), (0.83, 0.5), (0.5, 1), (0.17, 0.5)]
        case "cross":
            low, high = 0.34, 0.66
            return [
                (low, 0),
                (high, 0),
                (high, low),
                (1, low),
                (1, high),
                (high, high),
                (high, 1),
                (low, 1),
                (low, high),
                (0, high),
                (0, low),
                (low, low),
            ]
        case "pentagon":
            return _polygon(5)
        case "hexagon":
            return _polygon(6)
        case "star":
            outer, inner = _polygon(5), _polygon(5, radius=0.21, turn=math.pi / 5)
            return [point for pair in zip(outer, inner, strict=True) for point in pair]
        case _:
            return _heart()


def _polygon(num_corners: int, radius: float = 0.5, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / num_corners + turn for i in range(num_corners)]
    return [(0.5 + radius * math.sin(angle), 0.5 - radius * math.cos(angle)) for angle in angles]


def _heart() -> list[tuple[float, float]]:
    """The usual curve, x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    points = []
    for i in range(80):
        t = 2 * math.pi * i / 80
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.5 + x / 34, 0.46 - y / 34))
    return points
