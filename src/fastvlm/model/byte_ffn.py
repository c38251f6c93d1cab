"""A ConvFFN of the encoder whose wide layers multiply bytes, by the library of `fastvlm.native`, on a CPU.

Weights are whole numbers from -127 to 127 with a scale an output (`quantize.Packing(8, ROW)`); activations become whole
numbers from 0 to 255 with a scale and a zero for each position, taken from its own range. Sums are exact; bias, GELU
and skip are applied in float32.

Letters: `P` images, `h, w` feature grid, `C` channels, `N` outputs and `K` inputs of a layer.
"""

import ctypes
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.model.quantize import ZERO, QuantizedConv
from fastvlm.model.wide_ffn import WideFFN

_PANEL: Final = 32  # outputs that the kernel computes together, as in native/encoder.cpp


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "sums", "bias")),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    ]


class ByteFFN(WideFFN):
    """The two wide layers of a ConvFFN and the skip around them; maps are float32."""

    def __init__(self, fc1: QuantizedConv, fc2: QuantizedConv, library: ctypes.CDLL) -> None:
        """Lay out the weights as the kernel reads them; see `QuantizedConv.is_centred`."""
        super().__init__(_ByteLayer(fc1), _ByteLayer(fc2), library, kernel="fastvlm_ffn", dtype=torch.float32)


class _ByteLayer(nn.Module):
    """What the kernel reads of a layer."""

    weight: Tensor
    scales: Tensor
    sums: Tensor
    bias: Tensor

    def __init__(self, conv: QuantizedConv) -> None:
        super().__init__()
        assert conv.bias is not None
        self.num_inputs, self.num_outputs = conv.in_channels, conv.out_channels
        more = -conv.out_channels % _PANEL
        numbers = F.pad((conv.weight.to(torch.int16) - ZERO).to(torch.int8), (0, 0, 0, more))  # (N, K)
        panels = numbers.view(-1, _PANEL, conv.in_channels // 4, 4).transpose(1, 2).contiguous()
        self.register_buffer("weight", panels, persistent=False)
        self.register_buffer("scales", F.pad(conv.scales.flatten().float(), (0, more)), persistent=False)
        self.register_buffer("sums", numbers.float().sum(1), persistent=False)
        self.register_buffer("bias", F.pad(conv.bias.detach().float(), (0, more)), persistent=False)

    def described(self) -> _Layer:
        """Where it lies now."""
        names = ("weight", "scales", "sums", "bias")
        where = {name: self.get_buffer(name).data_ptr() for name in names}
        return _Layer(**where, inputs=self.num_inputs, outputs=self.num_outputs)
