"""The whole model: encode pictures, embed tokens, merge the two, read the sentence.

Letters: `P` images, `H, W` pixels, `N` positions, `C` channels of vision, `B` rows, `T` tokens, `D` width of language,
`V` vocabulary.
"""

from typing import Final

import torch
from torch import Tensor, nn

from fastvlm.config import Config
from fastvlm.model.language import Qwen2
from fastvlm.model.merge import merge, scatter
from fastvlm.model.projector import Projector
from fastvlm.model.vision import LAYER_SCALE, FastViTHD

_PIXELS: Final = 2**21
"""Seen at once on a CPU: the maps of more no longer stay in its caches, and each picture takes longer."""


class FastVLM(nn.Module):
    """Vision encoder, projector and language model."""

    def __init__(self, config: Config, initial_scale: float = LAYER_SCALE) -> None:
        super().__init__()
        self.config = config
        self.vision = FastViTHD(config.vision, initial_scale)
        self.projector = Projector(config.projector)
        self.language = Qwen2(config.language)

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn pixels `(P, 3, H, W)` into image embeddings `(P, N, D)`: a value one may keep and ask again."""
        if pixels.device.type != "cpu":
            return self.projector(self.vision(pixels))
        step = max(1, _PIXELS // (pixels.shape[-2] * pixels.shape[-1]))
        return torch.cat([self.projector(self.vision(some)) for some in torch.split(pixels, step)])

    def embed(self, token_ids: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """Embed token ids `(B, T)` and put image embeddings `(P, N, D)` where the placeholders are.

        Returns:
            What the language model reads, `(B, T, D)`.

        Raises:
            InputError: The prompt has more or fewer placeholders than the images need.
        """
        text_embeds, is_image = self._embed_text(token_ids)
        if image_embeds is None:
            image_embeds = text_embeds.new_zeros(0, text_embeds.shape[-1])
        return merge(text_embeds, image_embeds, is_image)

    def forward(
        self,
        token_ids: Tensor,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Return all logits `(B, T, V)` for token ids `(B, T)` and pictures; the arguments are those of `read`."""
        return self.language.head(self.read(token_ids, pixels, features, segments))

    def read(
        self,
        token_ids: Tensor,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states `(B, T, D)` for token ids `(B, T)` and pictures: what training needs.

        The pictures come as pixels `(P, 3, H, W)`, or as features `(P, N, C)` that a frozen encoder made of them. The
        caller has seen to it that there is a placeholder for each image embedding. `segments` `(B, T)` says which of
        several conversations in a row a token belongs to.
        """
        embeds, is_image = self._embed_text(token_ids)
        if pixels is not None:
            features = self.vision(pixels)
        if features is not None:
            embeds = scatter(embeds, self.projector(features), is_image)
        return self.language(embeds, segments=segments)

    def _embed_text(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        is_image = token_ids == self.config.image_token_id
        # A tokenizer without `<image>` has no row for it, so the lookup must not see the placeholder.
        return self.language.embed(token_ids.masked_fill(is_image, 0)), is_image
