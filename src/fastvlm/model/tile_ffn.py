"""A ConvFFN of the encoder whose wide layers go through the tiles of AMX, by the library of `fastvlm.native`.

The hidden layer, four times as wide as the map, is never written to memory. Sums, bias, GELU and skip are float32, the
layers' inputs bfloat16.

Letters: `P` images, `h, w` feature grid, `C` channels, `N` outputs and `K` inputs of a layer.
"""

import ctypes

import torch
from torch import Tensor, nn

from fastvlm.model.compiled import openmp
from fastvlm.model.gelu import fit
from fastvlm.model.tiles import tiles_of


class _Layer(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    ]


class TileFFN(nn.Module):
    """The two wide layers of a ConvFFN and the skip around them."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module, library: ctypes.CDLL) -> None:
        """Lay out the weights as the kernel reads them; see `tiles.can_tile`."""
        super().__init__()
        self.fc1, self.fc2 = _TileLayer(fc1), _TileLayer(fc2)
        self._library, self._gelu, self._parallel = library, fit(), openmp()

    def add_to(self, skip: Tensor, x: Tensor) -> Tensor:
        """Add what becomes of `x` to `skip`, both `(P, C, h, w)` in bfloat16, channels last in memory; return it."""
        given, total = x.permute(0, 2, 3, 1).contiguous(), skip.permute(0, 2, 3, 1).contiguous()
        assert given.dtype == total.dtype == torch.bfloat16
        self._library.fastvlm_tile_ffn(
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


class _TileLayer(nn.Module):
    """What the kernel reads of a layer."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        self.register_buffer("weight", tiles_of(conv.weight.detach().flatten(1)), persistent=False)
        self.register_buffer("bias", conv.bias.detach().float(), persistent=False)
        self.num_inputs, self.num_outputs = conv.in_channels, conv.out_channels

    def described(self) -> _Layer:
        """Where it lies now."""
        return _Layer(self.weight.data_ptr(), self.bias.data_ptr(), self.num_inputs, self.num_outputs)
