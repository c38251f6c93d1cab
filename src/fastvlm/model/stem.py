"""The first two convolutions of the folded encoder in one, by the library of `fastvlm.native`, on a CPU with AVX-512.

The map between them, which is the largest of all, is made line by line in the cache. Sums and GELU are float32, pixels
and the second's map float32 or bfloat16, the channels last in memory.

Letters: `P` images, `H, W` pixels, `h, w` feature grid, `C` channels.
"""

import ctypes
from ctypes import Structure
from typing import Final

from torch import Tensor, nn

from fastvlm.errors import InputError
from fastvlm.model.depthwise import DepthwiseConv, can_convolve, in_vectors

_COLORS: Final = 3  # as in native/stem.cpp
_SIDE: Final = (3, 3)
_STEP: Final = (2, 2)


class _First(Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("height", "width")),
    ]


def can_join(first: nn.Module, second: nn.Module) -> bool:
    """Whether the kernel takes these convolutions, once it is known that the processor has AVX-512."""
    return (
        isinstance(first, nn.Conv2d)
        and isinstance(second, nn.Conv2d)
        and (first.in_channels, first.groups, first.out_channels) == (_COLORS, 1, second.in_channels)
        and (first.kernel_size, first.stride, first.padding, first.dilation) == (_SIDE, _STEP, (1, 1), (1, 1))
        and first.padding_mode == "zeros"
        and first.weight.dtype == second.weight.dtype
        and first.bias is not None
        and can_convolve(second)
        and (second.kernel_size, second.stride) == (_SIDE, _STEP)
    )


class StemConvs(nn.Module):
    """A convolution of pixels with GELU, and a depthwise one, perhaps with GELU."""

    weight: Tensor
    bias: Tensor

    def __init__(self, first: nn.Module, second: nn.Module, library: ctypes.CDLL, *, has_gelu: bool = False) -> None:
        """Lay out the weights as the kernel reads them; see `can_join`."""
        super().__init__()
        assert isinstance(first, nn.Conv2d)
        assert first.bias is not None
        weight = first.weight.detach().float().permute(0, 2, 3, 1).flatten(1)[:, None]  # (C, 1, 27)
        self.register_buffer("weight", in_vectors(weight), persistent=False)
        self.register_buffer("bias", in_vectors(first.bias.detach().float().view(-1, 1, 1)), persistent=False)
        self.second = DepthwiseConv(second, library, has_gelu=has_gelu)
        self.dtype, self._kernel = first.weight.dtype, library.fastvlm_stem

    def forward(self, x: Tensor) -> Tensor:
        """`(P, 3, H, W)` to `(P, C, h, w)`, a quarter as high and wide.

        Raises:
            InputError: The pixels have another shape or format.
        """
        if x.ndim != 4 or x.shape[1] != _COLORS or x.dtype != self.dtype:
            raise InputError(f"pixels must be (P, 3, H, W) in {self.dtype}, got {tuple(x.shape)} in {x.dtype}")
        given = x.permute(0, 2, 3, 1).contiguous()
        _, height, width, _ = given.shape
        first = _First(self.weight.data_ptr(), self.bias.data_ptr(), height, width)
        return self.second.call(self._kernel, given, (height - 1) // 2 + 1, (width - 1) // 2 + 1, first)
