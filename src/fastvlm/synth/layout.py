"""Where things go: scattered, in rows, on a grid, in a heap; never hiding more of one another than allowed."""

import math
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
LAYOUTS = {"scatter": 0.56, "grid": 0.16, "row": 0.12, "heap": 0.16}
LARGEST_OVERLAP = 0.2
STEP = 2  # masks are compared at every second pixel
TRIES = 28


def sample_layout(rng: Random) -> str:
    """Choose how a picture is laid out."""
    return rng.choices(tuple(LAYOUTS), tuple(LAYOUTS.values()))[0]


def largest_size(layout: str, num_things: int, width: int, height: int) -> float:
    """How large things may be to fit, in pixels."""
    if layout == "row":
        return min(0.9 * max(width, height) / max(1, num_things), 0.25 * max(width, height))
    fill = 0.5 if layout == "grid" else 0.36
    return math.sqrt(fill * width * height / max(1, num_things))


class Plane:
    """The picture's area, and which thing is seen at each of its points."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.owner = np.full((height // STEP + 1, width // STEP + 1), -1, np.int16)
        self._areas: list[int] = []
        self._hidden: list[int] = []
        self._centres: list[tuple[float, float, float]] = []

    def visible_shares(self) -> list[float]:
        """Of each thing, how much is not covered by things above it."""
        return [1 - hidden / area for hidden, area in zip(self._hidden, self._areas, strict=True)]

    def put(
        self, mask: Mask, spots: Iterator[tuple[float, float]], rng: Random, overlap: float
    ) -> tuple[int, int] | None:
        """Find a place for a thing and take it.

        Args:
            mask: What it covers, at every `STEP`-th pixel.
            spots: Candidates for its centre.
            rng: Decides whether to try beside another thing first, when touching is allowed.
            overlap: Largest share of any thing that may be shared with another one; 0 keeps a gap.

        Returns:
            The upper left corner in pixels, or None if no spot was free.
        """
        high, wide = mask.shape
        area = max(1, int(mask.sum()))
        radius = math.sqrt(area / math.pi) * STEP
        for _ in range(TRIES):
            x, y = next(spots)
            if overlap and self._centres and rng.random() < 0.6:
                x, y = self._beside(radius, rng)
            left, top = round(x / STEP - wide / 2), round(y / STEP - high / 2)
            if left < 1 or top < 1 or left + wide > self.owner.shape[1] - 2 or top + high > self.owner.shape[0] - 2:
                continue
            if self._take(mask, left, top, area, overlap):
                self._centres.append(((left + wide / 2) * STEP, (top + high / 2) * STEP, radius))
                return left * STEP, top * STEP
        return None

    def _beside(self, radius: float, rng: Random) -> tuple[float, float]:
        x, y, other = rng.choice(self._centres)
        angle, reach = rng.uniform(0, 2 * math.pi), (radius + other) * rng.uniform(0.8, 1.1)
        return x + reach * math.cos(angle), y + reach * math.sin(angle)

    def _take(self, mask: Mask, left: int, top: int, area: int, overlap: float) -> bool:
        high, wide = mask.shape
        here = self.owner[top : top + high, left : left + wide]
        if overlap == 0:
            near = self.owner[top - 1 : top + high + 1, left - 1 : left + wide + 1]
            if (near >= 0).any():
                return False
        else:
            below = here[mask]
            below = below[below >= 0]
            if below.size > overlap * area:
                return False
            lost = np.bincount(below, minlength=len(self._areas))
            if any(self._hidden[i] + lost[i] > overlap * self._areas[i] for i in range(len(self._areas))):
                return False
            for i in range(len(self._areas)):
                self._hidden[i] += int(lost[i])
        here[mask] = len(self._areas)
        self._areas.append(area)
        self._hidden.append(0)
        return True


def spots(layout: str, num_things: int, plane: Plane, rng: Random) -> Iterator[tuple[float, float]]:
    """Candidates for centres, endless; a layout that fails falls back to scattering."""
    ordered: Sequence[tuple[float, float]] = ()
    if layout == "grid":
        ordered = _grid(num_things, plane, rng)
    elif layout == "row":
        ordered = _row(num_things, plane, rng)
    yield from ordered
    x, y = rng.uniform(0.35, 0.65) * plane.width, rng.uniform(0.35, 0.65) * plane.height
    spread = rng.uniform(0.1, 0.22)
    for i in range(100_000):
        if layout == "heap" and i < 12 * num_things:
            yield rng.gauss(x, spread * plane.width), rng.gauss(y, spread * plane.height)
        else:
            yield rng.uniform(0, plane.width), rng.uniform(0, plane.height)


def _grid(num_things: int, plane: Plane, rng: Random) -> list[tuple[float, float]]:
    columns = max(1, round(math.sqrt(num_things * plane.width / plane.height)))
    rows = math.ceil(num_things / columns)
    wide, high = plane.width / columns, plane.height / rows
    jitter = rng.choice((0.0, 0.02, 0.08))
    cells = [
        (
            (i % columns + 0.5 + rng.uniform(-jitter, jitter)) * wide,
            (i // columns + 0.5 + rng.uniform(-jitter, jitter)) * high,
        )
        for i in range(columns * rows)
    ]
    if rng.random() < 0.4:
        rng.shuffle(cells)
    return cells


def _row(num_things: int, plane: Plane, rng: Random) -> list[tuple[float, float]]:
    """A horizontal, vertical or slanted line, along the longer side."""
    slope = rng.choice((0.0, 0.0, rng.uniform(-0.3, 0.3)))
    level = rng.uniform(0.3, 0.7)
    steps = [(i + 0.5) / num_things for i in range(num_things)]
    if plane.width >= plane.height:
        return [(step * plane.width, (level + slope * (step - 0.5)) * plane.height) for step in steps]
    return [((level + slope * (step - 0.5)) * plane.width, step * plane.height) for step in steps]
