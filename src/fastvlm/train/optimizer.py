"""What is updated, by how much: parameter groups, AdamW or Muon, warm-up and cosine."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from fastvlm.train.muon import Muon

MATRIX_RATE = 2.0
"""Muon's steps are so much longer than AdamW's at the same --lr: what trained nano."""
MOMENTUM = 0.95
SMALLEST_MATRIX = 16


def build_optimizer(  # noqa: PLR0913  (what the parameter groups depend on)
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    rates: Mapping[str, float] | None = None,
    kind: Literal["adamw", "muon"] = "adamw",
) -> torch.optim.AdamW:
    """Make AdamW (arXiv 1711.05101) over the parameters that learn.

    Matrices and convolution kernels decay; biases, norms, layer scales and depthwise kernels (49 numbers that see each
    other only through one channel) do not.

    Args:
        model: Whose parameters learn.
        lr: Highest learning rate.
        weight_decay: Of what decays.
        betas: Of the two moments.
        rates: Other highest rates, by the module that a parameter belongs to.
        kind: Muon takes the matrices, but for embeddings and for heads that are thrown away; AdamW the rest.

    Returns:
        The optimizer, whose groups know their `peak_lr`.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            peak = next((rate for part, rate in (rates or {}).items() if name.startswith(f"{part}.")), lr)
            decay = weight_decay if parameter.ndim >= 2 and parameter.shape[1] > 1 else 0.0
            has_muon = kind == "muon" and _is_matrix(name, parameter)
            groups.setdefault((peak * (MATRIX_RATE if has_muon else 1), decay, has_muon), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        | ({"momentum": MOMENTUM} if has_muon else {})
        for (peak, decay, has_muon), parameters in groups.items()
    ]
    return (Muon if kind == "muon" else torch.optim.AdamW)(
        described,
        lr=lr,
        betas=betas,
        fused=True,  # one pass over the memory: ten times as fast on a CPU
    )


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon suits a parameter: linear layers and 1 x 1 convolutions between channels."""
    if any(part in {"embed_tokens", "lm_head", "heads"} for part in name.split(".")):
        return False
    is_square = parameter.ndim == 2 or (parameter.ndim == 4 and parameter.shape[2:] == (1, 1))
    return is_square and min(parameter.shape[:2]) >= SMALLEST_MATRIX


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def cosine(progress: float, *, warmup: float, floor: float = 0.0) -> float:
    """Return the factor of the learning rate at `progress` in [0, 1]: a linear rise, then half a cosine to `floor`."""
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / max(1e-9, 1.0 - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
