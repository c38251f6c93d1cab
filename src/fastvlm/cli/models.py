"""`fastvlm models ...` and `fastvlm convert`: checkpoints that are here, come, are made, or change their layout."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from fastvlm.checkpoint import zoo
from fastvlm.checkpoint.convert import convert as convert_checkpoint
from fastvlm.checkpoint.create import init_checkpoint
from fastvlm.checkpoint.pull import Progress
from fastvlm.cli.output import Output
from fastvlm.device import DTYPES
from fastvlm.options import ConvertOptions, ModelsInitOptions, ModelsListOptions, ModelsPullOptions, ModelsShowOptions

ALL = "all"


def list_(options: ModelsListOptions, output: Output) -> None:
    """Print one line a model."""
    found = zoo.list_models()
    if options.json:
        output.json([_plain(status) for status in found])
        return
    width = max(len(status.entry.name) for status in found)
    for status in found:
        here = _size(status.num_bytes) if status.folder is not None else "-"
        output.line(f"{status.entry.name:<{width}}  {here:>8}  {status.entry.summary}")
    output.note("fastvlm: the size is that of models that are here; `fastvlm models pull NAME` fetches one")


def show(options: ModelsShowOptions, output: Output) -> None:
    """Print what is known of one model."""
    status = zoo.show(options.name)
    if options.json:
        output.json(_plain(status))
        return
    for key, value in _plain(status).items():
        shown = ", ".join(value) if isinstance(value, list) else value
        output.line(f"{key:<12} {'-' if shown in (None, '') else shown}")


def pull(options: ModelsPullOptions, output: Output) -> None:
    """Fetch a model, or all of Apple's; print the folders."""

    def ask(terms: str) -> bool:
        if sys.stdin is None or not sys.stdin.isatty():
            return False
        output.note(terms)
        output.note("Do you accept this licence? Type yes to go on:")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    accept = True if options.accept_license else ask
    names = zoo.CHECKPOINTS if options.name.lower() == ALL else (options.name,)
    with _progress(output, options.name, is_quiet=options.quiet) as progress:
        folders = zoo.pull_all(names, accept_license=accept, base_url=options.base_url, progress=progress)
    for folder in folders:
        output.line(os.fspath(folder))


def init(options: ModelsInitOptions, output: Output) -> None:
    """Write random weights; print the folder."""
    folder = init_checkpoint(
        options.preset, options.seed, options.out, dtype=DTYPES[options.dtype], overwrite=options.overwrite
    )
    output.line(os.fspath(folder))


def convert(options: ConvertOptions, output: Output) -> None:
    """Write another layout; print the folder."""
    folder = convert_checkpoint(
        zoo.resolve(options.model),
        options.to,
        options.out,
        vision=options.vision,
        base=None if options.model_base is None else zoo.resolve(options.model_base),
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        overwrite=options.overwrite,
    )
    output.line(os.fspath(folder))


def _plain(status: zoo.ZooStatus) -> dict[str, Any]:
    entry = status.entry
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "kind": entry.kind,
        "summary": entry.summary,
        "license": entry.license,
        "license_url": entry.license_url,
        "url": status.url,
        "folder": None if status.folder is None else os.fspath(status.folder),
        "bytes": status.num_bytes,
        "sha256": status.sha256,
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


@contextlib.contextmanager
def _progress(output: Output, label: str, *, is_quiet: bool) -> Iterator[Progress | None]:
    """A bar where there is a terminal."""
    if is_quiet or not output.shows_progress:
        yield None
        return
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc=label, leave=False) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
