"""Dense supervision: the encoder says what is where, which drawn pictures know for certain.

The loss of the next token tells an encoder little about where it was wrong. Here small heads, which are thrown away
after training, predict from its maps which label (`synth/marks.py`) has a point in which cell of the picture: as
detectors of key points learn (arXiv 1904.07850), with a focal weight (arXiv 2006.04388).

Letters: `P` images, `H, W` pixels, `h, w` map, `k` cells a side, `C` channels, `M` marks of a picture, `L` labels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.model.fastvlm import FastVLM
from fastvlm.train.loop import Losses, Objective, learned_losses
from fastvlm.train.marks import FINE, NONE

CELL = 8
"""Side of a cell in pixels: about the width of the smallest letters."""
WIDTH = 64
"""Channels of a cell before it is classified."""
RARE = -6.0
"""Logit before learning: nearly every cell has nearly no label."""


def targets(marks: Tensor, num_labels: int, cells: int, dtype: torch.dtype) -> Tensor:
    """Share each of the marks `(P, M, 3)` among the four cells around it: `(P, L, k, k)`, from 0 to 1."""
    num_images, num_marks, _ = marks.shape
    label, position = marks[..., 0].long(), marks[..., 1:].float() / FINE * cells - 0.5  # (P, M), (P, M, 2)
    low = position.floor()
    share = position - low
    image = torch.arange(num_images, device=marks.device)[:, None].expand(-1, num_marks)
    grid = torch.zeros(num_images * num_labels * cells * cells, dtype=dtype, device=marks.device)
    for right in (0, 1):
        for below in (0, 1):
            x, y = low[..., 0].long() + right, low[..., 1].long() + below
            weight = (share[..., 0] if right else 1 - share[..., 0]) * (share[..., 1] if below else 1 - share[..., 1])
            is_inside = (label != NONE) & (x >= 0) & (x < cells) & (y >= 0) & (y < cells)
            index = ((image * num_labels + label) * cells + y) * cells + x
            grid.index_add_(0, torch.where(is_inside, index, 0).flatten(), (weight * is_inside).to(dtype).flatten())
    return grid.view(num_images, num_labels, cells, cells).clamp(max=1)


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sum the binary cross-entropies, each weighted by how far off it is; the weight passes no gradient."""
    logits, wanted = logits.float(), wanted.float()
    losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return ((wanted - logits.detach().sigmoid()).abs() * losses).sum()


class DenseHead(nn.Module):
    """From a map to logits of each label in each cell."""

    def __init__(self, dim: int, stride: int, num_labels: int) -> None:
        super().__init__()
        self.ratio = stride // CELL
        self.spread = nn.Conv2d(dim, WIDTH * self.ratio**2, 1)
        self.classify = nn.Conv2d(WIDTH, num_labels, 1)
        nn.init.constant_(self.classify.bias, RARE)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, L, ratio h, ratio w)`."""
        return self.classify(F.gelu(F.pixel_shuffle(self.spread(x), self.ratio)))


class DenseObjective(Objective):
    """The loss of the next token, and what two heads say of the last convolutional stage and of the final map."""

    def __init__(self, model: FastVLM, num_labels: int, weight: float) -> None:
        """Put heads beside a model whose vision encoder learns; `weight` is that of their loss."""
        super().__init__(model)
        config = model.config.vision
        self.num_labels, self.weight = num_labels, weight
        self.middle = len(config.dims) - config.num_attention_stages - 1
        stride = config.stride >> (len(config.dims) - 1 - self.middle)
        self.heads = nn.ModuleList(
            (
                DenseHead(config.dims[self.middle], stride, num_labels),
                DenseHead(2 * config.dims[-1], config.stride, num_labels),
            )
        )

    def forward(self, tensors: Mapping[str, Tensor]) -> Losses:
        """Compute the losses of `token_ids` and `labels` `(B, T)`, square `pixels` and their `marks` `(P, M, 3)`.

        Without marks, as in validation, it is the loss of the next token alone.
        """
        if "marks" not in tensors:
            return super().forward(tensors)
        maps = self._maps(tensors["pixels"])
        hidden = self.model.read(tensors["token_ids"], features=maps[-1].flatten(2).transpose(1, 2))
        sums, counts = learned_losses(self.model, hidden, tensors["labels"])
        return Losses(sums, counts, extra=self.weight * self._loss(maps, tensors))

    def _maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels `(P, 3, H, W)`, as the encoder does, and keep the map of the middle stage."""
        vision = self.model.vision
        middle = vision.stages[: self.middle + 1](vision.stem(pixels))
        return middle, vision.final_conv(vision.stages[self.middle + 1 :](middle))

    def _loss(self, maps: tuple[Tensor, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        marks = tensors["marks"]
        wanted = targets(marks, self.num_labels, tensors["pixels"].shape[-1] // CELL, maps[0].dtype)
        losses = [focal_loss(head(found), wanted) for head, found in zip(self.heads, maps, strict=True)]
        return torch.stack(losses).mean() / (marks[..., 0] != NONE).sum().clamp(min=1)
