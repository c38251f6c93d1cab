"""FastViTHD, the vision encoder: stem, five stages, a final convolution (arXiv 2412.13303, 3.2).

Parameter names are timm's. Both forms are here: the training form has parallel branches, each with its BatchNorm; the
re-parameterised form has one convolution instead (`fold.py` turns the first into the second).

Letters: `P` images, `H, W` pixels, `h, w` feature grid, `N = h * w`, `C` channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.config import VisionConfig
from fastvlm.errors import InputError

LAYER_SCALE = 1e-5  # FastViT's initial value; it suits a distilled encoder of 50 blocks, not a small one from scratch


class ConvNorm(nn.Module):
    """A convolution without bias and its BatchNorm."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h', w')`."""
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    """Each channel scaled by what the whole map holds (arXiv 1709.01507), with a ratio of 1/16."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, dim // 16, 1)
        self.fc2 = nn.Conv2d(dim // 16, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        scale = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))  # (P, C, 1, 1)
        return x * scale.sigmoid()


class MobileOne(nn.Module):
    """Parallel branches that become one convolution (arXiv 2206.04040).

    The training form adds up to three branches: k x k convolution, 1 x 1 convolution, BatchNorm alone.
    """

    def __init__(  # noqa: PLR0913  (a block is described by its shape)
        self,
        in_dim: int,
        out_dim: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        has_scale: bool = False,
        has_act: bool = True,
        has_squeeze: bool = False,
        is_reparameterised: bool = True,
    ) -> None:
        super().__init__()
        self.in_dim, self.kernel, self.stride, self.groups = in_dim, kernel, stride, groups
        self.reparam_conv: nn.Conv2d | None = None
        self.conv_kxk: nn.ModuleList | None = None
        self.conv_scale: ConvNorm | None = None
        self.identity: nn.BatchNorm2d | None = None
        if is_reparameterised:
            self.reparam_conv = nn.Conv2d(in_dim, out_dim, kernel, stride, kernel // 2, groups=groups)
        else:
            self.conv_kxk = nn.ModuleList([ConvNorm(in_dim, out_dim, kernel, stride=stride, groups=groups)])
            if has_scale:
                self.conv_scale = ConvNorm(in_dim, out_dim, 1, stride=stride, groups=groups)
            if in_dim == out_dim and stride == 1:
                self.identity = nn.BatchNorm2d(in_dim)
        self.se = SqueezeExcite(out_dim) if has_squeeze else None
        self.has_act = has_act

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h', w')`."""
        x = self.reparam_conv(x) if self.reparam_conv is not None else self._branches(x)
        if self.se is not None:
            x = self.se(x)
        return F.gelu(x) if self.has_act else x

    def _branches(self, x: Tensor) -> Tensor:
        branches: list[nn.Module | None] = [*(self.conv_kxk or ()), self.conv_scale, self.identity]
        outputs: list[Tensor] = [branch(x) for branch in branches if branch is not None]
        return sum(outputs[1:], outputs[0])


