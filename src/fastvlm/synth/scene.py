"""A drawn picture together with all that is known about it."""

from collections import Counter
from dataclasses import dataclass, field

from PIL import Image

from fastvlm.synth.wording import PLACES

CLEAR = 0.06  # how far inside a ninth of the picture a centre must lie


@dataclass(frozen=True)
class Subject:
    """What a question is about: "dog", "circle" or "red circle"."""

    name: str
    plural: str
    colour: str | None = None

    @property
    def one(self) -> str:
        """Singular, with its colour."""
        return f"{self.colour} {self.name}" if self.colour else self.name

    @property
    def many(self) -> str:
        """Plural, with its colour."""
        return f"{self.colour} {self.plural}" if self.colour else self.plural

    def counted(self, number: int) -> str:
        """For example "3 red circles"."""
        return f"{number} {self.one if number == 1 else self.many}"


@dataclass(frozen=True)
class Thing:
    """One thing in the picture; centre and size are shares of its width and height."""

    subject: Subject
    centre: tuple[float, float]
    size: tuple[float, float]


@dataclass
class Scene:
    """The picture and its facts."""

    image: Image.Image
    background: str | None
    """Colour of a plain background."""
    things: list[Thing] = field(default_factory=list)
    text: str | None = None
    ink: str | None = None
    """Name of the ink's colour, if people would agree on one."""
    text_spot: Thing | None = None
    font: str | None = None
    """Family of the handwriting."""
    height: float | None = None
    """Of its letters, as a share of the picture's longest side."""
    letters: list[tuple[str, tuple[float, float]]] = field(default_factory=list)
    """Each character and its middle, in shares of width and height; spaces are left out."""
    visible: list[float] = field(default_factory=list)
    """Share of each thing that no other thing covers."""

    @property
    def is_portrait(self) -> bool:
        """Whether one emoji is all there is to see."""
        return self.text is None and len(self.things) == 1 and self.things[0].subject.colour is None

    def groups(self) -> Counter[Subject]:
        """How many there are of each, by name and colour."""
        return Counter(thing.subject for thing in self.things)

    def count(self, subject: Subject) -> int:
        """How many things a question about `subject` means; without a colour it means all colours."""
        return sum(
            1
            for thing in self.things
            if thing.subject.name == subject.name and subject.colour in (None, thing.subject.colour)
        )

    def colours_of(self, name: str) -> set[str | None]:
        """The colours in which this kind of thing is drawn."""
        return {thing.subject.colour for thing in self.things if thing.subject.name == name}


def place_of(thing: Thing) -> str | None:
    """Name of the ninth of the picture that a thing is in, or None if one could argue."""
    cells = []
    for centre in thing.centre:
        cell = min(2, int(centre * 3))
        low, high = cell / 3 + (CLEAR if cell else 0), (cell + 1) / 3 - (CLEAR if cell < 2 else 0)
        if not low <= centre <= high:
            return None
        cells.append(cell)
    return PLACES[cells[1] * 3 + cells[0]]


def thing_at(subject: Subject, corner: tuple[int, int], size: tuple[int, int], canvas: tuple[int, int]) -> Thing:
    """A thing drawn with its upper left corner at a pixel, in shares of the canvas."""
    centre = (corner[0] + size[0] / 2) / canvas[0], (corner[1] + size[1] / 2) / canvas[1]
    return Thing(subject, centre, (size[0] / canvas[0], size[1] / canvas[1]))
