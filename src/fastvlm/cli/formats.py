"""`fastvlm export FORMAT --help`: what that format can do, and its options alone."""

import re
import textwrap
from collections.abc import Sequence

from fastvlm.cli.flags import WIDTH
from fastvlm.options import EXPORT_FORMATS, ExportFormat


def narrow(text: str, args: Sequence[str]) -> str:
    """Put what the formats can do before the help of `export`; of the one that is named among the arguments, more."""
    name = next((arg for arg in args if arg in EXPORT_FORMATS), None)
    usage, _, rest = text.partition("\n\n")
    if name is None:
        rows = "".join(_row(each, kind.reader) for each, kind in EXPORT_FORMATS.items())
        return f"{usage}\n\nformats (`fastvlm export FORMAT --help` says more of one):\n{rows}\n{rest}"
    kind = EXPORT_FORMATS[name]
    for option in kind.refuses:
        flag = f"--{option.replace('_', '-')}"
        rest = re.sub(rf"^  {flag}\b.*\n(?:   .*\n)*", "", rest, flags=re.MULTILINE)
    rest = re.sub(r"(--precision )\{[^}]*\}", rf"\1{{{','.join(kind.precisions)}}}", rest)
    return f"usage: fastvlm export {name} [-h] [OPTIONS]\n\n{_about(name, kind)}\n{rest}"


def _about(name: str, kind: ExportFormat) -> str:
    first, *others = kind.precisions
    count = "any number in one folder" if kind.holds_several else "one a folder"
    rows = {
        "read by": kind.reader,
        "precisions": f"{', '.join([f'{first} (default)', *others])}; {count}",
        "needs": f"pip install 'fastvlm[{kind.extra}]'" if kind.extra else "nothing more",
    }
    if "batch" not in kind.refuses:
        rows["pictures"] = "one at a time unless --batch dynamic" if kind.is_fixed else "any number unless --batch 1"
    reasons: dict[str, list[str]] = {}
    for option, reason in kind.refuses.items():
        reasons.setdefault(reason, []).append(f"--{option.replace('_', '-')}")
    refused = [f"{', '.join(options)}: {reason}" for reason, options in reasons.items()]
    lines = [_row(word, said) for word, said in rows.items()] + [_row("refuses", said) for said in refused]
    return f"{name}:\n{''.join(lines)}"


def _row(word: str, said: str) -> str:
    return textwrap.fill(f"  {word:<12} {said}", WIDTH, subsequent_indent=" " * 15, break_on_hyphens=False) + "\n"
