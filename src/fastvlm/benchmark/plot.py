"""`fastvlm bench plot`: accuracy against time to first token, in the paper and on the machine of a result.

The accuracies are the paper's; the left panel has the paper's times, the right one those that `bench paper` measured.
"""

import json
import math
from pathlib import Path
from typing import Any, Final

from fastvlm.benchmark.drawing import Drawing, Place
from fastvlm.benchmark.published import ENCODERS, FASTVITHD
from fastvlm.errors import InputError
from fastvlm.options import BenchPlotOptions

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 1120, 480, 64, 412
_PANELS: Final = ((72, 536), (620, 1084))
_LOW, _HIGH = 46.5, 57.0
_COLOURS: Final = ("#d1495b", "#1f5fbf", "#2e8b57", "#8a5cc2", "#c77f1a")
Curves = dict[str, list[tuple[float, float, int]]]
"""For each encoder its points: milliseconds, accuracy, side of the picture."""


def run(options: BenchPlotOptions) -> list[Path]:
    """Draw; return the two files.

    Raises:
        InputError: The results cannot be read or are not those of `bench paper`, or the pictures cannot be written.
    """
    results = _read(Path(options.results))
    here: Curves = {}
    for row in results["results"]:
        if row["program"] == ("fastvlm" if row["encoder"] == FASTVITHD else "timm"):
            here.setdefault(row["encoder"], []).append((row["ttft_ms"], row["paper"]["accuracy"], row["image_size"]))
    shown = {name: {size for *_, size in points} for name, points in here.items()}
    paper: Curves = {
        encoder.name: [
            (point.ttft_ms, point.accuracy, point.image_size)
            for point in encoder.points
            if point.image_size in shown.get(encoder.name, ())
        ]
        for encoder in ENCODERS
    }
    drawing = Drawing(_WIDTH, _HEIGHT)
    where = results["processor"] if "CPU" in results["machine"] else results["machine"]
    _panel(drawing, _PANELS[0], "in the paper (M1 Max: Neural Engine and GPU)", paper)
    _panel(drawing, _PANELS[1], f"measured: {where}, {_threads(results)}{results['settings']['dtype']}", here)
    _legend(drawing, here)
    paths = [Path(f"{options.out}{suffix}") for suffix in (".png", ".svg")]
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        drawing.write_png(paths[0])
        drawing.write_svg(paths[1])
    except OSError as error:
        raise InputError(f"{options.out} cannot be written: {error.strerror or error}") from error
    return paths


def _threads(results: dict[str, Any]) -> str:
    return f"{results['threads']} threads, " if "CPU" in results["machine"] else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if any(row["program"] and row["ttft_ms"] <= 0 for row in found["results"]) or not found["results"]:
            raise InputError(f"{path}: a time is not positive, or there is none")
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}; run fastvlm bench paper first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a result of fastvlm bench paper") from error
    return found


def _panel(drawing: Drawing, sides: tuple[int, int], title: str, curves: Curves) -> None:
    left, right = sides
    times = [ms for points in curves.values() for ms, *_ in points]
    low, high = math.log10(min(times)) - 0.12, math.log10(max(times)) + 0.2

    def place(ms: float, accuracy: float) -> Place:
        x = left + (math.log10(ms) - low) / (high - low) * (right - left)
        return x, _BOTTOM - (accuracy - _LOW) / (_HIGH - _LOW) * (_BOTTOM - _TOP)

    drawing.text((left, _TOP - 14), title, size=14)
    for accuracy in range(math.ceil(_LOW), math.floor(_HIGH) + 1, 2):
        _, y = place(min(times), accuracy)
        drawing.line([(left, y), (right, y)], "#e5e5e5")
        drawing.text((left - 8, y + 4), str(accuracy), size=12, colour="#444444", anchor="end")
    for tick in _ticks(10**low, 10**high):
        x, _ = place(tick, _LOW)
        drawing.line([(x, _TOP), (x, _BOTTOM)], "#e5e5e5")
        drawing.text((x, _BOTTOM + 18), f"{tick:,.0f}", size=12, colour="#444444", anchor="middle")
    frame: list[Place] = [(left, _TOP), (right, _TOP), (right, _BOTTOM), (left, _BOTTOM), (left, _TOP)]
    drawing.line(frame, "#999999")
    middle = (left + right) / 2
    drawing.text(
        (middle, _BOTTOM + 38),
        "time to first token: encoder, and prefill of its tokens; ms, logarithmic",
        anchor="middle",
    )
    for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
        places = [place(ms, accuracy) for ms, accuracy, _ in points]
        if len(places) > 1:
            drawing.line(places, colour, 2.5 if name == FASTVITHD else 1.5)
        for (x, y), (_, _, size) in zip(places, points, strict=True):
            drawing.dot((x, y), 5 if name == FASTVITHD else 4, colour)
            if name == FASTVITHD:
                drawing.text((x - 8, y - 7), str(size), size=11, colour=colour, anchor="end")
            else:
                drawing.text((x + 7, y + 13), str(size), size=11, colour=colour)


def _ticks(low: float, high: float) -> list[float]:
    ticks = [factor * 10.0**power for power in range(7) for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _legend(drawing: Drawing, curves: Curves) -> None:
    drawing.text((16, 24), "Accuracy (mean of GQA, TextVQA, POPE, DocVQA, SeedBench; arXiv 2412.13303) with Qwen2-0.5B")
    for index, (name, colour) in enumerate(zip(curves, _COLOURS, strict=False)):
        x = 72 + 150 * index
        drawing.dot((x, _HEIGHT - 14), 5, colour)
        drawing.text((x + 12, _HEIGHT - 10), name, colour=colour)
