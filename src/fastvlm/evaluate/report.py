"""What came out: results as plain values, as JSON, as lines and as a table."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question, what was right, and what was said."""

    task: str
    seed: int
    prompt: str
    expected: str
    got: str
    correct: bool
    mark: tuple[float, float]
    """Points, and out of how many."""
    also: dict[str, tuple[float, float]]
    buckets: dict[str, str]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The score of a part of the samples."""

    score: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one task gave."""

    task: str
    metric: str
    score: float
    interval: tuple[float, float]
    """95 % bootstrap interval of the score."""
    num_samples: int
    target: float | None
    is_error: bool
    """Whether less is better."""
    is_met: bool | None
    """Whether the score reaches the target."""
    also: dict[str, float]
    """Further scores of the same answers."""
    buckets: dict[str, dict[str, Bucket]]
    """The score broken down: by what, then of which part."""
    seconds: float
    pictures: str
    """Digest of all pictures, questions and right answers: equal where two runs asked the same."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a run gave, with all that is needed to repeat it."""

    tasks: list[TaskResult]
    model: dict[str, Any]
    machine: dict[str, str]
    versions: dict[str, str]
    options: dict[str, Any]
    seconds: float


def render(results: Results) -> str:
    """Make a table for people: one line a task."""
    rows = [("task", "metric", "score", "95 % interval", "samples", "target", "")]
    for task in results.tasks:
        low, high = task.interval
        sign = "<=" if task.is_error else ">="
        target = "" if task.target is None else f"{sign} {100 * task.target:.0f} %"
        verdict = {None: "", True: "met", False: "missed"}[task.is_met]
        rows.append(
            (
                task.task,
                task.metric,
                f"{100 * task.score:.1f} %",
                f"{100 * low:.1f} - {100 * high:.1f}",
                str(task.num_samples),
                target,
                verdict,
            )
        )
        rows += [("", name, f"{100 * value:.1f} %", "", "", "", "") for name, value in task.also.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    place = f"{results.machine['hardware']}, {results.machine['dtype']}"
    lines.append(f"{results.model['name']} ({results.model['fingerprint'][:12]}) on {place}: {results.seconds:.0f} s")
    return "\n".join(lines)


def write_results(path: Path, results: Results) -> None:
    """Write results as JSON, all of it or nothing.

    Raises:
        InputError: The file cannot be written.
    """
    _write(path, json.dumps(asdict(results), indent=1, ensure_ascii=False) + "\n")


def write_samples(path: Path, answered: Sequence[Answered]) -> None:
    """Write one JSON object a line and question, all of them or nothing.

    Raises:
        InputError: The file cannot be written.
    """
    names = ("task", "seed", "prompt", "expected", "got", "correct", "mark", "buckets")
    lines = [json.dumps({name: getattr(row, name) for name in names}, ensure_ascii=False) for row in answered]
    _write(path, "".join(line + "\n" for line in lines))


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
