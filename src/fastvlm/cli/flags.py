"""From a command line to an options dataclass: tyro reads the flags, errors become one line, help plain text."""

import contextlib
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from fastvlm.errors import InputError

_T = TypeVar("_T")
_CONFIG = (tyro.conf.UseAppendAction, tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
_RULE = re.compile(r" *-{4,} *")
_NO_DEFAULT = re.compile(r"\s*\(default:\s+(None|False)?\)")
_MAYBE_NONE = re.compile(r"\{None\}\|(\S+)|\{None,(\S+)")
WIDTH = 79
_WANTED = {int: "a whole number", float: "a number"}


class HelpAsked(Exception):
    """The user asked for help; the message is the text."""


def parse(kind: type[_T], args: Sequence[str], prog: str) -> _T:
    """Make options from arguments.

    Args:
        kind: The options class; its fields, and those of the dataclasses inside it, are the flags.
        args: What came behind the verb.
        prog: The verb as the user writes it.

    Raises:
        InputError: A flag is unknown, or a value cannot be used.
        HelpAsked: The arguments have `--help`.
    """
    _refuse_unknown(kind, args, prog)
    out, err = io.StringIO(), io.StringIO()  # which know no encoding, so that tyro draws its boxes in ASCII
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            options, unknown = tyro.cli(
                kind,
                prog=prog,
                args=[arg for arg in args if arg != "--"],
                config=_CONFIG,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise HelpAsked(_plain(out.getvalue())) from None
        raise InputError(f"{_message(err.getvalue(), kind, args)}; see {prog} --help") from None
    if unknown:
        raise InputError(f"unexpected argument {unknown[0]!r}; a text with spaces needs quotes; see {prog} --help")
    return _without_repeated_defaults(options)


def flags(kind: Any) -> Iterator[tuple[str, Field[Any], Any]]:
    """All spellings of all flags of an options class: spelling, field, type."""
    hints = get_type_hints(kind, include_extras=True)
    for entry in fields(kind):
        hint = hints[entry.name]
        if is_dataclass(hint):
            yield from flags(hint)
            continue
        yield f"--{entry.name.replace('_', '-')}", entry, hint
        for extra in get_args(hint)[1:]:
            for alias in getattr(extra, "aliases", None) or ():
                yield alias, entry, hint


def _without_repeated_defaults(options: _T) -> _T:
    """What is given replaces the default of a repeatable flag; tyro appends to it."""
    changes: dict[str, Any] = {}
    for entry in fields(options):  # type: ignore[arg-type]
        value = getattr(options, entry.name)
        if is_dataclass(value) and not isinstance(value, type):
            changes[entry.name] = _without_repeated_defaults(value)
        elif isinstance(value, tuple) and isinstance(entry.default, tuple) and entry.default:
            size = len(entry.default)
            if len(value) > size and value[:size] == entry.default:
                changes[entry.name] = value[size:]
    return replace(options, **changes) if changes else options  # type: ignore[type-var]


def _refuse_unknown(kind: type, args: Sequence[str], prog: str) -> None:
    """Name the closest flags before the values are looked at."""
    spellings = ["--help", *(spelling for spelling, _, _ in flags(kind))]
    for arg in args:
        name = arg.partition("=")[0]
        asked = name.replace("_", "-")
        if not name.startswith("--") or asked in ("--", *spellings) or asked.startswith("--tyro-"):
            continue
        close = get_close_matches(asked, spellings, n=3, cutoff=0.6)
        close += [spelling for spelling in spellings if len(asked) > 3 and spelling.startswith(asked)]
        hint = " or ".join(list(dict.fromkeys(close))[:3])
        hint = f"did you mean {hint}?" if hint else f"see {prog} --help"
        raise InputError(f"unknown option {name!r}; {hint}")


def _message(text: str, kind: type, args: Sequence[str]) -> str:
    """One line out of tyro's box: what stands between its title and its next rule."""
    sections: list[list[str]] = [[]]
    for row in text.splitlines():
        if _RULE.fullmatch(row):
            sections.append([])
        else:
            sections[-1] += row.split()
    line = " ".join(sections[1] if len(sections) > 1 and sections[1] else sections[0])
    if match := re.match(r"Missing value for argument '([^']*)'", line):
        return f"{_last(match[1])} needs a value"
    if match := re.match(r"Error parsing (\S+): (.*)", line):
        return _bad_value(match[1], match[2], kind, args)
    if match := re.match(r"invalid choice '(.*)' for argument '([^']*)'", line):
        return f"{_last(match[2])} must be one of {', '.join(map(str, _choices(match[2], kind)))}, got {match[1]!r}"
    if line.startswith("Missing from"):
        return f"needs {' and '.join(_missing(line, kind)) or 'more arguments'}"
    return line or "the arguments cannot be read"


def _missing(line: str, kind: type) -> list[str]:
    """The required arguments that tyro's message names."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for entry in fields(kind):
        if entry.default is not MISSING or entry.default_factory is not MISSING:
            continue
        flag = f"--{entry.name.replace('_', '-')}"
        names = [metavar for extra in get_args(hints[entry.name])[1:] if (metavar := getattr(extra, "metavar", None))]
        if re.search(rf"(^|[\s,]){flag}([\s,]|$)", line):
            found.append(flag)
        elif any(re.search(rf"\s{re.escape(name)}\s", line) for name in names):
            found.append(names[0])
    return found


def _choices(spellings: str, kind: type) -> list[str]:
    """What a flag may be, in the order in which it is written; tyro forgets it."""
    names = [name.removeprefix("--") for name in re.split(r"[/, ]+", spellings)]
    hints = [hint for spelling, _, hint in flags(kind) if spelling.removeprefix("--") in names]
    return [choice for choice in _words_of(hints[0]) if choice != "None"] if hints else ["the choices"]


def _words_of(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [word for part in get_args(hint) for word in _words_of(part)]


def _last(spellings: str) -> str:
    """Tyro names aliases first."""
    return spellings.replace(", ", "/").split("/")[-1]


def _bad_value(spellings: str, reason: str, kind: type, args: Sequence[str]) -> str:
    names = spellings.split("/")
    for spelling, _, hint in flags(kind):
        wanted = next((word for base, word in _WANTED.items() if base in _bases(hint)), None)
        if spelling in names and wanted is not None:
            return f"{spelling} must be {wanted}, got {_value_of(names, args)!r}"
    return f"{names[-1]}: {reason}"


def _bases(hint: Any) -> set[Any]:
    inner = get_args(hint)
    return {hint}.union(*(_bases(part) for part in inner if isinstance(part, type) or get_args(part)))


def _value_of(names: Sequence[str], args: Sequence[str]) -> str:
    found = ""
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name.replace("_", "-") in names:
            found = value if "=" in arg else next(iter(args[i + 1 : i + 2]), "")
    return found


def _plain(text: str) -> str:
    """Tyro's help without its boxes: for narrow, old and colourless terminals, pipes and documents alike."""
    rows: list[str] = []
    for row in text.splitlines():
        if _RULE.fullmatch(row):
            if rows and rows[-1] and not rows[-1].startswith("  "):
                rows[-1] = f"{rows[-1].strip()}:"
        elif match := re.fullmatch(r"  (--\S+ \S+), (--\S+ \S+) *", row):
            rows.append(f"  {match[2]}, {match[1]}")  # tyro names aliases first
        elif row.startswith("  "):
            rows.append(row.rstrip())
        else:
            rows += textwrap.wrap(row, WIDTH, subsequent_indent="  " * row.startswith("usage:")) or [""]
    text = re.sub(r"\(repeatable,\s+appends\s+to:", "(repeatable; default:", "\n".join(rows))
    plain = _NO_DEFAULT.sub("", _MAYBE_NONE.sub(_without_none, text))
    return re.sub(r" +\n", "\n", re.sub(r"\n{3,}", "\n\n", plain)).strip() + "\n"


def _without_none(match: re.Match[str]) -> str:
    shown = match[1] or "{" + match[2]
    is_column = match.string[match.end() :].startswith("  ")
    return shown.ljust(len(match[0])) if is_column else shown
