"""Apple's and transformers' preprocessing, to the last bit, on pictures of every awkward kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastvlm import image

GOLDENS = Path(__file__).parents[1] / "goldens"
EXPECTED = load_file(GOLDENS / "pixels.expected.safetensors")


@pytest.mark.parametrize("case", sorted(EXPECTED))
def test_pixels_equal_the_reference_to_the_last_bit(case):
    fit, file = case.split(".", 1)
    picture = image.read(GOLDENS / "images" / file, exif="ignore")

    values = image.resize(picture, size=256, fit=fit)

    np.testing.assert_array_equal(values.transpose(2, 0, 1), EXPECTED[case])


@pytest.mark.parametrize("case", sorted(EXPECTED))
def test_pixels_are_the_bytes_divided_by_255(case):
    fit, file = case.split(".", 1)
    picture = image.read(GOLDENS / "images" / file, exif="ignore")

    pixels = image.to_pixels(picture, size=256, fit=fit)

    expected = torch.from_numpy(EXPECTED[case].astype(np.float32) / np.float32(255))[None]
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_one_pixel_fills_the_square(fit):
    picture = image.read(GOLDENS / "images" / "pixel.png")

    values = image.resize(picture, size=64, fit=fit)

    assert values.shape == (64, 64, 3)
    assert (values == np.asarray(picture)[0, 0]).all()
