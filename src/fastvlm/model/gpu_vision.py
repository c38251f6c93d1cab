"""The folded encoder on an NVIDIA GPU: 1 x 1 convolutions as matrix products that end in GELU, captured as a graph.

A map in channels_last is a matrix with a row for each position, so a 1 x 1 convolution is one product; in bfloat16 and
float16 cuBLAS adds the bias and GELU (in its tanh form, which differs from the exact one by less than these formats
do) before the result is written. With Triton's kernels (`gpu_kernels`) the depthwise convolutions, which are cuDNN's
slowest, and the stem's first are ours, and most skips are added by the product before them. A CUDA graph then starts
all kernels at once.

Letters: `P` images, `H, W` pixels, `h, w` feature grid, `N = h * w`, `C` channels.
"""

import threading
from collections import OrderedDict
from types import ModuleType
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.model.gpu_graphs import Captured, capture
from fastvlm.model.vision import (
    ConvFFN,
    FastViTHD,
    LargeKernel,
    MobileOne,
    PositionalEncoding,
    RepMixer,
    RepMixerBlock,
)

_HALVES: Final = (torch.bfloat16, torch.float16)
_MOST_SEEN: Final = 32
"""Inputs of a whole convolution that is ours: three channels of 3 x 3, the stem's."""
_MOST_PICTURES: Final = 4
"""More at once keep the GPU busy without a graph, whose memory stays taken."""
_MOST_SIZES: Final = 4
"""Graphs that are kept, the last used."""


@torch.no_grad()
def fuse(vision: FastViTHD, kernels: ModuleType | None) -> FastViTHD:
    """Exchange the blocks of a folded encoder for fused ones, in place; without `kernels` cuDNN convolves."""
    for parent in list(vision.modules()):
        for name, child in list(parent.named_children()):
            if (better := _exchanged(child, kernels)) is not None:
                setattr(parent, name, better)
    return vision


def _exchanged(module: nn.Module, kernels: ModuleType | None) -> nn.Module | None:
    """A faster module that computes the same, if there is one."""
    if kernels is not None and isinstance(module, RepMixerBlock):
        return FusedMixerBlock(module, kernels)
    if isinstance(module, ConvFFN):
        return FusedFFN(module, kernels)
    if isinstance(module, RepMixer | PositionalEncoding | LargeKernel | MobileOne):
        conv = module.reparam_conv
        has_gelu = isinstance(module, LargeKernel) or (isinstance(module, MobileOne) and module.has_act)
        if conv is None or (isinstance(module, MobileOne) and module.se is not None):
            return None
        if conv.kernel_size == (1, 1) and conv.groups == 1:
            return Pointwise(conv, has_gelu=has_gelu)
        if kernels is not None and conv.groups == conv.in_channels:
            return Depthwise(conv, kernels, has_gelu=has_gelu)
        if kernels is not None and conv.groups == 1 and conv.weight[0].numel() <= _MOST_SEEN:
            return Convolution(conv, kernels, has_gelu=has_gelu)
    return None


def _rows(x: Tensor) -> Tensor:
    """A map `(P, C, h, w)` in channels_last as rows `(P h w, C)`, in the same memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class Pointwise(nn.Module):
    """A 1 x 1 convolution, perhaps with GELU, as one matrix product."""

    def __init__(self, conv: nn.Conv2d, *, has_gelu: bool) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight = nn.Parameter(conv.weight.detach()[:, :, 0, 0], requires_grad=False)
        self.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
        self.has_gelu = has_gelu

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h, w)`."""
        num_images, _, height, width = x.shape
        rows = _rows(x)
        if not self.has_gelu:
            rows = torch.addmm(self.bias, rows, self.weight.t())
        elif rows.dtype in _HALVES:
            rows = torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True)
        else:
            rows = F.gelu(torch.addmm(self.bias, rows, self.weight.t()))
        return rows.view(num_images, height, width, -1).permute(0, 3, 1, 2)


