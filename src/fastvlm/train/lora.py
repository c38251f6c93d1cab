"""Low-rank updates of frozen weights: W + alpha / rank * B A (arXiv 2106.09685).

An update hangs on the module whose weight it changes, as its parameters `lora_A` and `lora_B`: the module keeps its
class and its name, so whatever reads or wraps the model sees what it knows. `checkpoint/adapter.py` has the file
format, PEFT's.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.checkpoint.adapter import Adapter


def add_updates(module: nn.Module, *, rank: int, alpha: float, dropout: float) -> None:
    """Give every matrix inside a low-rank update that learns: linear layers and 1 x 1 convolutions.

    The update is nothing at first: B is zero. Embedding and head are left as they are.
    """
    for name, layer in module.named_modules():
        if not is_matrix(layer) or name.endswith("lm_head"):
            continue
        out_dim, in_dim = layer.weight.shape[:2]
        kernel = layer.weight.shape[2:]  # () or (1, 1)
        down = layer.weight.new_empty(rank, in_dim, *kernel)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # as PEFT: U(-1 / sqrt(in_dim), 1 / sqrt(in_dim))
        layer.lora_A = nn.Parameter(down)
        layer.lora_B = nn.Parameter(layer.weight.new_zeros(out_dim, rank, *kernel))
        layer.lora_scale, layer.lora_dropout = alpha / rank, dropout
        layer.register_forward_hook(_add_update)


def is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies each position by one matrix."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1)
    return isinstance(module, nn.Linear)


def _add_update(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    x = F.dropout(inputs[0], layer.lora_dropout, layer.training)  # type: ignore[arg-type]
    down, up = layer.lora_A, layer.lora_B
    assert isinstance(down, Tensor)
    assert isinstance(up, Tensor)
    update = F.linear(F.linear(x, down), up) if down.ndim == 2 else F.conv2d(F.conv2d(x, down), up)
    return output + layer.lora_scale * update  # type: ignore[operator]


def has_updates(model: nn.Module) -> bool:
    """Whether anything inside has a low-rank update."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def take_adapter(  # noqa: PLR0913  (what an adapter says of itself)
    tensors: Mapping[str, Tensor], whole: Sequence[str], *, base: str, rank: int, alpha: float, dropout: float
) -> Adapter:
    """Collect what was learned beside the frozen weights.

    Args:
        tensors: The model's state.
        whole: Parts that learned in full.
        base: What the model was loaded from.
        rank: Of the updates, as `add_updates` was given it; `alpha` and `dropout` likewise.
        alpha: See `rank`.
        dropout: See `rank`.
    """
    updates = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in ("lora_A", "lora_B")}
    kept = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in whole}
    return Adapter(base=base, rank=rank, alpha=alpha, dropout=dropout, updates=updates, whole=kept)


@torch.no_grad()
def merge_updates(model: nn.Module) -> None:
    """Add the updates to the weights and take them away; the model computes what it did."""
    for layer in model.modules():
        if not hasattr(layer, "lora_A"):
            continue
        down, up = layer.lora_A, layer.lora_B
        layer.weight += layer.lora_scale * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)  # type: ignore
        del layer.lora_A, layer.lora_B
        layer._forward_hooks.clear()
