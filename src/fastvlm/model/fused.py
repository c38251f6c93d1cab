"""The folded encoder in the operators that oneDNN fuses on a CPU: convolution with GELU, convolution with a skip.

Nothing else is computed: the activation is applied, and the skip added, while the sums are still in registers, in
float32, instead of in a pass of its own over the map; and kernels are laid out once as oneDNN reads them, instead of at
every call.

Depthwise convolutions, the stem and the wide layers of ConvFFNs are our library's where it is given and has them.

Letters: `P` images, `h, w` feature grid, `N = h * w`, `C` channels.
"""

import ctypes
import math
from copy import copy
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.model.byte_ffn import ByteFFN
from fastvlm.model.compiled import has_depthwise, has_tiles
from fastvlm.model.depthwise import DepthwiseConv, can_convolve
from fastvlm.model.quantize import QuantizedConv
from fastvlm.model.stem import StemConvs, can_join
from fastvlm.model.tile_attention import TileKernel, can_attend
from fastvlm.model.tile_ffn import TileFFN
from fastvlm.model.tiles import can_tile
from fastvlm.model.vision import (
    Attention,
    AttentionBlock,
    ConvFFN,
    Downsample,
    FastViTHD,
    LargeKernel,
    MobileOne,
    PositionalEncoding,
    RepMixer,
    RepMixerBlock,
    Stage,
)

_DTYPES: Final = (torch.float32, torch.bfloat16)
STRIP: Final = 4096
"""Positions of a map that pass through a hidden layer together: its four times as many channels stay in the cache."""


