"""Our depthwise convolutions are those of PyTorch, and the fused encoder takes them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.zoo import resolve
from fastvlm.model import fold, fused
from fastvlm.model.depthwise import DepthwiseConv, can_convolve

KINDS = [(3, 1), (3, 2), (7, 1), (7, 2)]  # kernel, stride
SIZES = [  # P, C, h, w: lanes, lines and tiles that are whole, too many or too few
    (1, 16, 8, 16),
    (1, 1, 1, 1),
    (2, 3, 2, 5),
    (1, 48, 5, 2),
    (2, 40, 33, 24),
    (1, 160, 19, 9),
    (3, 17, 41, 70),
    (1, 32, 12, 129),
]


def conv_of(dim, kernel, stride, times=1, dtype=torch.float32):
    return nn.Conv2d(dim, times * dim, kernel, stride, kernel // 2, groups=dim).requires_grad_(False).to(dtype)


def exact(conv, x, *, has_gelu=False):
    """In float64, the first outputs of all inputs first."""
    y = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding, 1, conv.groups)
    y = F.gelu(y) if has_gelu else y
    return y.unflatten(1, (conv.groups, -1)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize(("kernel", "stride"), KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("times", [1, 2])
def test_sums_are_those_of_float64(size, kernel, stride, times, convolving):
    conv, x = conv_of(size[1], kernel, stride, times), torch.randn(size)

    found = DepthwiseConv(conv, convolving)(x)

    assert_close(found.double(), exact(conv, x), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("kernel", "stride"), KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bfloat16_is_rounded_once(size, kernel, stride, convolving):
    conv, x = conv_of(size[1], kernel, stride, dtype=torch.bfloat16), torch.randn(size).bfloat16()

    found = DepthwiseConv(conv, convolving)(x)

    assert found.dtype == torch.bfloat16
    assert_close(found.double(), exact(conv, x), rtol=2**-8, atol=3e-6)  # half the last bit, and that of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), KINDS)
def test_gelu_comes_before_rounding(kernel, stride, dtype, convolving):
    conv, x = conv_of(48, kernel, stride, 2, dtype), (5 * torch.randn(1, 48, 20, 36)).to(dtype)

    found = DepthwiseConv(conv, convolving, has_gelu=True)(x)

    rtol = 0 if dtype == torch.float32 else 2**-8
    assert_close(found.double(), exact(conv, x, has_gelu=True), rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_even_and_what_is_too_large_to_infinity(dtype, convolving):
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, 1e-30, 0.0, torch.nan, -torch.inf])
    ours = DepthwiseConv(conv_of(len(values), 3, 1, dtype=dtype), convolving)
    ours.weight.zero_()
    ours.bias[0, 0, 0, : len(values)] = values

    found = ours(torch.randn(1, len(values), 2, 18).to(dtype))

    expected = values.to(dtype).view(1, -1, 1, 1).expand(found.shape)
    assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_gelu", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), KINDS)
def test_a_number_that_is_none_is_not_hidden_and_stays_where_it_is(kernel, stride, has_gelu, dtype, damage, convolving):
    conv, x = conv_of(20, kernel, stride, dtype=dtype), torch.randn(2, 20, 9, 21).to(dtype)
    ours = DepthwiseConv(conv, convolving, has_gelu=has_gelu)
    before = ours(x)
    x[1, 18, 4, 20] = damage

    found = ours(x)

    expected = exact(conv, x)
    if has_gelu:  # of minus infinity it is its limit
        expected = torch.where(expected.isneginf(), 0, F.gelu(expected))
    is_whole = exact(conv, x).isfinite()
    assert_close(found.double(), expected, rtol=2**-8, atol=2e-5, equal_nan=True)
    assert torch.equal(found[is_whole], before[is_whole])
    assert 0 < (~is_whole).sum() <= kernel**2


@pytest.mark.parametrize("num_threads", [1, 3, 64])
def test_the_number_of_threads_and_whose_they_are_changes_nothing(num_threads, monkeypatch, convolving):
    conv, x = conv_of(144, 7, 1), torch.randn(2, 144, 40, 30)
    ours = DepthwiseConv(conv, convolving)
    expected = ours(x)
    monkeypatch.setattr(ours, "_parallel", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)

    assert torch.equal(ours(x), expected)


def test_what_the_kernel_does_not_know_is_left_to_others():
    assert can_convolve(conv_of(8, 7, 2, 2))
    assert not can_convolve(nn.Conv2d(8, 8, 3, padding=1))
    assert not can_convolve(nn.Conv2d(8, 8, 3, groups=8))
    assert not can_convolve(nn.Conv2d(8, 8, 5, padding=2, groups=8))
    assert not can_convolve(nn.Conv2d(8, 8, 3, 3, padding=1, groups=8))
    assert not can_convolve(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8))
    assert not can_convolve(conv_of(8, 3, 1, dtype=torch.float16))


@pytest.mark.parametrize("size", [(1, 3, 64, 64), (2, 3, 256, 320)], ids=str)
@torch.inference_mode()
def test_the_fused_encoder_takes_it_for_every_channel_by_channel_convolution(size, convolving):
    folded = fold.for_inference(load(resolve("nano"), dtype=torch.float32).model).vision
    count = sum(can_convolve(module) for module in folded.modules())
    encoder = fused.fuse(copy.deepcopy(folded).to(memory_format=torch.channels_last), convolving)
    pixels = torch.rand(size)

    expected, found = folded(pixels), encoder(pixels.to(memory_format=torch.channels_last))

    assert count > 20
    assert sum(isinstance(module, DepthwiseConv) for module in encoder.modules()) == count
    assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean()))  # GELU is a polynomial
