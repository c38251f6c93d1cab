"""The folder of a run: checkpoints that are there whole or not at all, and what `load` reads.

    model.safetensors config.json ...     the newest checkpoint, or adapter_model.safetensors and adapter_config.json
    checkpoints/step-00000100/            the same, of that step
    checkpoints/step-00000100/state/      what resuming needs
    checkpoints/step-00000100/manifest.json   length and SHA-256 of every file of the step, and the facts of the run
    options.json metrics.jsonl samples.jsonl bad_samples.jsonl curves.png tensorboard/
    .lock                                 held by the run that writes here

A checkpoint is written under another name, its manifest last, everything is brought to the disk, and only then it gets
its name: whatever interrupts, the last whole one is there.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from fastvlm.checkpoint.reading import INDEX
from fastvlm.errors import CheckpointError, InputError
from fastvlm.train.parallel import Group
from fastvlm.train.skipped import BAD_SAMPLES
from fastvlm.train.state import STATE, facts_of

CHECKPOINTS: Final = "checkpoints"
MANIFEST: Final = "manifest.json"
LOG: Final = "metrics.jsonl"
OPTIONS: Final = "options.json"
SAMPLES: Final = "samples.jsonl"
CURVES: Final = "curves.png"
LOCK: Final = ".lock"
_PRIVATE: Final = {LOG, OPTIONS, SAMPLES, CURVES, LOCK, "tensorboard"}
_LINKED: Final = ".safetensors"  # large, and rewritten by nobody

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is whole."""

    path: Path
    facts: dict[str, Any]

    @property
    def state(self) -> Path:
        """Where the state is."""
        return self.path / STATE


