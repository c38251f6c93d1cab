"""One sample, whatever it is written in: a row of JSON or of a table becomes messages and the pictures they show.

What a row may be is in `read_row`. Nothing is repaired: a row that is not right is an error that says why.
"""

import base64
import binascii
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

from PIL import Image

from fastvlm.errors import InputError
from fastvlm.image import read
from fastvlm.options import CAPTION_PROMPT
from fastvlm.prompt import IMAGE, Message, Part, assistant, split_marks, user

MAX_PICTURE_BYTES: Final = 1 << 28
PICTURE_KEYS: Final = ("image", "images", "file_name", "path")
"""What the column of a picture may be called, the first that is there."""
CAPTION_KEYS: Final = ("caption", "text")
_TOOLS: Final = ("tools", "functions")
_NO_TOOLS: Final[tuple[object, ...]] = (None, "", "[]", [])
_OTHER_MEDIA: Final = ("video", "videos", "audio", "audios")
_LLAVA_ROLES: Final = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that is not read yet: a file, or its bytes."""

    name: str
    """What errors call it."""
    path: Path | None = None
    content: bytes | None = None

    def read_bytes(self) -> bytes:
        """Return the file's bytes.

        Raises:
            InputError: There is no such file, or it is no regular one, or too large.
        """
        return self.content if self.content is not None else _read_regular(self.path or Path(self.name), self.name)

    def read(self) -> Image.Image:
        """Decode it to RGB, within the limits of `fastvlm.image`.

        Raises:
            InputError: There is no such file, or it is not a whole picture.
        """
        return read(self.content if self.content is not None else self.path or Path(self.name), name=self.name)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, and the pictures of their slots in reading order."""

    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]
    id: str | None = None
    unread: tuple[str, ...] = ()
    """Keys of the row that say something which the answers may rest on, and which the model will not see."""


@dataclass(frozen=True, kw_only=True)
class PictureFolder:
    """Where the pictures are that rows name; no name leads out of it."""

    folder: Path
    allow_absolute: bool = False
    """Whether a row may name a file by its whole path."""

    def find(self, value: Any) -> Picture:
        """Find what a row calls a picture: a name, a `data:` address, bytes, or `{"bytes": ..., "path": ...}`.

        Raises:
            InputError: It is none of these, leads out of the folder, or there is no such file.
        """
        if isinstance(value, Mapping):  # how Hugging Face datasets store pictures
            if value.get("bytes") is None:
                return self.find(value.get("path"))
            value = value["bytes"]
        if isinstance(value, bytes):
            _check_length(len(value), "the picture")
            return Picture(name="the picture", content=value)
        if not isinstance(value, str) or not value:
            raise InputError(f"a picture must be a name, bytes or a data: address, got {value!r:.80}")
        if value[:5].lower() == "data:":
            return Picture(name="the data: picture", content=_data_uri(value))
        if "://" in value[:20]:
            raise InputError(f"picture {value!r:.80} is an address; download it, and name the file")
        path = self._path(value)
        if not path.is_file():
            raise InputError(f"there is no picture {path}; mend the row or --image-folder")
        return Picture(name=str(path), path=path)

    def _path(self, name: str) -> Path:
        paths = (PurePosixPath(name), PureWindowsPath(name))
        is_absolute = any(path.anchor for path in paths)
        if "\0" in name or any(".." in path.parts for path in paths) or (is_absolute and not self.allow_absolute):
            raise InputError(
                f"picture {name!r} leads out of --image-folder; name it from there, without `..`"
                f"{', or say --allow-absolute-paths' * is_absolute}"
            )
        return self.folder / name


