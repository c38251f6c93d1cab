"""The two wide layers of a ConvFFN and the skip around them, in one call of the library of `fastvlm.native`.

Letters: `P` images, `h, w` feature grid, `C` channels.
"""

import ctypes
from typing import Protocol

import torch
from torch import Tensor, nn

from fastvlm.model.compiled import openmp
from fastvlm.model.gelu import fit


class _Layer(Protocol):
    def described(self) -> ctypes.Structure:
        """Where it lies now."""


class WideFFN(nn.Module):
    """What `byte_ffn` and `tile_ffn` have in common: how a kernel is called, and what a map must be for it."""

    def __init__(self, fc1: _Layer, fc2: _Layer, library: ctypes.CDLL, *, kernel: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1, self.fc2, self._kernel, self._dtype = fc1, fc2, kernel, dtype
        self._library, self._gelu, self._parallel = library, fit(), openmp()

    def add_to(self, skip: Tensor, x: Tensor) -> Tensor:
        """Add what becomes of `x` to `skip`, both `(P, C, h, w)`, the channels last in memory; return it."""
        given, total = x.permute(0, 2, 3, 1).contiguous(), skip.permute(0, 2, 3, 1).contiguous()
        assert given.dtype == total.dtype == self._dtype
        getattr(self._library, self._kernel)(
            self._parallel,
            ctypes.c_int32(torch.get_num_threads()),
            ctypes.byref(self.fc1.described()),
            ctypes.byref(self.fc2.described()),
            ctypes.byref(self._gelu),
            ctypes.c_void_p(given.data_ptr()),
            ctypes.c_void_p(total.data_ptr()),
            ctypes.c_int64(given.shape[:3].numel()),
        )
        return total.permute(0, 3, 1, 2)