def can_fuse(vision: FastViTHD) -> bool:
    """Whether this build of PyTorch, this processor and this encoder (folded, on the CPU) allow `fuse`."""
    weight = next(vision.parameters())
    return (
        vision.is_folded
        and weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and torch._C._has_mkldnn
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.no_grad()
def fuse(vision: FastViTHD, library: ctypes.CDLL | None = None) -> FastViTHD:
    """Exchange the blocks of a folded encoder on the CPU for fused ones, in place; see `can_fuse`.

    Args:
        vision: The encoder.
        library: What `fastvlm.native.build.library` returns; needed where ConvFFNs are quantised, faster elsewhere.
    """
    vision.stem = _stem(vision.stem, library)
    for stage in vision.stages:
        _fuse_stage(stage, library)
    vision.add_module("final_conv", _mobile_one(vision.final_conv, library))
    return vision


class FusedConv(nn.Module):
    """A convolution, perhaps with GELU or with a map added, in one operator; its kernel is laid out for oneDNN.

    Which layout is right depends on the size of the map, and a wrong one is mended at every call. So the kernel is laid
    out when a size first comes, and the layouts of the last sizes are kept.
    """

    bias: Tensor

    def __init__(self, conv: nn.Module, *, has_gelu: bool = False) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        self.stride, self.padding, self.groups = list(conv.stride), [int(x) for x in conv.padding], conv.groups
        self.act = "gelu" if has_gelu else "none"
        self._layouts: dict[tuple[int, ...], Tensor] = {
            (): conv.weight.detach().contiguous(memory_format=torch.channels_last)
        }
        self.register_buffer("bias", conv.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h', w')`."""
        weight = self._laid_out(x.shape)
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, self.padding, self.stride, [1, 1], self.groups, self.act, [], "none"
        )

    def _laid_out(self, shape: torch.Size) -> Tensor:
        size = tuple(shape[2:])
        if (known := self._layouts.get(size)) is not None:
            return known
        weight = next(iter(self._layouts.values()))
        dense = weight.to_dense() if weight.is_mkldnn else weight
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            dense, self.padding, self.stride, [1, 1], self.groups, list(shape)
        )
        last = list(self._layouts.items())[-1:] if () not in self._layouts else []
        self._layouts = {**dict(last), size: packed}
        return packed

    def add_to(self, skip: Tensor, x: Tensor) -> Tensor:
        """Do what `forward` does, add it to `skip` `(P, C', h', w')` in place, and return that."""
        weight = self._laid_out(x.shape)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            skip, x, weight, self.bias, self.padding, self.stride, [1, 1], self.groups, "add", 1.0, None, [], None
        )


class WideningConv(nn.Module):
    """A depthwise convolution that makes several outputs of each input, with GELU: as many that make one of each.

    oneDNN has no kernel for the former but one for any groups, three to five times as slow. The first outputs of all
    inputs come first, then the second ones.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        self.times = conv.out_channels // conv.groups
        parts = []
        for index in range(self.times):
            part = copy(conv)
            part._parameters = {}
            part.in_channels = part.out_channels = conv.groups
            part.weight = nn.Parameter(conv.weight.detach()[index :: self.times].clone(), requires_grad=False)
            part.bias = nn.Parameter(conv.bias.detach()[index :: self.times].clone(), requires_grad=False)
            parts.append(FusedConv(part, has_gelu=True))
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h', w')`."""
        return torch.cat([part(x) for part in self.parts], dim=1)


class FusedFFN(nn.Module):
    """A ConvFFN and the skip around it; of a large map, strip by strip."""

    def __init__(self, ffn: ConvFFN, library: ctypes.CDLL | None) -> None:
        super().__init__()
        self.conv = _fused(ffn.conv, library)
        self.fc1 = FusedConv(ffn.fc1, has_gelu=True)
        self.fc2 = FusedConv(ffn.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)`, which is lost, to the same."""
        mixed = self.conv(x)
        num_images, _, height, width = x.shape
        if height * width <= STRIP:
            return self.fc2.add_to(x, self.fc1(mixed))
        lines = math.ceil(height / math.ceil(height * width / STRIP))
        for image in range(num_images):
            for top in range(0, height, lines):
                strip = (slice(image, image + 1), slice(None), slice(top, top + lines))
                self.fc2.add_to(x[strip], self.fc1(mixed[strip]))
        return x


class QuantizedFFN(nn.Module):
    """A ConvFFN whose 1 x 1 convolutions multiply bytes, and the skip around it."""

    def __init__(self, conv: nn.Module, fc1: QuantizedConv, fc2: QuantizedConv, library: ctypes.CDLL) -> None:
        super().__init__()
        self.conv, self.wide = _fused(conv, library), ByteFFN(fc1, fc2, library)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)`, which is lost, to the same."""
        return self.wide.add_to(x, self.conv(x))


class TiledFFN(nn.Module):
    """A ConvFFN whose 1 x 1 convolutions go through AMX's tiles, and the skip around it."""

    def __init__(self, ffn: ConvFFN, library: ctypes.CDLL) -> None:
        super().__init__()
        self.conv, self.wide = _fused(ffn.conv, library), TileFFN(ffn.fc1, ffn.fc2, library)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)`, which is lost, to the same."""
        return self.wide.add_to(x, self.conv(x))


class FusedLinear(nn.Module):
    """A linear layer whose matrix is laid out for oneDNN."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, num_rows: int) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_rows)
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)` to `(..., C')`."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        """Do what `forward` does, and apply SiLU."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """Do what `forward` does, and multiply with `factor` `(..., C')`."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")


