"""Contrastive pretraining of a vision encoder (CLIP, arXiv 2103.00020): pictures beside the words that name them.

Two towers, the loss between them, and the gathering of a batch that is spread over processes. It knows no files.

Letters: `P` pictures, as many as captions; `H, W` pixels; `T` tokens; `K` width of the shared embedding.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from fastvlm.config import LanguageConfig
from fastvlm.model.language import Qwen2
from fastvlm.model.vision import FastViTHD

_FIRST_SCALE: Final = 1 / 0.07  # CLIP's temperature at the start
_LARGEST_SCALE: Final = 100.0  # and the bound of what is learned


class TextTower(nn.Module):
    """A caption to an embedding: the house's Qwen2, read at the caption's last token.

    Attention is causal, so the last token has seen the whole caption and padding behind it changes nothing.
    """

    def __init__(self, config: LanguageConfig, clip_dim: int) -> None:
        super().__init__()
        self.language = Qwen2(config)
        self.proj = nn.Linear(config.dim, clip_dim, bias=False)

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Embed captions `(P, T)` of `lengths` `(P,)` as `(P, K)`."""
        hidden = self.language(self.language.embed(token_ids))  # (P, T, D)
        return self.proj(hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1])


class Clip(nn.Module):
    """Both towers and the temperature between them."""

    def __init__(self, vision: FastViTHD, text: TextTower) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE)))

    def forward(self, pixels: Tensor, token_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed pictures `(P, 3, H, W)` and captions `(P, T)`; both `(P, K)`, of length 1."""
        pictures = self.vision.embed(self.vision(pixels))
        assert pictures is not None, "the encoder has a CLIP head"
        return F.normalize(pictures.float(), dim=-1), F.normalize(self.text(token_ids, lengths).float(), dim=-1)

    def scale(self) -> Tensor:
        """What cosines are multiplied by."""
        return self.logit_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the temperature where CLIP keeps it, after each step."""
        self.logit_scale.clamp_(0, math.log(_LARGEST_SCALE))


def contrastive_loss(pictures: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    """Compare each picture with all captions and each caption with all pictures: symmetric InfoNCE (arXiv 1807.03748).

    Args:
        pictures: Embeddings of length 1, `(P, K)`.
        captions: The same; caption `i` belongs to picture `i`.
        scale: The inverse temperature, a scalar.

    Returns:
        The mean of both cross-entropies, a scalar.
    """
    logits = scale * pictures @ captions.T  # (P, P)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward brings each process the gradients that all of them have for its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        ctx.num_rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        distributed.all_reduce(total)
        first = ctx.num_rows * distributed.get_rank()
        return total[first : first + ctx.num_rows]


def gather(rows: Tensor) -> Tensor:
    """Put the rows `(P, K)` of all processes under one another, as many from each; alone, return them as they are.

    Each process then computes the loss of the whole batch. Gradients come back summed over the processes, so that their
    mean over processes, as DDP takes it, is the gradient of one process with the whole batch.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Take the mean of each gradient over the processes, in place; alone, do nothing."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How often, among all captions, a picture's own is the nearest; and the other way round. 0 to 1."""

    caption_of_picture: float
    picture_of_caption: float


def recall(pictures: Tensor, captions: Tensor) -> Recall:
    """Compute recall at 1 of embeddings of length 1, both `(P, K)`; equal captions count as one."""
    similar = pictures @ captions.T
    is_same = captions @ captions.T > 1 - 1e-5  # of which it is chance which one is nearest
    own = torch.arange(len(similar), device=similar.device)
    return Recall(
        caption_of_picture=float(is_same[own, similar.argmax(1)].float().mean()),
        picture_of_caption=float(is_same[own, similar.argmax(0)].float().mean()),
    )
