"""Matrices of bfloat16 in a model of floats: nothing is rounded, and what would be stays as it is."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastvlm import checkpoint
from fastvlm.model import halves
from fastvlm.model.halves import HalfEmbedding, HalfLinear, halve

GOLDENS = Path(__file__).parents[1] / "goldens"


def layers():
    """A table, a layer with a bias and one without, all of values that bfloat16 holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 24), nn.Linear(24, 40), nn.Linear(40, 7, bias=False)).requires_grad_(False)
    return model.bfloat16().float()


@torch.inference_mode()
@pytest.mark.parametrize("at_once", [1, 100, 10_000])  # of the floats: a row, some rows, all
def test_outputs_are_those_of_floats(at_once, monkeypatch):
    monkeypatch.setattr(halves, "_FLOATS", at_once)
    model, token_ids, hidden = layers(), torch.tensor([[3, 0], [29, 3]]), torch.randn(2, 3, 24)
    expected, logits = model(token_ids), nn.functional.linear(hidden, model[0].weight)
    bias = model[1].bias

    halve(model, lambda _: None)

    assert [type(layer) for layer in model] == [HalfEmbedding, HalfLinear, HalfLinear]
    assert model[1].bias is bias
    assert_close(model(token_ids), expected)
    assert_close(model[0].as_head(hidden), logits)
    assert all(layer.weight.dtype == torch.bfloat16 for layer in model.float())


def test_a_matrix_that_would_be_rounded_stays():
    model, kept = layers(), nn.Linear(24, 40)
    kept.weight.data.copy_(model[1].weight)
    kept.weight.data[-1, -1] = 1 + 2**-9  # bfloat16 has eight bits
    model[1] = kept

    halve(model, lambda _: None)

    assert model[1] is kept
    assert isinstance(model[2], HalfLinear)


def test_only_copied_weights_are_forgotten():
    model, forgotten = layers(), []
    model[0].bfloat16()
    table, expected = model[0].weight, [layer.weight.data_ptr() for layer in model[1:]]

    halve(model, forgotten.append)

    assert [weight.data_ptr() for weight in forgotten] == expected
    assert model[0].weight.data_ptr() == table.data_ptr()


@pytest.mark.parametrize("folder", ["apple_tiny", "hf_tiny"])
def test_matrices_of_the_language_model_may_stay_as_they_are_stored(folder):
    model = checkpoint.load(GOLDENS / folder, dtype=torch.float32, keep_halves=True).model
    whole = checkpoint.load(GOLDENS / folder, dtype=torch.float32).model.state_dict()

    for name, tensor in model.state_dict().items():
        is_matrix = name.startswith("language.") and tensor.dim() == 2
        assert tensor.dtype == (torch.bfloat16 if is_matrix else whole[name].dtype), name
        assert torch.equal(tensor.to(whole[name].dtype), whole[name])


def test_weights_of_another_format_are_converted(tmp_path):
    stored = checkpoint.load(GOLDENS / "hf_tiny", dtype=torch.float16)
    checkpoint.save(stored.model, stored.tokenizer, tmp_path / "half")

    model = checkpoint.load(tmp_path / "half", dtype=torch.float32, keep_halves=True).model

    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
