"""Rounding with error compensation: what one weight's rounding spoils, the weights behind it make good (GPTQ).

arXiv 2210.17323, with the groups' scales chosen first (for errors weighted by the inputs' second moments) and the
inputs taken in the order of falling second moments.

Letters: `N` outputs, `K` inputs, `g` groups of a row.
"""

from typing import Final

import torch
from torch import Tensor

from fastvlm.model.quantize import ROW, Packing, choose_scales, pack, to_numbers

_DAMPING: Final = 0.01  # of the mean second moment, added to each: 3.3 of the paper
_BLOCK: Final = 128  # inputs whose updates of the rest are applied together


@torch.no_grad()
def compensated(matrix: Tensor, moments: Tensor, packing: Packing, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a matrix so that its outputs change least.

    Args:
        matrix: `(N, K)`.
        moments: Second moments of the inputs, `(K, K)`: the mean of `x x^T` over tokens.
        packing: Fits `K`.
        dtype: Of scales and biases.

    Returns:
        As `model.quantize.quantise`.
    """
    num_outputs, num_inputs = matrix.shape
    size = num_inputs if packing.group_size == ROW else packing.group_size
    moments = moments.double()
    diagonal = moments.diagonal().clone()
    weights = matrix.double().clone()
    groups = weights.float().view(num_outputs, -1, size)
    importance = (diagonal + _DAMPING * diagonal.mean()).float().view(groups.shape[1:])
    scales, biases = choose_scales(groups, packing, dtype, importance)  # (N, g)
    order = diagonal.argsort(descending=True)
    weights, moments = weights[:, order], moments[order][:, order]
    moments.diagonal().add_(_DAMPING * float(diagonal.mean()) + 1e-12)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)  # (K, K)
    numbers = torch.empty_like(weights)
    columns = order // size  # the group of each input
    for start in range(0, num_inputs, _BLOCK):
        stop = min(start + _BLOCK, num_inputs)
        errors = torch.empty(num_outputs, stop - start, dtype=weights.dtype)
        for i in range(start, stop):
            scale, bias = scales[:, columns[i]].double(), biases[:, columns[i]].double()
            numbers[:, i] = to_numbers(weights[:, i], scale, bias, packing.bits)
            error = (weights[:, i] - (numbers[:, i] * scale + bias)) / inverse[i, i]
            weights[:, i:stop] -= error[:, None] * inverse[i, i:stop]
            errors[:, i - start] = error
        weights[:, stop:] -= errors @ inverse[start:stop, stop:]
    restored = torch.empty_like(numbers)
    restored[:, order] = numbers
    return pack(restored, packing.bits), scales, biases