def read_row(
    row: Any,
    find: Callable[[Any], Picture],
    *,
    caption_prompt: str = CAPTION_PROMPT,
    shown: Sequence[Picture] | None = None,
) -> Conversation:
    """Read a row of one of these forms.

    - LLaVA: `{"image": name or names, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}`; each
      `<image>` in what a human says is the slot of the next picture.
    - OpenAI: `{"messages": [{"role": ..., "content": text or parts}, ...]}`; only picture parts are slots, `<image>`
      in a text is letters. Parts without a picture of their own take those of `image` or `images`, in order.
    - Pictures and texts: `{"images": [...], "texts": [{"user": text, "assistant": text}, ...]}`; pictures come first.
    - A question: `{"image": ..., "question": text, "answer": text}`.
    - A caption: `{"image": ..., "caption": text}`; `text` is the same, `file_name` and `path` are `image`.

    Args:
        row: The row.
        find: From what a row calls a picture to the picture.
        caption_prompt: What is asked for a caption.
        shown: The pictures, where they lie beside the row and not in it.

    Raises:
        InputError: The row has none of these forms, turns in another order than question and answer, nothing to learn,
            or more or fewer slots than pictures.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"expected an object, got {type(row).__name__}")
    if None in row:
        raise InputError(f"{len(row[None])} more cells than the head has names; put quotes around a text with commas")
    if (strange := next((key for key in _OTHER_MEDIA if row.get(key)), None)) is not None:
        raise InputError(f"`{strange}` is not read, only pictures are; give frames as `image`, or leave the row out")
    if row.get("messages") is not None:
        messages, pictures = _openai(row, find, shown)
    elif row.get("conversations") is not None:
        pictures = _pictures(row, find) if shown is None else list(shown)
        messages = _llava(row["conversations"])
    elif row.get("texts") is not None:
        pictures = _pictures(row, find) if shown is None else list(shown)
        messages = _texts(row["texts"], len(pictures))
    else:
        pictures = _pictures(row, find) if shown is None else list(shown)
        messages = _caption(row, len(pictures), caption_prompt)
    num_slots = sum(message.num_images for message in messages)
    if num_slots != len(pictures):
        raise InputError(f"{num_slots} <image> marks for {len(pictures)} pictures")
    _check_turns(messages)
    name = row.get("id")
    return Conversation(
        messages=tuple(messages),
        pictures=tuple(pictures),
        id=str(name) if isinstance(name, str | int) else None,
        unread=tuple(key for key in _TOOLS if row.get(key) not in _NO_TOOLS),
    )


def _pictures(
    row: Mapping[str, Any], find: Callable[[Any], Picture], keys: Sequence[str] = PICTURE_KEYS
) -> list[Picture]:
    """The pictures of a row: none, one or a list."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return []
    value = row[key]
    if not isinstance(value, str | bytes | Mapping | list):
        raise InputError(f"`{key}` must be a name or a list of names, got {value!r:.80}")
    return [find(item) for item in (value if isinstance(value, list) else [value])]


def _llava(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise InputError(f"expected an object with a list `conversations`, got {turns!r:.80}")
    messages = []
    for turn in turns:
        role = _LLAVA_ROLES.get(str(turn.get("from"))) if isinstance(turn, Mapping) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise InputError(f"each turn needs `from` (human or gpt) and a text `value`, got {turn!r:.80}")
        content = split_marks(turn["value"]) if role == "user" else (turn["value"],)
        messages.append(Message(role=role, content=content))  # type: ignore[arg-type]
    return messages


def _openai(
    row: Mapping[str, Any], find: Callable[[Any], Picture], shown: Sequence[Picture] | None
) -> tuple[list[Message], list[Picture]]:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"`messages` must be a list of messages, got {turns!r:.80}")
    beside = list(shown) if shown is not None else _pictures(row, find, PICTURE_KEYS[:2])
    waiting = iter(beside)
    messages: list[Message] = []
    pictures: list[Picture] = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise InputError(f"each message needs a `role` and a `content`, got {turn!r:.80}")
        if turn.get("weight") not in (None, 1):
            raise InputError(f"a `weight` of {turn['weight']!r:.20} is not read, every answer is learned; leave it out")
        if (call := next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)) is not None:
            raise InputError(f"`{call}` is not read, and the answer would be learned without it; leave the row out")
        content, found = _parts(turn.get("content"), find, waiting)
        pictures += found
        messages.append(Message(role=turn["role"], content=content))
    if left := sum(1 for _ in waiting):
        raise InputError(f"{left} of {len(beside)} pictures have no picture part in `messages`")
    return messages, pictures


