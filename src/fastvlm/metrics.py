"""Scores as pure functions: what was said and what was right in, numbers out; no models, no files.

A score here is a share of sums, `hits / total`: right answers of questions, wrong characters of characters, facts named
of facts there were. So one interval, the bootstrap over samples, serves them all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
SPELLINGS = {"grey": "gray", "centre": "center"}
"""British spelling to the one that training uses."""
RESAMPLES = 2000
_NUMBER_OF_WORD = {word: number for number, word in enumerate(NUMBER_WORDS)}
_NEAR = 2  # words that may stand between a number and what it counts: "3 small red circles"


@dataclass(frozen=True, kw_only=True)
class Score:
    """A share of sums with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    num_samples: int


def normalise(text: str) -> str:
    """Drop what is no part of a short answer: case, outer and double spaces, a final `.` or `!`, British spelling."""
    words = text.casefold().strip().rstrip(".!").split()
    return " ".join(SPELLINGS.get(word, word) for word in words)


def is_exact(answer: str, expected: str) -> bool:
    """Whether two short answers are the same after `normalise`; "four" and "4" are not."""
    return normalise(answer) == normalise(expected)


def first_number(answer: str) -> int | None:
    """Find the first whole number in an answer, in digits or as a word up to twelve; None if there is none.

    "no" counts as zero only when it is the whole answer or its first word ("No apples.").
    """
    words = re.findall(r"-?\d+(?:[.,]\d+)*|[a-z]+", answer.casefold())
    for place, word in enumerate(words):
        if re.fullmatch(r"-?\d+", word):
            return int(word)
        if word in _NUMBER_OF_WORD:
            return _NUMBER_OF_WORD[word]
        if word in {"no", "none"} and place == 0:
            return 0
    return None


def edit_distance(left: Sequence[object], right: Sequence[object]) -> int:
    """Count the insertions, deletions and substitutions that make one sequence the other (Levenshtein 1966)."""
    row = list(range(len(right) + 1))
    for i, mine in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, theirs in enumerate(right, 1):
            cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (mine != theirs))
            diagonal, row[j] = row[j], cost
    return row[-1]


def character_errors(answer: str, expected: str) -> tuple[int, int]:
    """Count wrong characters and expected ones; spaces are collapsed, case and punctuation count.

    Their sums over many samples give the character error rate, which exceeds 1 when answers run on and on.
    """
    expected = " ".join(expected.split())
    return edit_distance(" ".join(answer.split()), expected), len(expected)


def facts_named(answer: str, required: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Count the facts that a description names, and all there are.

    A fact is a list of alternatives; it is named where one of them occurs in whole words, whatever the case. A number
    (`["3", "three"]`, several spellings, one in digits) must stand closely before an alternative of the fact after it:
    "3 cats and 5 dogs" names neither number of 5 cats and 3 dogs.
    """
    words = _words(answer)
    named = 0
    for i, alternatives in enumerate(required):
        spots = _find(words, alternatives)
        is_number = len(alternatives) > 1 and any(alternative.isdigit() for alternative in alternatives)
        if is_number and i + 1 < len(required):
            counted = _find(words, required[i + 1])
            named += any(0 < start - spot <= 1 + _NEAR for spot in spots for start in counted)
        else:
            named += bool(spots)
    return named, len(required)


def _words(text: str) -> list[str]:
    return [SPELLINGS.get(word, word) for word in re.findall(r"\w+", text.casefold())]


def _find(words: Sequence[str], alternatives: Sequence[str]) -> list[int]:
    """Where in `words` any alternative, itself one word or more, begins."""
    found = []
    for alternative in alternatives:
        phrase = _words(alternative)
        found += [i for i in range(len(words) - len(phrase) + 1) if phrase and words[i : i + len(phrase)] == phrase]
    return found


def score(hits: Sequence[float], totals: Sequence[float] | None = None, *, seed: int = 0) -> Score:
    """Sum up one number a sample, `sum(hits) / sum(totals)`, with its 95 % percentile bootstrap interval.

    Args:
        hits: What was right (or wrong) in each sample.
        totals: Out of how much in each sample; 1 by default.
        seed: Of the resampling: the same numbers give the same interval.
    """
    above = np.asarray(hits, np.float64)
    below = np.ones_like(above) if totals is None else np.asarray(totals, np.float64)
    if len(above) != len(below) or not below.sum() > 0:
        raise ValueError(f"{len(hits)} hits and {len(below)} totals make no share")
    rng, size = np.random.default_rng(seed), len(above)
    shares = []
    for _ in range(RESAMPLES):  # one at a time: all at once would take the memory of 2,000 samples a sample
        drawn = rng.integers(0, size, size)
        shares.append(above[drawn].sum() / max(below[drawn].sum(), 1e-12))
    low, high = np.percentile(shares, (2.5, 97.5))
    return Score(value=float(above.sum() / below.sum()), low=float(low), high=float(high), num_samples=len(above))
