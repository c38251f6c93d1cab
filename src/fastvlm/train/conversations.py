"""Conversations in LLaVA's form: JSON or JSONL whose `<image>` marks stand for pictures in a folder."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastvlm.config import VisionConfig
from fastvlm.errors import InputError
from fastvlm.image import read, resize
from fastvlm.prompt import Message, Tokenizer, split_marks, tokenize
from fastvlm.train.data import Example

_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


class ConversationDataset(Dataset[Example]):
    """Rows of `{"image": name or names, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}`."""

    def __init__(self, files: Sequence[Path], images: Path, tokenizer: Tokenizer, vision: VisionConfig) -> None:
        self.images, self.tokenizer, self.vision = images, tokenizer, vision
        self.rows = [(f"{file} row {i}", row) for file in files for i, row in enumerate(_read_rows(file))]
        if not self.rows:
            raise InputError(f"{', '.join(map(str, files))}: no conversations")
        for origin, row in self.rows:
            for name in _messages(origin, row)[1]:
                if not (images / name).is_file():
                    raise InputError(f"{origin}: there is no picture {images / name}; mend the row or --image-folder")

    def __len__(self) -> int:
        """Conversations in all files."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Read the pictures and tokenize the turns of one conversation.

        Raises:
            InputError: A picture cannot be read, or its mark is missing.
        """
        origin, row = self.rows[index]
        messages, names = _messages(origin, row)
        side = self.vision.image_size
        pixels = torch.zeros(0, 3, side, side, dtype=torch.uint8)
        if names:
            try:
                squares = [resize(read(self.images / name), size=side, fit=self.vision.fit) for name in names]
            except InputError as error:
                raise InputError(f"{origin}: {error}") from error
            pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
        tokens = tokenize(messages, self.tokenizer, self.vision.num_image_tokens, add_generation_prompt=False)
        return Example(pixels=pixels, token_ids=tokens.token_ids, labels=tokens.labels, task="conversation")


def _read_rows(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else None
        rows = json.loads(text) if rows is None else rows
    except OSError as error:
        raise InputError(
            f"{file}: {(error.strerror or str(error)).lower()}; --data names JSON or JSONL files"
        ) from error
    except ValueError as error:
        raise InputError(f"{file}: not a JSON or JSONL file: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{file}: expected a list of conversations, got {type(rows).__name__}")
    return rows


def _messages(origin: str, row: Any) -> tuple[list[Message], list[str]]:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{origin}: expected an object with a list `conversations`")
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(turn.get("from", "")) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise InputError(f"{origin}: each turn needs `from` (human or gpt) and a text `value`, got {turn!r:.80}")
        content = split_marks(turn["value"]) if role == "user" else (turn["value"],)
        messages.append(Message(role=role, content=content))  # type: ignore[arg-type]
    names = _names(origin, row.get("image"))
    num_marks = sum(message.num_images for message in messages)
    if num_marks != len(names):
        raise InputError(f"{origin}: {num_marks} <image> marks for {len(names)} pictures")
    return messages, names


def _names(origin: str, value: Any) -> list[str]:
    """The pictures of a row: none, a name or a list; none leads out of the folder of pictures."""
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{origin}: `image` must be a name or a list of names, got {value!r:.80}")
    for name in names:
        paths = (PurePosixPath(name), PureWindowsPath(name))
        if any(path.anchor or ".." in path.parts for path in paths):
            raise InputError(
                f"{origin}: picture {name!r} leads out of --image-folder; name it from there, without `..`"
            )
    return names
