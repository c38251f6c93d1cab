"""A depthwise convolution of the folded encoder by the library of `fastvlm.native`, on a CPU with AVX-512.

Sums, bias and GELU are float32; maps are float32 or bfloat16, the channels last in memory.

Letters: `P` images, `h, w` feature grid, `C` channels, `k` width of the kernel.
"""

import ctypes
from collections.abc import Callable
from ctypes import Structure
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.model.compiled import openmp
from fastvlm.model.gelu import fit

_LANES: Final = 16  # channels of a vector, as in native/depthwise.h
_KERNELS: Final = (3, 7)
_STRIDES: Final = (1, 2)
_DTYPES: Final = (torch.float32, torch.bfloat16)


class _Convolution(Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("channels", "kernel", "stride", "times", "has_gelu")),
    ]


class _Maps(Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("given", "made")),
        *((name, ctypes.c_int64) for name in ("is_half", "num_images", "height", "width")),
    ]


def can_convolve(conv: nn.Module) -> bool:
    """Whether the kernel takes this convolution, once it is known that the processor has AVX-512."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.groups == conv.in_channels
        and conv.kernel_size in [(k, k) for k in _KERNELS]
        and conv.stride in [(stride, stride) for stride in _STRIDES]
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.weight.dtype in _DTYPES
        and conv.bias is not None
    )


class DepthwiseConv(nn.Module):
    """A depthwise convolution, perhaps with GELU, that makes one or several outputs of each input.

    The first outputs of all inputs come first, then the second ones.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Module, library: ctypes.CDLL, *, has_gelu: bool = False) -> None:
        """Lay out the weights as the kernel reads them; see `can_convolve`."""
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        self.dim, self.kernel, self.stride = conv.in_channels, conv.kernel_size[0], conv.stride[0]
        self.times, self.has_gelu = conv.out_channels // conv.groups, has_gelu
        weight = conv.weight.detach().float().reshape(self.dim, self.times, self.kernel**2)
        bias = conv.bias.detach().float().reshape(self.dim, self.times, 1)
        self.register_buffer("weight", in_vectors(weight), persistent=False)
        self.register_buffer("bias", in_vectors(bias), persistent=False)
        self._library, self._gelu, self._parallel = library, fit(), openmp()

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, times * C, h', w')`."""
        given = x.permute(0, 2, 3, 1).contiguous()
        return self.call(self._library.fastvlm_depthwise, given, *given.shape[1:3])

    def call(self, kernel: Callable[..., None], given: Tensor, height: int, width: int, *more: Structure) -> Tensor:
        """Let a kernel make `(P, times * C, h', w')` of what it is given, out of a map that is so high and wide.

        `given` is `(P, ...)`; `more` describes what the kernel does before.
        """
        size = [(side - 1) // self.stride + 1 for side in (height, width)]
        made = given.new_empty(len(given), *size, self.times * self.dim)
        described = _Convolution(
            self.weight.data_ptr(), self.bias.data_ptr(), self.dim, self.kernel, self.stride, self.times, self.has_gelu
        )
        maps = _Maps(given.data_ptr(), made.data_ptr(), given.dtype == torch.bfloat16, len(given), height, width)
        structures = map(ctypes.byref, (*more, described, maps, self._gelu))
        if made.numel():
            kernel(self._parallel, ctypes.c_int32(torch.get_num_threads()), *structures)
        return made.permute(0, 3, 1, 2)


def in_vectors(values: Tensor) -> Tensor:
    """Lay out as kernels read: `(C, times, n)` to `(times, vectors, n, 16)`; what is missing to a vector is zero."""
    whole = F.pad(values.permute(1, 2, 0), (0, -len(values) % _LANES)).contiguous()
    return whole.view(*whole.shape[:2], -1, _LANES).transpose(1, 2).contiguous()