def _parts(content: Any, find: Callable[[Any], Picture], waiting: Any) -> tuple[tuple[Part, ...], list[Picture]]:
    """The content of one message; a picture is followed by a newline, as everywhere in FastVLM's prompt."""
    if isinstance(content, str):
        return (content,), []
    if not isinstance(content, list):
        raise InputError(f"`content` must be a text or a list of parts, got {content!r:.80}")
    parts: list[Part] = []
    pictures: list[Picture] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind in ("image_url", "input_image", "image"):
            value = next(
                (part[key] for key in ("image_url", "image", "path", "url") if part.get(key) is not None), None
            )
            if isinstance(value, Mapping) and "url" in value:
                value = value["url"]
            picture = find(value) if value is not None else next(waiting, None)
            if picture is None:
                raise InputError("there are more picture parts than pictures in `images`")
            pictures.append(picture)
            parts += [IMAGE, "\n"]
        else:
            raise InputError(f"a part must be a text, an image_url or an image, got {part!r:.80}")
    return tuple(parts), pictures


def _texts(turns: Any, num_pictures: int) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise InputError(f"`texts` must be a list of questions and answers, got {turns!r:.80}")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("user", "assistant")):
            raise InputError(f"each of `texts` needs a text `user` and a text `assistant`, got {turn!r:.80}")
        messages += [user(turn["user"], 0 if index else num_pictures), assistant(turn["assistant"])]
    return messages


def _caption(row: Mapping[str, Any], num_pictures: int, prompt: str) -> list[Message]:
    if row.get("question") is not None or row.get("answer") is not None:
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise InputError(f"`question` and `answer` must be texts, got {question!r:.40} and {answer!r:.40}")
        return [user(question, num_pictures), assistant(answer)]
    key = next((key for key in CAPTION_KEYS if row.get(key) is not None), None)
    if key is None or not num_pictures:
        raise InputError(
            "expected an object with `conversations`, `messages`, `texts`, or a picture and its `caption`; "
            f"it has {', '.join(sorted(map(str, row))) or 'nothing':.80}"
        )
    if not isinstance(row[key], str):
        raise InputError(f"`{key}` must be a text, got {row[key]!r:.80}")
    return [user(prompt, num_pictures), assistant(row[key])]


def _check_turns(messages: Sequence[Message]) -> None:
    """Question and answer take turns behind an optional system message, and every turn says something.

    A question may come last, as in files that were cut into pieces; nothing is learned of it.
    """
    turns = messages[1:] if messages[0].role == "system" else messages
    roles = [message.role for message in turns]
    expected = [("user", "assistant")[i % 2] for i in range(max(2, len(roles)))]
    if roles != expected:
        raise InputError(f"turns must be user, assistant, and so on, with an answer; got {', '.join(roles):.80}")
    for index, message in enumerate(turns):
        if message.role == "assistant" and not message.text.strip():
            raise InputError(f"turn {index + 1} is an empty answer; there is nothing to learn")
        if message.role == "user" and not message.num_images and not message.text.strip():
            raise InputError(f"turn {index + 1} is an empty question")


def _data_uri(value: str) -> bytes:
    head, comma, body = value.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError(f"a data: picture must be base64, got {head[:40]!r}")
    _check_length(len(body) * 3 // 4, "the data: picture")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("a data: picture is not base64") from error


def _check_length(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_PICTURE_BYTES:
        raise InputError(f"{name} has {num_bytes:,} bytes, more than {MAX_PICTURE_BYTES:,}")


def _read_regular(path: Path, name: str) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:  # without waiting for a pipe that nobody writes to
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{name}: not a regular file, expected a picture")
            _check_length(status.st_size, name)
            return file.read(MAX_PICTURE_BYTES)
    except OSError as error:
        raise InputError(f"{name}: {(error.strerror or str(error)).lower()}") from error
