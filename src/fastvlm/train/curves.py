"""The curves of a run as a picture, from its log: loss, validation, learning rate."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from fastvlm.train.folder import CURVES, LOG

_WIDTH, _HEIGHT, _MARGIN = 960, 320, 64
_COLOURS: Final = ("#1f5fbf", "#d1495b", "#2e8b57", "#8a5cc2", "#c77f1a", "#4a9ba8", "#777777", "#aa3377")
Curve = list[tuple[float, float]]


def plot(folder: Path) -> Path | None:
    """Draw `curves.png` beside the log of a run; None where there is nothing to draw."""
    rows = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    losses = {"loss": _curve(rows, "loss"), "validation": _curve(rows, "validation_loss")}
    tasks = sorted({name for row in rows for name in row.get("task_losses") or {}})
    by_task = {
        name: _curve([row.get("task_losses", {}) | {"step": row["step"]} for row in rows], name) for name in tasks
    }
    names = sorted({name for row in rows for name in row.get("scores") or {}})
    scores = {name: _curve([row.get("scores", {}) | {"step": row["step"]} for row in rows], name) for name in names}
    panels = [
        ("loss", losses, True),
        *([("loss of each task", by_task, True)] if len(tasks) > 1 else []),
        *([("scores", scores, False)] if names else []),
        ("learning rate", {"learning rate": _curve(rows, "lr")}, False),
    ]
    panels = [(title, {k: c for k, c in curves.items() if len(c) > 1}, log) for title, curves, log in panels]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    image = Image.new("RGB", (_WIDTH, _HEIGHT * len(panels)), "white")
    for i, (title, curves, is_log) in enumerate(panels):
        _draw(ImageDraw.Draw(image), i * _HEIGHT, title, curves, is_log=is_log)
    temporary = folder / f".{CURVES}.tmp"
    image.save(temporary, format="PNG", optimize=True)
    temporary.replace(folder / CURVES)
    return folder / CURVES


def _curve(rows: Sequence[dict[str, Any]], name: str) -> Curve:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _draw(draw: ImageDraw.ImageDraw, top: int, title: str, curves: dict[str, Curve], *, is_log: bool) -> None:
    """One panel: axes with a few numbers, a line a curve, its name in its colour."""
    font = ImageFont.load_default(14)
    points = [point for curve in curves.values() for point in curve]
    is_log = is_log and min(y for _, y in points) > 0
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = (_scaled(bound(y for _, y in points), is_log=is_log) for bound in (min, max))
    high = high if high > low else low + 1
    box = (_MARGIN, top + 36, _WIDTH - 16, top + _HEIGHT - 32)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (_scaled(y, is_log=is_log) - low) / (high - low)
        return (
            box[0] + (x - left) / max(1e-9, right - left) * (box[2] - box[0]),
            box[3] - share * (box[3] - box[1]),
        )

    draw.rectangle(box, outline="#999999")
    draw.text((_MARGIN, top + 10), title + (" (logarithmic)" if is_log else ""), fill="black", font=font)
    for i in range(5):
        value = low + (high - low) * i / 4
        y = box[3] - (box[3] - box[1]) * i / 4
        draw.line((box[0], y, box[2], y), fill="#e5e5e5")
        label = f"{10**value if is_log else value:.3g}"
        draw.text((box[0] - 6, y), label, fill="#444444", font=font, anchor="rm")
        x = box[0] + (box[2] - box[0]) * i / 4
        draw.text((x, box[3] + 6), f"{left + (right - left) * i / 4:,.0f}", fill="#444444", font=font, anchor="ma")
    at = _MARGIN + 230
    for i, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        draw.line([place(*point) for point in curve], fill=colour, width=2)
        draw.text((at, top + 10), name, fill=colour, font=font)
        at += int(draw.textlength(name, font=font)) + 18


def _scaled(value: float, *, is_log: bool) -> float:
    return math.log10(value) if is_log else value
