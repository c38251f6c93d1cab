"""Scenes with things: many to count, a few to describe, one to name or to find."""

import math
from dataclasses import dataclass
from random import Random

import numpy as np

from fastvlm.synth import backgrounds, canvas, layout
from fastvlm.synth.kinds import KINDS, Kind
from fastvlm.synth.looks import COUNTABLE, Look, Looks
from fastvlm.synth.scene import Scene, Subject, thing_at
from fastvlm.synth.sprites import Sprite, any_angle

SHAPES_SHARE = 0.44
"""How often the things asked about are plain shapes."""
LARGEST = 0.25
"""Of one thing among several, as a share of the picture's side."""
NAMEABLE = 0.055
"""Below this nobody could say which emoji it is, among others or on a busy background."""
LEANING = 30.0
"""Degrees that a thing turns where it should stay upright."""


@dataclass(frozen=True)
class Plan:
    """How things are to be arranged."""

    sizes: tuple[float, float]
    """Smallest and largest, as shares of the picture's side."""
    arrangement: str
    """One of `layout.LAYOUTS`."""
    is_apart: bool = False
    """Whether things must keep a gap."""


class Painter:
    """Draws things at one size of picture."""

    def __init__(self, looks: Looks, side: int) -> None:
        self._looks, self._side = looks, side

    def counting_scene(self, rng: Random, number: int, crowded: float) -> tuple[Scene, Subject | None]:
        """Draw `number` of one thing, alone or, as often as `crowded` says, among others.

        Returns:
            The scene, and what to ask about; None if it is absent.
        """
        target, ground = self._start(rng)
        wanted = [(target, number)] if number else []
        num_others = rng.choice((1, 1, 2, 3)) if number == 0 or rng.random() < crowded else 0
        left = rng.randint(max(1, num_others), 8)
        is_same_shape = rng.random() < 0.45
        looks = [target]
        for i in range(num_others):
            look = self._looks.other(looks, rng, ground.palette, is_same_shape=is_same_shape)
            others_after = num_others - 1 - i
            amount = rng.randint(1, left - others_after) if others_after else left
            left -= amount
            if look:
                looks.append(look)
                wanted.append((look, amount))
        scene = self._arrange(wanted, ground, rng, Plan(_sizes(rng), layout.sample_layout(rng)))
        if number == 0 and rng.random() < 0.5:
            return scene, None
        plain = Subject(target.subject.name, target.subject.plural)
        is_plain = scene.count(plain) == number and rng.random() < 0.6
        return scene, plain if is_plain else target.subject

    def mixed_scene(self, rng: Random) -> Scene:
        """Draw one to three kinds of things, a few of each: what descriptions are about."""
        target, ground = self._start(rng)
        wanted = [(target, rng.choice((1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10)))]
        self._add_others(wanted, rng.choice((0, 1, 1, 2)), ground, rng, is_same_shape=rng.random() < 0.3)
        return self._arrange(wanted, ground, rng, Plan(_sizes(rng), layout.sample_layout(rng)))

    def coloured_scene(self, rng: Random) -> Scene:
        """Draw shapes, each kind in one colour, and perhaps something else."""
        ground = self._ground(rng, [])
        wanted = [(self._looks.any_shape(rng, ground.palette), rng.choice((1, 1, 1, 2, 3, 4)))]
        self._add_others(wanted, rng.choice((0, 0, 1, 1, 2)), ground, rng)
        largest = 0.3 if len(wanted) == 1 else LARGEST
        return self._arrange(wanted, ground, rng, Plan((0.06, largest), layout.sample_layout(rng)))

    def placed_scene(self, rng: Random) -> tuple[Scene, Subject]:
        """Draw one thing somewhere, perhaps among others; also return what to ask about."""
        target, ground = self._start(rng, turn=LEANING)
        wanted = [(target, 1)]
        self._add_others(wanted, rng.choice((0, 0, 1, 2, 3)), ground, rng)
        plan = Plan((0.07, 0.34 if len(wanted) == 1 else LARGEST), "scatter", is_apart=True)
        return self._arrange(wanted, ground, rng, plan), target.subject

    def portrait_scene(self, rng: Random, *, is_small: bool = False) -> Scene:
        """Draw one emoji anywhere, large unless `is_small`."""
        kind = rng.choice(KINDS)
        ground = self._ground(rng, [kind])
        size = ground.image.size
        is_tumbling = kind.group != "face" and not is_small and rng.random() < 0.1
        look = self._looks.emoji(kind, rng, turn=180.0 if is_tumbling else LEANING, is_single=False)
        share = rng.uniform(0.15, 0.4) if is_small else rng.uniform(0.2, 0.92)
        longest = share * min(size) if rng.random() < 0.6 else min(share * max(size), 0.95 * min(size))
        angle = any_angle(rng, look.turn)
        sprite = self._looks.sprite(look, longest, angle, rng)
        excess = max(sprite.size[0] / size[0], sprite.size[1] / size[1]) / 1.02
        if excess > 1:
            sprite = self._looks.sprite(look, longest / excess, angle, rng)
        left = canvas.between(rng, 0, size[0] - sprite.size[0])
        top = canvas.between(rng, 0, size[1] - sprite.size[1])
        if rng.random() < (0.05 if is_small else 0.3):
            left, top = (size[0] - sprite.size[0]) // 2, (size[1] - sprite.size[1]) // 2
        if rng.random() < 0.12:
            canvas.litter(ground, rng, (left, top, left + sprite.size[0], top + sprite.size[1]))
        if rng.random() < 0.12:
            sprite.paste_shadow(ground.image, (left, top), rng.randint(3, 9), rng.uniform(0.3, 0.6))
        sprite.paste(ground.image, (left, top))
        thing = thing_at(look.subject, (left, top), sprite.size, size)
        return Scene(image=ground.image, background=ground.colour, things=[thing], visible=[1.0])

    def _start(self, rng: Random, turn: float = 180.0) -> tuple[Look, backgrounds.Background]:
        """Choose the first kind of thing, and a background on which it can be seen."""
        if rng.random() < SHAPES_SHARE:
            ground = self._ground(rng, [])
            return self._looks.any_shape(rng, ground.palette), ground
        kind = rng.choice(COUNTABLE)
        return self._looks.emoji(kind, rng, turn=turn), self._ground(rng, [kind])

    def _ground(self, rng: Random, kinds: list[Kind]) -> backgrounds.Background:
        size = canvas.sample_size(self._side, rng)
        return backgrounds.draw(size, rng, avoid=[self._looks.mean_colour(kind) for kind in kinds])

    def _add_others(
        self,
        wanted: list[tuple[Look, int]],
        number: int,
        ground: backgrounds.Background,
        rng: Random,
        *,
        is_same_shape: bool = False,
    ) -> None:
        """Add up to `number` further kinds to `wanted`, a few of each."""
        for _ in range(number):
            looks = [look for look, _ in wanted]
            look = self._looks.other(looks, rng, ground.palette, is_same_shape=is_same_shape)
            if look:
                wanted.append((look, rng.choice((1, 1, 2, 3, 4))))

    def _arrange(
        self, wanted: list[tuple[Look, int]], ground: backgrounds.Background, rng: Random, plan: Plan
    ) -> Scene:
        """Draw all that is wanted; where it does not fit, smaller."""
        image = ground.image
        queue = [look for look, number in wanted for _ in range(number)]
        rng.shuffle(queue)
        unit = math.sqrt(image.width * image.height)
        cap = layout.largest_size(plan.arrangement, len(queue), image.width, image.height)
        if len(queue) > 1:
            cap = min(cap, LARGEST * max(image.size))
        low, high = (share * unit for share in plan.sizes)
        is_mixed = rng.random() < 0.4
        base = rng.uniform(low, high)
        sizes = [min(cap, rng.uniform(low, high) if is_mixed else base * rng.uniform(0.92, 1.08)) for _ in queue]
        is_loose = plan.is_apart or plan.arrangement == "grid" or rng.random() < 0.55
        overlap = 0.0 if is_loose else rng.choice((0.08, 0.14, layout.LARGEST_OVERLAP))
        tilt = rng.choice((0.0, 20.0, 180.0, 180.0))
        shadow = (rng.randint(2, 6), rng.uniform(0.3, 0.6)) if rng.random() < 0.12 else None
        arrangement, shrink = plan.arrangement, 1.0
        is_busy = ground.style != "plain" or len(wanted) > 1
        while True:
            plane = layout.Plane(image.width, image.height)
            spots = layout.spots(arrangement, len(queue), plane, rng)
            placed: list[tuple[Sprite, tuple[int, int], Subject]] = []
            for look, wish in zip(queue, sizes, strict=True):
                floor = max(look.smallest, NAMEABLE) if look.designs and is_busy else look.smallest
                size = max(floor * unit, wish) * shrink
                sprite = self._looks.sprite(look, size, any_angle(rng, min(tilt, look.turn)), rng)
                mask = np.asarray(sprite.mask)[:: layout.STEP, :: layout.STEP] > 100
                corner = plane.put(mask, spots, rng, overlap)
                if corner is None:
                    break
                placed.append((sprite, corner, look.subject))
            if len(placed) == len(queue):
                break
            arrangement, shrink = "scatter", shrink * 0.85
        scene = Scene(image=image, background=ground.colour, visible=plane.visible_shares())
        for sprite, corner, subject in placed:
            if shadow:
                sprite.paste_shadow(image, corner, shadow[0], shadow[1])
            sprite.paste(image, corner)
            scene.things.append(thing_at(subject, corner, sprite.size, image.size))
        return scene


def _sizes(rng: Random) -> tuple[float, float]:
    """Smallest and largest share of the side that things take in one picture; tiny ones are the exception."""
    roll = rng.random()
    if roll < 0.08:
        return 0.03, 0.05
    if roll < 0.2:
        return 0.045, 0.08
    if roll < 0.65:
        return 0.07, 0.16
    if roll < 0.9:
        return 0.12, 0.25
    return 0.05, 0.25
