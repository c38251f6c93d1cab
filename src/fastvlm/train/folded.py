"""The vision encoder with branches, BatchNorm and layer scales folded anew for each pass, while all of them learn.

BatchNorm whose statistics are frozen is linear in its input, so branches and norms together are one convolution
(`model/fold.py`), whose kernel is a differentiable function of their weights. Summing kernels instead of maps gives the
same features and gradients, for a fraction of the arithmetic and of the activations that are kept.

Letters: `P` images, `H, W` pixels, `h, w` feature grid, `N = h * w`, `C` channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastvlm.model import fold
from fastvlm.model.vision import (
    AttentionBlock,
    ConvFFN,
    ConvNorm,
    Downsample,
    FastViTHD,
    LargeKernel,
    LayerScale,
    MobileOne,
    PositionalEncoding,
    RepMixer,
    RepMixerBlock,
)


def encode_folded(vision: FastViTHD, pixels: Tensor, *, recomputes: bool = False) -> Tensor:
    """Encode pixels `(P, 3, H, W)` as features `(P, N, C)`, as the encoder does with frozen statistics.

    Args:
        vision: The encoder; gradients reach all its weights.
        pixels: What it sees.
        recomputes: Keep only the inputs of blocks; the rest is computed again for the gradient.

    Raises:
        InputError: A side is not a multiple of the stride.
    """
    vision.grid(pixels.shape)
    x = pixels
    for layer in vision.stem:
        x = _mobile_one(layer, x)
    for stage in vision.stages:
        if isinstance(stage.downsample, Downsample):
            large, small = stage.downsample.proj
            x = _mobile_one(small, _large_kernel(large, x))
        if isinstance(stage.pos_emb, PositionalEncoding):
            x = _position(stage.pos_emb, x)
        for block in stage.blocks:  # type: ignore[union-attr]
            run = _attention_block if isinstance(block, AttentionBlock) else _mixer_block
            x = checkpoint(run, block, x, use_reentrant=False) if recomputes else run(block, x)
    return _mobile_one(vision.final_conv, x).flatten(2).transpose(1, 2)


def can_fold(vision: FastViTHD) -> bool:
    """Whether a pass may be folded: no statistics move, and no low-rank update hangs on a convolution."""
    norms = (module for module in vision.modules() if isinstance(module, nn.BatchNorm2d))
    return not any(norm.training for norm in norms) and not any(hasattr(m, "lora_A") for m in vision.modules())


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution in half precision whose kernel's gradient is summed in float32.

    oneDNN takes three to five times as long for that sum in bfloat16, and it is the longest part of such a step.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  (as a convolution is called)
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, groups: int
    ) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h', w')`."""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.groups = stride, groups
        half = weight.to(x.dtype)
        return F.conv2d(x, half, bias.to(x.dtype), stride, weight.shape[-1] // 2, groups=groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradients of the map, the kernel and the bias."""
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        along = torch.channels_last
        margin = weight.shape[-1] // 2

        def part(gradient: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
            steps, margins = [ctx.stride] * 2, [margin] * 2
            given = gradient.contiguous(memory_format=along), x.contiguous(memory_format=along), weight
            return torch.ops.aten.convolution_backward(
                *given, [len(weight)], steps, margins, [1, 1], False, [0, 0], ctx.groups, wanted
            )

        dx = part(gradient, x, weight.to(x.dtype), [True, False, False])[0] if ctx.needs_input_grad[0] else None
        _, dweight, dbias = part(gradient.float(), x.float(), weight.float(), [False, True, True])
        return dx, dweight, dbias, None, None


def _format(module: nn.Module) -> torch.dtype:
    """What a kernel is computed in: as its weights are."""
    return next(module.parameters()).dtype


def _convolve(x: Tensor, kernel: fold.Kernel, *, stride: int = 1, groups: int = 1) -> Tensor:
    weight, bias = kernel
    device = x.device.type
    if groups > 1 and device == "cpu" and torch.is_autocast_enabled(device):
        return _Depthwise.apply(x.to(torch.get_autocast_dtype(device)), weight, bias, stride, groups)  # type: ignore[no-untyped-call]
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)


def _mobile_one(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, MobileOne)
    if block.reparam_conv is not None:
        return block(x)
    x = _convolve(x, fold.mobile_one_kernel(block, _format(block)), stride=block.stride, groups=block.groups)
    if block.se is not None:
        x = block.se(x)
    return F.gelu(x) if block.has_act else x


def _large_kernel(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, LargeKernel)
    if block.reparam_conv is not None:
        return block(x)
    return F.gelu(_convolve(x, fold.large_kernel(block, _format(block)), stride=2, groups=x.shape[1]))


def _position(block: PositionalEncoding, x: Tensor) -> Tensor:
    if block.reparam_conv is not None:
        return block(x)
    return _convolve(x, fold.position_kernel(block, _format(block)), groups=x.shape[1])


def _mixer_block(block: RepMixerBlock, x: Tensor) -> Tensor:
    mixer = block.token_mixer
    assert isinstance(mixer, RepMixer)
    if mixer.reparam_conv is not None:
        x = mixer(x)
    else:
        x = _convolve(x, fold.mixer_kernel(mixer, _format(mixer)), groups=x.shape[1])
    return x + _feed_forward(block.mlp, block.layer_scale, x)


def _attention_block(block: AttentionBlock, x: Tensor) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)  # (P, N, C)
    attention, scale = block.token_mixer, block.layer_scale_1
    assert isinstance(scale, LayerScale)
    gamma = scale.gamma.flatten()
    weight, bias = attention.proj.weight * gamma[:, None], attention.proj.bias * gamma
    mixed = F.linear(attention.mix(block.norm(rows)), weight, bias)
    x = x + mixed.transpose(1, 2).reshape(x.shape)
    return x + _feed_forward(block.mlp, block.layer_scale_2, x)


def _feed_forward(mlp: ConvFFN, scale: nn.Module, x: Tensor) -> Tensor:
    """`scale(mlp(x))`."""
    assert isinstance(mlp.conv, ConvNorm)
    assert isinstance(scale, LayerScale)
    assert mlp.fc2.bias is not None
    hidden = _convolve(x, fold.conv_norm_kernel(mlp.conv, _format(mlp.conv)), groups=x.shape[1])
    gamma = scale.gamma.flatten()
    kernel = mlp.fc2.weight * gamma[:, None, None, None], mlp.fc2.bias * gamma
    return _convolve(F.gelu(mlp.fc1(hidden)), kernel)
