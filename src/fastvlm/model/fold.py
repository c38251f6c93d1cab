"""From parallel branches and BatchNorm to one convolution, exactly.

Two steps. `reparameterise` merges the branches of the training form; its result can be saved. `for_inference` also
folds what the released checkpoints leave: the BatchNorm of each ConvFFN and every layer scale.

Folding a BatchNorm: y = (x - mean) / sqrt(var + eps) * weight + bias is linear in x, so it scales the kernel before it
(arXiv 2206.04040, 3.1). All sums are made in float64 and rounded once.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.quantize import QuantizedConv
from fastvlm.model.vision import (
    Attention,
    AttentionBlock,
    ConvFFN,
    ConvNorm,
    FastViTHD,
    LargeKernel,
    LayerScale,
    MobileOne,
    PositionalEncoding,
    RepMixer,
    RepMixerBlock,
)

Kernel = tuple[Tensor, Tensor]
"""Weight `(out, in / groups, k, k)` and bias `(out,)`, of one format: float64 where the result is kept."""


def reparameterise(model: FastVLM) -> FastVLM:
    """Merge the branches of the encoder in place and say so in the config; the result can be saved."""
    reparameterise_vision(model.vision)
    model.config = replace(model.config, vision=model.vision.config)
    return model


@torch.no_grad()
def reparameterise_vision(vision: FastViTHD) -> FastViTHD:
    """Merge the branches of every block in place; an encoder already in that form is left alone."""
    if vision.config.is_reparameterised:
        return vision
    for module in list(vision.modules()):
        if isinstance(module, RepMixer):
            _merge_mixer(module)
        elif isinstance(module, LargeKernel):
            _merge_large_kernel(module)
        elif isinstance(module, PositionalEncoding):
            _merge_position(module)
    for module in list(vision.modules()):
        if isinstance(module, MobileOne) and module.reparam_conv is None:
            kernel = mobile_one_kernel(module)
            module.reparam_conv = _conv(kernel, stride=module.stride, groups=module.groups, like=vision)
            module.conv_kxk = module.conv_scale = module.identity = None
    vision.config = replace(vision.config, is_reparameterised=True)
    return vision


@torch.no_grad()
def for_inference(model: FastVLM) -> FastVLM:
    """Fold everything that can be folded, in place: branches, BatchNorm, layer scale. One way: saving it raises."""
    vision = reparameterise(model).vision
    if vision.is_folded:
        return model
    for module in list(vision.modules()):
        if isinstance(module, RepMixerBlock):
            _scale_conv(module.mlp.fc2, module.layer_scale)
            module.layer_scale = nn.Identity()
        elif isinstance(module, AttentionBlock):
            _scale_attention(module.token_mixer, module.layer_scale_1)
            _scale_conv(module.mlp.fc2, module.layer_scale_2)
            module.layer_scale_1 = nn.Identity()
            module.layer_scale_2 = nn.Identity()
        elif isinstance(module, ConvFFN) and isinstance(module.conv, ConvNorm):
            conv = module.conv.conv
            module.conv = _conv(conv_norm_kernel(module.conv), stride=1, groups=conv.groups, like=vision)
    vision.is_folded = True
    return model.eval().requires_grad_(False)


def _norm_kernel(weight: Tensor, norm: nn.BatchNorm2d, dtype: torch.dtype) -> Kernel:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.to(dtype) / torch.sqrt(norm.running_var.to(dtype) + norm.eps)  # (out,)
    bias = norm.bias.to(dtype) - norm.running_mean.to(dtype) * scale
    return weight.to(dtype) * scale[:, None, None, None], bias


def conv_norm_kernel(branch: ConvNorm, dtype: torch.dtype = torch.float64) -> Kernel:
    """Put a convolution and its BatchNorm into one kernel; like the kernels below, it passes gradients."""
    return _norm_kernel(branch.conv.weight, branch.bn, dtype)


def _identity_kernel(dim: int, groups: int, kernel: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The convolution that changes nothing, `(dim, dim / groups, k, k)`."""
    width = dim // groups
    weight = torch.zeros(dim, width, kernel, kernel, dtype=dtype, device=like.device)
    channels = torch.arange(dim, device=like.device)
    weight[channels, channels % width, kernel // 2, kernel // 2] = 1
    return weight


def _pad_to(weight: Tensor, kernel: int) -> Tensor:
    margin = (kernel - weight.shape[-1]) // 2
    return F.pad(weight, [margin] * 4) if margin else weight


def mobile_one_kernel(block: MobileOne, dtype: torch.dtype = torch.float64) -> Kernel:
    """Sum the branches of a block."""
    kernels = [conv_norm_kernel(branch, dtype) for branch in block.conv_kxk or () if isinstance(branch, ConvNorm)]
    if block.conv_scale is not None:
        kernels.append(conv_norm_kernel(block.conv_scale, dtype))
    if block.identity is not None:
        unit = _identity_kernel(block.in_dim, block.groups, block.kernel, block.identity.weight, dtype)
        kernels.append(_norm_kernel(unit, block.identity, dtype))
    # One after the other: the gradients of a stack's sum would share their memory.
    weights, biases = [_pad_to(weight, block.kernel) for weight, _ in kernels], [bias for _, bias in kernels]
    return sum(weights[1:], weights[0]), sum(biases[1:], biases[0])


def mixer_kernel(mixer: RepMixer, dtype: torch.dtype = torch.float64) -> Kernel:
    """Put x plus the scaled difference of mixer and norm into one kernel."""
    assert mixer.mixer is not None
    assert mixer.norm is not None
    assert mixer.layer_scale is not None
    weight, bias = mobile_one_kernel(mixer.mixer, dtype)
    norm_weight, norm_bias = mobile_one_kernel(mixer.norm, dtype)
    scale = mixer.layer_scale.gamma.to(dtype)  # (C, 1, 1)
    unit = _identity_kernel(len(scale), len(scale), 3, scale, dtype)
    return unit + scale[..., None] * (weight - norm_weight), scale.flatten() * (bias - norm_bias)


def large_kernel(block: LargeKernel, dtype: torch.dtype = torch.float64) -> Kernel:
    """Sum the large convolution and the small one."""
    assert block.large_conv is not None
    assert block.small_conv is not None
    weight, bias = conv_norm_kernel(block.large_conv, dtype)
    small_weight, small_bias = conv_norm_kernel(block.small_conv, dtype)
    return weight + _pad_to(small_weight, weight.shape[-1]), bias + small_bias


def position_kernel(block: PositionalEncoding, dtype: torch.dtype = torch.float64) -> Kernel:
    """Put the skip of a positional encoding into its convolution."""
    conv = block.pos_enc
    assert conv is not None
    assert conv.bias is not None
    dim = conv.out_channels
    return conv.weight.to(dtype) + _identity_kernel(dim, dim, 7, conv.weight, dtype), conv.bias.to(dtype)


def _merge_mixer(mixer: RepMixer) -> None:
    kernel = mixer_kernel(mixer)
    mixer.reparam_conv = _conv(kernel, stride=1, groups=len(kernel[1]), like=mixer)
    mixer.mixer = mixer.norm = mixer.layer_scale = None


def _merge_large_kernel(block: LargeKernel) -> None:
    assert block.large_conv is not None
    groups = block.large_conv.conv.groups
    block.reparam_conv = _conv(large_kernel(block), stride=2, groups=groups, like=block)
    block.large_conv = block.small_conv = None


def _merge_position(block: PositionalEncoding) -> None:
    kernel = position_kernel(block)
    block.reparam_conv = _conv(kernel, stride=1, groups=len(kernel[1]), like=block)
    block.pos_enc = None


def _scale_conv(conv: nn.Conv2d | QuantizedConv, scale: nn.Module) -> None:
    assert isinstance(scale, LayerScale)
    if isinstance(conv, QuantizedConv):
        return conv.multiply(scale.gamma.flatten())
    assert conv.bias is not None
    gamma = scale.gamma.double().flatten()
    conv.weight.copy_(conv.weight.double() * gamma[:, None, None, None])
    conv.bias.copy_(conv.bias.double() * gamma)


def _scale_attention(attention: Attention, scale: nn.Module) -> None:
    assert isinstance(scale, LayerScale)
    gamma = scale.gamma.double().flatten()
    attention.proj.weight.copy_(attention.proj.weight.double() * gamma[:, None])
    attention.proj.bias.copy_(attention.proj.bias.double() * gamma)


def _conv(kernel: Kernel, *, stride: int, groups: int, like: nn.Module) -> nn.Conv2d:
    weight, bias = kernel
    parameter = next(like.parameters())
    out_dim, width, size, _ = weight.shape
    conv = nn.Conv2d(width * groups, out_dim, size, stride, size // 2, groups=groups, device="meta")
    conv.weight = nn.Parameter(weight.to(parameter.dtype))
    conv.bias = nn.Parameter(bias.to(parameter.dtype))
    return conv.train(like.training)
