"""The language model in packed matrices computes what it does in plain ones, and gives the plain ones' memory back."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.zoo import resolve
from fastvlm.config import LanguageConfig
from fastvlm.device import place
from fastvlm.model import packed
from fastvlm.model.cache import KVCache
from fastvlm.model.fused import FusedLinear
from fastvlm.model.language import Qwen2
from fastvlm.predict import Predictor

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor multiplies no bfloat16"
)


def language_of(*, tied, dtype=torch.bfloat16):
    config = LanguageConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96, vocab_size=101, tied=tied)
    torch.manual_seed(0)
    language = Qwen2(config)
    for parameter in language.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 1.0)
    return language.to(dtype).eval().requires_grad_(False)


def logits_of(language, lengths):
    cache = KVCache(language.config, num_rows=2, capacity=32, dtype=torch.bfloat16)
    found = []
    with torch.inference_mode():
        for length in lengths:
            ids = torch.arange(2 * length).view(2, length)
            hidden = language(language.embed(ids), cache)
            cache.advance([length, length])
            found.append(language.head(hidden).float())
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_plain_matrices(tied):
    language = language_of(tied=tied)
    other = copy.deepcopy(language)
    forgotten = []

    assert packed.can_pack(language)
    packed.pack(other, forgotten.append)

    got, expected = logits_of(other, (11, 1, 3)), logits_of(language, (11, 1, 3))
    assert (got - expected).norm() < 0.01 * expected.norm()
    linears = [name for name, module in language.named_modules() if isinstance(module, nn.Linear)]
    names = {*linears, "lm_head"}
    assert {name for name, module in other.named_modules() if isinstance(module, FusedLinear)} == names
    assert len(forgotten) == len(names)


def test_other_formats_are_left_to_pytorch():
    assert not packed.can_pack(language_of(tied=True, dtype=torch.float32))


def test_a_loaded_model_gives_back_what_it_copied_and_still_knows_its_tokens():
    stored = load(resolve("nano"), dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in stored.model.language.named_parameters()}
    table = stored.model.language.embed_tokens.weight

    predictor = Predictor(stored.model, stored.tokenizer, place("cpu", "bfloat16"), forget=stored.forget)

    assert isinstance(predictor.model.language.lm_head, FusedLinear)
    assert_close(table, before["embed_tokens.weight"], rtol=0, atol=0)  # read from the file again
