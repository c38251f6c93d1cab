"""A checkpoint folder to a repository of the Hugging Face hub: weights, settings, licence and a card, nothing else."""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import httpx2
import huggingface_hub  # its names are imported when first used: half a second that only an upload pays
import torch

from fastvlm.checkpoint.adapter import base_of, is_adapter, read_adapter
from fastvlm.checkpoint.hub import is_repository
from fastvlm.checkpoint.load import load, load_encoder, recognise
from fastvlm.checkpoint.reading import Weights, licence_files, read_json
from fastvlm.checkpoint.zoo import resolve
from fastvlm.errors import CheckpointError, DownloadError, FastVLMError, InputError
from fastvlm.options import FRESH

CARD: Final = "README.md"
_SENT: Final = re.compile(
    r"(model|model-\d{5}-of-\d{5}|clip_head|adapter_model)\.safetensors|model\.safetensors\.index\.json"
    r"|(adapter_|generation_|preprocessor_|processor_|tokenizer_)?config\.json"
    r"|(tokenizer|vocab|added_tokens|special_tokens_map)\.json|merges\.txt|chat_template\.(jinja|json)"
)
_LICENCES: Final = {  # the hub's name of a licence, and words that its text has
    "apple-amlr": "Apple Machine Learning Research Model",
    "apache-2.0": "Apache License",
    "mit": "MIT License",
    "cc-by-4.0": "Attribution 4.0 International",
    "cc-by-nc-4.0": "Attribution-NonCommercial 4.0",
}
_UNTOLD: Final = (  # numbers of a run that shaped no weight
    "workers",
    "log_every",
    "save_minutes",
    "save_steps",
    "validate_every",
    "shown_answers",
    "keep",
    "timeout",
    "quiet",
    "resume",
)
_LEARNING: Final = ("learn_vision", "learn_projector", "learn_language")


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What would be sent, and what would stay.

    Attributes:
        repository: `owner/name`.
        files: Each name in the repository with the file, or the content, that it gets.
        kept_back: Names of what the folder holds beside them: training state, logs, options, anything unknown.
        licence: The hub's name of the licence; None when neither the folder nor the caller says it.
        local_base: Of an adapter, the folder of this machine that it calls its base; None where others can find that.
    """

    repository: str
    files: dict[str, Path | bytes]
    kept_back: tuple[str, ...]
    licence: str | None
    local_base: str | None = None

    def size(self, name: str) -> int:
        """Bytes of one file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def prepare_upload(folder: str | Path, repository: str, *, licence: str | None = None) -> Upload:
    """Choose what of a folder goes to the hub; write nothing, ask no network.

    A trained folder without a licence takes that of what it began with, where its options name a folder that is here.

    The folder must load: as a whole model, an encoder, or an adapter. Its card stays as it is; where there is none, one
    is made of what the folder says about itself.

    Args:
        folder: The checkpoint.
        repository: `owner/name`.
        licence: The hub's name of the licence (`apache-2.0`), where the folder's own files do not say it.

    Raises:
        InputError: The repository's name cannot be one.
        CheckpointError: The folder cannot be loaded, or its licence is another one.
    """
    place = Path(folder)
    if not is_repository(repository) or "@" in repository:
        raise InputError(f"{repository!r} is not a repository's name; expected owner/name")
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; name a checkpoint's")
    summary, usage = _summary(place, repository)
    files: dict[str, Path | bytes] = {path.name: path for path in licence_files(place)}
    files |= {path.name: path for path in sorted(place.iterdir()) if _SENT.fullmatch(path.name) and path.is_file()}
    found = _licence(place)
    if found is None:
        inherited: dict[str, Path | bytes] = {
            name: path for base in _bases(place) for name, path in _licence_texts(base).items()
        }
        files = inherited | files
        names = {name for base in _bases(place) if (name := _licence(base)) is not None}
        found = names.pop() if len(names) == 1 else None
    if None not in (found, licence) and found != licence:
        raise CheckpointError(f"{place}: its licence is {found}, not {licence}; leave --license out")
    if CARD not in files:
        files[CARD] = _card(place, repository, found or licence, summary, usage).encode()
    left = tuple(sorted(path.name for path in place.iterdir() if path.name not in files))
    return Upload(
        repository=repository,
        files=dict(sorted(files.items())),
        kept_back=left,
        licence=found or licence,
        local_base=_local_base(place),
    )


def send(upload: Upload, *, is_private: bool, message: str) -> str:
    """Make the repository where it is missing, and send all files as one commit; return its address.

    HF_TOKEN, or the token that the hub's own `hf auth login` has stored, says who is sending.

    Raises:
        InputError: Nothing says under which licence, or an adapter's base is a folder of this machine.
        DownloadError: The hub cannot be reached or refuses.
    """
    if upload.licence is None:
        raise InputError(f"{upload.repository}: nothing says under which licence; give --license, such as apache-2.0")
    if upload.local_base is not None:
        raise InputError(f"{upload.repository}: {local_base_remark(upload.local_base)}")
    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in upload.files.items()
    ]
    try:
        api.create_repo(upload.repository, private=is_private, exist_ok=True)
        commit = api.create_commit(upload.repository, operations, commit_message=message)
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        raise DownloadError(f"{upload.repository}: {_reason(error)}") from error
    return str(commit.commit_url)


