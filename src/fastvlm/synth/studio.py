"""Samples from seeds: the one door to everything in this folder."""

from random import Random
from typing import Any, get_args

from fastvlm.synth.assets import Assets
from fastvlm.synth.compose import Painter
from fastvlm.synth.degrade import degrade
from fastvlm.synth.handwriting import Scribe
from fastvlm.synth.looks import Looks
from fastvlm.synth.marks import marks_of
from fastvlm.synth.notes import Writer
from fastvlm.synth.phrases import Phrases
from fastvlm.synth.questions import LARGEST_COUNT, Asked, absent, ask, present
from fastvlm.synth.sample import TASKS, Mark, Sample, Split
from fastvlm.synth.scene import Scene, Subject
from fastvlm.synth.sprites import Sprites, turned

SHARES = {
    "counting": 0.52, "reading": 0.20, "description": 0.08, "emoji": 0.05, "place": 0.07, "yes_no": 0.04,
    "colour": 0.04,
}  # fmt: skip
"""How often each task is drawn, for nano and wherever none is asked for: what is learned last has most."""
COUNTS = {0: 6, 1: 6, 2: 7, 3: 8, 4: 10, 5: 11, 6: 12, 7: 12, 8: 12, 9: 12, 10: 12}
"""How often each number is drawn for training; of held-out pictures all are alike."""
CROWDED = {"train": 0.75, "heldout": 0.55}
"""How often what is counted has other things beside it."""
EACH = 0.6
"""How often further questions about a picture of several kinds are first of all about their numbers."""


class Studio:
    """Draws samples. Build one per process: what it caches (scaled sprites, open fonts) speeds up the next sample."""

    def __init__(self, assets: Assets, side: int = 384) -> None:
        """Prepare to draw.

        Args:
            assets: Fonts, emoji and words.
            side: The model's input size in pixels; pictures are about as large.
        """
        self._assets, self._side = assets, side
        self._painter = Painter(Looks(Sprites(assets)), side)
        self._writers = {
            split: Writer(Scribe(assets, split), Phrases(assets.words, split), side) for split in get_args(Split)
        }

    def __reduce__(self) -> tuple[type["Studio"], tuple[Assets, int]]:
        """Pickle without the caches: another process fills its own."""
        return Studio, (self._assets, self._side)

    def sample(self, seed: int, *, split: Split, task: str | None = None) -> Sample:
        """Draw one sample: the same arguments give the same bytes in every process.

        Args:
            seed: Any whole number; each split has its own seeds.
            split: `heldout` uses only fonts, words and wordings that `train` never uses, and asks one question.
            task: One of `TASKS`; None draws one by `SHARES`.
        """
        rng = Random(f"fastvlm {split} {seed} {task}")
        task = task or rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
        while True:  # a scene that turned out not to answer its question clearly is drawn again
            scene, target = self._stage(task, split, rng)
            asked = ask(task, scene, split, rng, target)
            if asked is not None:
                break
        smallest = min((min(thing.size[0], thing.size[1]) for thing in scene.things), default=1.0)
        image, angle = degrade(scene.image, rng, gentle=smallest < 0.06)
        turns = [asked[0]]
        if split == "train":
            turns += [turn for turn, _ in _more(task, scene, asked[1], rng)]
        marks = tuple(_turned(mark, image.size, angle) for mark in marks_of(scene))
        traits = _traits(scene, asked[1])
        return Sample(image=image, turns=tuple(turns), task=task, facts=asked[1], marks=marks, traits=traits)

    def _stage(self, task: str, split: Split, rng: Random) -> tuple[Scene, Subject | None]:
        """Draw a scene that suits the task, and say what to ask about (None: anything)."""
        roll = rng.random()
        if task == "counting":
            is_train = split == "train"
            number = (
                rng.choices(tuple(COUNTS), tuple(COUNTS.values()))[0] if is_train else rng.randint(0, LARGEST_COUNT)
            )
            scene, target = self._painter.counting_scene(rng, number, crowded=CROWDED[split])
            return scene, target or absent(scene, rng)
        if task == "reading" or (task in {"description", "yes_no", "place", "colour"} and roll < 0.14):
            return self._writers[split].scene(rng, is_small=task == "place"), None
        if task == "emoji" or (task in {"description", "yes_no", "place"} and roll < 0.34):
            return self._painter.portrait_scene(rng, is_small=task == "place"), None
        if task == "place":
            return self._painter.placed_scene(rng)
        if task == "colour":
            return self._painter.coloured_scene(rng), None
        return self._painter.mixed_scene(rng), None


def _turned(mark: Mark, size: tuple[int, int], angle: float) -> Mark:
    """Where a mark is after the whole picture was turned about its middle."""
    if not angle:
        return mark
    x, y = turned((mark.x * size[0], mark.y * size[1]), size, size, 1.0, angle)
    return Mark(mark.label, x / size[0], y / size[1])


def _traits(scene: Scene, facts: dict[str, Any]) -> dict[str, Any]:
    """What makes the picture easy or hard: of the things asked about, or of all where none is named."""
    traits: dict[str, Any] = {"background": "plain" if scene.background else "other"}
    if scene.text is not None:
        traits |= {"font": scene.font, "height": scene.height}
    kind = facts.get("kind") or facts.get("name")
    things = [thing for thing in scene.things if kind in (None, thing.subject.name)]
    colour = facts.get("colour")
    meant = [thing for thing in things if colour in (None, thing.subject.colour)]
    if meant:
        traits["size"] = sum(max(thing.size) for thing in meant) / len(meant)
        traits["look"] = "shape" if meant[0].subject.colour else "emoji"
    return traits | {"others": len(scene.things) - len(meant)}


def _more(task: str, scene: Scene, facts: dict[str, Any], rng: Random) -> list[Asked]:
    """Further questions about the same picture: training gets more out of each drawing."""
    amount = rng.choice((1, 2, 3, 4, 5))
    others = [other for other in TASKS if other != task or task in {"counting", "yes_no"}]
    if len(scene.things) > 1:  # of several kinds, and what is not there at all
        others += ["counting", "counting"]
    rng.shuffle(others)
    wanted: list[tuple[str, Subject | None]] = [(other, None) for other in others]
    if len(scene.groups()) > 1 and rng.random() < EACH:
        wanted = [("counting", present(scene, rng)) for _ in range(rng.randint(2, 6))] + wanted
    found: list[Asked] = []
    for other, target in wanted:
        if len(found) == amount:
            break
        asked = ask(other, scene, "train", rng, target)
        if other == "counting" and asked is not None and asked[1] in [facts, *(more[1] for more in found)]:
            continue  # asked and answered
        # Large things are in the center: unasked-for, that answer would drown the other places.
        if asked is not None and (asked[0].answer != "center" or rng.random() < 0.25):
            found.append(asked)
    rng.shuffle(found)
    return found
