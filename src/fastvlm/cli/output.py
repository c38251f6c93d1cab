"""Standard output and standard error that survive what shells do to them: closed, cut, or unable to show an emoji."""

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from fastvlm.errors import InputError

_CONTROLS = dict.fromkeys([*(code for code in range(32) if chr(code) not in "\n\t"), *range(127, 160)], "\ufffd")
"""What an answer may not do to a terminal: move its cursor, set its title, type into it."""


class Output:
    """Where a command's results and its remarks go."""

    def __init__(self, out: TextIO | None, err: TextIO | None) -> None:
        """Take the two streams; None is one that the shell has closed."""
        self._out, self._err = out, err
        for stream in (out, err):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace" if stream is out else "backslashreplace")

    def write(self, text: str) -> None:
        """Write a piece of the result at once.

        Raises:
            BrokenPipeError: Nobody reads any more.
            InputError: The disk is full, or the like.
        """
        if self._out is None:
            return
        try:
            self._out.write(text.translate(_CONTROLS) if self._out.isatty() else text)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            self.drop()
            raise InputError(f"standard output: cannot be written ({error.strerror})") from error

    def line(self, text: str = "") -> None:
        """Write a line of the result."""
        self.write(f"{text}\n")

    def json(self, value: Any) -> None:
        """Write a result for machines, on one line."""
        self.line(json.dumps(value))

    def note(self, text: str) -> None:
        """Write a remark of one line to standard error; a closed one loses it."""
        if self._err is not None:
            with contextlib.suppress(OSError, ValueError):
                self._err.write(f"{text}\n")
                self._err.flush()

    @property
    def shows_progress(self) -> bool:
        """Whether standard error is a terminal that can move its cursor."""
        with contextlib.suppress(ValueError):
            return self._err is not None and self._err.isatty() and os.environ.get("TERM") != "dumb"
        return False

    def drop(self) -> None:
        """Let what is buffered vanish, so that the interpreter does not complain when it ends."""
        is_ours = self._out is sys.__stdout__
        if self._out is None or not is_ours:
            return
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._out.fileno())
            os.close(null)


@contextlib.contextmanager
def logging_to(output: Output, *, is_debug: bool) -> Iterator[None]:
    """Show the package's warnings as remarks while a command runs."""
    handler = _NoteHandler(output)
    handler.setFormatter(logging.Formatter("fastvlm: %(levelname)s: %(message)s"))
    logger = logging.getLogger("fastvlm")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if is_debug else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _NoteHandler(logging.Handler):
    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        self._output.note(self.format(record).replace("\n", " ").replace("WARNING", "warning"))
