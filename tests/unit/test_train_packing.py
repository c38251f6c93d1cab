"""Several conversations in a row give the loss and the gradients that they give alone."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fastvlm.checkpoint.load import load
from fastvlm.model.language import block_diagonal
from fastvlm.prompt import IGNORE
from fastvlm.train.data import Example, collate
from fastvlm.train.packing import pack

GOLDENS = Path(__file__).parents[1] / "goldens"


@given(st.lists(st.integers(1, 20), max_size=30))
def test_every_conversation_is_in_one_row_and_no_row_is_too_long(lengths):
    rows = pack(lengths, 20)

    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 20 for row in rows)
    if lengths:
        assert len(rows) <= 2 * -(-sum(lengths) // 20)  # first-fit never leaves two rows half empty


def test_positions_and_mask_begin_again_in_each_conversation():
    positions, is_seen = block_diagonal(torch.tensor([[0, 0, 0, 1, 1, -1]]))

    assert positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert is_seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.fixture(scope="module")
def model():
    return load(GOLDENS / "hf_tiny", dtype=torch.float32).model.eval()


def examples_of(model, seed=0):
    """Five conversations of unequal length with none, one and two pictures."""
    generator = torch.Generator().manual_seed(seed)
    image_id, num = model.config.image_token_id, 1
    examples = []
    for num_pictures, length in [(1, 9), (0, 5), (2, 17), (0, 12), (1, 6)]:
        words = torch.randint(0, 400, (length,), generator=generator).tolist()
        ids = [words[0], *[image_id] * (num * num_pictures), *words[1:]]
        learned = [IGNORE] * (len(ids) - length // 2) + ids[len(ids) - length // 2 :]
        pixels = torch.randint(0, 256, (num_pictures, 3, 64, 64), generator=generator, dtype=torch.uint8)
        examples.append(Example(pixels=pixels, token_ids=ids, labels=learned, task="x"))
    return examples


def put_together(examples, model, **changes):
    settings = {"max_tokens": 32, "pad_id": 0, "image_id": model.config.image_token_id, "num_image_tokens": 1}
    return collate(examples, **(settings | changes))


def loss_and_gradients(model, batch):
    model.zero_grad()
    logits = model(batch.token_ids, batch.pixels / 255, segments=batch.segments)
    targets = batch.labels[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_loss_and_gradients_are_the_unpacked_ones(model):
    examples = examples_of(model)
    apart, packed = put_together(examples, model), put_together(examples, model, is_packed=True)

    expected_loss, expected = loss_and_gradients(model, apart)
    loss, gradients = loss_and_gradients(model, packed)

    assert packed.token_ids.shape[0] == 2 < len(apart.token_ids)
    assert len(packed.pixels) == len(apart.pixels) == 4
    assert (packed.labels != IGNORE).sum() == (apart.labels != IGNORE).sum()
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert any("vision" in name for name in gradients)
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)


def test_without_the_mask_packing_would_change_the_loss(model):
    """The test above can fail: rows that see one another give another loss."""
    batch = put_together(examples_of(model), model, is_packed=True)
    packed = model(batch.token_ids, batch.pixels / 255, segments=batch.segments)

    seen = model(batch.token_ids, batch.pixels / 255)

    assert (packed - seen).abs().max() > 1e-2


def test_the_end_of_a_conversation_does_not_learn_the_beginning_of_the_next():
    examples = [Example(pixels=torch.zeros(0, 3, 64, 64), token_ids=[5, 6], labels=[5, 6], task="x")] * 2

    batch = collate(examples, max_tokens=4, pad_id=0, image_id=9, num_image_tokens=1, is_packed=True)

    assert batch.token_ids.tolist() == [[5, 6, 5, 6]]
    assert batch.labels.tolist() == [[IGNORE, 6, IGNORE, 6]]
    assert batch.segments.tolist() == [[0, 0, 1, 1]]


def test_a_picture_is_as_long_as_its_placeholders():
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    ids = [1, 9, 9, 9, 9, 2]
    examples = [Example(pixels=pixels, token_ids=ids, labels=ids, task="x")] * 2

    batch = collate(examples, max_tokens=11, pad_id=0, image_id=9, num_image_tokens=4, is_packed=True)

    assert batch.token_ids.shape == (2, 6)  # eleven positions hold one of them


def test_the_task_of_a_row_of_several_kinds_is_mixed():
    examples = [
        Example(pixels=torch.zeros(0, 3, 64, 64), token_ids=[1] * n, labels=[1] * n, task=task)
        for n, task in [(3, "a"), (3, "a"), (2, "b"), (2, "a")]
    ]

    batch = collate(examples, max_tokens=6, pad_id=0, image_id=9, num_image_tokens=1, is_packed=True)

    assert batch.tasks == ("a", "mixed")
    assert batch.num_samples == 4
