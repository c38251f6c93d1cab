"""CUDA graphs: kernels that are recorded once and then started together.

A small model's kernels take less time than the processor needs to start them one by one. A graph reads and writes the
same memory each time, so its input is copied in and its result copied out.
"""

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from fastvlm.errors import DeviceError

_WARM_UPS: Final = 2
"""Runs before recording, in which libraries choose and load their kernels."""


@dataclass(frozen=True)
class Captured:
    """A recorded function of one tensor."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    result: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the function of a tensor of the same shape."""
        self.given.copy_(x)
        self.graph.replay()
        return self.result.clone()

    def at_least(self, x: Tensor, length: int) -> Tensor:
        """Compute the function of a shorter tensor `(B, T, D)`: the rest of what it was made for is padding."""
        self.given[:, :length].copy_(x)
        self.graph.replay()
        return self.result[:, :length].clone()


class Pool:
    """Memory that several graphs share: no result of theirs is kept where it was computed."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        """What PyTorch calls it by."""
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        return self._handle


def capture(function: Callable[[Tensor], Tensor], like: Tensor, pool: Pool | None = None) -> Captured:
    """Record a function of a tensor such as `like`, in memory of its own or in a pool.

    What the function writes elsewhere it writes while it is recorded, too.
    """
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        return _record(function, like.clone(), pool)


def _record(function: Callable[[Tensor], Tensor], given: Tensor, pool: Pool | None) -> Captured:
    stream = torch.cuda.Stream(given.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(given.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function(given)
    torch.cuda.current_stream(given.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=None if pool is None else pool.handle, stream=stream):
        result = function(given)
    return Captured(graph, given, result)


def kernels() -> ModuleType:
    """Triton's kernels.

    Raises:
        DeviceError: Triton or a C compiler, which it needs, is not here.
    """
    if importlib.util.find_spec("triton") is None:
        raise DeviceError("--compile on a GPU needs Triton, which comes with PyTorch's CUDA builds; leave it out")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        raise DeviceError("--compile on a GPU needs a C compiler (cc, gcc or clang); install one, or leave it out")
    return importlib.import_module("fastvlm.model.gpu_kernels")  # only here: it needs Triton