def local_base_remark(base: str) -> str:
    """Say what is wrong with an adapter whose base nobody else has, and what helps."""
    return (
        f"adapter_config.json names a folder of this machine as its base, {base}; write the name of that model's "
        f"repository there, or merge both: fastvlm convert --to hf"
    )


def _reason(error: Exception) -> str:
    errors = huggingface_hub.errors
    match error:
        case errors.LocalTokenNotFoundError():
            return "the hub wants to know who you are; set HF_TOKEN, or run `hf auth login`"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the hub refused it (status {error.response.status_code}); HF_TOKEN must be allowed to write there"
        case errors.HfHubHTTPError():
            return f"the hub refused it (status {error.response.status_code}); see the repository's page"
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set; unset it to upload"
        case httpx2.HTTPError():
            return "the hub cannot be reached; check the network and HF_ENDPOINT"
        case _:
            return " ".join(str(error).split())[:300]


def _summary(place: Path, repository: str) -> tuple[str, list[str]]:
    """Load the folder, which is the proof that others can; say what it is, and the commands that use it."""
    pull = f"fastvlm models pull {repository}"
    if is_adapter(place):
        base = "a FastVLM" if _local_base(place) is not None else base_of(place)
        read_adapter(place)
        return f"A LoRA adapter in PEFT's format for {base}.", []
    if recognise(Weights.open(place)) == "encoder":
        encoder = load_encoder(place)
        return f"A FastViTHD vision encoder of {_millions(encoder)} million parameters, in timm's names.", []
    model = load(place).model
    vision = model.config.vision
    text = (
        f"A FastVLM of {_millions(model)} million parameters: a picture becomes a square of {vision.image_size} pixels "
        f"and {vision.num_image_tokens} tokens of its language model."
    )
    return text, [pull, f'fastvlm predict --model {repository} --image cat.jpg --prompt "What is this?"']


def _local_base(place: Path) -> str | None:
    """The base model of an adapter, where that is a folder and no name that others know."""
    if not is_adapter(place):
        return None
    base = base_of(place)
    is_path = any(path(base).is_absolute() for path in (PurePosixPath, PureWindowsPath)) or base[:1] in (".", "~")
    return base if is_path or Path(base).exists() else None


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.1f}"


def _bases(place: Path) -> list[Path]:
    """The folders that a run began with, as its options name them, where they are here."""
    options = place / "options.json"
    values = read_json(options) if options.is_file() else {}
    found = []
    for key in ("model", "encoder", "language"):
        if isinstance(name := values.get(key), str) and name != FRESH:
            with contextlib.suppress(FastVLMError):
                found.append(Path(name) if Path(name).exists() else resolve(name))
    return found


def _licence_texts(place: Path) -> dict[str, Path]:
    """The licence files of a folder; its card is about another model."""
    return {path.name: path for path in licence_files(place) if path.name.upper() != CARD.upper()}


def _licence(place: Path) -> str | None:
    """What the card's header says, else what the licence's text is known by; `other` for a text that is not known."""
    card = place / CARD
    if card.is_file():
        header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if header and (match := re.search(r"^license: *['\"]?([\w.-]+)", header[1], re.MULTILINE)):
            return match[1]
    texts = [path for path in licence_files(place) if re.match(r"LICEN[CS]E|COPYING", path.name, re.IGNORECASE)]
    for path in texts:
        text = path.read_text(encoding="utf-8", errors="replace")
        if (name := next((name for name, words in _LICENCES.items() if words in text), None)) is not None:
            return name
    return "other" if texts else None


def _card(place: Path, repository: str, licence: str | None, summary: str, usage: list[str]) -> str:
    run = _told(place / "options.json")
    header = {"license": licence, "library_name": "fastvlm", "pipeline_tag": "image-text-to-text"}
    lines = ["---", *(f"{key}: {value}" for key, value in header.items() if value is not None), "---", ""]
    lines += [f"# {repository.partition('/')[2]}", "", summary, ""]
    if usage:
        lines += ["## How to ask it", "", "```sh", *usage, "```", ""]
    if run:
        lines += [
            "## How it was trained",
            "",
            "`fastvlm train`, with",
            "",
            "```json",
            json.dumps(run, indent=1),
            "```",
            "",
        ]
    lines += [
        "## What is not known",
        "",
        "This card was made by `fastvlm push`. Nobody has written here what the model is good for, on what data it was",
        "trained, or how well it does; measure before you rely on it.",
        "",
    ]
    return "\n".join(lines)


def _told(options: Path) -> dict[str, Any]:
    """Numbers, switches, the stage and what of a run learned: nothing that names a place on somebody's disk."""
    values = read_json(options) if options.is_file() else {}
    has_updates = "lora" in (values.get(name) for name in _LEARNING)
    return {
        key: value
        for key, value in values.items()
        if (key == "stage" or key in _LEARNING or isinstance(value, int | float))
        and value not in (None, False)
        and key not in _UNTOLD
        and (has_updates or not key.startswith("lora_"))
    }
