"""What is where in a drawn picture: labels at points, for training an encoder to say so (`train/dense.py`)."""

import string

from fastvlm.synth.colours import NAMED
from fastvlm.synth.kinds import KINDS
from fastvlm.synth.sample import Mark
from fastvlm.synth.scene import Scene, Subject
from fastvlm.synth.shapes import SHAPES

CHARACTERS = string.ascii_letters + string.digits + string.punctuation


def labels() -> tuple[str, ...]:
    """Every label there is: kinds of things, colours of shapes, both together, and characters."""
    shapes = tuple(shape.name for shape in SHAPES)
    both = tuple(f"{colour} {shape}" for colour in NAMED for shape in shapes)
    return tuple(dict.fromkeys((*(kind.name for kind in KINDS), *shapes, *NAMED, *both, *map(_letter, CHARACTERS))))


def marks_of(scene: Scene) -> tuple[Mark, ...]:
    """The labels of a scene: up to three a thing, one a character."""
    found = [Mark(label, *thing.centre) for thing in scene.things for label in _names(thing.subject)]
    found += [Mark(_letter(char), x, y) for char, (x, y) in scene.letters if char in CHARACTERS]
    return tuple(found)


def _names(subject: Subject) -> tuple[str, ...]:
    return (subject.name, subject.colour, subject.one) if subject.colour else (subject.name,)


def _letter(char: str) -> str:
    return f"letter {char}"
