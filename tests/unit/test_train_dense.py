"""The encoder's own supervision, and the optimizer for matrices."""

import pytest
import torch
from torch import nn

from fastvlm.config import PRESETS
from fastvlm.errors import InputError
from fastvlm.model.vision import FastViTHD
from fastvlm.options import TrainOptions
from fastvlm.prompt import IGNORE
from fastvlm.synth.sample import Mark
from fastvlm.train.dense import DenseObjective, targets
from fastvlm.train.loop import Objective
from fastvlm.train.marks import MOST, NONE, encode_marks
from fastvlm.train.muon import orthogonalise
from fastvlm.train.optimizer import MATRIX_RATE, build_optimizer, set_rates
from fastvlm.train.start import fresh_model


@pytest.fixture(scope="module")
def model():
    return fresh_model(PRESETS["nano"], seed=0)


def batch(model, num_images: int = 2, side: int = 128) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    slots = (side // 64) ** 2
    token_ids = torch.randint(5, 200, (num_images, slots + 6), generator=generator)
    labels = token_ids.clone()
    labels[:, : 1 + slots] = IGNORE
    token_ids[:, 1 : 1 + slots] = model.config.image_token_id
    marks = torch.full((num_images, MOST, 3), NONE, dtype=torch.int16)
    marks[:, 0] = torch.tensor((3, 4000, 9000), dtype=torch.int16)
    pixels = torch.rand(num_images, 3, side, side, generator=generator)
    return {"token_ids": token_ids, "labels": labels, "pixels": pixels, "marks": marks}


def test_a_mark_in_the_middle_of_a_cell_is_all_in_that_cell() -> None:
    rows = encode_marks([Mark("b", 0.5, 5.5 / 8)], {"a": 0, "b": 1}, size=(100, 100))
    grid = targets(rows[None], num_labels=2, cells=8, dtype=torch.float32)

    assert grid.sum() == pytest.approx(1, abs=1e-3)
    assert grid[0, 1, 5].nonzero().flatten().tolist() == [3, 4]  # x lies on the line between two cells
    assert grid[0, 1, 5, 3] == pytest.approx(0.5, abs=2e-3)


def test_marks_of_a_wide_picture_lie_in_the_middle_band_of_the_square() -> None:
    rows = encode_marks([Mark("a", 0.0, 0.0), Mark("a", 1.0, 1.0)], {"a": 0}, size=(200, 100))

    assert rows[0].tolist() == [0, 0, 7500]
    assert rows[1].tolist() == [0, 30000, 22500]
    assert (rows[2:, 0] == NONE).all()


def test_two_marks_of_one_label_in_one_cell_are_one() -> None:
    marks = torch.full((1, 4, 3), NONE, dtype=torch.int16)
    marks[0, :2] = torch.tensor((0, 1875, 1875), dtype=torch.int16)  # the middle of the first of eight cells

    grid = targets(marks, num_labels=1, cells=8, dtype=torch.float32)

    assert grid.sum() == 1


def test_the_features_are_those_of_the_encoder(model) -> None:
    objective = DenseObjective(model, num_labels=7, weight=0.5).eval()
    tensors = batch(model)

    losses = objective(tensors)
    plain = Objective(model).eval()(tensors)

    assert torch.allclose(losses.sums, plain.sums, atol=1e-4)
    assert losses.extra is not None
    assert losses.extra > 0
    assert plain.extra is None
    del tensors["marks"]
    assert objective(tensors).extra is None


def test_the_encoder_learns_what_is_where() -> None:
    """One step's gradient reaches the first layer, and some steps teach the heads two pictures by heart."""
    torch.manual_seed(0)
    model = fresh_model(PRESETS["nano"], seed=0)
    objective = DenseObjective(model, num_labels=7, weight=1.0).train()
    optimizer = build_optimizer(objective, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.98), kind="muon")
    tensors = batch(model)

    found = []
    for _ in range(12):
        losses = objective(tensors)
        losses.extra.backward()
        first = next(model.vision.parameters()).grad
        assert first is not None
        assert first.abs().sum() > 0
        found.append(losses.extra.item())
        optimizer.step()
        optimizer.zero_grad()

    assert found[-1] < 0.3 * found[0]


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 16, 64)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    values = torch.linalg.svdvals(orthogonalise(matrices))

    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_steps_as_far_as_it_says_and_adamw_takes_the_rest() -> None:
    """Against the formula: a first step along the orthogonalised gradient, whatever the gradient's length."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 32)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, lr=0.01, weight_decay=0.0, betas=(0.9, 0.98), kind="muon")
    set_rates(optimizer, 1.0)
    (1000 * layer(torch.randn(8, 48))).square().sum().backward()
    gradient, bias_before = layer.weight.grad.clone(), layer.bias.detach().clone()

    optimizer.step()

    moved = before - layer.weight.detach()
    wanted = orthogonalise(gradient[None])[0] * 0.01 * MATRIX_RATE * 0.2 * 48**0.5
    assert torch.allclose(moved, wanted, atol=1e-5)
    assert torch.allclose((bias_before - layer.bias).abs(), torch.full((32,), 0.01), rtol=1e-3)  # Adam's first step


def test_muon_leaves_embeddings_and_depthwise_kernels_to_adamw(model) -> None:
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), kind="muon")
    taken = {id(p) for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in taken}

    assert "language.layers.0.self_attn.q_proj.weight" in names
    assert not any("embed_tokens" in name for name in names)
    depthwise = [
        f"vision.{name}.weight"
        for name, module in FastViTHD(PRESETS["nano"].vision).named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1
    ]
    assert depthwise
    assert not names & set(depthwise)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dense": 0.5, "data": ("x.json",)}, "--dense is for"),
        ({"dense": 0.5, "learn_vision": "frozen"}, "--dense is for"),
        ({"dense": -1.0}, "dense must be between"),
        ({"optimizer": "muon", "parallel": "fsdp"}, "whole matrices"),
        ({"optimizer": "sgd"}, "adamw or muon"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message) -> None:
    with pytest.raises(InputError, match=message):
        TrainOptions(output="x", **given)
