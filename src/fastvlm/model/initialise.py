"""Random weights that compute like trained ones: every activation of moderate size, whatever the depth.

A benchmark on random weights is only fair when no number is denormal (many times slower on some processors) or
overflows. Each tensor is drawn from the seed and its own name, so one can be made without the others.
"""

import math
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Final

import torch
from torch import Tensor, nn

from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.language import RMSNorm
from fastvlm.model.vision import ClipHead, LargeKernel, LayerNorm, LayerScale, MobileOne, PositionalEncoding, RepMixer

_GELU_GAIN: Final = 1.8  # GELU keeps 0.65 of a standard normal's root mean square, half of a small signal's
_LAYER_SCALE: Final = 0.1
_EMBEDDING_STD: Final = 0.02

Draw = Callable[[torch.Generator], Tensor]
"""Makes one tensor's values, float32."""


def initial_values(model: FastVLM, seed: int) -> dict[str, Callable[[], Tensor]]:
    """How to make each tensor of a model's state, which may be on the meta device."""
    rules = dict(_rules(model))
    return {name: _seeded(rules[name], seed, name) for name in model.state_dict()}


def _seeded(draw: Draw, seed: int, name: str) -> Callable[[], Tensor]:
    number = int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
    return lambda: draw(torch.Generator().manual_seed(number))


def _rules(model: FastVLM) -> Iterator[tuple[str, Draw]]:
    """Name and rule of each tensor; a later rule for the same name replaces an earlier, more general one."""
    depth = (2 * model.config.language.num_layers) ** -0.5  # what each layer may add to the sum of all
    for name, module in model.named_modules():
        for key, draw in _module_rules(module):
            yield f"{name}.{key}", draw
        if name.endswith((".o_proj", ".down_proj")) and isinstance(module, nn.Linear):
            yield f"{name}.weight", _normal(module.weight.shape, depth * module.in_features**-0.5)
        elif name.endswith(".fc2") and isinstance(module, nn.Conv2d | nn.Linear):
            yield f"{name}.weight", _fan_in(module, _GELU_GAIN)


def _module_rules(module: nn.Module) -> Iterator[tuple[str, Draw]]:
    if isinstance(module, nn.Conv2d | nn.Linear):
        yield "weight", _fan_in(module, 1)
        if module.bias is not None:
            yield "bias", _normal(module.bias.shape, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        shape = module.weight.shape
        yield "weight", _uniform(shape, 0.8, 1.2)
        yield "bias", _normal(shape, 0.05)
        yield "running_mean", _normal(shape, 0.1)
        yield "running_var", _uniform(shape, 0.8, 1.2)
        yield "num_batches_tracked", lambda _: torch.tensor(1)
    elif isinstance(module, LayerNorm | RMSNorm):
        yield "weight", _uniform(module.weight.shape, 0.8, 1.2)
        if isinstance(module, LayerNorm):
            yield "bias", _normal(module.bias.shape, 0.05)
    elif isinstance(module, LayerScale):
        yield "gamma", _uniform(module.gamma.shape, 0.5 * _LAYER_SCALE, 1.5 * _LAYER_SCALE)
    elif isinstance(module, nn.Embedding):
        yield "weight", _normal(module.weight.shape, _EMBEDDING_STD)
    elif isinstance(module, ClipHead):
        yield "proj", _normal(module.proj.shape, module.proj.shape[0] ** -0.5)
    elif isinstance(module, MobileOne | LargeKernel):
        yield from _branch_rules(module)
    elif isinstance(module, RepMixer | PositionalEncoding):
        yield from _near_identity(module)


def _branch_rules(block: MobileOne | LargeKernel) -> Iterator[tuple[str, Draw]]:
    """Parallel branches share the variance of their sum."""
    gain = _GELU_GAIN if isinstance(block, LargeKernel) or block.has_act else 1.0
    convs = {
        name: module for name, module in block.named_modules() if isinstance(module, nn.Conv2d) and "se." not in name
    }
    identity = block.identity if isinstance(block, MobileOne) else None
    gain /= math.sqrt(max(len(convs) + (identity is not None), 1))
    for name, conv in convs.items():
        yield f"{name}.weight", _fan_in(conv, gain)
    if identity is not None:
        yield "identity.weight", _uniform(identity.weight.shape, 0.8 * gain, 1.2 * gain)


def _near_identity(block: RepMixer | PositionalEncoding) -> Iterator[tuple[str, Draw]]:
    """A merged block holds its skip, without which dozens in a row would lose the signal."""
    conv = block.reparam_conv
    if conv is not None:
        shape, noise = conv.weight.shape, 0.1 / conv.kernel_size[0]
        centre = conv.kernel_size[0] // 2

        def draw(generator: torch.Generator) -> Tensor:
            weight = torch.randn(shape, generator=generator) * noise
            weight[:, :, centre, centre] += 1
            return weight

        yield "reparam_conv.weight", draw
    elif isinstance(block, PositionalEncoding) and block.pos_enc is not None:
        yield "pos_enc.weight", _fan_in(block.pos_enc, 0.1)


def _fan_in(layer: nn.Conv2d | nn.Linear, gain: float) -> Draw:
    return _normal(layer.weight.shape, gain * layer.weight[0].numel() ** -0.5)


def _normal(shape: torch.Size, std: float) -> Draw:
    return lambda generator: torch.randn(shape, generator=generator).mul_(std)


def _uniform(shape: torch.Size, low: float, high: float) -> Draw:
    return lambda generator: torch.rand(shape, generator=generator).mul_(high - low).add_(low)
