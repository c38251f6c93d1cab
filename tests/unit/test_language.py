"""Qwen2 and its cache: what was read in pieces, or beside other rows, is what was read at once and alone."""

import pytest
import torch

from fastvlm.config import LanguageConfig
from fastvlm.errors import ContextError
from fastvlm.model.cache import KVCache
from fastvlm.model.language import Qwen2

CONFIG = LanguageConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48, vocab_size=50, tied=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Qwen2(CONFIG).eval()


def cache_of(num_rows, capacity=32):
    return KVCache(CONFIG, num_rows=num_rows, capacity=capacity)


def read(model, embeds, cache, lengths=None):
    hidden = model(embeds, cache)
    cache.advance(lengths or [embeds.shape[1]] * embeds.shape[0])
    return hidden


@torch.inference_mode()
def test_cache_gives_the_same_hidden_states_as_no_cache(model):
    embeds = torch.randn(2, 9, 32)
    cache = cache_of(2)

    stepwise = torch.cat([read(model, embeds[:, i : i + 1], cache) for i in range(9)], dim=1)

    torch.testing.assert_close(stepwise, model(embeds), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", [1, 4, 8])
@torch.inference_mode()
def test_prefill_in_two_pieces_is_prefill_in_one(model, cut):
    embeds = torch.randn(1, 9, 32)
    cache = cache_of(1)

    pieces = torch.cat([read(model, embeds[:, :cut], cache), read(model, embeds[:, cut:], cache)], dim=1)

    torch.testing.assert_close(pieces, model(embeds), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_row_of_a_padded_batch_is_the_row_alone(model):
    lengths = [3, 7, 5]
    rows = [torch.randn(1, length + 2, 32) for length in lengths]
    batch = torch.full((3, 7, 32), 9.0)  # padding that would be noticed
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        batch[index, :length] = row[0, :length]
    cache = cache_of(3)

    first = read(model, batch, cache, lengths)
    second = read(model, torch.cat([row[:, -2:-1] for row in rows]), cache)
    third = read(model, torch.cat([row[:, -1:] for row in rows]), cache)

    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = model(row)[0]
        torch.testing.assert_close(first[index, :length], alone[:length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(second[index, 0], alone[length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(third[index, 0], alone[length + 1], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_truncated_cache_goes_on_as_if_the_rest_was_never_read(model):
    embeds = torch.randn(1, 9, 32)
    cache = cache_of(1)
    read(model, torch.cat([embeds[:, :5], torch.randn(1, 3, 32)], dim=1), cache)

    cache.truncate(5)
    rest = read(model, embeds[:, 5:], cache)

    torch.testing.assert_close(rest, model(embeds)[:, 5:], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_reordered_rows_go_on_from_their_new_past(model):
    embeds = torch.randn(2, 4, 32)
    cache = cache_of(2)
    read(model, embeds, cache)
    token = torch.randn(1, 1, 32)

    cache.reorder([1, 1])
    hidden = read(model, token.expand(2, -1, -1), cache)

    alone = model(torch.cat([embeds[1:], token], dim=1))[:, -1:]
    torch.testing.assert_close(hidden, alone.expand(2, -1, -1), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_full_cache_says_so(model):
    cache = cache_of(1, capacity=4)

    with pytest.raises(ContextError, match="holds 4 positions, 5 are needed"):
        read(model, torch.randn(1, 5, 32), cache)


def test_an_untied_head_is_its_own_matrix():
    config = LanguageConfig(dim=32, num_layers=1, num_heads=4, num_kv_heads=2, mlp_dim=48, vocab_size=50, tied=False)
    model = Qwen2(config)
    hidden = torch.randn(1, 32)

    assert model.lm_head is not None
    torch.testing.assert_close(model.head(hidden), hidden @ model.lm_head.weight.T)
