"""What the comparison says of answers; the rest of it is tested with each format."""

from types import SimpleNamespace

import pytest
import torch

from fastvlm.checkpoint.load import load
from fastvlm.export.verify import TIE, _above, _differences, _texts


@pytest.fixture(scope="module")
def tokenizer(goldens):
    return load(goldens / "apple_tiny").tokenizer


def row(tokenizer, eager, own, gap):
    picture = SimpleNamespace(question="?")
    return SimpleNamespace(answer=eager, own_answer=own, gap=lambda: gap, tokenizer=tokenizer, picture=picture)


def test_an_answer_spelled_in_other_tokens_is_equal_and_counted(tokenizer):
    merged = tokenizer.encode_text("hello hello")
    single = [id_ for letter in "hello hello" for id_ in tokenizer.encode_text(letter)]
    assert merged != single

    found = _texts([row(tokenizer, merged, single, 0.5), row(tokenizer, merged, merged, None)])

    assert (found["equal"], found["same_tokens"], found["equal_or_tied"]) == (2, 1, 2)
    assert found["different"] == []


@pytest.mark.parametrize(("gap", "tied"), [(TIE / 2, 1), (TIE * 2, 0)])
def test_an_answer_is_at_a_tie_where_eager_holds_two_tokens_closer_than_a_thousandth(tokenizer, gap, tied):
    found = _texts([row(tokenizer, tokenizer.encode_text("a"), tokenizer.encode_text("b"), gap)])

    assert (found["equal"], found["same_tokens"], found["equal_or_tied"]) == (0, 0, tied)
    assert len(found["different"]) == 1 - tied
    assert found["tie"] == 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["eager", "export"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_value_that_is_not_finite_on_either_side_is_a_failure(value, side, place):
    pairs = [(torch.ones(1, 4), torch.ones(1, 4)) for _ in range(2)]
    pairs[place][side == "export"][0, 2] = value

    found = _differences(pairs)

    assert _above("features", found, 1e-4, 0.99) == ["features are not finite"]
    assert _above("logits beside the same cache", found, None, None) == ["logits beside the same cache are not finite"]


def test_values_that_are_equal_and_finite_are_no_failure():
    assert _above("features", _differences([(torch.ones(1, 4), torch.ones(1, 4))]), 1e-4, 0.99) == []


def test_values_that_are_all_zeros_on_both_sides_are_equal():
    pair = (torch.zeros(1, 4), torch.zeros(1, 4))

    found = _differences([pair, pair])

    assert (found["relative"], found["least_cosine"]) == (0, 1)
    assert _above("features", found, 1e-4, 0.99) == []


@pytest.mark.parametrize(("most", "least_cosine"), [(1e-4, 0.99), (None, None)])
@pytest.mark.parametrize(
    ("value", "said"), [(0.5, "zeros in eager and up to 5.00e-01 in the export"), (torch.nan, "not finite")]
)
def test_values_beside_eager_ones_that_are_all_zeros_are_a_failure(value, said, most, least_cosine):
    pairs = [(torch.zeros(1, 4), torch.zeros(1, 4)), (torch.zeros(1, 4), torch.tensor([[0, value, 0, 0]]))]

    assert _above("features", _differences(pairs), most, least_cosine) == [f"features are {said}"]
