"""Several measurements of one thing: their middle, their tail, their spread, and how they grow with size."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def summary(values: Sequence[float], digits: int = 2) -> dict[str, Any]:
    """Median, 95th percentile (nearest rank), spread and all values; the spread is the range over the median."""
    ordered = sorted(values)
    middle = statistics.median(ordered)
    tail = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {
        "median": round(middle, digits),
        "p95": round(tail, digits),
        "spread": round((ordered[-1] - ordered[0]) / middle, 3) if middle else 0.0,
        "values": [round(value, digits) for value in values],
    }


def summaries(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The summary of each named value that the rows have."""
    return {f"{name}_ms": summary([row[name] for row in rows]) for name in names if all(name in row for row in rows)}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent with which the values grow with the sizes: a least-squares line through their logarithms."""
    result: float = statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope
    return round(result, 3)
