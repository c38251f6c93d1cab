"""What lies behind the things: plain, gradient, paper, textures, and what could be a photograph out of focus."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from fastvlm.synth import noise
from fastvlm.synth.colours import NAMED, PASTEL, RGB, distance, near, shade

STYLES = {"plain": 0.46, "gradient": 0.1, "paper": 0.12, "texture": 0.15, "photo": 0.17}


@dataclass(frozen=True)
class Background:
    """A drawn background."""

    image: Image.Image
    style: str
    colour: str | None
    """Its colour's name, when it is plain."""
    palette: tuple[RGB, ...]
    """The colours in it, so that things can be told from it."""


def draw(size: tuple[int, int], rng: Random, *, avoid: Sequence[RGB] = (), style: str | None = None) -> Background:
    """Draw a background.

    Args:
        size: Width and height in pixels.
        rng: Where every choice comes from.
        avoid: Colours of things; a plain background differs clearly from all of them.
        style: One of `STYLES`; None draws it.
    """
    style = style or rng.choices(tuple(STYLES), tuple(STYLES.values()))[0]
    colour = None
    if style == "plain":
        colour, rgb = plain_colour(rng, avoid)
        image = Image.new("RGB", size, rgb)
    elif style == "gradient":
        image = _gradient(size, rng)
    elif style == "paper":
        image = _paper(size, rng)
    elif style == "texture":
        image = _texture(size, rng)
    else:
        image = _photo(size, rng)
    return Background(image=image, style=style, colour=colour, palette=_palette(image, style))


def plain_colour(rng: Random, avoid: Sequence[RGB]) -> tuple[str, RGB]:
    """A named colour for a plain page: white most often; and one of its shades."""
    for _ in range(12):
        roll = rng.random()
        if roll < 0.5:
            name, rgb = "white", rng.choice(NAMED["white"]) if rng.random() < 0.3 else (255, 255, 255)
        elif roll < 0.6:
            name, rgb = "black", shade("black", rng)
        elif roll < 0.78:
            name = rng.choice(tuple(PASTEL))
            rgb = rng.choice(PASTEL[name])
        else:
            name = rng.choice(tuple(NAMED))
            rgb = shade(name, rng)
        if all(distance(rgb, other) > 150 for other in avoid):
            return name, rgb
    options = [(name, rgb) for name, shades in NAMED.items() for rgb in shades]
    return max(options, key=lambda option: min((distance(option[1], other) for other in avoid), default=0.0))


def colour_map(image: Image.Image, stops: Sequence[RGB]) -> Image.Image:
    """Colour an `L` image: dark becomes the first stop, light the last, others evenly between."""
    at = np.linspace(0, 255, len(stops))
    table = [np.interp(np.arange(256), at, [stop[i] for stop in stops]).astype(np.uint8).tolist() for i in range(3)]
    return Image.merge("RGB", [image.point(channel) for channel in table])


def _palette(image: Image.Image, style: str) -> tuple[RGB, ...]:
    if style == "plain":
        return (image.getpixel((0, 0)),)  # type: ignore[return-value]
    small = np.asarray(image.resize((5, 5), Image.Resampling.BILINEAR, reducing_gap=1.0)).reshape(-1, 3)
    return tuple((int(r), int(g), int(b)) for r, g, b in small)


def _any_colour(rng: Random) -> RGB:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _light(rng: Random) -> RGB:
    base = rng.randint(205, 250)
    return near((base, base, base), rng, rng.choice((4, 12, 30)))


def _calm(rng: Random) -> RGB:
    """A colour for large areas: light, dark or muted, seldom loud."""
    roll = rng.random()
    if roll < 0.45:
        return _light(rng)
    if roll < 0.6:
        return near((35, 35, 40), rng, 25)
    if roll < 0.85:
        base = rng.randint(90, 190)
        return near((base, base, base), rng, 45)
    return _any_colour(rng)


