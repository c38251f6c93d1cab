"""1 x 1 convolutions of the encoder whose weights and activations are bytes while they are multiplied, on a CPU.

Weights are whole numbers from -127 to 127 with a scale an output (`quantize.Packing(8, ROW)`); activations become whole
numbers from 0 to 255 with one scale for the positions that are given together, taken from their own range. Sums are
exact; bias, GELU and skip are applied in float32.

Letters: `N` positions, `K` inputs, `M` outputs.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

from fastvlm.device import cpu_flags
from fastvlm.model.quantize import ZERO, QuantizedConv

_VNNI: Final = {"avx512_vnni", "avx_vnni"}  # without them sums of two products are cut to 16 bits
_STEPS: Final = 254  # one less than there are: the least and the greatest value may both be rounded up
_SMALLEST_SCALE: Final = 1e-12


def can_multiply_bytes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model in that place gains from bytes: a CPU that multiplies them, and activations in float32."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and torch._C._has_mkldnn
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
        and bool(_VNNI & cpu_flags())
    )


class ByteConv(nn.Module):
    """A quantised 1 x 1 convolution, perhaps with GELU, that multiplies bytes; it overwrites what it is given."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor

    def __init__(self, conv: QuantizedConv, num_positions: int, *, has_gelu: bool = False) -> None:
        """Lay out the weights for so many positions at once; see `QuantizedConv.is_centred`."""
        super().__init__()
        assert conv.bias is not None
        numbers = (conv.weight.to(torch.int16) - ZERO).to(torch.int8)  # (M, K)
        packed = torch.ops.onednn.qlinear_prepack(numbers, [num_positions, conv.in_channels])
        self.act = "gelu" if has_gelu else "none"
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("scales", conv.scales.flatten().float(), persistent=False)
        self.register_buffer("zeros", torch.zeros(conv.out_channels, dtype=torch.int32), persistent=False)
        self.register_buffer("bias", conv.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, K)`, which is lost, to `(N, M)`."""
        x, scale, zero = _to_bytes(x)
        return torch.ops.onednn.qlinear_pointwise(
            x, scale, zero, self.weight, self.scales, self.zeros, self.bias, 1.0, 0, torch.float32, self.act, [], "none"
        )

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """Add the outputs for `x` `(N, K)`, which is lost, to `total` `(N, M)`."""
        x, scale, zero = _to_bytes(x)
        weights = self.weight, self.scales, self.zeros
        torch.ops.onednn.qlinear_pointwise.binary(
            x, scale, zero, *weights, total, self.bias, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "none"
        )


def _to_bytes(x: Tensor) -> tuple[Tensor, float, int]:
    """Numbers, scale and the number of zero: `x` is nearly (number - zero) x scale; `x` itself is lost."""
    low, high = (float(edge) for edge in torch.aminmax(x))
    if not math.isfinite(high - low):
        return torch.zeros_like(x, dtype=torch.uint8), math.nan, 0  # what is made of them is NaN, too
    scale = max((max(high, 0.0) - min(low, 0.0)) / _STEPS, _SMALLEST_SCALE)
    zero = round(-min(low, 0.0) / scale)
    half = torch.tensor(zero + 0.5)  # the fraction is cut off
    return torch.add(half, x, alpha=1 / scale, out=x).to(torch.uint8), scale, zero