class LargeKernel(nn.Module):
    """A 7 x 7 depthwise convolution of stride 2 that widens, with a parallel 3 x 3 while training; then GELU."""

    def __init__(self, in_dim: int, out_dim: int, *, is_reparameterised: bool) -> None:
        super().__init__()
        self.reparam_conv: nn.Conv2d | None = None
        self.large_conv: ConvNorm | None = None
        self.small_conv: ConvNorm | None = None
        if is_reparameterised:
            self.reparam_conv = nn.Conv2d(in_dim, out_dim, 7, 2, 3, groups=in_dim)
        else:
            self.large_conv = ConvNorm(in_dim, out_dim, 7, stride=2, groups=in_dim)
            self.small_conv = ConvNorm(in_dim, out_dim, 3, stride=2, groups=in_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h/2, w/2)`."""
        if self.reparam_conv is not None:
            return F.gelu(self.reparam_conv(x))
        assert self.large_conv is not None
        assert self.small_conv is not None
        return F.gelu(self.large_conv(x) + self.small_conv(x))


class LayerScale(nn.Module):
    """One learned factor a channel (arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), initial))

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        return x * self.gamma


class RepMixer(nn.Module):
    """Mixing of neighbours by a 3 x 3 depthwise convolution; its skip is folded in (arXiv 2303.14189, 3.2)."""

    def __init__(self, dim: int, initial_scale: float, *, is_reparameterised: bool) -> None:
        super().__init__()
        self.reparam_conv: nn.Conv2d | None = None
        self.mixer: MobileOne | None = None
        self.norm: MobileOne | None = None
        self.layer_scale: LayerScale | None = None
        if is_reparameterised:
            self.reparam_conv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        else:
            self.mixer = MobileOne(dim, dim, 3, groups=dim, has_scale=True, has_act=False, is_reparameterised=False)
            self.norm = MobileOne(dim, dim, 3, groups=dim, has_act=False, is_reparameterised=False)
            self.norm.conv_kxk = None
            self.layer_scale = LayerScale(dim, initial_scale)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        if self.reparam_conv is not None:
            return self.reparam_conv(x)
        assert self.mixer is not None
        assert self.norm is not None
        assert self.layer_scale is not None
        return x + self.layer_scale(self.mixer(x) - self.norm(x))


class Attention(nn.Module):
    """Every position attends to every other; heads of 32 channels, no bias in q, k, v."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, N, C)` to the same."""
        return self.proj(self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        """Attend, `(P, N, C)` to the heads' results side by side, `(P, N, C)`."""
        num_images, num_positions, dim = x.shape
        qkv = self.qkv(x).view(num_images, num_positions, 3, dim // self.head_dim, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (P, heads, N, head_dim)
        x = F.scaled_dot_product_attention(query, key, value)
        return x.transpose(1, 2).reshape(num_images, num_positions, dim)


class LayerNorm(nn.Module):
    """LayerNorm over the channels of a map, one position at a time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`(P, N, C)` to the same."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, 1e-5)


class ConvFFN(nn.Module):
    """A 7 x 7 depthwise convolution, then the two linear layers of a transformer as 1 x 1 convolutions."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.conv: nn.Module = ConvNorm(dim, dim, 7, groups=dim)
        self.fc1 = nn.Conv2d(dim, ratio * dim, 1)
        self.fc2 = nn.Conv2d(ratio * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    """A block of the convolutional stages."""

    def __init__(self, dim: int, ratio: int, initial_scale: float, *, is_reparameterised: bool) -> None:
        super().__init__()
        self.token_mixer = RepMixer(dim, initial_scale, is_reparameterised=is_reparameterised)
        self.mlp = ConvFFN(dim, ratio)
        self.layer_scale: nn.Module = LayerScale(dim, initial_scale)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        x = self.token_mixer(x)
        return x + self.layer_scale(self.mlp(x))


class AttentionBlock(nn.Module):
    """A block of the attention stages."""

    def __init__(self, dim: int, ratio: int, head_dim: int, initial_scale: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.token_mixer = Attention(dim, head_dim)
        self.layer_scale_1: nn.Module = LayerScale(dim, initial_scale)
        self.mlp = ConvFFN(dim, ratio)
        self.layer_scale_2: nn.Module = LayerScale(dim, initial_scale)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        rows = x.flatten(2).transpose(1, 2)  # (P, N, C), free of copies when x is channels_last
        mixed = self.token_mixer(self.norm(rows)).transpose(1, 2).reshape(x.shape)  # (P, C, h, w)
        x = x + self.layer_scale_1(mixed)
        return x + self.layer_scale_2(self.mlp(x))


class Downsample(nn.Module):
    """Half the height and width, a wider map."""

    def __init__(self, in_dim: int, out_dim: int, *, is_reparameterised: bool) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LargeKernel(in_dim, out_dim, is_reparameterised=is_reparameterised),
            MobileOne(out_dim, out_dim, 1, is_reparameterised=is_reparameterised),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h/2, w/2)`."""
        return self.proj(x)


class PositionalEncoding(nn.Module):
    """Where a position is, from its neighbours: a 7 x 7 depthwise convolution with a skip (arXiv 2102.10882)."""

    def __init__(self, dim: int, *, is_reparameterised: bool) -> None:
        super().__init__()
        self.reparam_conv: nn.Conv2d | None = None
        self.pos_enc: nn.Conv2d | None = None
        if is_reparameterised:
            self.reparam_conv = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim)
        else:
            self.pos_enc = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to the same."""
        if self.reparam_conv is not None:
            return self.reparam_conv(x)
        assert self.pos_enc is not None
        return x + self.pos_enc(x)


class Stage(nn.Module):
    """Downsampling (not in the first stage), positions (attention stages), then blocks of one kind."""

    def __init__(self, config: VisionConfig, index: int, initial_scale: float) -> None:
        super().__init__()
        dim, is_reparameterised = config.dims[index], config.is_reparameterised
        has_attention = index >= len(config.dims) - config.num_attention_stages
        self.downsample: nn.Module = nn.Identity()
        if index:
            self.downsample = Downsample(config.dims[index - 1], dim, is_reparameterised=is_reparameterised)
        self.pos_emb: nn.Module = nn.Identity()
        if has_attention:
            self.pos_emb = PositionalEncoding(dim, is_reparameterised=is_reparameterised)
        self.blocks = nn.Sequential(
            *(
                AttentionBlock(dim, config.mlp_ratio, config.head_dim, initial_scale)
                if has_attention
                else RepMixerBlock(dim, config.mlp_ratio, initial_scale, is_reparameterised=is_reparameterised)
                for _ in range(config.depths[index])
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h', w')`."""
        return self.blocks(self.pos_emb(self.downsample(x)))


class ClipHead(nn.Module):
    """Mean over positions and one matrix: the embedding that CLIP pretraining compared with text."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(in_dim, out_dim))

    def forward(self, features: Tensor) -> Tensor:
        """`(P, N, C)` to `(P, clip_dim)`."""
        return features.mean(1) @ self.proj


class FastViTHD(nn.Module):
    """Image to features."""

    def __init__(self, config: VisionConfig, initial_scale: float = LAYER_SCALE) -> None:
        super().__init__()
        self.config = config
        dim, last, is_reparameterised = config.dims[0], config.dims[-1], config.is_reparameterised
        self.stem = nn.Sequential(
            MobileOne(3, dim, 3, stride=2, is_reparameterised=is_reparameterised),
            MobileOne(dim, dim, 3, stride=2, groups=dim, is_reparameterised=is_reparameterised),
            MobileOne(dim, dim, 1, is_reparameterised=is_reparameterised),
        )
        self.stages = nn.Sequential(*(Stage(config, i, initial_scale) for i in range(len(config.dims))))
        self.final_conv = MobileOne(
            last, 2 * last, 3, groups=last, has_scale=True, has_squeeze=True, is_reparameterised=is_reparameterised
        )
        self.head = ClipHead(2 * last, config.clip_dim) if config.clip_dim else None
        self.is_folded = False  # set by fold.for_inference, after which it cannot be saved

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels `(P, 3, H, W)` as features `(P, N, C)`; sides may differ, both multiples of 64.

        Raises:
            InputError: A side is not a multiple of the stride.
        """
        self.grid(pixels.shape)
        return self.final_conv(self.stages(self.stem(pixels))).flatten(2).transpose(1, 2)

    def embed(self, features: Tensor) -> Tensor | None:
        """Pool features `(P, N, C)` to the CLIP embedding `(P, clip_dim)`; None without a CLIP head."""
        return None if self.head is None else self.head(features)

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return `(h, w)` for pixels of that shape.

        Raises:
            InputError: A side is not a multiple of the stride.
        """
        height, width = shape[-2:]
        if height % self.config.stride or width % self.config.stride or not height or not width:
            raise InputError(f"pixels are {height} x {width}; both sides must be multiples of {self.config.stride}")
        return height // self.config.stride, width // self.config.stride
