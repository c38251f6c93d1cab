"""Random weights of which no activation is denormal or enormous."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastvlm.config import PRESETS, Config, LanguageConfig, ProjectorConfig, VisionConfig
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.initialise import initial_values

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@torch.no_grad()
def initialise(model, seed):
    draws = initial_values(model, seed)
    for name, tensor in model.state_dict().items():
        tensor.copy_(draws[name]())


def tiny(*, is_reparameterised):
    vision = VisionConfig(
        image_size=128,
        depths=(1, 2, 3, 1, 1),
        dims=(16, 32, 64, 128, 256),
        clip_dim=24,
        is_reparameterised=is_reparameterised,
    )
    language = LanguageConfig(dim=64, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=96, vocab_size=100, tied=False)
    return Config(
        vision=vision, projector=ProjectorConfig(in_dim=512, out_dim=64), language=language, image_token_id=99
    )


def measured(model, pixels, token_ids):
    """The largest magnitude, the smallest root mean square and the number of denormals, over all modules."""
    largest, smallest, denormal = [], [], []

    def measure(_module, _inputs, output):
        size = output.detach().float().abs()
        largest.append(float(size.max()))
        smallest.append(float(size.square().mean().sqrt()))
        denormal.append(int(((size > 0) & (size < SMALLEST_NORMAL)).sum()))

    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_hook(measure)
    with torch.inference_mode():
        model(token_ids, pixels)
    return max(largest), min(smallest), sum(denormal)


def inputs(config, side):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    picture = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")  # smooth, as photos are
    num_image_tokens = (side // config.vision.stride) ** 2
    token_ids = torch.randint(0, 90, (1, 20 + num_image_tokens), generator=generator)
    token_ids[0, 5 : 5 + num_image_tokens] = config.image_token_id
    return picture, token_ids


@pytest.mark.parametrize("is_reparameterised", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_activations_of_a_small_model_are_of_moderate_size(is_reparameterised, seed):
    config = tiny(is_reparameterised=is_reparameterised)
    model = FastVLM(config).eval()
    initialise(model, seed)

    largest, smallest, num_denormal = measured(model, *inputs(config, 128))

    assert largest < 1e3
    assert smallest > 1e-4
    assert num_denormal == 0


@pytest.mark.slow
@pytest.mark.parametrize("is_reparameterised", [True, False])
def test_activations_of_the_real_geometry_are_of_moderate_size(is_reparameterised):
    config = PRESETS["0.5b"]
    config = replace(config, vision=replace(config.vision, is_reparameterised=is_reparameterised))
    with torch.device("meta"):
        model = FastVLM(config)
    model = model.to_empty(device="cpu").eval()
    initialise(model, 0)

    largest, smallest, num_denormal = measured(model, *inputs(config, 512))

    assert largest < 1e4
    assert smallest > 1e-4
    assert num_denormal == 0


def test_the_seed_decides_every_weight():
    models = [FastVLM(tiny(is_reparameterised=False)) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        initialise(model, seed)

    first, same, other = (model.state_dict() for model in models)

    for name, tensor in first.items():
        assert torch.equal(tensor, same[name])
        if not name.endswith("num_batches_tracked"):
            assert not torch.equal(tensor, other[name]), name


def test_one_tensor_can_be_drawn_without_the_others():
    config = tiny(is_reparameterised=True)
    model = FastVLM(config)
    initialise(model, 4)
    with torch.device("meta"):
        shapes = FastVLM(config)

    draws = initial_values(shapes, 4)

    name = "language.layers.1.mlp.up_proj.weight"
    assert torch.equal(draws[name](), model.state_dict()[name])
