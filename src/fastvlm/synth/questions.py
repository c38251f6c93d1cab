"""Questions that a scene can answer, with their answers and what a scorer needs."""

from collections.abc import Callable
from random import Random
from typing import Any

from fastvlm.synth import wording
from fastvlm.synth.kinds import KINDS
from fastvlm.synth.rivals import are_rivals
from fastvlm.synth.sample import Split, Turn
from fastvlm.synth.scene import Scene, Subject, place_of
from fastvlm.synth.shapes import SHAPES

Asked = tuple[Turn, dict[str, Any]]

EMOJI_SUBJECTS = tuple(Subject(kind.name, kind.plural) for kind in KINDS if kind.is_countable)
SHAPE_SUBJECTS = tuple(Subject(shape.name, shape.plural) for shape in SHAPES)
LARGEST_COUNT = 10
LARGEST_PLACED = 0.55  # what fills the picture is nowhere in particular


def ask(task: str, scene: Scene, split: Split, rng: Random, target: Subject | None = None) -> Asked | None:
    """Ask a question of one kind; None if the scene has no clear answer.

    Args:
        task: One of `sample.TASKS`.
        scene: What is drawn.
        split: Whose wordings to use.
        rng: Where every choice comes from.
        target: What to count, look for or locate; None chooses.
    """
    return ASKERS[task](scene, split, rng, target)


def _turn(task: str, wordings: wording.Wordings, answer: str, split: Split, rng: Random, **words: str) -> Turn:
    template = wording.choose(wordings, split, rng)
    return Turn(task=task, wording=template, question=wording.fill(template, rng, **words), answer=answer)


def _words(subject: Subject) -> dict[str, str]:
    return {"thing": subject.one, "things": subject.many, "a_thing": wording.article(subject.one)}


def absent(scene: Scene, rng: Random) -> Subject:
    """Something that is not in the picture, and that nothing in it could be taken for."""
    names = [thing.subject.name for thing in scene.things]
    shapes = [thing.subject for thing in scene.things if thing.subject.colour]
    for _ in range(60):
        roll = rng.random()
        if shapes and roll < 0.35:  # the same shape in another colour
            colour = rng.choice(("red", "orange", "yellow", "green", "blue", "purple", "pink", "black"))
            subject = Subject(shapes[0].name, shapes[0].plural, colour)
            if scene.count(subject) == 0:
                return subject
        subject = rng.choice(SHAPE_SUBJECTS if roll > (0.4 if shapes else 0.8) else EMOJI_SUBJECTS)
        if all(name != subject.name and not are_rivals(name, subject.name) for name in names):
            return subject
    return Subject("train", "trains")


def present(scene: Scene, rng: Random) -> Subject | None:
    """Something in the picture; a shape with or without its colour."""
    if not scene.things:
        return None
    subject = rng.choice(sorted(scene.groups(), key=lambda one: (one.name, one.colour or "")))
    if subject.colour and rng.random() < 0.5:
        return Subject(subject.name, subject.plural)
    return subject


def _count(scene: Scene, split: Split, rng: Random, target: Subject | None) -> Asked | None:
    if target is None:
        if (scene.is_portrait or scene.text is not None) and rng.random() < 0.7:
            return None  # nothing to count there: asked often enough elsewhere
        target = present(scene, rng) if rng.random() < 0.85 else absent(scene, rng)
    if target is None or target.name in wording.MASS:
        return None
    number = scene.count(target)
    if number > LARGEST_COUNT:
        return None
    turn = _turn("counting", wording.COUNTING, str(number), split, rng, **_words(target))
    return turn, {"count": number, "kind": target.name, "colour": target.colour}


def _read(scene: Scene, split: Split, rng: Random, _target: Subject | None) -> Asked | None:
    if scene.text is None:
        return None
    return _turn("reading", wording.READING, scene.text, split, rng), {"text": scene.text}


def _name(scene: Scene, split: Split, rng: Random, _target: Subject | None) -> Asked | None:
    if not scene.is_portrait:
        return None
    name = scene.things[0].subject.name
    return _turn("emoji", wording.EMOJI, name, split, rng), {"name": name}


def _describe(scene: Scene, split: Split, rng: Random, _target: Subject | None) -> Asked | None:
    ground = wording.backdrop(scene.background)
    required: list[list[str]] = [[scene.background]] if scene.background else []
    if scene.text is not None:
        if scene.things:
            return None
        noun = "text" if " " in scene.text else "word"
        answer = f"The {noun} {scene.text} in handwriting{ground}."
        required = [[scene.text], ["handwriting", "handwritten", "written", "text"], *required]
    elif scene.is_portrait:
        name = scene.things[0].subject.name
        answer = f"{_capital(wording.article(name) if name not in wording.MASS else f'a {name}')} emoji{ground}."
        required = [[name], *required]
    else:
        groups = sorted(scene.groups().items(), key=lambda item: (-item[1], item[0].name, item[0].colour or ""))
        if not 1 <= len(groups) <= 3 or groups[0][1] > LARGEST_COUNT:
            return None
        facts = []
        for subject, number in groups:
            facts += [[str(number), *_NUMBERS[number]], [subject.name, subject.plural]]
            facts += [[subject.colour, *_ALSO.get(subject.colour, ())]] if subject.colour else []
        required = [*facts, *required]
        if len(scene.things) == 1:
            answer = f"{_capital(wording.article(groups[0][0].one))}{ground}."
        else:
            answer = f"{wording.listing([subject.counted(number) for subject, number in groups])}{ground}."
    return _turn("description", wording.DESCRIPTION, answer, split, rng), {"required": required, "answer": answer}


