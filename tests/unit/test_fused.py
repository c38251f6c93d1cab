"""The fused encoder computes what the folded one does."""

import copy

import pytest
import torch
from torch.testing import assert_close

from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.zoo import resolve
from fastvlm.config import PRESETS
from fastvlm.model import fold, fused
from fastvlm.model.vision import FastViTHD

BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor multiplies no bfloat16"
    ),
)


@pytest.fixture(scope="module")
def folded():
    return fold.for_inference(load(resolve("nano"), dtype=torch.float32).model).vision


@pytest.mark.parametrize("size", [(1, 3, 64, 64), (1, 3, 128, 192), (3, 3, 256, 256), (2, 3, 448, 320)], ids=str)
def test_fused_features_are_those_of_the_folded_encoder(folded, size):
    pixels = torch.rand(size)
    encoder = copy.deepcopy(folded).to(memory_format=torch.channels_last)

    with torch.inference_mode():
        expected = folded(pixels)
        got = fused.fuse(encoder)(pixels.to(memory_format=torch.channels_last))

    assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().mean()))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_sizes_may_come_in_any_order(folded, dtype):
    encoder = fused.fuse(copy.deepcopy(folded).to(dtype).to(memory_format=torch.channels_last))
    sizes = [(64, 64), (256, 128), (64, 64), (384, 384), (64, 64), (256, 128)]
    pixels = [torch.rand(1, 3, *size).to(dtype, memory_format=torch.channels_last) for size in sizes]

    with torch.inference_mode():
        got = [encoder(x) for x in pixels]
        alone = [fused.fuse(copy.deepcopy(folded).to(dtype).to(memory_format=torch.channels_last))(x) for x in pixels]

    for one, other in zip(got, alone, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [BFLOAT16])
def test_fused_bfloat16_is_no_further_from_float32_than_unfused(folded, dtype):
    pixels = torch.rand(4, 3, 256, 256)  # several, for one picture's distances vary by a tenth
    plain = copy.deepcopy(folded).to(dtype).to(memory_format=torch.channels_last)

    with torch.inference_mode():
        exact = folded(pixels)
        unfused = plain(pixels.to(dtype)).float()
        got = fused.fuse(plain)(pixels.to(dtype, memory_format=torch.channels_last)).float()

    def distance(features):
        return float((features - exact).norm() / exact.norm())

    assert distance(got) < 1.2 * distance(unfused)
    assert distance(got) < 3e-2


def test_an_encoder_that_is_not_folded_is_not_fused():
    assert not fused.can_fuse(FastViTHD(PRESETS["nano"].vision))


def test_an_encoder_in_another_format_is_not_fused(folded):
    assert fused.can_fuse(folded)
    assert not fused.can_fuse(copy.deepcopy(folded).half())
    assert not fused.can_fuse(copy.deepcopy(folded).to("meta"))
