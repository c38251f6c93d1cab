"""Apple's published models by short name: what there is, what is here, and how it gets here.

    0.5b-stage3  1.5b-stage3  7b-stage3             the models that answer; `0.5b` means `0.5b-stage3`
    0.5b-stage2  1.5b-stage2  7b-stage2             before the last training stage; for training on
    0.5b-stage3-ios  1.5b-stage3-ios  7b-stage3-ios     what Apple's app reads; `0.5b-ios` for short
    apple/FastVLM-0.5B  ...-1.5B  ...-7B            on the hub; `hub:0.5b` for short
    owner/name  owner/name@revision                 any other repository of the hub
    nano                                            the small model inside this package

Models live in one folder, `models_folder()`; the hub's are in the hub's own cache. Apple publishes no checksums, so the
digest of an archive is recorded when it is first seen, in `sha256.json`, and compared ever after.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from fastvlm.checkpoint.hub import find_snapshot, is_repository, pull_repository
from fastvlm.checkpoint.pull import Progress, pull_archive, recorded_sha256
from fastvlm.errors import CheckpointError, InputError
from fastvlm.folders import user_cache

APPLE_URL = "https://ml-site.cdn-apple.com/datasets/fastvlm"
NANO_FOLDER = Path(__file__).parents[1] / "assets" / "nano"

_HUB_URL = "https://huggingface.co"
_APPLE_LICENSE = "apple-amlr (research only)"
_APPLE_LICENSE_URL = "https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL"
_APPLE_TERMS = f"""\
Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model License Agreement.
In short (the agreement itself is what counts): the weights, and whatever you derive from them, may be used for
non-commercial scientific research and academic development only, not in any product or service; whoever passes
them on passes on the agreement and this notice with them and says what was changed.
The agreement: {_APPLE_LICENSE_URL}
"""


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """One model that can be pulled."""

    name: str
    kind: Literal["packaged", "zip", "bundle", "hub"]
    preset: str | None
    """Which of `config.PRESETS` it is; None for a repository that we know nothing of."""
    summary: str
    license: str
    source: str
    """File name of the archive, or repository on the hub."""
    aliases: tuple[str, ...] = ()

    def url(self, base_url: str | None = None) -> str:
        """Return where it comes from."""
        if self.kind == "hub":
            return f"{os.environ.get('HF_ENDPOINT', _HUB_URL).rstrip('/')}/{self.source.partition('@')[0]}"
        if self.kind == "packaged":
            return ""
        return f"{(base_url or os.environ.get('FASTVLM_ZOO_URL') or APPLE_URL).rstrip('/')}/{self.source}"

    @property
    def license_url(self) -> str:
        """Where the licence can be read."""
        return _APPLE_LICENSE_URL if self.license == _APPLE_LICENSE else self.url()

    @property
    def terms(self) -> str:
        """What one agrees to by pulling it."""
        if self.license == _APPLE_LICENSE:
            return _APPLE_TERMS
        return f"The licence of {self.source} is its publisher's: see {self.license_url}\n"


def _zip(preset: str, stage: int) -> ZooEntry:
    stem = f"llava-fastvithd_{preset}_stage{stage}"
    last = stage == 3
    return ZooEntry(
        name=f"{preset}-stage{stage}",
        kind="zip",
        preset=preset,
        summary=f"FastVLM {preset.upper()}, {'ready to answer' if last else 'before the last stage, for training on'}",
        license=_APPLE_LICENSE,
        source=f"{stem}.zip",
        aliases=(preset, stem) if last else (stem,),
    )


def _bundle(preset: str, dtype: str) -> ZooEntry:
    stem = f"llava-fastvithd_{preset}_stage3_llm.{dtype}"
    return ZooEntry(
        name=f"{preset}-stage3-ios",
        kind="bundle",
        preset=preset,
        summary=f"FastVLM {preset.upper()} for Apple's app: language model in {dtype}, encoder in Core ML",
        license=_APPLE_LICENSE,
        source=f"{stem}.zip",
        aliases=(f"{preset}-ios", stem),
    )


def _hub(preset: str) -> ZooEntry:
    return ZooEntry(
        name=f"apple/FastVLM-{preset.upper()}",
        kind="hub",
        preset=preset,
        summary=f"FastVLM {preset.upper()}, stage 3, on the hub",
        license=_APPLE_LICENSE,
        source=f"apple/FastVLM-{preset.upper()}",
        aliases=(f"hub:{preset}",),
    )


NANO = ZooEntry(
    name="nano",
    kind="packaged",
    preset="nano",
    summary="the small model in this package: counts things, reads short words, names emoji",
    license="Apache-2.0",
    source="",
)
"""The one model that needs no pulling."""

ZOO: tuple[ZooEntry, ...] = (
    *(_zip(preset, stage) for preset in ("0.5b", "1.5b", "7b") for stage in (3, 2)),
    *(_bundle(preset, dtype) for preset, dtype in (("0.5b", "fp16"), ("1.5b", "int8"), ("7b", "int4"))),
    *(_hub(preset) for preset in ("0.5b", "1.5b", "7b")),
)
"""All that Apple publishes: six archives, three bundles for its app, three repositories."""

CHECKPOINTS: tuple[str, ...] = tuple(entry.name for entry in ZOO if entry.kind == "zip")
"""The six that Apple's get_models.sh fetches."""

