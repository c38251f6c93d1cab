"""Attention in AMX's tiles is that of float64, weights and results rounded to bfloat16; hidden keys are not seen."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.zoo import resolve
from fastvlm.config import LanguageConfig
from fastvlm.model import fold, fused
from fastvlm.model.cache import KVCache
from fastvlm.model.compiled import has_tiles
from fastvlm.model.language import Attention, rotary_angles
from fastvlm.model.tile_attention import TileAttention, TileKernel, can_attend

CONFIG = LanguageConfig(dim=128, num_layers=1, num_heads=4, num_kv_heads=2, mlp_dim=64, vocab_size=9, tied=True)


@pytest.fixture
def tiled(kernels):
    """The library, where it has tiles."""
    if not has_tiles(kernels):
        pytest.skip("this processor has no tiles")
    return kernels


def drawn(*shape, size=1.0):
    return (torch.randn(shape) * size).bfloat16()


def attend(kernels, query, key, value, *, is_causal):
    out = torch.full(query.shape, torch.nan, dtype=torch.bfloat16)
    TileKernel(kernels).attend(query, key, value, out, is_causal=is_causal)
    return out


def exact(query, key, value, *, is_causal):
    """What is right, in float64, and how much the rounding of the weights and of the result may change it."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    if is_causal:
        unseen = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1 + scores.shape[3] - scores.shape[2])
        scores = scores.masked_fill(unseen, -torch.inf)
    weights = scores.softmax(dim=-1)
    mean = weights @ value
    return mean, 1.02 * (2**-8 * (weights @ value.abs()) + 2**-7 * mean.abs())


