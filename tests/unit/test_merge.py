"""Putting image embeddings where the placeholders are."""

import pytest
import torch

from fastvlm.errors import InputError
from fastvlm.model.merge import merge


def test_images_go_into_the_placeholders_in_reading_order():
    text = torch.zeros(2, 5, 3)
    is_image = torch.tensor([[False, True, True, False, False], [True, True, False, True, True]])
    images = torch.arange(1, 7).repeat_interleave(3).float().view(3, 2, 3)

    merged = merge(text, images, is_image)

    assert merged[..., 0].tolist() == [[0, 1, 2, 0, 0], [3, 4, 0, 5, 6]]


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_a_wrong_number_of_images_is_said(num_images):
    is_image = torch.tensor([[False, True, True, True, True]])

    with pytest.raises(InputError, match=f"has 4 image placeholders, the images make {2 * num_images}"):
        merge(torch.zeros(1, 5, 3), torch.ones(num_images, 2, 3), is_image)
