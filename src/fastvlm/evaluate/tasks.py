"""What is measured, as data: the tasks, how answers are marked, and how pictures are drawn for them.

Knows no model and imports no torch: worker processes import this file alone.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastvlm.errors import InputError
from fastvlm.metrics import character_errors, facts_named, first_number, is_exact
from fastvlm.synth.assets import read_assets
from fastvlm.synth.sample import Sample
from fastvlm.synth.studio import Studio

Mark = tuple[float, float]
"""Points of one answer, and out of how many: right answers of 1, wrong characters of characters, facts of facts."""
Marker = Callable[[str, Sample], Mark]
SIDE = 384
"""Size of the pictures, whatever the model reads: each model gets the same ones."""
BLOCK = 1_000_000
"""Seeds a block: no two blocks share a picture."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of question."""

    name: str
    metric: str
    """What the score is called."""
    mark: Marker
    target: float | None = None
    """What nano must reach."""
    is_error: bool = False
    """Whether less is better."""
    also: Mapping[str, Marker] = field(default_factory=dict)
    """Further scores, by name."""
    buckets: Mapping[str, Callable[[Sample], str | None]] = field(default_factory=dict)
    """By what the score is broken down; None leaves a sample out."""

    def is_met(self, value: float) -> bool | None:
        """Whether a score reaches the target; None where there is none."""
        if self.target is None:
            return None
        return value <= self.target if self.is_error else value >= self.target

    def is_right(self, mark: Mark) -> bool:
        """Whether an answer leaves nothing to wish for."""
        return mark[0] == 0 if self.is_error else mark[0] == mark[1]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One drawn picture with its question."""

    seed: int
    sample: Sample
    digest: str
    """Of the picture, the question and the right answer."""


def _exact(answer: str, sample: Sample) -> Mark:
    return float(is_exact(answer, sample.turns[0].answer)), 1.0


def _number(answer: str, sample: Sample) -> Mark:
    return float(first_number(answer) == sample.facts["count"]), 1.0


def _near(answer: str, sample: Sample) -> Mark:
    number = first_number(answer)
    return float(number is not None and abs(number - sample.facts["count"]) <= 1), 1.0


def _characters(answer: str, sample: Sample) -> Mark:
    return character_errors(answer, sample.facts["text"])


def _characters_any_case(answer: str, sample: Sample) -> Mark:
    return character_errors(answer.casefold(), sample.facts["text"].casefold())


def _whole_text(answer: str, sample: Sample) -> Mark:
    return float(" ".join(answer.split()) == sample.facts["text"]), 1.0


def _facts(answer: str, sample: Sample) -> Mark:
    return facts_named(answer, sample.facts["required"])


def _band(value: float | None, edges: Sequence[float], unit: str = "") -> str | None:
    """Name the band between two edges that a value is in, for example "8-16 %"; the first and last are open."""
    if value is None:
        return None
    above = [edge for edge in edges if value >= edge]
    if not above:
        return f"< {edges[0]:g}{unit}"
    rest = edges[len(above) :]
    return f"{above[-1]:g}-{rest[0]:g}{unit}" if rest else f">= {edges[-1]:g}{unit}"


def _percent(sample: Sample, edges: Sequence[float]) -> str | None:
    size = sample.traits.get("size")
    return _band(None if size is None else 100 * size, edges, " %")


def _things(sample: Sample) -> str | None:
    return _band(sample.traits["others"], (1, 3, 6))


TASKS = {
    task.name: task
    for task in (
        Task(
            name="counting",
            metric="exact",
            mark=_exact,
            target=0.92,
            also={"first number in the answer": _number, "within one": _near},
            buckets={
                "count": lambda sample: str(sample.facts["count"]),
                "size of the things": lambda sample: _percent(sample, (5, 8, 12, 16, 20)),
                "emoji or shape": lambda sample: sample.traits.get("look"),
                "other things": _things,
                "background": lambda sample: sample.traits["background"],
            },
        ),
        Task(
            name="emoji",
            metric="exact",
            mark=_exact,
            target=0.97,
            buckets={
                "kind": lambda sample: sample.facts["name"],
                "size": lambda sample: _percent(sample, (30, 50, 70)),
                "background": lambda sample: sample.traits["background"],
            },
        ),
        Task(
            name="reading",
            metric="character error",
            mark=_characters,
            target=0.10,
            is_error=True,
            also={"character error, any case": _characters_any_case, "whole text right": _whole_text},
            buckets={
                "characters": lambda sample: _band(len(sample.facts["text"]), (4, 7, 10, 14, 19)),
                "font": lambda sample: sample.traits["font"],
                "height of the letters": lambda sample: _band(SIDE * sample.traits["height"], (18, 24, 36, 48), " px"),
                "what": lambda sample: _script(sample.facts["text"]),
            },
        ),
        Task(
            name="description",
            metric="facts named",
            mark=_facts,
            target=0.80,
            also={"exact": _exact},
            buckets={"facts": lambda sample: str(len(sample.facts["required"]))},
        ),
        Task(name="yes_no", metric="exact", mark=_exact, buckets={"answer": lambda sample: sample.facts["answer"]}),
        Task(name="colour", metric="exact", mark=_exact, buckets={"answer": lambda sample: sample.facts["answer"]}),
        Task(name="place", metric="exact", mark=_exact, buckets={"answer": lambda sample: sample.facts["answer"]}),
    )
}
GROUPS = {"nano": tuple(TASKS)}
"""Names that stand for several tasks."""


def _script(text: str) -> str:
    if any(char.isdigit() for char in text):
        return "with digits"
    if " " in text:
        return "several words"
    return "one word, capitals" if text.isupper() else "one word"


def choose(names: Sequence[str]) -> list[Task]:
    """Look names of tasks and groups up, each task once.

    Raises:
        InputError: A name is unknown.
    """
    chosen: dict[str, Task] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            raise InputError(f"no task is called {name!r}; there are {', '.join([*GROUPS, *TASKS])}")
        chosen |= {part: TASKS[part] for part in GROUPS.get(name, (name,))}
    return list(chosen.values())


def draw(assets: Path, task: str, seeds: Sequence[int]) -> list[Item]:
    """Draw held-out samples: there is no way to ask for what is trained on.

    Args:
        assets: Folder of fonts and emoji.
        task: Name of the task.
        seeds: One a sample; the same seed gives the same picture.
    """
    studio = _studio(assets)
    items = []
    for seed in seeds:
        sample = studio.sample(seed, split="heldout", task=task)
        text = f"{sample.image.size} {sample.turns[0].question}\n{sample.turns[0].answer}\n"
        digest = hashlib.sha256(text.encode() + sample.image.tobytes()).hexdigest()
        items.append(Item(seed=seed, sample=sample, digest=digest))
    return items


@functools.lru_cache(maxsize=1)
def _studio(assets: Path) -> Studio:
    """The studio of this process."""
    return Studio(read_assets(assets), side=SIDE)