class RunFolder:
    """Where a run writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Where the steps are."""
        return self.path / CHECKPOINTS

    def refuse_others(self) -> None:
        """See to it that a run may begin here: nothing is here but what a run leaves that ended before it saved.

        Raises:
            InputError: Something else is here.
        """
        if not self.path.is_dir():
            return
        listed = BAD_SAMPLES.partition(".")[0]  # each process has such a file
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(listed)} - _PRIVATE
        if names == {CHECKPOINTS} and not any(path.name.startswith("step-") for path in self.checkpoints.iterdir()):
            return
        if names:
            raise InputError(f"{self.path} exists and is not empty; give another --output, or --resume to go on")

    def require_state(self) -> None:
        """See to it that there is something to go on from.

        Raises:
            CheckpointError: There is not.
        """
        if not any(self.checkpoints.glob("step-*")):
            raise CheckpointError(f"{self.path}: no training state to resume from; expected {CHECKPOINTS}/step-...")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out for the length of the block; the lock of a process that is killed ends with it.

        Raises:
            InputError: Another run is at work here, or a file has this name.
            CheckpointError: The folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            raise InputError(
                f"{self.path}: another run is at work here; wait for it, or give another --output"
            ) from error
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{self.path} is not a folder; give another --output") from error
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            yield
        finally:
            lock.release()

    def latest(self) -> Saved:
        """Find the newest checkpoint that is whole; damaged ones are named in a warning and passed over.

        Raises:
            CheckpointError: There is none.
        """
        reasons = []
        for path in sorted(self.checkpoints.glob("step-*"), reverse=True):
            try:
                saved = Saved(path=path, facts=_verified(path))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reasons.append(f"{path}: the training state is damaged ({' '.join(str(error).split())[:160]})")
                logger.warning("%s; an older one is taken", reasons[-1])
                continue
            return saved
        self.require_state()
        raise CheckpointError(f"{reasons[0]}; begin another run")

    def save(
        self,
        facts: dict[str, Any],
        *,
        write_model: Callable[[Path], None],
        write_state: Callable[[Path], None],
        group: Group,
        keep: int,
    ) -> None:
        """Write a checkpoint; every process of the run calls it, the first does what only one can do.

        Args:
            facts: What a resumed run must know; `step` is among them.
            write_model: Writes what `load` reads into a folder; only the first process calls it.
            write_state: Writes the state into a folder, all processes together.
            group: The processes.
            keep: How many checkpoints stay.

        Raises:
            CheckpointError: It cannot be written; what was there before is.
        """
        name = f"step-{facts['step']:08d}"
        place = self.checkpoints / f".{name}.tmp"
        try:
            if group.first(lambda: self._is_there(self.checkpoints / name)):
                return
            group.first(lambda: _empty(place))
            write_state(place / STATE)
            group.first(lambda: self._finish(place, self.checkpoints / name, facts, write_model, keep))
        except OSError as error:
            raise _unwritable(self.path, error) from error
        finally:
            if group.is_first:
                shutil.rmtree(place, ignore_errors=True)

    def _is_there(self, saved: Path) -> bool:
        """Whether a step is saved already, as when a run ends right behind it; a kill may have kept it from `load`."""
        if not _is_whole(saved):
            return False
        self.publish(saved)
        return True

    def _finish(
        self, place: Path, target: Path, facts: dict[str, Any], write_model: Callable[[Path], None], keep: int
    ) -> None:
        write_model(place)
        files = sorted(path for path in place.rglob("*") if path.is_file())
        listed = {str(path.relative_to(place)): _describe(path) for path in files}
        manifest = place / MANIFEST
        manifest.write_text(json.dumps({"files": listed, "facts": facts}), encoding="utf-8")
        for path in (*files, manifest, place / STATE, place):
            _flush(path)
        if target.exists():  # and is damaged
            shutil.rmtree(target)
        os.replace(place, target)
        _flush(self.checkpoints)
        self.publish(target)
        self._prune(keep, target.name)

    def publish(self, saved: Path) -> None:
        """Put a checkpoint's files where `load` reads them; large ones are shared with it, not copied.

        A kill in between leaves a folder that `load` reads or refuses, never one of mixed steps.
        """
        files = sorted(path for path in saved.iterdir() if path.is_file() and path.name != MANIFEST)
        shards = [path for path in files if path.suffix == _LINKED]
        if len(shards) > 1:  # without its index a model of several files is none
            (self.path / INDEX).unlink(missing_ok=True)
        for path in sorted(files, key=lambda path: path.name == INDEX):
            temporary = self.path / f".{path.name}.tmp"
            temporary.unlink(missing_ok=True)
            _share(path, temporary)
            os.replace(temporary, self.path / path.name)
            temporary.unlink(missing_ok=True)  # which is left where both were names of one file already

    def _prune(self, keep: int, newest: str) -> None:
        """Keep the newest step, which is whole, and those before it; later ones were damaged when the run went on."""
        steps = sorted((path for path in self.checkpoints.glob("step-*") if path.name <= newest), reverse=True)
        for path in (*steps[keep:], *self.checkpoints.glob(".*")):
            # A folder that is half gone must not look like a checkpoint.
            aside = path if path.name.startswith(".") else path.with_name(f".{path.name}.old")
            if aside is not path:
                os.replace(path, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def write_options(self, options: dict[str, Any]) -> None:
        """Write down what the run was asked to do.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / OPTIONS, json.dumps(options, indent=1))
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def cut_logs(self, last_step: int) -> None:
        """Drop the lines of steps that will be done again, and one that was cut.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        try:
            for name in (LOG, SAMPLES):
                path = self.path / name
                if path.is_file():
                    lines = path.read_text(encoding="utf-8").splitlines()
                    write_text(path, "".join(line + "\n" for line in lines if _step_of(line) <= last_step))
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _empty(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    (place / STATE).mkdir(parents=True)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verified(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint whose files are those of its manifest."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    for name, described in manifest["files"].items():
        if _describe(path / name) != described:
            raise ValueError(f"{name} is not what was written")
    return facts_of(manifest["facts"])


def _is_whole(path: Path) -> bool:
    try:
        _verified(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _share(path: Path, target: Path) -> None:
    if path.suffix == _LINKED:
        with contextlib.suppress(OSError):  # not every file system has links
            os.link(path, target)
            return
    shutil.copyfile(path, target)


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {error.strerror or error}; what was saved before is there")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