def _gradient(size: tuple[int, int], rng: Random) -> Image.Image:
    first = _calm(rng)
    second = near(first, rng, 90) if rng.random() < 0.6 else _calm(rng)
    roll = rng.random()
    if roll < 0.2:
        ramp = Image.radial_gradient("L")
        left = rng.uniform(0, 60)
        ramp = ramp.resize(size, Image.Resampling.BILINEAR, box=(left, left, 256 - rng.uniform(0, 60), 256 - left / 2))
    else:
        corners = np.array([[rng.random(), rng.random()], [rng.random(), rng.random()]], np.float32)
        if roll < 0.6:  # straight up or across
            corners = np.array([[0, 0], [1, 1]], np.float32) if roll < 0.4 else np.array([[0, 1], [0, 1]], np.float32)
        corners = (corners - corners.min()) / max(1e-3, float(np.ptp(corners)))
        ramp = Image.fromarray((corners * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    return colour_map(ramp, (first, second))


def _paper(size: tuple[int, int], rng: Random) -> Image.Image:
    """White, cream or grey paper: blank, lined, squared, creased."""
    base = rng.choice(((255, 255, 255), (250, 246, 235), (244, 238, 220), (235, 235, 238), (252, 245, 190)))
    base = near(base, rng, 6)
    image = Image.new("RGB", size, base)
    if rng.random() < 0.5:
        depth = rng.randint(6, 28)
        image = colour_map(noise.window(size, rng, zoom=(0.5, 1.0)), (tuple(max(0, v - depth) for v in base), base))  # type: ignore[arg-type]
    pen = ImageDraw.Draw(image)
    step = rng.uniform(0.05, 0.13) * max(size)
    ink = rng.choice(((170, 195, 225), (190, 190, 195), (150, 175, 210), (205, 215, 225), (220, 190, 190)))
    start = rng.uniform(0, step)
    width = rng.choice((1, 1, 2))
    kind = rng.random()
    if kind < 0.65:
        for i in range(int(size[1] / step) + 1):
            pen.line((0, start + i * step, size[0], start + i * step), fill=ink, width=width)
    if 0.45 < kind < 0.65:
        for i in range(int(size[0] / step) + 1):
            pen.line((start + i * step, 0, start + i * step, size[1]), fill=ink, width=width)
    elif kind < 0.2:
        margin = size[0] * rng.uniform(0.08, 0.16)
        pen.line((margin, 0, margin, size[1]), fill=(230, 140, 140), width=width)
    return image


def _texture(size: tuple[int, int], rng: Random) -> Image.Image:
    base = _calm(rng)
    other = near(base, rng, rng.choice((20, 35, 60)))
    roll = rng.random()
    if roll < 0.3:
        image = colour_map(noise.window(size, rng, zoom=(0.4, 1.0)), (base, other))
    elif roll < 0.45:
        dark = near(rng.choice(((120, 75, 40), (160, 115, 70), (205, 165, 115), (90, 60, 40))), rng, 15)
        light = tuple(min(255, value + rng.randint(20, 45)) for value in dark)
        image = colour_map(
            noise.window(size, rng, zoom=(0.6, 1.0), stretch=rng.uniform(6, 14)),
            (dark, light, dark, light),  # type: ignore[arg-type]
        )
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    elif roll < 0.6:
        stops = [near(base, rng, 40) for _ in range(rng.randint(3, 6))]
        image = colour_map(noise.window(size, rng, zoom=(0.2, 0.7)), stops)
    else:
        image = colour_map(_pattern(size, rng), (base, other))
    if rng.random() < 0.5:
        image = ImageChops.add(image, noise.grain_window(size, rng).point(_scaled(rng.uniform(0.1, 0.6))), 1, -128)
    return image


def _scaled(factor: float) -> list[int]:
    """A table that pulls noise towards 128, for the three channels."""
    return [round(128 + (value - 128) * factor) for value in range(256)] * 3


def _pattern(size: tuple[int, int], rng: Random) -> Image.Image:
    """Stripes or checks at any angle, sharp or soft, `L`."""
    angle = rng.choice((0.0, 0.0, np.pi / 2, np.pi / 4, rng.uniform(0, np.pi)))
    period = rng.uniform(0.03, 0.2) * max(size)
    across = np.arange(size[0], dtype=np.float32) * (np.cos(angle) / period)
    down = np.arange(size[1], dtype=np.float32) * (np.sin(angle) / period)
    stripes = np.add.outer(down, across).astype(np.float32)
    roll = rng.random()
    if roll < 0.35:
        wave = np.abs(stripes % 1.0 - 0.5) * 510
    elif roll < 0.7:
        wave = (stripes % 1.0 < 0.5) * np.uint8(255)
    else:
        across = np.arange(size[0], dtype=np.float32) * (-np.sin(angle) / period)
        down = np.arange(size[1], dtype=np.float32) * (np.cos(angle) / period)
        wave = ((stripes % 1.0 < 0.5) ^ (np.add.outer(down, across) % 1.0 < 0.5)) * np.uint8(255)
    return Image.fromarray(wave.astype(np.uint8))


def _photo(size: tuple[int, int], rng: Random) -> Image.Image:
    """Something that a camera might have seen out of focus."""
    roll = rng.random()
    if roll < 0.3:
        return _landscape(size, rng)
    if roll < 0.65:
        return _blobs(size, rng)
    clouds = noise.window(size, rng, zoom=(0.15, 0.8))
    stops = [_calm(rng)]
    stops += [near(stops[0], rng, 80) for _ in range(rng.randint(1, 3))]
    return _lit(colour_map(clouds, stops), rng)


def _landscape(size: tuple[int, int], rng: Random) -> Image.Image:
    """Sky above, ground, water or a table below."""
    horizon = round(size[1] * rng.uniform(0.25, 0.75))
    sky = rng.choice(((120, 175, 230), (180, 205, 235), (230, 190, 160), (150, 160, 175), (60, 80, 130)))
    ground = rng.choice(
        ((90, 140, 70), (120, 160, 80), (190, 170, 120), (110, 95, 80), (70, 110, 150), (225, 225, 230))
    )
    sky, ground = near(sky, rng, 20), near(ground, rng, 20)
    upper = noise.window((size[0], horizon), rng, zoom=(0.4, 1.0))
    lower = noise.window((size[0], size[1] - horizon), rng, zoom=(0.3, 0.8), stretch=0.5)
    image = Image.new("RGB", size)
    image.paste(colour_map(upper, (sky, near(sky, rng, 12), (240, 240, 242))), (0, 0))
    image.paste(colour_map(lower, (ground, near(ground, rng, 35))), (0, horizon))
    return image


def _blobs(size: tuple[int, int], rng: Random) -> Image.Image:
    """Large soft patches, as of a room behind the thing in focus."""
    small = Image.new("RGB", (28, 28), _calm(rng))
    pen = ImageDraw.Draw(small)
    base = _calm(rng)
    for _ in range(rng.randint(2, 9)):
        x, y, w, h = rng.uniform(-6, 26), rng.uniform(-6, 26), rng.uniform(4, 18), rng.uniform(4, 18)
        draw_one = pen.ellipse if rng.random() < 0.6 else pen.rectangle
        draw_one((x, y, x + w, y + h), fill=near(base, rng, 60) if rng.random() < 0.7 else _calm(rng))
    # A sharp patch would be a square or a circle to count: eight pixels across, none stays sharp.
    return _lit(small.resize((8, 8), Image.Resampling.BOX).resize(size, Image.Resampling.BICUBIC), rng)


def _lit(image: Image.Image, rng: Random) -> Image.Image:
    """Add sensor grain to some."""
    if rng.random() < 0.6:
        return image
    grain = noise.grain_window(image.size, rng).point(_scaled(rng.uniform(0.05, 0.35)))
    return ImageChops.add(image, grain, 1, -128)
