"""The encoder equals Apple's, stage by stage."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from fastvlm import checkpoint
from fastvlm.model import fold

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = {"rtol": 1e-6, "atol": 1e-4}  # of float32; the stated 1e-4, and float32's own on values in the hundreds
STAGES = {  # Apple numbers what lies between stem and head in one row
    "tower.stem": "stem",
    "tower.network.0": "stages.0.blocks",
    "tower.network.1": "stages.1.downsample",
    "tower.network.2": "stages.1.blocks",
    "tower.network.3": "stages.2.downsample",
    "tower.network.4": "stages.2.blocks",
    "tower.network.5": "stages.3.downsample",
    "tower.network.6": "stages.3.pos_emb",
    "tower.network.7": "stages.3.blocks",
    "tower.network.8": "stages.4.downsample",
    "tower.network.9": "stages.4.pos_emb",
    "tower.network.10": "stages.4.blocks",
    "tower.conv_exp": "final_conv",
}


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDENS / "apple_tiny.expected.safetensors")


@pytest.fixture(scope="module")
def pixels():
    return load_file(GOLDENS / "pixels.expected.safetensors")["pad.photo.jpg"][None].float() / 255


@pytest.fixture
def model():
    return checkpoint.load(GOLDENS / "apple_tiny", dtype=torch.float32).model


@pytest.fixture(scope="module")
def activations(pixels):
    vision = checkpoint.load(GOLDENS / "apple_tiny", dtype=torch.float32).model.vision
    outputs = {}
    for apple_name, name in STAGES.items():
        module = vision.get_submodule(name)
        module.register_forward_hook(lambda _, __, output, key=apple_name: outputs.__setitem__(key, output))
    with torch.inference_mode():
        vision(pixels)
    return outputs


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_computes_what_apples_does(name, activations, expected):
    assert_close(activations[name], expected[name].view_as(activations[name]), **TOLERANCE)


@torch.inference_mode()
def test_features_projection_and_clip_embedding_equal_apples(model, pixels, expected):
    features = model.vision(pixels)

    assert_close(features, expected["tower.features"], **TOLERANCE)
    assert_close(model.projector(features), expected["projector.out"], **TOLERANCE)
    assert_close(model.vision.embed(features), expected["tower.head"].view(1, -1), **TOLERANCE)


@torch.inference_mode()
def test_a_picture_that_is_not_square_gives_apples_features(model, expected):
    assert_close(model.vision(expected["rect.in"]), expected["rect.features"], **TOLERANCE)


@torch.inference_mode()
def test_the_encoder_folded_for_inference_still_equals_apples(model, pixels, expected):
    fold.for_inference(model)

    assert_close(model.vision(pixels), expected["tower.features"], **TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("is_folded", [False, True])
def test_the_training_form_computes_what_apples_does(is_folded):
    golden = load_file(GOLDENS / "training_form.expected.safetensors")
    vision = checkpoint.load_encoder(GOLDENS / "training_form.safetensors", dtype=torch.float32)
    assert not vision.config.is_reparameterised

    if is_folded:
        fold.reparameterise_vision(vision)
    features = vision(golden["in"])

    # Values reach 691 here, so 1e-4 is meant of the usual size of a value, and large ones carry float32's rounding.
    scale = golden["conv_exp"].abs().mean()
    assert_close(features / scale, golden["conv_exp"].flatten(2).transpose(1, 2) / scale, rtol=1e-5, atol=1e-4)


def test_an_encoder_with_other_depths_is_read_by_its_shapes():
    config = checkpoint.load_encoder(GOLDENS / "training_form.safetensors", image_size=128).config

    assert config == replace(
        config, depths=(1, 1, 1, 1, 1), dims=(16, 32, 64, 128, 256), image_size=128, mlp_ratio=4, clip_dim=None
    )