class Depthwise(nn.Module):
    """A convolution of each channel with a kernel of its own, perhaps with GELU, by Triton's kernel.

    With `raised` `(C,)` it takes a map that lies so much higher, and gives what it gives of the map itself.
    """

    weight: Tensor
    bias: Tensor
    outside: Tensor | None

    def __init__(
        self, conv: nn.Conv2d, kernels: ModuleType, *, has_gelu: bool = False, raised: Tensor | None = None
    ) -> None:
        super().__init__()
        assert conv.bias is not None
        self.stride, self.has_gelu, self._kernels = conv.stride[0], has_gelu, kernels
        weight = conv.weight.detach()[:, 0].permute(1, 2, 0).contiguous()  # (k, k, C')
        bias = conv.bias.detach().float()
        if raised is not None:
            bias = bias - raised * weight.float().sum((0, 1))
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        outside = None if raised is None else raised.to(conv.weight.dtype)
        self.register_buffer("outside", outside, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h', w')`."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self._kernels.depthwise(
            x, self.weight, self.bias, stride=self.stride, has_act=self.has_gelu, outside=self.outside
        )


class Convolution(nn.Module):
    """A convolution of few channels, perhaps with GELU, by Triton's kernel."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, kernels: ModuleType, *, has_gelu: bool) -> None:
        super().__init__()
        assert conv.bias is not None
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.has_gelu, self._kernels = has_gelu, kernels
        weight = conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 2).contiguous()  # (k k C, C')
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", conv.bias.detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h', w')`."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self._kernels.convolve(
            x, self.weight, self.bias, kernel=self.kernel, stride=self.stride, has_act=self.has_gelu
        )


class FusedMixerBlock(nn.Module):
    """A RepMixerBlock whose last product adds to what it skips.

    cuBLAS adds a product to a matrix that is there, but then no bias. So the mixer's bias adds that of the last product
    as well, and the convolution behind the mixer takes it off again.
    """

    def __init__(self, block: RepMixerBlock, kernels: ModuleType) -> None:
        super().__init__()
        mixer, ffn = block.token_mixer.reparam_conv, block.mlp
        assert mixer is not None
        assert isinstance(ffn.conv, nn.Conv2d)
        assert ffn.fc2.bias is not None
        raised = ffn.fc2.bias.detach().float()
        self.mixer = Depthwise(mixer, kernels)
        self.mixer.bias = self.mixer.bias + raised
        self.conv = Depthwise(ffn.conv, kernels, raised=raised)
        self.fc1 = Pointwise(ffn.fc1, has_gelu=True)
        self.weight = nn.Parameter(ffn.fc2.weight.detach()[:, :, 0, 0], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        x = self.mixer(x)
        hidden = self.fc1(self.conv(x))
        _rows(x).addmm_(_rows(hidden), self.weight.t())
        return x


class FusedFFN(nn.Module):
    """A ConvFFN whose linear layers are matrix products."""

    def __init__(self, ffn: ConvFFN, kernels: ModuleType | None) -> None:
        super().__init__()
        assert isinstance(ffn.conv, nn.Conv2d)
        self.conv = ffn.conv if kernels is None else Depthwise(ffn.conv, kernels)
        self.fc1, self.fc2 = Pointwise(ffn.fc1, has_gelu=True), Pointwise(ffn.fc2, has_gelu=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        return self.fc2(self.fc1(self.conv(x)))


class GraphedVision(nn.Module):
    """An encoder, captured as a graph for each size of one or a few pictures when it first comes."""

    def __init__(self, vision: FastViTHD) -> None:
        """Wrap a folded encoder on the GPU."""
        super().__init__()
        self.vision, self.config = vision, vision.config
        self.head, self.grid = vision.head, vision.grid
        self._graphs: OrderedDict[tuple[int, ...], Captured] = OrderedDict()
        self._lock = threading.Lock()

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels `(P, 3, H, W)` as features `(P, N, C)`."""
        self.grid(pixels.shape)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if len(pixels) > _MOST_PICTURES or torch.is_grad_enabled():
            return self._encode(pixels)
        with self._lock:
            shape = tuple(pixels.shape)
            if shape not in self._graphs:
                self._graphs[shape] = capture(self._encode, pixels)
                if len(self._graphs) > _MOST_SIZES:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(shape)
            return self._graphs[shape](pixels)

    def embed(self, features: Tensor) -> Tensor | None:
        """Pool features `(P, N, C)` to the CLIP embedding `(P, clip_dim)`; None without a CLIP head."""
        return self.vision.embed(features)

    def _encode(self, pixels: Tensor) -> Tensor:
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
        here = torch.cuda.device_of(pixels)  # type: ignore[no-untyped-call]
        with here, exact:  # Triton starts its kernels on the current device
            return self.vision(pixels)
