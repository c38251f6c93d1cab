"""`manifest.json`: what an export is, where it came from, and the digest of every file."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from fastvlm.checkpoint.save import write_json
from fastvlm.export.parts import Request, Source, Written, num_image_tokens

MANIFEST: Final = "manifest.json"
PARITY: Final = "parity.json"


def write_manifest(place: Path, source: Source, request: Request, written: Written, *, name: str) -> dict[str, Any]:
    """Describe a finished folder; `name` is the format's. Written last, as it holds the digests of the others."""
    vision, language = source.config.vision, source.config.language
    checkpoint = source.checkpoint
    values = {
        "format": name,
        "source": {
            "name": checkpoint.path.name,
            "layout": checkpoint.layout,
            "fingerprint": checkpoint.fingerprint,
            "parameters": source.num_parameters,
        },
        "precisions": list(request.precisions),
        "image": {
            "size": request.image_size,
            "fit": vision.fit,
            "resize": "bicubic, as Pillow",
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            "tokens": num_image_tokens(source, request),
            "token_id": source.config.image_token_id,
            "has_dynamic_batch": None if written.ends_in is None else request.has_dynamic_batch,
            "ends_in": written.ends_in,
        },
        "language": {**language.to_dict(), "stop_ids": list(source.tokenizer.stop_ids)},
        "inputs_and_outputs": written.inputs,
        "licences": sorted(checkpoint.licences) or "none came with the source",
        "changes": written.notes,
        "versions": {"fastvlm": version("fastvlm"), **written.versions},
        "written": datetime.now(UTC).strftime("%Y-%m-%d"),
        "files": files_of(place),
    }
    write_json(place / MANIFEST, values)
    return values


def files_of(place: Path) -> dict[str, dict[str, Any]]:
    """Length and digest of every file but the manifest, by its path inside the folder."""
    paths = sorted(path for path in place.rglob("*") if path.is_file() and path != place / MANIFEST)
    return {
        path.relative_to(place).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }


def is_of_export(path: Path) -> bool:
    """Whether all of something at the top of a folder is in the folder's manifest: then it may be replaced."""
    folder = path.parent
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if not isinstance(files, Mapping):
        return False
    inside = [path] if path.is_file() else [each for each in path.rglob("*") if not each.is_dir()]
    return all(each == folder / MANIFEST or each.relative_to(folder).as_posix() in files for each in inside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
