"""How each kind of thing looks in one picture: which design, which colour, and what may stand beside it."""

from dataclasses import dataclass
from random import Random

from fastvlm.synth import shapes
from fastvlm.synth.colours import NAMED, RGB, distance, luminance, shade
from fastvlm.synth.kinds import KINDS, Kind
from fastvlm.synth.rivals import are_rivals
from fastvlm.synth.scene import Subject
from fastvlm.synth.sprites import Sprite, Sprites, with_halo

COUNTABLE = tuple(kind for kind in KINDS if kind.is_countable)
SEVERAL = frozenset({"leaf"})
"""Kinds whose `also` designs show more than one: not where things are counted."""
SHAPE_BY_NAME = {shape.name: shape for shape in shapes.SHAPES}
STANDS_OUT = 200.0
"""Distance of colours above which a shape is seen at once."""
IS_SEEN = 120.0
"""Below this it needs a rim."""
CLOSE = {
    "red": ("orange", "brown", "pink"),
    "orange": ("red", "yellow", "brown"),
    "yellow": ("orange",),
    "green": (),
    "blue": ("purple",),
    "purple": ("blue", "pink"),
    "pink": ("purple", "red"),
    "brown": ("orange", "red"),
    "black": ("gray",),
    "white": ("gray",),
    "gray": ("black", "white"),
}
"""Colours that are hard to tell apart side by side."""


@dataclass(frozen=True)
class Look:
    """How one kind of thing is drawn in one picture."""

    subject: Subject
    designs: tuple[int, ...] = ()
    """Of an emoji: those that are mixed."""
    paints: tuple[tuple[str, RGB], ...] = ()
    """Of a shape: styles and their colours, in order."""
    halo: RGB | None = None
    turn: float = 180.0
    """Largest rotation in degrees."""
    smallest: float = 0.035
    """As a share of the picture's side."""


class Looks:
    """Chooses looks, and draws them."""

    def __init__(self, sprites: Sprites) -> None:
        self._sprites = sprites

    def emoji(self, kind: Kind, rng: Random, *, turn: float = 180.0, is_single: bool = True) -> Look:
        """One design for all of a kind mostly, else each thing its own; `is_single`: none that shows several things."""
        num_designs = self._sprites.num_designs(kind.name)
        if is_single and kind.name in SEVERAL:
            num_designs //= 1 + len(kind.also)
        designs = (rng.randrange(num_designs),) if rng.random() < 0.8 else tuple(range(num_designs))
        return Look(Subject(kind.name, kind.plural), designs=designs, turn=turn)

    def any_shape(self, rng: Random, palette: tuple[RGB, ...]) -> Look:
        """Some shape, the usual ones most often."""
        return self.shape(_shape_name(rng), rng, palette)

    def shape(self, name: str, rng: Random, palette: tuple[RGB, ...], taken: tuple[str, ...] = ()) -> Look:
        """A shape in a colour that stands out from the background's palette and is not `taken`."""
        shape = SHAPE_BY_NAME[name]
        contrast, colour, rgb = self._colour(rng, palette, taken)
        paints: tuple[tuple[str, RGB], ...] = (("filled", rgb),)
        smallest = shape.smallest
        is_clear = contrast > STANDS_OUT and all(abs(luminance(rgb) - luminance(other)) > 50 for other in palette)
        if shapes.has_outline(name) and is_clear and rng.random() < 0.2:
            paints = ((rng.choice(("thick", "thin")), rgb),)
            smallest = max(smallest, 0.06)
        elif shapes.has_outline(name) and rng.random() < 0.22:
            paints = (*paints, ("thin", (0, 0, 0) if luminance(rgb) > 60 else (255, 255, 255)))
        halo = None
        if contrast < IS_SEEN:
            halo = max(((255, 255, 255), (0, 0, 0)), key=lambda rim: distance(rim, rgb))
        subject = Subject(name, shape.plural, colour)
        return Look(subject, paints=paints, halo=halo, turn=shape.turn, smallest=smallest)

    def other(
        self, looks: list[Look], rng: Random, palette: tuple[RGB, ...], *, is_same_shape: bool = False
    ) -> Look | None:
        """Another kind of thing that cannot be taken for those already there; None if none was found."""
        names = [look.subject.name for look in looks]
        first = looks[0].subject
        if is_same_shape and first.colour:
            taken = tuple(look.subject.colour or "" for look in looks)
            taken += tuple(close for colour in taken for close in CLOSE.get(colour, ()))
            return self.shape(first.name, rng, palette, taken)
        for _ in range(30):
            is_shape = rng.random() < (0.7 if first.colour else 0.25)
            kind = rng.choice(COUNTABLE)
            name = _shape_name(rng) if is_shape else kind.name
            if not any(are_rivals(name, other) for other in names):
                return self.shape(name, rng, palette) if is_shape else self.emoji(kind, rng)
        return None

    def sprite(self, look: Look, size: float, angle: float, rng: Random) -> Sprite:
        """Draw one thing of this look."""
        if look.designs:
            return self._sprites.emoji(look.subject.name, rng.choice(look.designs), size, angle, rng.random() < 0.2)
        drawn = self._sprites.shape(look.subject.name, look.paints, size, angle)
        return with_halo(drawn, look.halo, max(1, round(size * 0.05))) if look.halo and size < 120 else drawn

    def mean_colour(self, kind: Kind) -> RGB:
        """The colour of an emoji on the whole."""
        return self._sprites.mean_colour(kind.name)

    def _colour(self, rng: Random, palette: tuple[RGB, ...], taken: tuple[str, ...]) -> tuple[float, str, RGB]:
        """Contrast with the background, name and value of a colour for a shape."""
        names = [name for name in NAMED if name not in taken]
        best = (-1.0, "red", (255, 0, 0))
        for _ in range(10):
            name = rng.choice(names)
            rgb = shade(name, rng)
            contrast = min(distance(rgb, other) for other in palette)
            best = max(best, (contrast, name, rgb))
            if contrast > STANDS_OUT:
                return contrast, name, rgb
        return best


def _shape_name(rng: Random) -> str:
    return rng.choice(shapes.COMMON) if rng.random() < 0.6 else rng.choice(shapes.SHAPES).name
