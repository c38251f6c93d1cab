"""A ConvFFN of the encoder whose wide layers go through the tiles of AMX, by the library of `fastvlm.native`.

The hidden layer, four times as wide as the map, is never written to memory. Sums, bias, GELU and skip are float32, the
layers' inputs bfloat16.

Letters: `P` images, `h, w` feature grid, `C` channels, `N` outputs and `K` inputs of a layer.
"""

import ctypes

import torch
from torch import Tensor, nn

from fastvlm.model.tiles import tiles_of
from fastvlm.model.wide_ffn import WideFFN


class _Layer(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    ]


class TileFFN(WideFFN):
    """The two wide layers of a ConvFFN and the skip around them; maps are bfloat16."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module, library: ctypes.CDLL) -> None:
        """Lay out the weights as the kernel reads them; see `tiles.can_tile`."""
        super().__init__(_TileLayer(fc1), _TileLayer(fc2), library, kernel="fastvlm_tile_ffn", dtype=torch.bfloat16)


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
