"""Messages to token ids and token ids to text: ChatML as FastVLM was trained on it (Apple calls it `qwen_2`).

Text is encoded piece by piece between the control tokens, which are put in by id, so nothing that a user types can
become a control token or the place of a picture. Knows no model and no picture, only how many placeholders one needs.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from fastvlm.errors import CheckpointError, InputError

IGNORE: Final = -100  # label of a position that is not learned; PyTorch's cross entropy skips it by default

IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"
END_OF_TEXT: Final = "<|endoftext|>"
IMAGE_MARK: Final = "<image>"
DEFAULT_SYSTEM: Final = "You are a helpful assistant."

# How Qwen2 cuts text into the words within which byte pairs are merged.
QWEN2_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_FILE_BYTES: Final = 64 * 2**20  # Qwen2's tokenizer.json has 7 MB
MAX_TEXT_CHARS: Final = 1_000_000  # more than any context holds; the pattern gives up at ten million spaces

_T = TypeVar("_T")
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ImageSlot:
    """The place of one picture in a message."""


IMAGE: Final = ImageSlot()
Part = str | ImageSlot


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one side says: text and pictures, in reading order."""

    role: Role
    content: tuple[Part, ...]

    def __post_init__(self) -> None:
        """Refuse what the template has no place for."""
        if self.role not in ("system", "user", "assistant"):
            raise InputError(f"a message has the role {self.role!r}; expected system, user or assistant")
        if strange := [type(part).__name__ for part in self.content if not isinstance(part, Part)]:
            raise InputError(f"a message of the {self.role} holds {strange[0]}; expected text (str)")
        if self.role != "user" and self.num_images:
            raise InputError(f"a message of the {self.role} holds a picture; only the user's may")

    @property
    def num_images(self) -> int:
        """How many pictures the message shows."""
        return sum(isinstance(part, ImageSlot) for part in self.content)

    @property
    def text(self) -> str:
        """The words alone."""
        return "".join(part for part in self.content if isinstance(part, str))


def system(text: str) -> Message:
    """Tell the model how to behave; goes first and replaces the default."""
    return Message(role="system", content=(text,))


def user(text: str, num_images: int = 0) -> Message:
    r"""Ask about `num_images` pictures, which come before the text, each followed by "\n"."""
    return Message(role="user", content=(*(IMAGE, "\n") * num_images, text))


def assistant(text: str) -> Message:
    """An answer that was given, or is to be learned."""
    return Message(role="assistant", content=(text,))


def split_marks(text: str) -> tuple[Part, ...]:
    """Read text in LLaVA's form, where `<image>` marks a picture; for training files, never for what a user types."""
    first, *others = text.split(IMAGE_MARK)
    parts = [first, *(part for other in others for part in (IMAGE, other))]
    return tuple(part for part in parts if part != "")


@dataclass(frozen=True)
class _Control:
    """A control token of the template, which typed text cannot produce."""

    text: str


_Piece = str | ImageSlot | _Control
_START, _END = _Control(IM_START), _Control(IM_END)


def _turns(messages: Sequence[Message]) -> list[Message]:
    """The messages with the default system prompt in front, unless they bring their own."""
    if not messages:
        raise InputError("there are no messages; give at least one from the user")
    if any(message.role == "system" for message in messages[1:]):
        raise InputError("a system message comes after the first message; put it first")
    has_system = messages[0].role == "system"
    return [*messages] if has_system else [system(DEFAULT_SYSTEM), *messages]


def _pieces(message: Message) -> Iterator[_Piece]:
    """One turn, with neighbouring texts joined: they are encoded as one, as Apple does."""
    yield _START
    text = f"{message.role}\n"
    for part in message.content:
        if isinstance(part, ImageSlot):
            if text:
                yield text
            yield part
            text = ""
        else:
            text += part
    if text:
        yield text
    yield _END
    yield "\n"


def _generation_pieces() -> Iterator[_Piece]:
    yield _START
    yield "assistant\n"


