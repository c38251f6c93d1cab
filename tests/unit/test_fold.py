"""Folding changes the form and not the function."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastvlm.config import Config, LanguageConfig, ProjectorConfig, VisionConfig
from fastvlm.model import fold
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.initialise import initial_values
from fastvlm.model.vision import ConvNorm, FastViTHD, LayerScale


@torch.no_grad()
def initialise(model, seed):
    draws = initial_values(model, seed)
    for name, tensor in model.state_dict().items():
        tensor.copy_(draws[name]())


def build(*, is_reparameterised, depths=(1, 1, 2, 1, 1), dims=(16, 32, 64, 128, 256), seed=0):
    vision = VisionConfig(image_size=128, depths=depths, dims=dims, clip_dim=8, is_reparameterised=is_reparameterised)
    language = LanguageConfig(dim=32, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=32, vocab_size=50, tied=True)
    projector = ProjectorConfig(in_dim=2 * dims[-1], out_dim=32)
    model = FastVLM(Config(vision=vision, projector=projector, language=language, image_token_id=49)).eval()
    initialise(model, seed)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("seed", [0, 1])
def test_merged_branches_compute_the_same(seed):
    model = build(is_reparameterised=False, seed=seed)
    pixels = torch.rand(2, 3, 128, 192)
    before = model.vision(pixels)

    fold.reparameterise(model)

    assert model.config.vision.is_reparameterised
    assert model.vision.config == model.config.vision
    assert before.abs().max() > 0.1
    assert_close(model.vision(pixels), before, rtol=1e-5, atol=1e-4)


def test_merged_branches_have_the_names_of_the_reparameterised_form():
    model = build(is_reparameterised=False)
    other = FastViTHD(replace(model.config.vision, is_reparameterised=True))

    fold.reparameterise(model)

    ours = {name: tensor.shape for name, tensor in model.vision.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in other.state_dict().items()}


@torch.inference_mode()
@pytest.mark.parametrize("is_reparameterised", [True, False])
def test_everything_folded_computes_the_same(is_reparameterised):
    model = build(is_reparameterised=is_reparameterised)
    pixels = torch.rand(1, 3, 192, 64)
    before = model.encode(pixels)

    fold.for_inference(model)

    assert model.vision.is_folded
    assert not any(isinstance(module, ConvNorm | LayerScale | nn.BatchNorm2d) for module in model.modules())
    assert_close(model.encode(pixels), before, rtol=1e-5, atol=1e-4)


def test_folding_twice_changes_nothing_more():
    model = fold.for_inference(build(is_reparameterised=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    fold.for_inference(model)

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_folded_models_learn_no_more_and_reparameterised_ones_do():
    model = fold.reparameterise(build(is_reparameterised=False))
    assert all(parameter.requires_grad for parameter in model.parameters())

    fold.for_inference(model)

    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_keeps_the_dtype(dtype):
    model = build(is_reparameterised=False).to(dtype)

    fold.for_inference(model)

    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@torch.inference_mode()
@pytest.mark.slow
@pytest.mark.parametrize(
    ("depths", "dims"),
    [((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536)), ((2, 12, 24, 4, 4), (128, 256, 512, 1024, 2048))],
    ids=["mci3", "mci4"],
)
def test_the_real_encoders_fold_exactly(depths, dims):
    model = build(is_reparameterised=False, depths=depths, dims=dims)
    pixels = torch.rand(1, 3, 128, 64)
    before = model.vision(pixels)

    fold.for_inference(model)

    assert_close(model.vision(pixels), before, rtol=1e-4, atol=1e-4)
