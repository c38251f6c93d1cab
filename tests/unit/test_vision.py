"""The encoder takes pictures of every size that it can divide, and no other."""

import pytest
import torch

from fastvlm.config import VisionConfig
from fastvlm.errors import InputError
from fastvlm.model.vision import FastViTHD


@pytest.fixture(scope="module")
def vision():
    config = VisionConfig(image_size=64, depths=(1, 1, 1, 1, 1), dims=(16, 32, 64, 64, 64))
    return FastViTHD(config).eval()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128), (192, 64)])
@torch.inference_mode()
def test_sides_that_are_multiples_of_64_give_a_feature_for_each_square(height, width, vision):
    features = vision(torch.rand(2, 3, height, width))

    assert features.shape == (2, height * width // 64**2, 128)


@pytest.mark.parametrize(("height", "width"), [(100, 128), (128, 65), (63, 63), (32, 64), (0, 64), (64, 0)])
def test_other_sides_are_refused_with_both_numbers(height, width, vision):
    with pytest.raises(InputError, match=f"pixels are {height} x {width}; both sides must be multiples of 64"):
        vision(torch.rand(1, 3, height, width))