def render(messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """Write the messages as one ChatML text with `<image>` marks; for people, the model reads `tokenize`."""
    pieces: list[_Piece] = [piece for message in _turns(messages) for piece in _pieces(message)]
    if add_generation_prompt:
        pieces += _generation_pieces()
    return "".join(piece if isinstance(piece, str) else getattr(piece, "text", IMAGE_MARK) for piece in pieces)


def chat_template() -> str:
    """The same prompt as a Jinja template, for `LlavaProcessor.apply_chat_template` of transformers."""
    return _CHAT_TEMPLATE.replace("@SYSTEM@", DEFAULT_SYSTEM)


_CHAT_TEMPLATE = """\
{%- macro say(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
    {%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
  {{- '<|im_start|>system\\n@SYSTEM@<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {{- say(message['content']) -}}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class Tokenizer:
    """Byte-level BPE in Qwen2's format: text to ids, ids to bytes.

    Attributes:
        image_id: The placeholder of a picture: the id of `<image>`, or the first id past the tokenizer.
        im_start_id: The id of `<|im_start|>`.
        im_end_id: The id of `<|im_end|>`.
        end_of_text_id: The id of `<|endoftext|>`.
        stop_ids: The two ids that end an answer, always.
        vocab_size: Ids that may be chosen lie below this one; `never_chosen` names the exceptions.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, origin: str = "the tokenizer") -> None:
        """Wrap a tokenizer of the `tokenizers` library; `origin` names it in errors."""
        self._backend = backend
        self.origin = origin
        if not isinstance(backend.model, models.BPE):
            raise CheckpointError(f"{origin} is a {type(backend.model).__name__}; expected byte-level BPE as Qwen2's")
        backend.no_padding()
        backend.no_truncation()
        if backend.model.dropout is not None:
            backend.model.dropout = None  # a training aid, which would make encoding random

        vocab = backend.get_vocab(with_added_tokens=True)
        missing = [name for name in (IM_START, IM_END, END_OF_TEXT) if name not in vocab]
        if missing:
            raise CheckpointError(f"{origin} does not know {', '.join(missing)}; expected a Qwen2 chat tokenizer")
        if len(set(vocab.values())) != len(vocab):
            raise CheckpointError(f"{origin} gives one id to several tokens; expected ids without gaps")
        num_bytes = sum(char in vocab for char in _BYTE_OF_CHAR)
        if num_bytes != 256:
            raise CheckpointError(f"{origin} knows {num_bytes} of the 256 bytes; expected byte-level BPE as Qwen2's")
        self.im_start_id = vocab[IM_START]
        self.im_end_id = vocab[IM_END]
        self.end_of_text_id = vocab[END_OF_TEXT]
        self.stop_ids = (self.im_end_id, self.end_of_text_id)
        self.image_id = vocab.get(IMAGE_MARK, max(vocab.values()) + 1)
        self._known_ids = frozenset(vocab.values()) - {self.image_id}
        self.vocab_size = max(self._known_ids) + 1
        self._never_chosen: dict[int, bytes] = {}
        self._forbid_typed_controls(vocab)

    def _forbid_typed_controls(self, vocab: Mapping[str, int]) -> None:
        """Let added tokens that are special pass as plain text, and check that they do."""
        controls = [name for name in (IM_START, IM_END, END_OF_TEXT, IMAGE_MARK) if name in vocab]
        # A token that is marked special a second time keeps its id.
        self._backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in controls])
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = {id_ for id_, token in added.items() if token.special} | {vocab[name] for name in controls}
        self._added_bytes = {id_: str(token.content).encode() for id_, token in added.items()}
        for name in controls:
            if vocab[name] in self.encode_text(name):
                raise CheckpointError(f"{self.origin} builds {name} out of plain text; expected an added special token")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back from a pickle, which forgets that control tokens are not parsed."""
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `tokenizer.json`, or `vocab.json` and `merges.txt`, of a checkpoint folder."""
        path = folder / "tokenizer.json"
        if path.is_file():
            return cls.from_json(_read_text(path), origin=str(path))
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return cls(_from_vocab_and_merges(folder), origin=str(folder / "vocab.json"))
        raise CheckpointError(f"{folder} has no tokenizer; expected tokenizer.json, or vocab.json and merges.txt")

    @classmethod
    def from_json(cls, text: str, *, origin: str = "tokenizer.json") -> Self:
        """Take the content of a `tokenizer.json`."""
        content = _parse_json(text, origin)
        for pattern in _patterns(content.get("normalizer"), content.get("pre_tokenizer")):
            # Another pattern means other ids, and a hostile one takes hours; so only the known one is compiled.
            if pattern != QWEN2_PATTERN:
                raise CheckpointError(f"{origin} splits words by {str(pattern)[:40]!r}; expected the pattern of Qwen2")
        backend = _guarded(lambda: tokenizers.Tokenizer.from_str(text), origin)
        for token in content.get("added_tokens") or []:
            _check_id(backend, token["content"], token["id"], origin)
        return cls(backend, origin=origin)

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json`, as it was read."""
        return self._backend.to_str()

    def encode_text(self, text: str) -> list[int]:
        """Turn typed text into ids; `<|im_end|>`, `<image>` and the like are letters here, never control tokens."""
        if len(text) > MAX_TEXT_CHARS:
            raise InputError(f"the text has {len(text):,} characters; at most {MAX_TEXT_CHARS:,} are read")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text has half a character (a lone surrogate) at position {error.start}") from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def id_to_bytes(self, token_id: int) -> bytes:
        """What a token writes; nothing for special tokens and for ids that the tokenizer does not know."""
        if token_id in self._special_ids or token_id not in self._known_ids:
            return b""
        if token_id in self._added_bytes:
            return self._added_bytes[token_id]
        token = self._backend.id_to_token(token_id) or ""
        return b"".join(_BYTE_OF_CHAR.get(char, char.encode()) for char in token)

    def detokenize(self, token_ids: Iterable[int]) -> str:
        """The whole text of the ids; what is not UTF-8 becomes U+FFFD."""
        return b"".join(map(self.id_to_bytes, token_ids)).decode(errors="replace")

    def never_chosen(self, num_rows: int) -> list[int]:
        """The ids below `num_rows` (rows of the embedding table) that no answer may hold: `<image>` and unused ones."""
        return [id_ for id_, is_never in enumerate(self.never_chosen_mask(num_rows)) if is_never]

    def never_chosen_mask(self, num_rows: int) -> bytes:
        """`never_chosen` as a byte for each id, 1 or 0; worked out once, for it takes longer than a token does."""
        if num_rows not in self._never_chosen:
            self._never_chosen[num_rows] = bytes(id_ not in self._known_ids for id_ in range(num_rows))
        return self._never_chosen[num_rows]

    def write(self, folder: Path, *, with_image: bool = True, with_vocab: bool = False, max_length: int = 8192) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` so that transformers reads a `Qwen2Tokenizer`.

        Args:
            folder: Where to; it must exist.
            with_image: Give `<image>` an id of its own, `image_id`, as transformers' `fast_vlm` needs.
            with_vocab: Also write `vocab.json` and `merges.txt`, as Apple's folders have.
            max_length: What `model_max_length` says.
        """
        content = json.loads(self._backend.to_str())
        if not with_image and self.image_id >= self.vocab_size:  # in the middle it stays: others would move up
            content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != IMAGE_MARK]
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        if with_image:
            backend.add_special_tokens([AddedToken(IMAGE_MARK, normalized=False, special=True)])
            _check_id(backend, IMAGE_MARK, self.image_id, self.origin)
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        config = json.dumps(_tokenizer_config(backend, max_length), indent=1, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
        if with_vocab:
            backend.model.save(str(folder))


def _tokenizer_config(backend: tokenizers.Tokenizer, max_length: int) -> dict[str, Any]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = sorted(backend.get_added_tokens_decoder().items())
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(id_): {flag: getattr(token, flag) for flag in flags} for id_, token in added},
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def qwen2_backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Build Qwen2's pipeline (NFC, its pattern, byte-level BPE) around a vocabulary; it has no control tokens yet."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_chars() -> dict[str, bytes]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table), in the order of their ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTE_OF_CHAR: Final = byte_chars()


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_FILE_BYTES // 2**20} MiB; a tokenizer has less than 20")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _parse_json(text: str, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} holds a {type(content).__name__}; expected a JSON object")
    return content


def _patterns(*nodes: Any) -> Iterator[Any]:
    """Every regular expression inside parts of a tokenizer.json."""
    for node in nodes:
        if isinstance(node, dict):
            yield from (value for key, value in node.items() if key == "Regex")
            yield from _patterns(*node.values())
        elif isinstance(node, list):
            yield from _patterns(*node)


def _from_vocab_and_merges(folder: Path) -> tokenizers.Tokenizer:
    vocab_path, config_path = folder / "vocab.json", folder / "tokenizer_config.json"
    vocab = _parse_json(_read_text(vocab_path), str(vocab_path))
    lines = [
        line for line in _read_text(folder / "merges.txt").splitlines() if line and not line.startswith("#version")
    ]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    backend = _guarded(lambda: qwen2_backend(vocab, merges), str(vocab_path))
    config = _parse_json(_read_text(config_path), str(config_path)) if config_path.is_file() else {}
    added = config.get("added_tokens_decoder") or dict(enumerate((END_OF_TEXT, IM_START, IM_END), start=len(vocab)))
    for id_, token in _guarded(lambda: sorted((int(key), value) for key, value in added.items()), str(config_path)):
        name = token.get("content") if isinstance(token, dict) else token
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{config_path} adds a token without a content under the id {id_}")
        is_special = not isinstance(token, dict) or bool(token.get("special"))
        backend.add_tokens([AddedToken(name, normalized=False, special=is_special)])
        _check_id(backend, name, id_, str(config_path))
    return backend


def _check_id(backend: tokenizers.Tokenizer, name: str, token_id: int, origin: str) -> None:
    """The library numbers added tokens itself, whatever a file says; a difference would go unnoticed."""
    if backend.token_to_id(name) != token_id:
        raise CheckpointError(f"{origin} gives {name!r} the id {token_id}; the vocabulary before it ends elsewhere")


def _guarded(make: Callable[[], _T], origin: str) -> _T:
    """Run what the library may refuse; its errors come as bare `Exception`, its panics even as `BaseException`."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001
        raise CheckpointError(f"{origin} cannot be used as a tokenizer: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True)
class Tokens:
    """A prompt as the model reads it, with what it is to learn.

    Attributes:
        token_ids: Ids, placeholders in place, `(T,)`.
        labels: The ids that are learned, `IGNORE` elsewhere, `(T,)`; not shifted.
    """

    token_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        """How many positions of the context it takes."""
        return len(self.token_ids)


def tokenize(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    num_image_tokens: int | Sequence[int],
    *,
    add_generation_prompt: bool = True,
) -> Tokens:
    r"""Turn messages into token ids, with `image_id` repeated for each picture.

    Learned are each answer, the `<|im_end|>` and the "\n" after it: Apple's `preprocess_qwen_2`.

    Args:
        messages: The conversation; the default system prompt is put in front unless it brings one.
        tokenizer: The model's tokenizer.
        num_image_tokens: N, the same for all pictures or one number a picture, in reading order.
        add_generation_prompt: End with the head of the answer that is to come; off in training.

    Raises:
        InputError: A list of `num_image_tokens` does not fit the pictures of the messages.
    """
    turns = _turns(messages)
    counts = _image_counts(turns, num_image_tokens)
    writer = _Writer(tokenizer, iter(counts))
    for message in turns:
        writer.add(_pieces(message), is_learned=message.role == "assistant")
    if add_generation_prompt:
        writer.add(_generation_pieces(), is_learned=False)
    return Tokens(writer.token_ids, writer.labels)


def tokenize_follow_up(message: Message, tokenizer: Tokenizer, num_image_tokens: int | Sequence[int]) -> Tokens:
    r"""What follows the `<|im_end|>` of an answer when the user goes on: "\n", the turn, the next answer's head.

    A chat that keeps its cache appends this instead of reading the whole conversation again.
    """
    writer = _Writer(tokenizer, iter(_image_counts([message], num_image_tokens)))
    writer.add(iter(["\n"]), is_learned=False)
    writer.add(_pieces(message), is_learned=False)
    writer.add(_generation_pieces(), is_learned=False)
    return Tokens(writer.token_ids, writer.labels)


def _image_counts(messages: Sequence[Message], num_image_tokens: int | Sequence[int]) -> Sequence[int]:
    num_images = sum(message.num_images for message in messages)
    if isinstance(num_image_tokens, int):
        return [num_image_tokens] * num_images
    if len(num_image_tokens) != num_images:
        raise InputError(f"the messages show {num_images} pictures, {len(num_image_tokens)} were given")
    return num_image_tokens


class _Writer:
    """Collects ids and labels, turn by turn."""

    def __init__(self, tokenizer: Tokenizer, counts: Iterator[int]) -> None:
        self.tokenizer = tokenizer
        self.counts = counts
        self.token_ids: list[int] = []
        self.labels: list[int] = []

    def add(self, pieces: Iterator[_Piece], *, is_learned: bool) -> None:
        """Append a turn; of a learned one everything after its head, `<|im_start|>assistant` and the newline."""
        ids = [id_ for piece in pieces for id_ in self._encode(piece)]
        # The head is counted, not cut off: an answer that begins with a newline may share a token with it.
        num_head = 1 + len(self.tokenizer.encode_text("assistant\n")) if is_learned else len(ids)
        self.token_ids += ids
        self.labels += [IGNORE] * num_head + ids[num_head:]

    def _encode(self, piece: _Piece) -> list[int]:
        if isinstance(piece, ImageSlot):
            return [self.tokenizer.image_id] * next(self.counts)
        if isinstance(piece, _Control):
            return [self.tokenizer.im_start_id if piece == _START else self.tokenizer.im_end_id]
        return self.tokenizer.encode_text(piece)


class Detokenizer:
    """Token ids to text as they come, whole characters only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin an answer."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one token; return the characters that are complete with it, perhaps none."""
        return self._decoder.decode(self._tokenizer.id_to_bytes(token_id))

    def flush(self) -> str:
        """End the answer; return what was held back (U+FFFD for a character that never became whole)."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts an answer before the first stop string, and holds back text that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for `stops`; none is allowed."""
        if "" in stops:
            raise InputError("a stop string is empty; give at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self._is_stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text; return what may be shown, and whether a stop string came."""
        if self._is_stopped:
            return "", True
        self._held += text
        # The stop string that is complete first wins, however the text is cut into pieces.
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            shown = self._held[: min(found)[1]]
            self._held, self._is_stopped = "", True
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """End the answer; return the text that was held back in vain."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
