"""How a program that is measured is talked to: a request in, an answer out, each one line of JSON.

The program loads its model once and then measures whenever it is asked, so that several take turns. It says hello with
what loading took. A request has a `do`, the name of a handler; a handler that raises answers with its `error`.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def open_channel() -> TextIO:
    """Keep standard output for answers; whatever else is printed goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return channel


def serve(channel: TextIO, hello: Mapping[str, Any], handlers: Mapping[str, Handler]) -> None:
    """Say hello; answer requests until standard input ends."""
    _say(channel, hello)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request["do"]](request)
        except Exception as error:  # noqa: BLE001  (whoever asked reports it)
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        _say(channel, answer)


def _say(channel: TextIO, value: Mapping[str, Any]) -> None:
    channel.write(json.dumps(value) + "\n")
    channel.flush()


class Laps:
    """Milliseconds between points of a run, read when the device has caught up."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        """Start the clock; `synchronize` waits for the device."""
        synchronize()
        self._synchronize = synchronize
        self._start = self._last = time.perf_counter()

    def lap(self) -> float:
        """Since the last lap, or the start."""
        self._synchronize()
        before, self._last = self._last, time.perf_counter()
        return 1000 * (self._last - before)

    def total(self) -> float:
        """Since the start, up to the last lap."""
        return 1000 * (self._last - self._start)


def peak_bytes() -> int:
    """The most memory that this process has held, by Linux's count of its own pages where that is told."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