_NAMES = {alias.lower(): entry for entry in (NANO, *ZOO) for alias in (entry.name, *entry.aliases)}


@dataclass(frozen=True, kw_only=True)
class ZooStatus:
    """A model of the zoo and what of it is here."""

    entry: ZooEntry
    url: str
    folder: Path | None
    """Where it is; None until it is pulled."""
    num_bytes: int
    """Size on disk."""
    sha256: str | None
    """Of the archive, as first seen on this machine."""


def models_folder() -> Path:
    """Return where pulled models live: FASTVLM_MODELS, else this user's cache.

    Raises:
        CheckpointError: This user has no home folder.
    """
    if chosen := os.environ.get("FASTVLM_MODELS"):
        return Path(chosen).expanduser()
    try:
        return user_cache() / "models"
    except RuntimeError as error:
        raise CheckpointError("models folder: this user has no home; set FASTVLM_MODELS to a folder") from error


def resolve(name: str, *, folder: Path | None = None) -> Path:
    """Return the folder (or zip) of a model by short name or path, never downloading.

    A short name of the zoo comes first: for a folder that happens to be called so, write `./nano`.

    Raises:
        CheckpointError: Nothing is called so, or it was not pulled yet.
    """
    entry = _NAMES.get(name.lower())
    if (entry is None or "/" in name) and os.path.exists(name):  # Path.exists raises on names that no disk can hold
        return Path(name)
    if entry is None and not is_repository(name):
        if "/" in name or os.sep in name or name.endswith(".zip"):
            raise CheckpointError(f"{name[:1000]!r}: no such file or folder; `fastvlm models list` shows what there is")
        raise CheckpointError(_unknown(name))
    entry = entry or _foreign(name)
    if (here := _find(entry, folder)) is not None:
        return here
    if entry.kind == "packaged":
        raise CheckpointError(f"{NANO_FOLDER}: the packaged model is not there; install the fastvlm package again")
    if entry.preset is None:
        raise CheckpointError(f"{name!r}: no such folder; if the hub has it, run `fastvlm models pull {name}`")
    raise CheckpointError(
        f"{name!r}: not here yet; run `fastvlm models pull {entry.name}`; its licence is {entry.license}"
    )


