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
from fastvlm.model.quantize import ROW, Packing, QuantizedLinear, quantise, replace_layers
from fastvlm.predict import Predictor

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor multiplies no bfloat16"
)


PACKING = Packing(8, ROW)


def language_of(*, tied, dtype=torch.bfloat16):
    config = LanguageConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96, vocab_size=101, tied=tied)
    torch.manual_seed(0)
    language = Qwen2(config)
    for parameter in language.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 1.0)
    return language.to(dtype).eval().requires_grad_(False)


def logits_of(language, num_rows, lengths):
    cache = KVCache(language.config, num_rows=num_rows, capacity=32, dtype=torch.bfloat16)
    found = []
    with torch.inference_mode():
        for length in lengths:
            ids = torch.arange(num_rows * length).view(num_rows, length)
            hidden = language(language.embed(ids), cache)
            cache.advance([length] * num_rows)
            found.append(language.head(hidden).float())
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16", 4),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f", 4),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16", 1),
        ("", 4),
    ],
)
def test_few_rows_are_filled_up_except_on_intels_processors_that_multiply_bfloat16(tmp_path, line, number):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\n{line}\n")

    assert packed.fewest_rows(info) == number


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("fewest", [1, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_plain_matrices(tied, fewest, num_rows, monkeypatch):
    monkeypatch.setattr(packed, "fewest_rows", lambda: fewest)
    language = language_of(tied=tied)
    other = copy.deepcopy(language)
    forgotten = []

    assert packed.can_pack(language)
    packed.pack(other, forgotten.append)

    got, expected = (logits_of(model, num_rows, (11, 1, 3)) for model in (other, language))
    assert (got - expected).norm() < 0.01 * expected.norm()
    assert not [name for name, module in other.named_modules() if isinstance(module, nn.Linear)]
    linears = [module for module in language.modules() if isinstance(module, nn.Linear)]
    assert len(forgotten) == len(linears) + tied


def test_queries_keys_and_values_come_from_one_matrix():
    language = packed.pack(language_of(tied=True))

    matrices = {name: module for name, module in language.layers[0].named_modules() if isinstance(module, FusedLinear)}

    assert matrices.keys() == {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    }
    assert matrices["self_attn.qkv_proj"].weight.shape == (64 + 2 * 32, 64)


def test_what_is_quantised_stays_so_beside_packed_matrices():
    language = language_of(tied=True)
    names = ["layers.0.self_attn.k_proj", "layers.1.mlp.down_proj"]
    matrices = [language.get_submodule(name).weight for name in names]
    replace_layers(language, dict.fromkeys(names, PACKING))
    for name, matrix in zip(names, matrices, strict=True):
        layer = language.get_submodule(name)
        layer.weight, layer.scales, layer.biases = quantise(matrix, PACKING, torch.bfloat16)
    other = copy.deepcopy(language)

    packed.pack(other)

    got, expected = (logits_of(model, 1, (11, 1)) for model in (other, language))
    assert (got - expected).norm() < 0.01 * expected.norm()
    assert [name for name in names if isinstance(other.get_submodule(name), QuantizedLinear)] == names
    assert not [name for name, module in other.named_modules() if isinstance(module, nn.Linear)]


def test_other_formats_are_left_to_pytorch():
    assert not packed.can_pack(language_of(tied=True, dtype=torch.float32))


def test_a_loaded_model_gives_back_what_it_copied_and_still_knows_its_tokens():
    stored = load(resolve("nano"), dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in stored.model.language.named_parameters()}
    table = stored.model.language.embed_tokens.weight

    predictor = Predictor(stored.model, stored.tokenizer, place("cpu", "bfloat16"), forget=stored.forget)

    assert isinstance(predictor.model.language.lm_head, FusedLinear)
    assert_close(table, before["embed_tokens.weight"], rtol=0, atol=0)  # read from the file again
