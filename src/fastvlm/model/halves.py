"""Matrices of bfloat16 in a model that computes in float32: half the bytes to read, and nothing is rounded.

Letters: `N` outputs and `K` inputs of a matrix, `D` width, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FLOATS: Final = 2**23  # made at once: they stay in the last cache until they are multiplied with


def halve(module: nn.Module, forget: Callable[[Tensor], None]) -> None:
    """Exchange each linear layer and table whose values bfloat16 holds exactly, in place.

    `forget` is called with each weight that was copied.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear | nn.Embedding) and _is_exact(layer.weight):
            weight = layer.weight.detach()
            bits = weight.to(torch.bfloat16)
            new = HalfEmbedding(bits) if isinstance(layer, nn.Embedding) else HalfLinear(bits, layer.bias)
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, new)
            if bits is not weight:
                forget(weight)


def _is_exact(weight: Tensor) -> bool:
    if weight.dtype == torch.bfloat16:
        return True
    rows = (weight[:1], weight)  # most that are not exact are found out by their first row
    return weight.dtype == torch.float32 and all(torch.equal(part.bfloat16().float(), part) for part in rows)


class _Half(nn.Module):
    """A matrix `(N, K)` of bfloat16; it is kept as whole numbers, which `Module.to` leaves as they are."""

    bits: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("bits", weight.view(torch.int16))

    @property
    def weight(self) -> Tensor:
        """The matrix."""
        return self.bits.view(torch.bfloat16)

    def multiply(self, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`, by floats of some rows at a time."""
        parts = torch.split(self.weight, max(1, _FLOATS // self.weight.shape[1]))
        products = [F.linear(x, part.float()) for part in parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


class HalfLinear(_Half):
    """A linear layer."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        """Take a matrix `(N, K)` of bfloat16 and perhaps a bias `(N,)`."""
        super().__init__(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`."""
        product = self.multiply(x)
        return product if self.bias is None else product + self.bias


class HalfEmbedding(_Half):
    """A table of tokens, which is also the head of a tied model."""

    def forward(self, token_ids: Tensor) -> Tensor:
        """`(...)` ids to `(..., D)`."""
        return F.embedding(token_ids, self.weight).float()

    def as_head(self, hidden: Tensor) -> Tensor:
        """`(..., D)` hidden states to `(..., V)` logits."""
        return self.multiply(hidden)
