"""Matrices of bfloat16 in the tiles of AMX give what float32 gives, within bfloat16's rounding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastvlm.config import LanguageConfig
from fastvlm.model.cache import KVCache
from fastvlm.model.compiled import has_tiles
from fastvlm.model.language import Qwen2, rotary_angles, rotate
from fastvlm.model.native import NativeQwen2, TiledLinear
from fastvlm.model.quantize import ROW, Packing, QuantizedLinear, quantise, replace_layers
from fastvlm.model.tile_ffn import TileFFN
from fastvlm.model.tiles import can_tile, tiles_of

CONFIG = LanguageConfig(dim=128, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=1632, vocab_size=101, tied=True)
STEP = 2**-9  # half of what neighbouring numbers of bfloat16 differ by, over the number


@pytest.fixture
def tiled(kernels):
    """The library, where the processor has tiles."""
    if not has_tiles(kernels):
        pytest.skip("this processor has no tiles")
    return kernels


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def language():
    torch.manual_seed(0)
    model = Qwen2(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08 if parameter.dim() > 1 else 1.0)
    return model.bfloat16().eval().requires_grad_(False)


def test_a_tile_holds_pairs_of_inputs_of_16_outputs():
    matrix = torch.arange(64 * 96).view(64, 96).remainder(251).bfloat16()

    tiles = tiles_of(matrix)

    assert tiles.shape == (4, 3, 16, 16, 2)
    assert tiles.is_contiguous()
    for output, number in ((0, 0), (17, 33), (63, 95), (40, 62)):
        place = (output // 16, number // 32, number % 32 // 2, output % 16, number % 2)
        assert tiles[place] == matrix[output, number]


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (torch.zeros(64, 96, dtype=torch.bfloat16), True),
        (torch.zeros(64, 96, 1, 1, dtype=torch.bfloat16), True),
        (torch.zeros(64, 96, 3, 3, dtype=torch.bfloat16), False),
        (torch.zeros(48, 96, dtype=torch.bfloat16), False),
        (torch.zeros(64, 80, dtype=torch.bfloat16), False),
        (torch.zeros(64, 96), False),
    ],
)
def test_only_whole_tiles_of_bfloat16_are_taken(matrix, expected):
    assert can_tile(matrix) == expected


@torch.inference_mode()
@pytest.mark.parametrize(("dim", "hidden", "size"), [(96, 384, (16, 24)), (32, 128, (5, 7)), (192, 768, (9, 33))])
def test_the_wide_layers_of_the_encoder(tiled, dim, hidden, size):
    torch.manual_seed(0)
    fc1, fc2 = nn.Conv2d(dim, hidden, 1).bfloat16(), nn.Conv2d(hidden, dim, 1).bfloat16()
    x, skip = (torch.randn(2, dim, *size).bfloat16().to(memory_format=torch.channels_last) for _ in range(2))
    wide = F.gelu(F.conv2d(x.double(), fc1.weight.double(), fc1.bias.double()))
    expected = skip.double() + F.conv2d(wide, fc2.weight.double(), fc2.bias.double())

    found = TileFFN(fc1, fc2, tiled).add_to(skip.clone(memory_format=torch.preserve_format), x)

    assert distance(found, expected) < 2 * STEP


@torch.inference_mode()
def test_what_is_no_number_stays_with_its_position(tiled):
    fc1, fc2 = nn.Conv2d(32, 128, 1).bfloat16(), nn.Conv2d(128, 32, 1).bfloat16()
    x = torch.randn(1, 32, 6, 6).bfloat16().to(memory_format=torch.channels_last)
    x[0, 3, 2, 4] = float("nan")

    found = TileFFN(fc1, fc2, tiled).add_to(torch.zeros_like(x), x)

    assert found[0, :, 2, 4].isnan().all()
    assert found.isnan().sum() == 32


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [9, 16, 17, 32, 47, 291, 600])
@pytest.mark.parametrize("packing", [None, Packing(8, ROW), Packing(8, 32), Packing(4, 32), Packing(4, 64)])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(96, 128), (32, 3200)])
def test_many_tokens_times_a_matrix_of_any_format(tiled, num_tokens, packing, num_outputs, num_inputs):
    torch.manual_seed(0)
    x, weight = torch.randn(num_tokens, num_inputs).bfloat16(), torch.randn(num_outputs, num_inputs) / num_inputs**0.5
    bias = nn.Parameter(torch.randn(num_outputs).bfloat16(), requires_grad=False)
    kernels = NativeQwen2(language(), tiled, 2)._kernels
    if packing is None:
        linear = nn.Linear(num_inputs, num_outputs)
        linear.weight, linear.bias = nn.Parameter(weight.bfloat16(), requires_grad=False), bias
        layer, floats = TiledLinear(linear), weight.bfloat16()
    else:
        layer = QuantizedLinear(num_inputs, num_outputs, packing, bias=True)
        layer.weight, layer.scales, layer.biases = quantise(weight, packing, torch.bfloat16)
        layer.bias, floats = bias, layer.floats(torch.float32)
    matrix = kernels.matrix(layer)

    found = kernels.multiply_tiles(matrix, x)

    assert kernels.can_tile(matrix)
    assert distance(found, F.linear(x.double(), floats.double(), bias.double())) < 1.5 * STEP


@torch.inference_mode()
@pytest.mark.parametrize("packing", [None, Packing(8, ROW), Packing(4, 32)])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_prompt_and_the_tokens_behind_it(tiled, packing, num_rows):
    model, reference = language(), language()
    if packing is not None:
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        for each in (model, reference):
            replace_layers(each, dict.fromkeys(names, packing))
    reference = reference.float()
    native = NativeQwen2(model, tiled, 2)
    caches = [
        KVCache(CONFIG, num_rows=num_rows, capacity=128, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
    ]

    for num_tokens in (70, 1, 2, 3, 4, 20):
        embeds = torch.randn(num_rows, num_tokens, CONFIG.dim).bfloat16()
        found, expected = native(embeds, caches[0]), reference(embeds.float(), caches[1])
        for cache in caches:
            cache.advance([num_tokens] * num_rows)
        assert distance(found, expected) < 0.02


@torch.inference_mode()
def test_heads_are_turned_by_the_angles_of_their_tokens(tiled):
    kernels = NativeQwen2(language(), tiled, 2)._kernels
    x = torch.randn(2, 11, 4 * 64).bfloat16()
    cosine, sine = (angle.bfloat16() for angle in rotary_angles(torch.arange(22).view(2, 11), 64, 10000.0))
    expected = rotate(x.double().view(2, 11, 4, 64).transpose(1, 2), cosine.double(), sine.double())

    kernels.turn(x, (cosine, sine), 4)

    assert distance(x.view(2, 11, 4, 64).transpose(1, 2), expected) < STEP
