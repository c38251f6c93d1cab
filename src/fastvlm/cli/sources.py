"""What `--image` names: a file, an address, or standard input."""

import os
import re
import sys

from fastvlm.errors import InputError
from fastvlm.fetch import read_url, without_secrets
from fastvlm.image import WEB_FORMATS, read
from fastvlm.options import ImageOptions
from fastvlm.predict import ImageSource

STDIN = "-"
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def read_image(source: str, options: ImageOptions) -> ImageSource:
    """Read what is not a file at once, and see that a file is there, before a model is loaded.

    Raises:
        InputError: There is no such file, or what came is no picture.
        DownloadError: The address cannot be fetched.
    """
    if source == STDIN:
        content, name, formats = _standard_input(), "standard input", None
    elif _ADDRESS.match(source):
        content, name, formats = read_url(source), without_secrets(source), WEB_FORMATS
    else:
        if not _exists(source):
            raise InputError(
                f"{source}: no such file" if source.isprintable() and source else f"{source!r}: no such file"
            )
        return source
    return read(
        content,
        max_pixels=options.max_pixels,
        exif=options.exif,
        alpha=options.alpha,
        name=name,
        **({} if formats is None else {"formats": formats}),
    )


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:
        return False


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise InputError("standard input is closed; expected a picture")
    if sys.stdin.isatty():
        raise InputError("standard input is a terminal; pipe a picture into it, as in: cat cat.jpg | fastvlm ...")
    limit = 1 << 29
    content = sys.stdin.buffer.read(limit + 1)
    if not content:
        raise InputError("standard input is empty; expected a picture")
    if len(content) > limit:
        raise InputError(f"standard input has more than {limit} bytes; expected a picture")
    return content
