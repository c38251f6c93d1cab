"""Putting the image into the sentence."""

from torch import Tensor

from fastvlm.errors import InputError


def merge(text_embeds: Tensor, image_embeds: Tensor, is_image: Tensor) -> Tensor:
    """Replace the placeholder embeddings with the image embeddings, in order.

    Args:
        text_embeds: Embedded tokens, placeholders included, `(B, T, D)`.
        image_embeds: Projected image features, `(P, N, D)`; images in reading order.
        is_image: True where a token is a placeholder, `(B, T)`.

    Returns:
        What the language model reads, `(B, T, D)`.

    Raises:
        InputError: The prompt has more or fewer placeholders than the images need.
    """
    num_slots = int(is_image.sum())
    num_vectors = image_embeds.shape[:-1].numel()
    if num_slots != num_vectors:
        raise InputError(f"the prompt has {num_slots} image placeholders, the images make {num_vectors}")
    return scatter(text_embeds, image_embeds, is_image)


def scatter(text_embeds: Tensor, image_embeds: Tensor, is_image: Tensor) -> Tensor:
    """Do what `merge` does without counting, which waits for the device; training counts in `collate`."""
    return text_embeds.masked_scatter(is_image.unsqueeze(-1), image_embeds.to(text_embeds.dtype))
