"""`fastvlm export`: check, write beside the target, read back, compare with eager, describe, rename.

What a format can do is in `options.EXPORT_FORMATS`; the rest is refused before anything is read. Its code is a module
of this folder, named in `MODULES` and imported when it is asked for. Each has:

    def ready(options: ExportOptions) -> None
        Before the model is read: raise ExportError where a package is missing (`parts.needs`) or an option does not
        fit.

    def check(source: Source, request: Request) -> int
        Before anything is written: raise ExportError where the model does not fit the format; return the most bytes
        that the folder takes while it is written.

    def write(source: Source, request: Request, place: Path) -> Written
        Write all files into the empty folder `place`. Licences, CHANGES.md, manifest and report are written by `run`.

    def read(source: Source, request: Request, place: Path, precision: Precision) -> Exported
        Read what was written, from its files alone, ready to be run and compared; called once a precision.

`source.eager` is the model that an export has to equal; `source.checkpoint` is the model as it is stored. `run` has put
the export's side into `source.config.vision.image_size`. What these types hold is in `parts.py`; `verify.py` does the
comparing for every format alike, and `docs/export.md` says what was found.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from fastvlm.checkpoint.convert import write_licences
from fastvlm.checkpoint.folder import check_target, staged_folder
from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.save import write_json
from fastvlm.checkpoint.zoo import resolve
from fastvlm.device import available_memory_bytes
from fastvlm.errors import ExportError, InputError
from fastvlm.export.manifest import MANIFEST, PARITY, is_of_export, write_manifest
from fastvlm.export.parts import Request, Source
from fastvlm.export.verify import MANY_PARAMETERS, compare, draw_pictures, summarise
from fastvlm.model.fastvlm import FastVLM
from fastvlm.options import EXPORT_FORMATS, ExportOptions

MODULES: Final = {
    "onnx": "fastvlm.export.onnx",
    "openvino": "fastvlm.export.openvino",
    "gguf-lm": "fastvlm.export.gguf_lm",
    "coreml": "fastvlm.export.coreml",
    "mlx": "fastvlm.export.mlx",
    "ios-bundle": "fastvlm.export.ios_bundle",
}
_FLOAT32_COPIES: Final = {  # of all weights, at the most: eager, what is being written, and what runs it
    "onnx": 4.5,
    "openvino": 4.5,
    "gguf-lm": 2.8,
    "coreml": 4.1,
    "mlx": 3.0,
    "ios-bundle": 4.1,
}
_PICTURES: Final = 4  # traced, or before and behind a layer


def run(options: ExportOptions, *, report: Callable[[str], None] | None = None) -> Path:
    """Export a model and compare it with eager; return the folder.

    Args:
        options: What to write, and where.
        report: Called with a line of progress now and then.

    Raises:
        ExportError: A package is missing, the model does not fit the format, the memory or the disk, or what was
            written does not compute what the model computes; then nothing is left behind.
        InputError: A picture of this size does not fit the model.
        CheckpointError: The model cannot be read, or the target may not be replaced.
    """
    say = report or (lambda line: None)
    module = import_module(MODULES[options.format])
    folder = resolve(options.model)
    target: dict[str, Any] = {"overwrite": options.overwrite, "marks": (MANIFEST,), "is_known": is_of_export}
    _check_apart(options, folder)
    check_target(options.out, **target)
    module.ready(options)
    source = _source(options, folder)
    request = _request(options, source)
    with staged_folder(options.out, **target) as place:
        _check_room(source, module.check(source, request), place, copies=_FLOAT32_COPIES[options.format])
        say(f"writing {options.format} ({', '.join(request.precisions)})")
        written = module.write(source, request, place)
        write_licences(place, source.checkpoint, written.notes)
        reports = _compare(source, request, module, place, options, say)
        write_json(place / PARITY, {"format": options.format, "reports": reports})
        write_manifest(place, source, request, written, name=options.format)
    return Path(options.out)


def _check_apart(options: ExportOptions, folder: Path) -> None:
    for read in (folder, *([Path(options.vision)] if options.vision else [])):
        if Path(options.out).resolve().is_relative_to(read.resolve()):
            raise ExportError(f"{options.out} lies in {read}, which is read; name another folder")


def _source(options: ExportOptions, folder: Path) -> Source:
    def sized(model: FastVLM) -> FastVLM:
        size = options.image_size or model.config.vision.image_size
        stride = model.config.vision.stride
        if size % stride:
            raise InputError(f"image_size must be a multiple of {stride}, got {size}")
        model.config = replace(model.config, vision=replace(model.config.vision, image_size=size))
        return model

    checkpoint = load(folder, vision=options.vision, dequantise=True)
    sized(checkpoint.model)
    return Source(
        checkpoint, lambda: sized(load(folder, vision=options.vision, dtype=torch.float32, dequantise=True).model)
    )


def _request(options: ExportOptions, source: Source) -> Request:
    kind = EXPORT_FORMATS[options.format]
    vision, room = source.config.vision, source.config.language.max_positions
    if vision.num_image_tokens >= room:
        raise InputError(
            f"a picture of {vision.image_size} pixels takes {vision.num_image_tokens} tokens, the model's context "
            f"holds {room}; take a smaller --image-size"
        )
    return Request(
        precisions=options.precision or kind.precisions[:1],
        image_size=source.config.vision.image_size,
        has_dynamic_batch=(options.batch or ("1" if kind.is_fixed else "dynamic")) == "dynamic",
        with_projector=options.with_projector or options.format != "coreml",
    )


def _check_room(source: Source, num_bytes: int, place: Path, *, copies: float) -> None:
    """See that disk and memory hold what comes, before an hour is spent on it."""
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ExportError(
            f"the export takes {_size(num_bytes)}, the disk has {_size(free)} free; make room or name another disk"
        )
    vision = source.config.vision
    widest = 4 * _PICTURES * vision.dims[0] * (vision.image_size // 2) ** 2  # what the first convolution makes
    needed, available = int(4 * source.num_parameters * copies) + widest, available_memory_bytes()
    if available is not None and available < needed:
        raise ExportError(
            f"exporting {source.num_parameters:,} weights for pictures of {vision.image_size} pixels takes about "
            f"{_size(needed)} of memory, {_size(available)} are free; use a smaller model, a smaller --image-size or a "
            "larger machine"
        )


def _compare(  # noqa: PLR0913
    source: Source,
    request: Request,
    module: ModuleType,
    place: Path,
    options: ExportOptions,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    count = options.pictures or (2 if source.num_parameters > MANY_PARAMETERS else 20)
    pictures = draw_pictures(count)
    reports = []
    for precision in request.precisions:
        say(f"comparing {precision} with eager on {count} pictures")
        found = compare(source, request, module.read(source, request, place, precision), pictures, precision=precision)
        say(summarise(found))
        reports.append(found)
        if found["failures"]:
            said = f"{options.format} {precision} is not equal to eager: {'; '.join(found['failures'])}"
            if not options.keep:
                raise ExportError(f"{said}; nothing was kept (--keep keeps it)")
            say(f"{said}; it is kept to be looked at")
    return reports


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
