"""Fetching a repository of the Hugging Face hub: data files only, never its code.

HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean everywhere else.
"""

import re
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub  # its names are imported when first used: half a second that only a download pays
from huggingface_hub.utils.tqdm import tqdm

from fastvlm.checkpoint.archive import check_folder
from fastvlm.errors import CheckpointError, DownloadError

_ALLOWED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*", "ACKNOWLEDGEMENTS*"]
_REFUSED = ["*.py", "*.pyc", "*.bin", "*.pt", "*.pth", "*.pkl", "*.so", "*.dll"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?", re.ASCII)


def is_repository(name: str) -> bool:
    """Whether a name is written like a repository's: `owner/name`, or `owner/name@revision`."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name and not name.endswith(".zip")


def find_snapshot(repository: str) -> Path | None:
    """Return the folder of a repository that was fetched before, without asking the network."""
    repo_id, _, revision = repository.partition("@")
    try:
        folder = Path(_snapshot(repo_id, revision or None, local_files_only=True))
        check_folder(folder)
    except (OSError, ValueError, CheckpointError):
        return None
    return folder


def pull_repository(repository: str, *, show_progress: bool = True) -> Path:
    """Fetch the data files of a repository into the hub's own cache; return their folder.

    What is there already is not fetched again, and a file that was cut short is resumed.

    Raises:
        DownloadError: The hub cannot be reached or does not give the repository.
        CheckpointError: What came is damaged or holds no weights.
    """
    repo_id, _, revision = repository.partition("@")
    bar = {} if show_progress else {"tqdm_class": _NoBar}
    try:
        folder = Path(_snapshot(repo_id, revision or None, **bar))
        try:
            check_folder(folder)
        except CheckpointError:  # damaged in the cache, which the hub's client does not notice: once more from scratch
            folder = Path(_snapshot(repo_id, revision or None, force_download=True, **bar))
            check_folder(folder)
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise DownloadError(f"{repository}: {_reason(error)}") from error
    return folder


def _snapshot(repo_id: str, revision: str | None, **how: Any) -> str:
    return huggingface_hub.snapshot_download(
        repo_id, revision=revision, allow_patterns=_ALLOWED, ignore_patterns=_REFUSED, **how
    )


def _reason(error: Exception) -> str:
    errors = huggingface_hub.errors
    match error:
        case errors.GatedRepoError():
            return "the hub wants you to accept its terms first; do so on the repository's page and set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return "the hub has no such revision; see the branches and tags on the repository's page"
        case errors.RepositoryNotFoundError():
            return "the hub has no such repository, or it is private; check the name, or set HF_TOKEN"
        case errors.HfHubHTTPError():
            return f"the hub refused it (status {error.response.status_code}); look at the repository's page"
        case errors.HFValidationError():
            return "not a repository's name, expected owner/name"
        case errors.LocalEntryNotFoundError(__cause__=errors.HfHubHTTPError() as cause):
            return _reason(cause)
        case errors.LocalEntryNotFoundError() if huggingface_hub.constants.HF_HUB_OFFLINE:
            return "not in the local cache, and HF_HUB_OFFLINE is set; unset it to download"
        case errors.LocalEntryNotFoundError() | httpx2.HTTPError():
            return "the hub cannot be reached and the files are not in the local cache; check the network"
        case OSError():
            return f"cannot be written to {huggingface_hub.constants.HF_HUB_CACHE} ({error.strerror or error})"
        case _:
            return " ".join(str(error).split())


class _NoBar(tqdm):
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