_NUMBERS: tuple[tuple[str, ...], ...] = (
    ("zero", "no"), ("one", "a", "an"), ("two",), ("three",), ("four",), ("five",), ("six",), ("seven",), ("eight",),
    ("nine",), ("ten",),
)  # fmt: skip
_ALSO = {"gray": ("grey",)}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _yes_no(scene: Scene, split: Split, rng: Random, target: Subject | None) -> Asked | None:
    roll = rng.random()
    if target is None and roll < (0.55 if scene.text else 0.06):
        answer = "Yes" if scene.text else "No"
        return _turn("yes_no", wording.YES_NO_TEXT, answer, split, rng), {"answer": answer}
    groups = scene.groups()
    plain = {(subject.name, subject.plural) for subject in groups if subject.name not in wording.MASS}
    if target is None and not scene.is_portrait and plain and roll < 0.3:
        first = Subject(*rng.choice(sorted(plain)))
        if roll < 0.14 and len(plain) > 1:
            second = Subject(*rng.choice(sorted(plain - {(first.name, first.plural)})))
            answer = "Yes" if scene.count(first) > scene.count(second) else "No"
            words = {"things": first.many, "others": second.many}
            return _turn("yes_no", wording.YES_NO_MORE, answer, split, rng, **words), {"answer": answer}
        number = scene.count(first)
        claimed = number if rng.random() < 0.5 else max(2, number + rng.choice((-3, -2, -1, 1, 2, 3)))
        if 2 <= claimed <= LARGEST_COUNT:
            answer = "Yes" if claimed == number else "No"
            words = {"number": str(claimed), "things": first.many}
            return _turn("yes_no", wording.YES_NO_NUMBER, answer, split, rng, **words), {"answer": answer}
    subject = target
    if subject is None:
        subject = present(scene, rng) if rng.random() < 0.56 else absent(scene, rng)
    if subject is None:
        subject = absent(scene, rng)
    answer = "Yes" if scene.count(subject) else "No"
    is_plural = subject.name in wording.MASS or rng.random() < 0.3
    family = wording.YES_NO_MANY if is_plural else wording.YES_NO_ONE
    return _turn("yes_no", family, answer, split, rng, **_words(subject)), {"answer": answer}


def _colour(scene: Scene, split: Split, rng: Random, _target: Subject | None) -> Asked | None:
    named: list[tuple[wording.Wordings, dict[str, str], str]] = []
    for name in sorted({thing.subject.name for thing in scene.things}):
        colours = scene.colours_of(name)
        colour = next(iter(colours))
        if len(colours) == 1 and colour:
            subject = next(thing.subject for thing in scene.things if thing.subject.name == name)
            plain = Subject(subject.name, subject.plural)
            family = wording.COLOUR if scene.count(plain) == 1 else wording.COLOURS
            named += [(family, _words(plain), colour)] * 3
    if scene.background:
        named.append((wording.COLOUR, {"thing": "background"}, scene.background))
    if scene.text is not None and scene.ink:
        word = rng.choice(("text", "handwriting", "writing", "ink"))
        named += [(wording.COLOUR, {"thing": word}, scene.ink)] * 2
    if not named:
        return None
    family, words, colour = rng.choice(named)
    return _turn("colour", family, colour, split, rng, **words), {"answer": colour}


def _place(scene: Scene, split: Split, rng: Random, target: Subject | None) -> Asked | None:
    groups = scene.groups()
    lone = [thing for thing in scene.things if scene.count(Subject(thing.subject.name, thing.subject.plural)) == 1]
    lone = [thing for thing in lone if thing.subject.name not in wording.MASS and place_of(thing)]
    lone = [thing for thing in lone if max(thing.size) < LARGEST_PLACED]
    if target is not None:
        lone = [thing for thing in lone if thing.subject.name == target.name]
    elif scene.text_spot is not None and place_of(scene.text_spot) and (not groups or rng.random() < 0.7):
        lone = [scene.text_spot]
    if not lone:
        return None
    thing = rng.choice(lone)
    place = place_of(thing)
    assert place is not None
    noun = thing.subject.name
    if scene.is_portrait and rng.random() < 0.4:
        noun = "emoji"
    return _turn("place", wording.PLACE, place, split, rng, thing=noun), {"answer": place, "kind": thing.subject.name}


ASKERS: dict[str, Callable[[Scene, Split, Random, Subject | None], Asked | None]] = {
    "counting": _count,
    "reading": _read,
    "emoji": _name,
    "description": _describe,
    "yes_no": _yes_no,
    "colour": _colour,
    "place": _place,
}
