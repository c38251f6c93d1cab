from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from fastvlm.checkpoint.load import load
from fastvlm.export.graphs import LARGEST_FLOAT16, Decoder, Embedder, HalfEncoder, find_islands, magnitude
from fastvlm.export.parts import ImageEncoder
from fastvlm.model import fold


@pytest.fixture(autouse=True)
def same_tensors():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model(goldens):
    return fold.for_inference(load(goldens / "apple_tiny", dtype=torch.float32).model)


def empty(config, rows=1):
    shape = (rows, config.num_kv_heads, 0, config.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]


@torch.inference_mode()
def test_a_decoder_with_its_cache_outside_computes_what_the_language_model_computes(model):
    language = model.language
    embeds = torch.randn(1, 9, language.config.dim)
    positions, mask = torch.arange(9)[None], torch.ones(1, 9, dtype=torch.int64)
    decoder = Decoder(language)

    _, past = decoder(embeds[:, :4], mask[:, :4], positions[:, :4], empty(language.config))
    first, past = decoder(embeds[:, 4:8], mask[:, :8], positions[:, 4:8], past)
    last, _ = decoder(embeds[:, 8:], mask, positions[:, 8:], past)

    expected = language.head(language(embeds))
    assert_close(torch.cat([first, last], 1), expected[:, 4:], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_row_padded_on_the_left_is_the_row_alone(model):
    language = model.language
    long, short = torch.randn(1, 6, language.config.dim), torch.randn(1, 4, language.config.dim)
    embeds = torch.cat([long, torch.cat([torch.zeros(1, 2, language.config.dim), short], 1)])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])

    logits, _ = Decoder(language)(embeds, mask, positions, empty(language.config, 2))

    assert_close(logits[0], language.head(language(long))[0], rtol=0, atol=1e-4)
    assert_close(logits[1, 2:], language.head(language(short))[0], rtol=0, atol=1e-4)


def test_the_placeholder_gets_a_row_where_the_tokenizer_has_none(model):
    rows = model.language.config.vocab_size

    embedder = Embedder(model.language, rows + 3)

    assert embedder(torch.tensor([[rows + 2]])).abs().max() == 0
    assert_close(embedder(torch.tensor([[5]]))[0, 0], model.language.embed_tokens.weight[5])


@torch.inference_mode()
def test_an_encoder_that_overflows_float16_keeps_the_parts_that_do_in_float32(model):
    loud = deepcopy(model)
    # Every value behind this convolution is ten million times as large.
    loud.vision.stages[4].pos_emb.reparam_conv.weight *= 1e7
    loud.vision.stages[4].pos_emb.reparam_conv.bias *= 1e7
    loud.vision.stages[4].pos_emb.reparam_conv.weight.clamp_(-6e4, 6e4)
    loud.vision.stages[4].pos_emb.reparam_conv.bias.clamp_(-6e4, 6e4)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = ImageEncoder(loud, with_projector=False)(pixels)

    islands = find_islands(loud, [pixels])
    found = HalfEncoder(deepcopy(loud), list(islands), with_projector=False)(pixels)
    without = HalfEncoder(deepcopy(loud), [], with_projector=False)(pixels)

    assert max(islands.values()) > LARGEST_FLOAT16
    assert "stages.4.pos_emb" in islands
    assert "stem" not in islands
    assert not torch.isfinite(without).all()
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


@torch.inference_mode()
def test_half_the_width_of_numbers_is_close_where_nothing_overflows(model):
    pixels = torch.rand(2, 3, 64, 64)
    expected = ImageEncoder(model, with_projector=True)(pixels)

    assert find_islands(model, [pixels]) == {}
    found = HalfEncoder(deepcopy(model), [], with_projector=True)(pixels)

    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, -3.0], 3.0), ([2.0, torch.nan], torch.inf), ([-torch.inf, 1.0], torch.inf), ([], 0.0)],
)
def test_a_value_that_is_no_number_has_an_infinite_magnitude(values, expected):
    assert magnitude(torch.tensor(values)) == expected


def test_a_magnitude_does_not_depend_on_how_a_tensor_lies_in_memory():
    x = torch.arange(-30.0, 18).reshape(1, 4, 3, 4)

    for other in (x, x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, ::2], x.expand(2, 4, 3, 4)):
        assert magnitude(other) == 30


@torch.inference_mode()
def test_a_part_whose_values_are_no_numbers_stays_in_float32(model):
    broken = deepcopy(model)
    broken.vision.final_conv.se.fc1.bias[0] = torch.nan

    islands = find_islands(broken, [torch.rand(1, 3, 64, 64)])

    assert islands["final_conv"] == torch.inf
    assert "stem" not in islands
