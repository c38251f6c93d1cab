"""Scenes with handwriting."""

from random import Random

from PIL import ImageDraw

from fastvlm.synth import backgrounds, canvas
from fastvlm.synth.colours import NAMED, RGB, distance, luminance, near, shade
from fastvlm.synth.handwriting import Scribe, Wish, rough
from fastvlm.synth.phrases import Phrases
from fastvlm.synth.scene import Scene, Subject, thing_at

GROUNDS = {"plain": 0.46, "paper": 0.28, "gradient": 0.09, "texture": 0.1, "photo": 0.07}
LETTERS = 14, 60
"""Smallest and largest height of letters, in pixels of a picture whose longest side is `REFERENCE`."""
REFERENCE = 384
TRIES = 6
READABLE = 230.0
"""Distance that ink keeps from every colour of the background, and below the difference in lightness."""
LIGHTER = 75.0


class Writer:
    """Draws handwriting of one split at one size."""

    def __init__(self, scribe: Scribe, phrases: Phrases, side: int) -> None:
        self._scribe, self._phrases, self._side = scribe, phrases, side

    def scene(self, rng: Random, *, is_small: bool = False) -> Scene:
        """Write a word or a line, dark on light mostly."""
        size = canvas.sample_size(self._side, rng, is_wide=rng.random() < 0.85)
        style = rng.choices(tuple(GROUNDS), tuple(GROUNDS.values()))[0]
        ground = backgrounds.draw(size, rng, style=style)
        unit = max(size) / REFERENCE
        angle = 0.0 if rng.random() < 0.35 else rng.uniform(-15, 15) * rng.choice((0.4, 1.0))
        for _ in range(TRIES):  # a long line in a narrow picture would be too small to read
            lines = self._phrases.sample(rng)
            index, lines = self._scribe.choose(lines, rng)
            height = rng.uniform(LETTERS[0], 28 if is_small else LETTERS[1]) * unit
            wish = Wish(height=height, room=(0.96 * size[0] - 4, 0.96 * size[1] - 4), angle=angle)
            written = self._scribe.write(lines, index, wish, rng)
            if written.height >= 0.97 * LETTERS[0] * unit:
                break
        ink = written.mask
        left = canvas.between(rng, 2, size[0] - ink.width - 2)
        top = canvas.between(rng, 2, size[1] - ink.height - 2)
        if rng.random() < 0.25 and not is_small:
            left, top = (size[0] - ink.width) // 2, (size[1] - ink.height) // 2
        box = (left, top, left + ink.width, top + ink.height)
        name, rgb = _ink(rng, ground)
        if name is None:
            rgb = _label(ground, rng, box)
        if rng.random() < 0.08:
            ink = rough(ink, rng)
        if ground.style == "plain" and rng.random() < 0.08:
            canvas.litter(ground, rng, (left - 6, top - 6, box[2] + 6, box[3] + 6))
        ground.image.paste(rgb, box, ink)
        return Scene(
            image=ground.image,
            background=ground.colour if name else None,
            text=" ".join(lines),
            ink=None if name == "dark" else name,
            text_spot=thing_at(Subject("text", "texts"), (left, top), ink.size, size),
            font=self._scribe.family(index),
            height=written.height / max(size),
            letters=[(char, ((left + x) / size[0], (top + y) / size[1])) for char, (x, y) in written.letters],
        )


def _ink(rng: Random, ground: backgrounds.Background) -> tuple[str | None, RGB]:
    """A colour of ink that can be read on the background; no name if none was found."""
    light = sum(luminance(colour) for colour in ground.palette) / len(ground.palette)
    for _ in range(12):
        if light > 120:
            name = rng.choice(("black",) * 6 + ("dark",) * 2 + ("blue",) * 4 + ("red", "green", "purple", "brown"))
        else:
            name = rng.choice(("white",) * 6 + ("yellow", "pink", "orange"))
        if rng.random() < 0.1:
            name = rng.choice(tuple(NAMED))
        rgb = near((45, 45, 60), rng, 22) if name == "dark" else shade(name, rng)
        if all(distance(rgb, c) > READABLE and abs(luminance(rgb) - luminance(c)) > LIGHTER for c in ground.palette):
            return name, rgb
    return None, (0, 0, 0)


def _label(ground: backgrounds.Background, rng: Random, box: canvas.Box) -> RGB:
    """Put a piece of paper where the text will be, and return what to write with."""
    margin = rng.randint(2, 12)
    paper: RGB = rng.choice(((255, 255, 255), (250, 246, 230), (255, 245, 160), (235, 238, 242)))
    area = (box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)
    ImageDraw.Draw(ground.image).rounded_rectangle(area, radius=rng.choice((0, 0, 6)), fill=near(paper, rng, 4))
    ink: RGB = rng.choice(((0, 0, 0), (25, 25, 30), (30, 50, 130), (70, 20, 20)))
    return ink
