"""A folder that is written whole or not at all, and that takes the place of nothing but its own kind."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fastvlm.checkpoint.reading import LICENCES
from fastvlm.errors import CheckpointError

_MARKS: Final = ("config.json",)  # a folder without it is no checkpoint
_KNOWN: Final = re.compile(
    r"(model|model-\d{5}-of-\d{5}|clip_head|train_state|adapter_model)\.safetensors|model\.safetensors\.index\.json"
    r"|(adapter_|generation_|preprocessor_|processor_|tokenizer_)?config\.json"
    r"|(tokenizer|vocab|added_tokens|special_tokens_map|train_state|options|trainer_state|quantization)\.json"
    r"|merges\.txt|chat_template\.(jinja|json)|metrics\.jsonl|\.gitattributes|\.DS_Store"
)
_TEXTS: Final = ("", ".md", ".txt", ".rst", ".pdf")


@contextmanager
def staged_folder(
    folder: str | Path,
    *,
    overwrite: bool,
    marks: Sequence[str] = _MARKS,
    is_known: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Give a temporary folder beside the target; it takes the target's place when the block ends well.

    Args:
        folder: The target; a link to a folder stays a link.
        overwrite: Replace a checkpoint that is there; a folder that holds anything else is never replaced.
        marks: As `find_stranger`, for folders that are no checkpoints.
        is_known: As `find_stranger`; by default the names of a checkpoint's files.

    Raises:
        CheckpointError: The target is there and may not be replaced, or cannot be written.
    """
    target = check_target(folder, overwrite=overwrite, marks=marks, is_known=is_known)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            yield place
            replace_folder(place, target)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


def check_target(
    folder: str | Path,
    *,
    overwrite: bool,
    marks: Sequence[str] = _MARKS,
    is_known: Callable[[Path], bool] | None = None,
) -> Path:
    """Refuse a target as `staged_folder` would, with the same arguments, before work is spent on it; return its path.

    Raises:
        CheckpointError: The target is there and may not be replaced, or cannot be written.
    """
    if not os.fspath(folder):
        raise CheckpointError("the name of the folder to write is empty; name a folder")
    target = Path(folder).resolve()
    try:
        _check_target(target, overwrite=overwrite, marks=marks, is_known=is_known or _is_known)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def find_stranger(folder: Path, *, marks: Sequence[str], is_known: Callable[[Path], bool]) -> str | None:
    """Say why a folder may not be replaced: the name of something in it that is not ours; None if it may.

    Args:
        folder: A folder that is there.
        marks: Files of which one must be there, or nothing in the folder is taken for ours.
        is_known: Whether something in the folder is what we, or a program like us, write.
    """
    paths = sorted(folder.iterdir())
    is_ours = any((folder / mark).is_file() for mark in marks)
    return next((path.name for path in paths if not is_ours or not is_known(path)), None)


def replace_folder(place: Path, target: Path) -> None:
    """Put a finished folder where another may be; whatever interrupts, one of the two is there in the end."""
    place.chmod(0o777 & ~_umask())
    if not target.exists():
        os.replace(place, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    old = aside / target.name
    try:
        os.replace(target, old)
        os.replace(place, target)
    except BaseException:  # also Ctrl-C and SIGTERM
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _check_target(target: Path, *, overwrite: bool, marks: Sequence[str], is_known: Callable[[Path], bool]) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder")
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir():
        raise CheckpointError(f"{target} cannot be written: {above} is a file; name another folder")
    tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=above).cleanup()  # says what the disk would say later
    if Path.cwd().is_relative_to(target):  # whoever stands in it would stand in a folder that is gone
        raise CheckpointError(f"{target} is or holds the folder you are in; name another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} is not empty; name another folder, or say --overwrite (overwrite=True)")
    if (name := find_stranger(target, marks=marks, is_known=is_known)) is not None:
        what = "checkpoint" if marks == _MARKS else "export"
        raise CheckpointError(f"{target} holds {name!r} and is no {what} alone; name another folder or move it away")


def _is_known(path: Path) -> bool:
    if path.is_dir():
        return False
    is_text = LICENCES.match(path.name) is not None and path.suffix.lower() in _TEXTS
    return is_text or _KNOWN.fullmatch(path.name) is not None


def _umask() -> int:
    # Reading it means setting it; there is no other way in Python.
    mask = os.umask(0)
    os.umask(mask)
    return mask