def check(kernels, query, key, value, *, is_causal):
    found = attend(kernels, query, key, value, is_causal=is_causal)
    expected, tolerance = exact(query, key, value, is_causal=is_causal)
    assert ((found - expected).abs() <= tolerance + 1e-5).all()


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    ("num_queries", "before"), [(1, 0), (2, 0), (31, 5), (31, 30), (33, 0), (33, 95), (291, 0), (70, 291)]
)
def test_it_is_attention_in_float64_but_for_the_rounding(num_queries, before, is_causal, width, tiled):
    query = drawn(2, 4, num_queries, width)
    key, value = drawn(2, 2, before + num_queries, width), drawn(2, 2, before + num_queries, width)

    check(tiled, query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("num_keys", [1, 32, 127, 128, 129, 256, 1024])
def test_there_may_be_more_keys_than_queries_or_fewer(num_keys, tiled):
    check(tiled, drawn(1, 3, 40, 32), drawn(1, 3, num_keys, 32), drawn(1, 3, num_keys, 32), is_causal=False)


def test_it_is_as_near_as_pytorch(tiled):
    query, key, value = (drawn(1, 24, 256, 32, size=2) for _ in range(3))

    found = attend(tiled, query, key, value, is_causal=False)
    theirs = F.scaled_dot_product_attention(query, key, value)

    expected, _ = exact(query, key, value, is_causal=False)
    assert distance(found, expected) < 1.2 * distance(theirs, expected)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("slope", [-1.0, 1.0, 0.05])
def test_the_highest_score_may_come_first_or_last(slope, is_causal, tiled):
    query, key, value = drawn(1, 2, 600, 64), drawn(1, 1, 600, 64), drawn(1, 1, 600, 64)
    query[..., 0], key[..., 0] = 8, slope * torch.arange(600)  # scores from -600 to 600, or to 30

    check(tiled, query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("size", [0.0, 1e-20, 10.0])
def test_scores_may_be_all_alike_or_far_apart(size, tiled):
    query, key, value = drawn(1, 2, 50, 32, size=size), drawn(1, 2, 300, 32, size=size), drawn(1, 2, 300, 32)

    check(tiled, query, key, value, is_causal=False)


def test_what_lies_beside_a_head_is_neither_read_nor_written(tiled):
    num_images, num_positions, num_heads, width = 2, 77, 3, 32
    qkv = drawn(num_images, num_positions, 3, num_heads, width)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    keys, values = (torch.full((num_images, num_heads, 200, width), torch.nan).bfloat16() for _ in range(2))
    keys[:, :, :num_positions], values[:, :, :num_positions] = key, value
    room = torch.full((num_images, num_positions + 1, num_heads, width), 7.0).bfloat16()
    expected = attend(tiled, *(x.contiguous() for x in (query, key, value)), is_causal=False)

    assert torch.equal(attend(tiled, query, key, value, is_causal=False), expected)
    TileKernel(tiled).attend(
        query,
        keys[:, :, :num_positions],
        values[:, :, :num_positions],
        room[:, :num_positions].transpose(1, 2),
        is_causal=False,
    )
    assert torch.equal(room[:, :num_positions].transpose(1, 2), expected)
    assert (room[:, num_positions] == 7).all()


@pytest.mark.parametrize("what", ["query", "key"])
def test_a_number_that_is_none_is_not_hidden_and_is_seen_only_by_those_who_may(what, tiled):
    query, key, value = (drawn(1, 2, 150, 32) for _ in range(3))
    {"query": query, "key": key}[what][0, 1, 70, 5] = torch.nan

    found = attend(tiled, query, key, value, is_causal=True).isnan()

    expected = torch.zeros_like(found)
    expected[0, 1, 70 : 71 if what == "query" else None] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_a_value_that_is_none_is_not_hidden(damage, tiled):
    query, key, value = (drawn(1, 2, 150, 32) for _ in range(3))
    value[0, 1, 70, 5] = damage

    found = attend(tiled, query, key, value, is_causal=True)

    assert not found[0, 1, 70:, 5].isfinite().any()
    assert found[0, 0].isfinite().all()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_and_whose_they_are_changes_nothing(num_threads, monkeypatch, tiled):
    query, key, value = drawn(2, 4, 100, 64), drawn(2, 2, 300, 64), drawn(2, 2, 300, 64)
    expected, out = attend(tiled, query, key, value, is_causal=True), torch.empty_like(query)
    kernel = TileKernel(tiled)
    monkeypatch.setattr(kernel, "_parallel", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)

    kernel.attend(query, key, value, out, is_causal=True)

    assert torch.equal(out, expected)


def test_other_widths_and_formats_are_left_to_pytorch(tiled):
    assert can_attend(tiled, torch.bfloat16, 32)
    assert not can_attend(tiled, torch.float32, 32)
    assert not can_attend(tiled, torch.bfloat16, 48)
    assert not can_attend(tiled, torch.bfloat16, 288)


@pytest.fixture
def attention():
    module = Attention(CONFIG)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.requires_grad_(False).bfloat16()


def angles_of(positions):
    cosine, sine = rotary_angles(positions, CONFIG.head_dim, CONFIG.rope_theta)
    return cosine.bfloat16(), sine.bfloat16()


def read(module, pieces, lengths=(0, 0)):
    """Read pieces `(2, T, D)` one after the other into a cache; return what comes of each, and the cache."""
    cache = KVCache(CONFIG, num_rows=2, capacity=200, dtype=torch.bfloat16)
    cache.keys[:], cache.values[:] = drawn(*cache.keys.shape), drawn(*cache.values.shape)
    cache.lengths, found = list(lengths), []
    for piece in pieces:
        num_tokens = piece.shape[1]
        angles = angles_of(cache.positions(num_tokens))
        found.append(module(piece, angles, cache.is_seen(num_tokens), cache, 0))
        cache.advance([num_tokens, num_tokens])
    return found, cache


@pytest.fixture
def without_sdpa(monkeypatch):
    """PyTorch's attention must not be called."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)


def test_a_prompt_without_a_cache_goes_through_the_tiles(attention, tiled, request):
    x, angles = drawn(2, 70, CONFIG.dim), angles_of(torch.arange(70)[None])
    expected = attention(x, angles, None, None, 0)
    request.getfixturevalue("without_sdpa")

    found = TileAttention(attention, tiled)(x, angles, None, None, 0)

    assert distance(found, expected) < 0.01


@pytest.mark.parametrize("sizes", [(60,), (33, 40), (50, 2, 90)], ids=str)
def test_a_prompt_in_pieces_goes_through_the_tiles(sizes, attention, tiled, request):
    pieces = [drawn(2, size, CONFIG.dim) for size in sizes]
    torch.manual_seed(1)
    expected, kept = read(attention, pieces)
    request.getfixturevalue("without_sdpa")
    torch.manual_seed(1)

    found, cache = read(TileAttention(attention, tiled), pieces)

    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 0.01
    assert torch.equal(cache.keys, kept.keys)
    assert torch.equal(cache.values, kept.values)


@pytest.mark.parametrize(("num_tokens", "lengths"), [(1, (0, 0)), (1, (7, 7)), (5, (7, 9)), (1, (7, 9))], ids=str)
def test_one_token_and_rows_of_several_lengths_go_pytorchs_way(num_tokens, lengths, attention, tiled):
    pieces = [drawn(2, num_tokens, CONFIG.dim)]
    torch.manual_seed(1)
    (expected,), _ = read(attention, pieces, lengths)
    torch.manual_seed(1)

    (found,), _ = read(TileAttention(attention, tiled), pieces, lengths)

    assert torch.equal(found, expected)


def test_another_mask_goes_pytorchs_way(attention, tiled):
    x, angles = drawn(2, 9, CONFIG.dim), angles_of(torch.arange(9)[None])
    is_seen = torch.eye(9, dtype=torch.bool).expand(2, 1, 9, 9)

    found = TileAttention(attention, tiled)(x, angles, is_seen, None, 0)

    assert torch.equal(found, attention(x, angles, is_seen, None, 0))


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor multiplies no bfloat16")
@torch.inference_mode()
def test_the_encoder_attends_through_the_tiles(tiled, request):
    folded = fold.for_inference(load(resolve("nano"), dtype=torch.float32).model).vision
    pixels = torch.rand(2, 3, 256, 320)
    plain, other = (copy.deepcopy(folded).bfloat16().to(memory_format=torch.channels_last) for _ in range(2))
    halves = pixels.bfloat16().to(memory_format=torch.channels_last)
    expected, theirs = folded(pixels), fused.fuse(plain)(halves)
    request.getfixturevalue("without_sdpa")

    found = fused.fuse(other, tiled)(halves)

    assert distance(found, expected) < 1.2 * distance(theirs, expected)
