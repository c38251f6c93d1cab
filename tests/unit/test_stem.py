"""The stem's first two convolutions in one are those of PyTorch, and the fused encoder takes them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.zoo import resolve
from fastvlm.errors import InputError
from fastvlm.model import fold, fused
from fastvlm.model.depthwise import DepthwiseConv
from fastvlm.model.stem import StemConvs, can_join

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [  # P, C, H, W: lanes, lines and tiles that are whole, too many or too few
    (1, 96, 64, 64),
    (1, 1, 1, 1),
    (2, 16, 3, 2),
    (1, 48, 31, 130),
    (2, 17, 5, 257),
    (1, 200, 33, 20),
    (3, 32, 150, 128),
    (1, 40, 70, 600),
]


def convs_of(dim, dtype=torch.float32):
    first, second = nn.Conv2d(3, dim, 3, 2, 1), nn.Conv2d(dim, dim, 3, 2, 1, groups=dim)
    return [conv.requires_grad_(False).to(dtype) for conv in (first, second)]


def exact(first, second, x, *, has_gelu=True):
    """In float64."""
    for conv, acts in ((first, True), (second, has_gelu)):
        x = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), 2, 1, 1, conv.groups)
        x = torch.where(x.isneginf(), 0, F.gelu(x)) if acts else x  # of minus infinity it is its limit
    return x


@pytest.mark.parametrize("has_gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_are_those_of_float64_and_rounded_once(size, dtype, has_gelu, convolving):
    num_images, dim, *sides = size
    convs, x = convs_of(dim, dtype), (3 * torch.randn(num_images, 3, *sides)).to(dtype)

    found = StemConvs(*convs, convolving, has_gelu=has_gelu)(x)

    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    rtol = 0 if dtype == torch.float32 else 2**-8
    assert_close(found.double(), exact(*convs, x, has_gelu=has_gelu), rtol=rtol, atol=3e-5)  # GELU is a polynomial


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pixel_that_is_no_number_is_not_hidden_and_stays_where_it_is(dtype, damage, convolving):
    convs, x = convs_of(24, dtype), torch.randn(2, 3, 40, 140).to(dtype)
    ours = StemConvs(*convs, convolving, has_gelu=True)
    before = ours(x)
    x[1, 2, 21, 131] = damage

    found = ours(x)

    expected = exact(*convs, x)
    assert_close(found.double(), expected, rtol=2**-8, atol=3e-5, equal_nan=True)
    is_whole = torch.ones_like(found, dtype=torch.bool)
    is_whole[1, :, 5:7, 32:34] = False
    assert torch.equal(found[is_whole], before[is_whole])
    assert 0 < (~expected.isfinite()).sum() <= (~is_whole).sum()


@pytest.mark.parametrize("num_threads", [1, 3, 64])
def test_the_number_of_threads_and_whose_they_are_changes_nothing(num_threads, monkeypatch, convolving):
    ours, x = StemConvs(*convs_of(96), convolving), torch.randn(2, 3, 200, 330)
    expected = ours(x)
    monkeypatch.setattr(ours.second, "_parallel", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)

    assert torch.equal(ours(x), expected)


def test_what_the_kernel_does_not_know_is_left_to_others():
    first, second = convs_of(8)
    assert can_join(first, second)
    assert not can_join(nn.Conv2d(4, 8, 3, 2, 1), second)
    assert not can_join(nn.Conv2d(3, 8, 3, 1, 1), second)
    assert not can_join(nn.Conv2d(3, 8, 5, 2, 2), second)
    assert not can_join(nn.Conv2d(3, 8, 3, 2), second)
    assert not can_join(nn.Conv2d(3, 8, 3, 2, 1, bias=False), second)
    assert not can_join(nn.Conv2d(3, 8, 3, 2, 1, dilation=2), second)
    assert not can_join(nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect"), second)
    assert not can_join(nn.Conv2d(3, 9, 3, 2, 1, groups=3), convs_of(9)[1])
    assert not can_join(first, nn.Conv2d(8, 8, 3, 1, 1, groups=8))
    assert not can_join(first, nn.Conv2d(8, 8, 7, 2, 3, groups=8))
    assert not can_join(first, nn.Conv2d(8, 8, 3, 2, 1))
    assert not can_join(first, copy.deepcopy(second).bfloat16())
    assert not can_join(*(conv.half() for conv in convs_of(8)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pixels_of_another_shape_or_format_are_refused_and_none_are_nothing(dtype, convolving):
    ours = StemConvs(*convs_of(20, dtype), convolving)
    for size in ((1, 1, 8, 8), (1, 4, 8, 8), (3, 8, 8)):
        with pytest.raises(InputError, match="pixels must be"):
            ours(torch.rand(size, dtype=dtype))
    for other in {torch.float16, torch.float64, *DTYPES} - {dtype}:
        with pytest.raises(InputError, match="pixels must be"):
            ours(torch.rand(1, 3, 8, 8).to(other))

    assert ours(torch.rand(0, 3, 8, 8, dtype=dtype)).shape == (0, 20, 2, 2)


@torch.inference_mode()
def test_the_fused_encoder_takes_it(convolving):
    folded = fold.for_inference(load(resolve("nano"), dtype=torch.float32).model).vision
    stem = fused.fuse(copy.deepcopy(folded).to(memory_format=torch.channels_last), convolving).stem
    pixels = torch.rand(2, 3, 192, 320)

    expected, found = folded.stem(pixels), stem(pixels.to(memory_format=torch.channels_last))

    assert isinstance(stem[0], StemConvs)
    assert isinstance(stem[0].second, DepthwiseConv)
    assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean()))  # GELU is a polynomial


@torch.inference_mode()
def test_a_stem_without_gelu_between_them_is_left_to_others(convolving):
    folded = fold.for_inference(load(resolve("nano"), dtype=torch.float32).model).vision
    folded.stem[0].has_act = False
    stem = fused.fuse(copy.deepcopy(folded).to(memory_format=torch.channels_last), convolving).stem
    pixels = torch.rand(1, 3, 64, 96)

    expected, found = folded.stem(pixels), stem(pixels.to(memory_format=torch.channels_last))

    assert not any(isinstance(module, StemConvs) for module in stem.modules())
    assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean()))  # GELU is a polynomial
