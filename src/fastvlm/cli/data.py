"""`fastvlm data ...`: the fonts and emoji of nano's pictures, and the pictures."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlm.checkpoint.folder import staged_folder
from fastvlm.cli.output import Output
from fastvlm.options import DataAssetsOptions, DataSynthOptions
from fastvlm.synth.assets import default_folder, read_assets
from fastvlm.synth.sample import Sample
from fastvlm.synth.studio import Studio
from fastvlm.train.assets import fetch_assets, update_lock

CONVERSATIONS = "data.json"
_SHEET_COLUMNS, _SHEET_ROWS, _SHEET_SIDE = 6, 6, 192


def assets(options: DataAssetsOptions, output: Output) -> None:
    """Fetch the assets; print their folder, or the lock file when that was asked for."""
    progress = None if options.quiet else output.note
    if options.update_lock:
        output.line(os.fspath(update_lock(progress=progress)))
        return
    folder = Path(options.folder).expanduser() if options.folder else default_folder()
    output.line(os.fspath(fetch_assets(folder, progress=progress)))


def synth(options: DataSynthOptions, output: Output) -> None:
    """Draw pictures and questions; print the file that `fastvlm train --data` takes."""
    studio = Studio(read_assets(Path(options.assets) if options.assets else default_folder()), options.image_size)
    folder = Path(options.out)
    with staged_folder(folder, overwrite=False) as place:
        rows = list(_draw(studio, options, place))
        (place / CONVERSATIONS).write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    output.line(os.fspath(folder / CONVERSATIONS))
    output.note(f"fastvlm: train on it with --data {folder / CONVERSATIONS} --image-folder {folder}")


def _draw(studio: Studio, options: DataSynthOptions, place: Path) -> Iterator[dict[str, Any]]:
    """Write the pictures, give their conversations in LLaVA's form."""
    (place / "images").mkdir()
    sheet = Image.new("RGB", (_SHEET_COLUMNS * _SHEET_SIDE, _SHEET_ROWS * _SHEET_SIDE), "white")
    for index in range(options.num):
        sample = studio.sample(options.seed * 1_000_003 + index, split=options.split, task=options.task)
        name = f"images/{index:07d}.png"
        content = io.BytesIO()
        sample.image.save(content, "PNG")
        (place / name).write_bytes(content.getvalue())
        if options.preview and index < _SHEET_COLUMNS * _SHEET_ROWS:
            _paste(sheet, sample.image, index)
        yield _row(sample, name, index)
    if options.preview:
        sheet.save(place / "preview.png", "PNG")


def _row(sample: Sample, name: str, index: int) -> dict[str, Any]:
    conversations: list[dict[str, str]] = []
    for turn in sample.turns:
        mark = "" if conversations else "<image>\n"
        conversations += [{"from": "human", "value": mark + turn.question}, {"from": "gpt", "value": turn.answer}]
    return {
        "id": f"{index:07d}",
        "image": name,
        "task": sample.task,
        "facts": sample.facts,
        "conversations": conversations,
    }


def _paste(sheet: Image.Image, image: Image.Image, index: int) -> None:
    small = image.copy()
    small.thumbnail((_SHEET_SIDE - 4, _SHEET_SIDE - 4))
    row, column = divmod(index, _SHEET_COLUMNS)
    sheet.paste(small, (column * _SHEET_SIDE + 2, row * _SHEET_SIDE + 2))
