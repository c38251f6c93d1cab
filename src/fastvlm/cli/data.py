"""`fastvlm data ...`: the fonts and emoji of nano's pictures, the pictures, and a look at data before training."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from fastvlm.checkpoint.folder import staged_folder
from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.zoo import resolve
from fastvlm.cli.output import Output
from fastvlm.errors import ConfigError, InputError
from fastvlm.options import DataAssetsOptions, DataCheckOptions, DataSynthOptions
from fastvlm.synth.assets import default_folder, read_assets
from fastvlm.synth.sample import Sample
from fastvlm.synth.studio import Studio
from fastvlm.train.assets import fetch_assets, update_lock
from fastvlm.train.check import Report, examine, show
from fastvlm.train.dataset import ConversationDataset, open_dataset
from fastvlm.train.mixture import parse_parts
from fastvlm.train.skipped import is_too_many, too_many

CONVERSATIONS = "data.json"
_PROBLEMS_SHOWN = 20
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


def check(options: DataCheckOptions, output: Output) -> None:
    """Show some samples, count all; print both.

    Raises:
        InputError: The data cannot be read, a sample that was asked for does not exist, or too many cannot be used.
    """
    dataset = _open(options)
    size = len(dataset)
    shown = options.show or sorted({0, size // 2, size - 1})
    if absent := [index for index in shown if not 0 <= index < size]:
        raise InputError(f"--show {absent[0]}: the data has samples 0 to {size - 1}")
    texts = [show(dataset, index) for index in shown]
    if not options.json:
        output.line("+ is learned; <|...|> and <image ...> are control tokens, with a backslash they are letters")
        output.line("".join(f"\n{text}\n" for text in texts))
    limit = min(options.limit or size, size)
    with tqdm(total=limit, unit=" samples", leave=False, disable=options.quiet or not output.shows_progress) as bar:
        report = examine(
            dataset,
            range(size) if limit == size else [i * size // limit for i in range(limit)],
            num_workers=options.workers,
            reads_pictures=not options.skip_pictures,
            progress=bar.update,
        )
    if options.json:
        output.json(asdict(report) | {"shown": texts, "fingerprint": dataset.fingerprint})
    else:
        output.write(_render(report, options.max_bad_fraction))
    if is_too_many(len(report.problems), report.num_checked, report.num_samples, options.max_bad_fraction):
        raise InputError(too_many(report.problems, report.num_checked, options.max_bad_fraction))


def _open(options: DataCheckOptions) -> ConversationDataset:
    parts = parse_parts(options.data, options.image_folder)
    checkpoint = load(resolve(options.model))
    vision = checkpoint.model.config.vision
    if options.image_size is not None:
        try:
            vision = replace(vision, image_size=options.image_size)
        except ConfigError as error:
            raise InputError(f"--image-size does not fit {options.model}: {error}") from error
    return open_dataset(
        parts,
        checkpoint.tokenizer,
        vision,
        max_tokens=options.max_tokens,
        caption_prompt=options.caption_prompt,
        allow_absolute=options.allow_absolute_paths,
    )


def _render(report: Report, max_bad_fraction: float) -> str:
    """Write the counts, a line each."""
    num_bad = len(report.problems)
    num_good = report.num_checked - num_bad
    shortest, middle, most, longest = report.token_quantiles
    pictures = f"{report.num_without_pictures:,} samples without, {report.num_with_several:,} with several"
    lengths = f"shortest sample {shortest:,}, middle {middle:,}, 99 % up to {most:,}, longest {longest:,}"
    learned = report.num_learned / max(1, report.num_tokens)
    rows = [
        f"checked    {report.num_checked:,} of {report.num_samples:,} samples",
        f"usable     {num_good:,}",
        f"unusable   {num_bad:,} ({num_bad / report.num_checked:.2%}; --max-bad-fraction {max_bad_fraction:g})",
        f"pictures   {report.num_pictures:,}; {pictures}",
        f"tokens     {report.num_tokens:,}, {learned:.1%} learned; {lengths}",
        f"sources    {', '.join(f'{name} {count:,}' for name, count in report.sources.items())}",
    ]
    if report.repeated_ids:
        rows.append(f"ids        {len(report.repeated_ids):,} come more than once, as {report.repeated_ids[0]!r}")
    rows += [
        f"not read   `{key}`, in {count:,} samples: the answers are learned without it"
        for key, count in report.unread.items()
    ]
    rows += [f"  {problem}" for problem in report.problems[:_PROBLEMS_SHOWN]]
    if num_bad > _PROBLEMS_SHOWN:
        rows.append(f"  and {num_bad - _PROBLEMS_SHOWN:,} more; --json has all")
    return "".join(f"{row}\n" for row in rows)


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
