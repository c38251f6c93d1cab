"""What the hardware can do: the fastest matrix product of each format, the fastest reading of memory."""

import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fastvlm.device import synchronize

_SIDES: Final = {"cpu": (1024, 2048, 3072)}
_SIDES_ELSEWHERE: Final = (4096, 8192)
_READ_BYTES: Final = 2**30


def thread_counts(threads: int) -> list[int]:
    """1, 2, 4 ... up to the threads that there are."""
    counts = [1]
    while counts[-1] * 2 < threads:
        counts.append(counts[-1] * 2)
    return sorted({*counts, threads})


def measure(device: torch.device, threads: int, seconds: float) -> dict[str, Any]:
    """Look for each ceiling for about so many seconds, with `threads` threads where the device is the CPU.

    Returns:
        `float32`, `bfloat16`, `float16` (accelerators only) and `int8` in operations a second, None where the format
        cannot be multiplied; `read` in bytes a second.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        formats = ["float32", "bfloat16", *([] if device.type == "cpu" else ["float16"]), "int8"]
        found: dict[str, Any] = {name: _product(device, name, seconds) for name in formats}
        found["read"] = _read(device, seconds)
    finally:
        torch.set_num_threads(before)
    return found


def _product(device: torch.device, name: str, seconds: float) -> float | None:
    sides, best = _SIDES.get(device.type, _SIDES_ELSEWHERE), 0.0
    for side in sides:
        if name == "int8":
            left = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
            right, multiply = left.t().contiguous().t(), torch._int_mm
        else:
            left = torch.randn(side, side, device=device).to(getattr(torch, name))
            right, multiply = left, torch.mm
        try:
            shortest = _shortest(device, lambda m=multiply, a=left, b=right: m(a, b), seconds / len(sides))  # type: ignore[misc]
        except (RuntimeError, NotImplementedError):
            return None
        best = max(best, 2 * side**3 / shortest)
    return best


def _read(device: torch.device, seconds: float) -> float:
    """Read a gigabyte in several ways, of which the fastest counts."""
    numbers = torch.ones(_READ_BYTES // 4, device=device)
    table = numbers.view(-1, 4096)
    vector = torch.ones(4096, device=device)
    ways: list[Callable[[], Tensor]] = [numbers.sum, numbers.max, lambda: torch.mv(table, vector)]
    return max(_READ_BYTES / _shortest(device, way, seconds / len(ways)) for way in ways)


def _shortest(device: torch.device, work: Callable[[], Tensor], seconds: float) -> float:
    work()
    best, ends = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < ends:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
