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
"""Weight `(out, in / groups, k, k)` and bias `(out,)`, both float64."""


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
            kernel = _mobile_one_kernel(module)
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
            module.conv = _conv(_conv_norm_kernel(module.conv), stride=1, groups=conv.groups, like=vision)
    vision.is_folded = True
    return model.eval().requires_grad_(False)


def _norm_kernel(weight: Tensor, norm: nn.BatchNorm2d) -> Kernel:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)  # (out,)
    bias = norm.bias.double() - norm.running_mean.double() * scale
    return weight.double() * scale[:, None, None, None], bias


def _conv_norm_kernel(branch: ConvNorm) -> Kernel:
    return _norm_kernel(branch.conv.weight, branch.bn)


def _identity_kernel(dim: int, groups: int, kernel: int, like: Tensor) -> Tensor:
    """The convolution that changes nothing, `(dim, dim / groups, k, k)`."""
    width = dim // groups
    weight = torch.zeros(dim, width, kernel, kernel, dtype=torch.float64, device=like.device)
    channels = torch.arange(dim, device=like.device)
    weight[channels, channels % width, kernel // 2, kernel // 2] = 1
    return weight


def _pad_to(weight: Tensor, kernel: int) -> Tensor:
    margin = (kernel - weight.shape[-1]) // 2
    return F.pad(weight, [margin] * 4)


def _mobile_one_kernel(block: MobileOne) -> Kernel:
    kernels = [_conv_norm_kernel(branch) for branch in block.conv_kxk or () if isinstance(branch, ConvNorm)]
    if block.conv_scale is not None:
        kernels.append(_conv_norm_kernel(block.conv_scale))
    if block.identity is not None:
        unit = _identity_kernel(block.in_dim, block.groups, block.kernel, block.identity.weight)
        kernels.append(_norm_kernel(unit, block.identity))
    weights = [_pad_to(weight, block.kernel) for weight, _ in kernels]
    return torch.stack(weights).sum(0), torch.stack([bias for _, bias in kernels]).sum(0)


def _merge_mixer(mixer: RepMixer) -> None:
    # The block computes x plus the scaled difference of mixer and norm.
    assert mixer.mixer is not None
    assert mixer.norm is not None
    assert mixer.layer_scale is not None
    weight, bias = _mobile_one_kernel(mixer.mixer)
    norm_weight, norm_bias = _mobile_one_kernel(mixer.norm)
    scale = mixer.layer_scale.gamma.double()  # (C, 1, 1)
    unit = _identity_kernel(len(scale), len(scale), 3, scale)
    kernel = unit + scale[..., None] * (weight - norm_weight), scale.flatten() * (bias - norm_bias)
    mixer.reparam_conv = _conv(kernel, stride=1, groups=len(scale), like=mixer)
    mixer.mixer = mixer.norm = mixer.layer_scale = None


def _merge_large_kernel(block: LargeKernel) -> None:
    assert block.large_conv is not None
    assert block.small_conv is not None
    weight, bias = _conv_norm_kernel(block.large_conv)
    small_weight, small_bias = _conv_norm_kernel(block.small_conv)
    kernel = weight + _pad_to(small_weight, weight.shape[-1]), bias + small_bias
    block.reparam_conv = _conv(kernel, stride=2, groups=block.large_conv.conv.groups, like=block)
    block.large_conv = block.small_conv = None


def _merge_position(block: PositionalEncoding) -> None:
    conv = block.pos_enc
    assert conv is not None
    assert conv.bias is not None
    dim = conv.out_channels
    kernel = conv.weight.double() + _identity_kernel(dim, dim, 7, conv.weight), conv.bias.double()
    block.reparam_conv = _conv(kernel, stride=1, groups=dim, like=block)
    block.pos_enc = None


def _scale_conv(conv: nn.Conv2d, scale: nn.Module) -> None:
    assert isinstance(scale, LayerScale)
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