def pull(
    name: str,
    *,
    accept_license: bool | Callable[[str], bool] = False,
    folder: Path | None = None,
    base_url: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Download, verify and unpack a model unless it is here already; return its folder.

    A download that was cut, even by kill -9, goes on where it ended. Of two processes that pull the same model at the
    same time the second waits for the first.

    Args:
        name: Short name, archive's name, or repository on the hub.
        accept_license: True, or what is called with the licence's terms and answers for the user.
        folder: Instead of `models_folder()`. The hub's models go to the hub's own cache.
        base_url: Instead of Apple's address (or of the one in FASTVLM_ZOO_URL): a mirror with the same file names.
        progress: Told how far the download is. For the hub's models: None also silences the hub's own bars.

    Raises:
        InputError: The licence was not accepted.
        CheckpointError: The name is unknown, or what came is damaged or hostile.
        DownloadError: The network or the disk does not allow it, or it is not what came the first time.
    """
    entry = _entry(name)
    here = _find(entry, folder)
    if here is None and entry.kind != "packaged" and not _is_accepted(entry.terms, accept_license):
        raise InputError(
            f"{entry.name}: its licence, {entry.license}, was not accepted; read {entry.license_url} "
            "and pass --accept-license"
        )
    if entry.kind == "hub":  # also when it is here: its publisher may have changed it
        return pull_repository(entry.source, show_progress=progress is not None)
    if here is not None or entry.kind == "packaged":
        return here or resolve(entry.name)
    return pull_archive(entry.url(base_url), folder or models_folder(), notice=entry.terms, progress=progress)


def pull_all(
    names: Sequence[str] = CHECKPOINTS,
    *,
    accept_license: bool | Callable[[str], bool] = False,
    folder: Path | None = None,
    base_url: str | None = None,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Pull several models, by default `CHECKPOINTS`; return their folders. Each licence is asked for once."""
    answers: dict[str, bool] = {}

    def ask_once(terms: str) -> bool:
        if terms not in answers:
            answers[terms] = _is_accepted(terms, accept_license)
        return answers[terms]

    return tuple(
        pull(name, accept_license=ask_once, folder=folder, base_url=base_url, progress=progress) for name in names
    )


def show(name: str, *, folder: Path | None = None, base_url: str | None = None) -> ZooStatus:
    """Return what is known of one model.

    Raises:
        CheckpointError: Nothing is called so.
    """
    return _status(_entry(name), folder, base_url)


def list_models(*, folder: Path | None = None, base_url: str | None = None) -> tuple[ZooStatus, ...]:
    """Return what is known of nano and of each model of the zoo."""
    return tuple(_status(entry, folder, base_url) for entry in (NANO, *ZOO))


def _status(entry: ZooEntry, folder: Path | None, base_url: str | None) -> ZooStatus:
    here = _find(entry, folder)
    is_archive = entry.kind in ("zip", "bundle")
    return ZooStatus(
        entry=entry,
        url=entry.url(base_url),
        folder=here,
        num_bytes=sum(path.stat().st_size for path in here.rglob("*") if path.is_file()) if here is not None else 0,
        sha256=recorded_sha256(folder or models_folder(), entry.source) if is_archive else None,
    )


def _is_accepted(terms: str, accept_license: bool | Callable[[str], bool]) -> bool:
    return accept_license(terms) if callable(accept_license) else accept_license


def _entry(name: str) -> ZooEntry:
    if (entry := _NAMES.get(name.lower().removesuffix(".zip"))) is not None:
        return entry
    if is_repository(name):
        return _foreign(name)
    raise CheckpointError(_unknown(name))


def _foreign(repository: str) -> ZooEntry:
    return ZooEntry(
        name=repository,
        kind="hub",
        preset=None,
        summary="a repository on the hub",
        license="its publisher's",
        source=repository,
    )


def _find(entry: ZooEntry, folder: Path | None) -> Path | None:
    if entry.kind == "hub":
        return find_snapshot(entry.source)
    stem = entry.source.removesuffix(".zip")
    path = NANO_FOLDER if entry.kind == "packaged" else (folder or models_folder()) / stem
    return path if (path / "config.json").is_file() else None


def _unknown(name: str) -> str:
    close = [_NAMES[match].name for match in get_close_matches(name.lower(), _NAMES, n=3, cutoff=0.5)]
    names = list(dict.fromkeys(close))
    remedy = "" if names == ["nano"] else "; what is not here yet comes by `fastvlm models pull NAME`"
    hint = f"did you mean {' or '.join(names)}?" if names else "`fastvlm models list` shows what there is"
    return f"no model or folder is called {name[:200]!r}; {hint}{remedy}"
