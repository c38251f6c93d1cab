"""Matrices of bfloat16 as the tiles of AMX take them, for the library of `fastvlm.native`.

Letters: `N` outputs and `K` inputs of a matrix.
"""

from typing import Final

import torch
from torch import Tensor

MULTIPLE: Final = 32  # of which the kernels take inputs and outputs
_SIDE: Final = 16  # outputs in a tile, as in native/tiles.h
_PAIRS: Final = 16  # of inputs in a tile


def can_tile(matrix: Tensor) -> bool:
    """Whether `tiles_of` takes a matrix `(N, K)`, or a 1 x 1 convolution's kernel `(N, K, 1, 1)`."""
    is_matrix = all(size == 1 for size in matrix.shape[2:])
    return matrix.dtype == torch.bfloat16 and is_matrix and not any(size % MULTIPLE for size in matrix.shape[:2])


def tiles_of(matrix: Tensor) -> Tensor:
    """Lay out a matrix `(N, K)` as a right factor: `(N / 16, K / 32, 16, 16, 2)`, the inputs in pairs.

    A tile is 16 pairs of inputs by 16 outputs, one behind the other in memory.
    """
    num_outputs, num_inputs = matrix.shape
    pairs = matrix.contiguous().view(torch.int32).view(num_outputs // _SIDE, _SIDE, num_inputs // 32, _PAIRS)
    tiles = pairs.permute(0, 2, 3, 1).contiguous()
    return tiles.view(torch.bfloat16).view(*tiles.shape, 2)
