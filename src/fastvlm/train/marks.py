"""What is where in a drawn picture, as numbers that a batch can hold."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastvlm.synth.sample import Mark

MOST = 64
"""Marks that are kept of a picture; the fullest drawing has fewer."""
FINE = 30_000
"""Positions are whole numbers of so many parts of the square's side."""
NONE = -1
"""Label of a row without a mark."""


def encode_marks(marks: Sequence[Mark], labels: Mapping[str, int], size: tuple[int, int]) -> Tensor:
    """Write the marks of a picture of `size` (width, height), padded to a square, as rows of label, x and y.

    Returns:
        int16, `(MOST, 3)`; rows that are left over have the label `NONE`.
    """
    side = max(size)
    rows = torch.full((MOST, 3), NONE, dtype=torch.int16)
    for i, mark in enumerate(marks[:MOST]):
        x, y = ((side - extent) / 2 + share * extent for share, extent in zip((mark.x, mark.y), size, strict=True))
        rows[i] = torch.tensor((labels[mark.label], round(x / side * FINE), round(y / side * FINE)))
    return rows
