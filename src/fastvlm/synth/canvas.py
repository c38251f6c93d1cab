"""The sheet that a scene is drawn on: its size, and marks on it that mean nothing."""

from random import Random

from PIL import ImageDraw

from fastvlm.synth.backgrounds import Background
from fastvlm.synth.colours import near

ASPECTS = {1.0: 0.6, 4 / 3: 0.12, 3 / 2: 0.06, 16 / 9: 0.05, 2.0: 0.03, 3 / 4: 0.07, 2 / 3: 0.04, 0.5: 0.03}
"""Width over height, and how often."""
Box = tuple[int, int, int, int]


def sample_size(side: int, rng: Random, *, is_wide: bool = False) -> tuple[int, int]:
    """Width and height: mostly the model's own square, sometimes another shape or another size."""
    aspect = rng.choices(tuple(ASPECTS), tuple(ASPECTS.values()))[0]
    if is_wide and aspect < 1:
        aspect = 1 / aspect
    longest = side if rng.random() < 0.75 else round(side * rng.uniform(0.75, 1.3))
    return (longest, round(longest / aspect)) if aspect >= 1 else (round(longest * aspect), longest)


def litter(ground: Background, rng: Random, box: Box) -> None:
    """Scatter a few dots and strokes outside `box`, in place."""
    image = ground.image
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 6)):
        x, y = rng.randrange(image.width), rng.randrange(image.height)
        reach = rng.uniform(0.008, 0.03) * max(image.size)
        if box[0] - 2 * reach < x < box[2] + 2 * reach and box[1] - 2 * reach < y < box[3] + 2 * reach:
            continue
        colour = near(rng.choice(ground.palette), rng, 90)
        if rng.random() < 0.5:
            pen.line((x - reach, y, x + rng.uniform(-1, 1) * reach, y + reach), fill=colour, width=rng.randint(1, 4))
        else:
            pen.rectangle((x - reach / 2, y - reach / 2, x + reach / 2, y + reach / 2), fill=colour)


def between(rng: Random, low: int, high: int) -> int:
    """A whole number in the range; the middle when the range is empty."""
    return rng.randint(low, high) if high > low else (low + high) // 2
