"""Passes in which the encoder is folded anew: the features and gradients of the encoder as it stands."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastvlm.checkpoint.load import assemble, load, load_encoder
from fastvlm.device import place
from fastvlm.prompt import IGNORE
from fastvlm.train.data import Batch
from fastvlm.train.folded import can_fold, encode_folded
from fastvlm.train.learning import choose_what_learns, set_train_mode
from fastvlm.train.loop import Objective, Trainer, learned_losses, row_losses
from fastvlm.train.optimizer import build_optimizer

GOLDENS = Path(__file__).parents[1] / "goldens"


def model_of(form):
    checkpoint = load(GOLDENS / "apple_tiny", dtype=torch.float32)
    if form == "inference":
        return checkpoint.model, checkpoint.tokenizer
    encoder = load_encoder(GOLDENS / "training_form.safetensors", image_size=128, dtype=torch.float32)
    return assemble(encoder, checkpoint.model.language, checkpoint.tokenizer, image_size=128, seed=0), None


@pytest.fixture(params=["training", "inference"])
def model(request):
    found = model_of(request.param)[0]
    generator = torch.Generator().manual_seed(3)
    for module in found.vision.modules():  # norms and scales as after training, not as at its start
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    choose_what_learns(
        found, dict.fromkeys(("vision", "projector", "language"), "full"), rank=1, alpha=1.0, dropout=0.0
    )
    set_train_mode(found, learns_vision=True, learns_statistics=False)
    return found


def gradients(model, features):
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    (features * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.vision.named_parameters() if "head" not in name}


@pytest.mark.parametrize("recomputes", [False, True])
def test_features_and_gradients_are_those_of_the_encoder(model, recomputes):
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # as in training
    before = copy.deepcopy(model.vision.state_dict())

    wanted = model.vision(pixels)
    wanted_gradients = gradients(model, wanted)
    found = encode_folded(model.vision, pixels, recomputes=recomputes)
    found_gradients = gradients(model, found)

    assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        error = (found_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, (name, error.item())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.vision.state_dict().items())


def test_half_precision_is_as_near_as_the_encoder_in_half_precision(model):
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    wanted = model.vision(pixels)
    truth = gradients(model, wanted)

    errors = []
    for encode in (model.vision, lambda pixels: encode_folded(model.vision, pixels)):
        with torch.autocast("cpu", torch.bfloat16):
            features = encode(pixels)
        found = gradients(model, features.float())
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        total = sum((found[name] - truth[name]).square().sum() for name in truth).sqrt()
        errors.append(float(total / sum(gradient.square().sum() for gradient in truth.values()).sqrt()))

    assert errors[1] < 1.2 * errors[0], errors


def test_gradients_of_several_passes_add_up(model):
    """No two weights' gradients may share their memory, which is added to in place."""
    pixels = torch.rand(1, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    once = gradients(model, encode_folded(model.vision, pixels))

    weights = torch.randn(encode_folded(model.vision, pixels).shape, generator=torch.Generator().manual_seed(1))
    (encode_folded(model.vision, pixels) * weights).sum().backward()

    for name, parameter in model.vision.named_parameters():
        if name in once:
            assert_close(parameter.grad, 2 * once[name], rtol=1e-4, atol=1e-5, msg=name)


def test_passes_are_folded_only_where_that_is_exact(model):
    assert can_fold(model.vision)

    set_train_mode(model, learns_vision=True, learns_statistics=True)
    assert not can_fold(model.vision)

    set_train_mode(model, learns_vision=True, learns_statistics=False)
    choose_what_learns(
        model, {"vision": "lora", "projector": "full", "language": "full"}, rank=1, alpha=1.0, dropout=0.0
    )
    assert not can_fold(model.vision)


def test_a_trainer_folds_where_statistics_are_frozen_and_learns_the_same(model):
    batch = Batch(
        pixels=torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        token_ids=torch.tensor([[model.config.image_token_id] * 4 + list(range(5, 15))]),
        labels=torch.tensor([[IGNORE] * 8 + list(range(9, 15))]),
        tasks=("x",),
        num_samples=1,
    )
    results = []
    for is_plain in (False, True):
        learned = copy.deepcopy(model)
        optimizer = build_optimizer(learned, lr=1e-6, weight_decay=0.0, betas=(0.9, 0.98))
        trainer = Trainer(Objective(learned), optimizer, place("cpu", "float32"), learns_statistics=False)
        trainer.set_train_mode()
        assert trainer.objective.is_folded
        trainer.objective.is_folded = not is_plain
        steps = [trainer.train_step([batch], 1.0) for _ in range(2)]
        results.append(torch.stack([torch.stack([step.sums.sum(), step.norm]) for step in steps]))

    assert_close(results[0][0], results[1][0], rtol=1e-4, atol=0)
    assert_close(results[0][1], results[1][1], rtol=1e-2, atol=0)  # behind a step of AdamW, which knows only signs


def test_losses_of_what_is_learned_are_those_of_all_logits():
    model, _ = model_of("inference")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (3, 9), generator=generator)
    labels = ids.where(torch.rand(3, 9, generator=generator) < 0.5, IGNORE)
    labels[1] = IGNORE  # a row that teaches nothing

    found = []
    for way in (
        lambda hidden: learned_losses(model, hidden, labels),
        lambda hidden: row_losses(model.language.head(hidden), labels),
    ):
        model.zero_grad(set_to_none=True)
        sums, counts = way(model.read(ids))
        sums.sum().backward()
        found.append((sums.detach(), counts, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))

    assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert found[0][1].tolist() == found[1][1].tolist()
    assert found[0][1][1] == 0
    assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-5)
