"""What one drawn example is: a picture, questions with answers, and the facts behind them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

Split = Literal["train", "heldout"]
TASKS = ("counting", "reading", "emoji", "description", "yes_no", "colour", "place")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question about the picture, its answer, and the wording (a template) that the question was made from."""

    task: str
    wording: str
    question: str
    answer: str


@dataclass(frozen=True)
class Mark:
    """One label at one point, in shares of the picture's width and height."""

    label: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture as a user would hand it in, and what is asked about it; the first turn is the sample's task."""

    image: Image.Image
    turns: tuple[Turn, ...]
    task: str
    facts: dict[str, Any]
    """What a scorer needs, as plain values: `count` and `kind`, `text`, `name`, `answer` or `required`."""
    marks: tuple[Mark, ...] = ()
    """What is where in the picture."""
    traits: dict[str, Any] = field(default_factory=dict)
    """How hard the picture is, as plain values: `size`, `others`, `look`, `background`; `font` and `height` of text."""