class FusedAttentionBlock(nn.Module):
    """A block of the attention stages."""

    def __init__(self, block: AttentionBlock, library: ctypes.CDLL | None) -> None:
        super().__init__()
        self.norm, self.ffn = block.norm, _ffn(block.mlp, library)
        attention: Attention = block.token_mixer
        self.head_dim = attention.head_dim
        self.qkv, self.proj = FusedLinear(attention.qkv, 256), FusedLinear(attention.proj, 256)
        self._kernel: TileKernel | None = None
        if library is not None and can_attend(library, attention.qkv.weight.dtype, self.head_dim):
            self._kernel = TileKernel(library)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        num_images, dim, height, width = x.shape
        rows = x.flatten(2).transpose(1, 2)  # (P, N, C), free of copies when x is channels_last
        qkv = self.qkv(self.norm(rows)).view(num_images, -1, 3, dim // self.head_dim, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (P, heads, N, head_dim)
        if self._kernel is None:
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        else:
            mixed = qkv.new_empty(qkv[:, :, 0].shape)  # (P, N, heads, head_dim)
            self._kernel.attend(query, key, value, mixed.transpose(1, 2), is_causal=False)
        rows = rows + self.proj(mixed.reshape(rows.shape))  # (P, N, C)
        return self.ffn(rows.view(num_images, height, width, dim).permute(0, 3, 1, 2))


def _stem(stem: nn.Sequential, library: ctypes.CDLL | None) -> nn.Sequential:
    first, second, last = stem
    assert isinstance(first, MobileOne)
    assert isinstance(second, MobileOne)
    conv, depthwise = first.reparam_conv, second.reparam_conv
    assert conv is not None
    assert depthwise is not None
    is_plain = first.se is None and second.se is None and first.has_act
    if library is not None and is_plain and can_join(conv, depthwise) and has_depthwise(library):
        joined = StemConvs(conv, depthwise, library, has_gelu=second.has_act)
        return nn.Sequential(joined, _mobile_one(last, library))
    return nn.Sequential(*(_mobile_one(block, library) for block in stem))


def _fuse_stage(stage: nn.Module, library: ctypes.CDLL | None) -> None:
    assert isinstance(stage, Stage)
    if not isinstance(stage.downsample, nn.Identity):
        assert isinstance(stage.downsample, Downsample)
        large, small = stage.downsample.proj
        stage.downsample = _downsample(large, small, library)
    if isinstance(stage.pos_emb, PositionalEncoding):
        stage.pos_emb = _fused(stage.pos_emb.reparam_conv, library)
    for index, block in enumerate(stage.blocks):
        if isinstance(block, RepMixerBlock):
            assert isinstance(block.token_mixer, RepMixer)
            mixer = _fused(block.token_mixer.reparam_conv, library)
            stage.blocks[index] = nn.Sequential(mixer, _ffn(block.mlp, library))
        else:
            assert isinstance(block, AttentionBlock)
            stage.blocks[index] = FusedAttentionBlock(block, library)


def _downsample(large: nn.Module, small: nn.Module, library: ctypes.CDLL | None) -> nn.Module:
    assert isinstance(large, LargeKernel)
    assert isinstance(small, MobileOne)
    assert large.reparam_conv is not None
    assert small.reparam_conv is not None
    times = large.reparam_conv.out_channels // large.reparam_conv.groups
    if times == 1 or small.reparam_conv.groups != 1:
        return nn.Sequential(_fused(large.reparam_conv, library, has_gelu=True), _mobile_one(small, library))
    weight = small.reparam_conv.weight.data  # it takes its inputs in the order in which they come
    small.reparam_conv.weight.data = torch.cat([weight[:, index::times] for index in range(times)], dim=1)
    return nn.Sequential(_widening(large.reparam_conv, library), _mobile_one(small, library))


def _widening(conv: nn.Conv2d, library: ctypes.CDLL | None) -> nn.Module:
    if library is not None and can_convolve(conv) and has_depthwise(library):
        return DepthwiseConv(conv, library, has_gelu=True)
    return WideningConv(conv)


def _ffn(ffn: ConvFFN, library: ctypes.CDLL | None) -> nn.Module:
    if isinstance(ffn.fc1, QuantizedConv) and isinstance(ffn.fc2, QuantizedConv):
        assert library is not None
        return QuantizedFFN(ffn.conv, ffn.fc1, ffn.fc2, library)
    if library is not None and can_tile(ffn.fc1.weight) and can_tile(ffn.fc2.weight) and has_tiles(library):
        return TiledFFN(ffn, library)
    return FusedFFN(ffn, library)


def _fused(conv: nn.Module | None, library: ctypes.CDLL | None, *, has_gelu: bool = False) -> nn.Module:
    assert conv is not None, "fold.for_inference comes before"
    if library is None or not can_convolve(conv) or not has_depthwise(library):
        return FusedConv(conv, has_gelu=has_gelu)
    ours = DepthwiseConv(conv, library, has_gelu=has_gelu)
    return ours if ours.times == 1 else nn.Sequential(ours, nn.ChannelShuffle(ours.times))


def _mobile_one(block: nn.Module, library: ctypes.CDLL | None) -> nn.Module:
    assert isinstance(block, MobileOne)
    if block.se is None:
        return _fused(block.reparam_conv, library, has_gelu=block.has_act)
    act = nn.GELU() if block.has_act else nn.Identity()
    return nn.Sequential(_fused(block.reparam_conv, library), block.se, act)
