"""What is updated, by how much: parameter groups, AdamW, warm-up and cosine."""

import math

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Make AdamW (arXiv 1711.05101) over the parameters that learn.

    Matrices and convolution kernels decay; biases, norms, layer scales and depthwise kernels (49 numbers that see each
    other only through one channel) do not.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and parameter.shape[1] > 1 else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    is_cuda = any(parameter.is_cuda for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=is_cuda or None)


def cosine(progress: float, *, warmup: float, floor: float = 0.0) -> float:
    """Return the factor of the learning rate at `progress` in [0, 1]: a linear rise, then half a cosine to `floor`."""
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / max(1e-9, 1.0 - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
