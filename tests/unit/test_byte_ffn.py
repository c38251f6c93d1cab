"""The encoder in bytes is near its floats, is saved as it is, and is made floats where bytes gain nothing."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from fastvlm import checkpoint
from fastvlm.accelerate import accelerate
from fastvlm.checkpoint.build import shapes_only
from fastvlm.checkpoint.load import load_encoder
from fastvlm.checkpoint.zoo import resolve
from fastvlm.config import PRESETS
from fastvlm.device import Placement
from fastvlm.errors import InputError
from fastvlm.model import fold, fused
from fastvlm.model.byte_ffn import ByteFFN
from fastvlm.model.compiled import can_multiply_bytes
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.fused import FusedFFN, QuantizedFFN
from fastvlm.model.quantize import ROW, Packing, QuantizedConv, quantise, quantized_layers, use_floats
from fastvlm.options import QuantizeOptions
from fastvlm.quantize.run import encoder_packings, quantize

ON_CPU = Placement(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def multiplying(kernels, monkeypatch):
    """The library, where it multiplies bytes; models that are compiled take it."""
    if not can_multiply_bytes(kernels):
        pytest.skip("this processor multiplies no bytes")
    monkeypatch.setattr("fastvlm.accelerate.library", lambda: kernels)
    return kernels


def conv_of(matrix, bias=None):
    packing = Packing(8, ROW)
    conv = QuantizedConv(matrix.shape[1], matrix.shape[0], packing, bias=True)
    conv.weight, conv.scales, conv.biases = quantise(matrix, packing, torch.float32)
    conv.bias = nn.Parameter(torch.randn(len(matrix)) if bias is None else bias, requires_grad=False)
    return conv


def wide(dim, hidden):
    """A pair of layers whose outputs are about as large as the inputs."""
    return conv_of(torch.randn(hidden, dim) / dim**0.5), conv_of(torch.randn(dim, hidden) / hidden**0.5)


def in_floats(fc1, fc2, x):
    """(P, C, h, w) in float64."""
    weights = [conv.floats(torch.float32).double()[..., None, None] for conv in (fc1, fc2)]
    hidden = F.gelu(F.conv2d(x.double(), weights[0], fc1.bias.double()))
    return F.conv2d(hidden, weights[1], fc2.bias.double())


def in_bytes(kernels, fc1, fc2, x):
    x = x.to(memory_format=torch.channels_last)
    return ByteFFN(fc1, fc2, kernels).add_to(torch.zeros_like(x), x)


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = QuantizeOptions(model="nano", out=str(tmp_path_factory.mktemp("bytes") / "nano"), encoder_bits=8)
    return quantize(options)


def test_the_folder_says_which_layers_of_the_encoder_were_rounded_and_how(folder):
    said = json.loads((folder / "quantization.json").read_text())["encoder"]
    rounded = {
        name: each
        for name, each in quantized_layers(checkpoint.load(folder).model).items()
        if name.startswith("vision.")
    }

    assert {re.sub(r"\.\d+", ".*", name) for name in rounded} == set(said["layers"])
    assert {each.packing for each in rounded.values()} == {Packing(said["bits"], ROW)}
    assert said["matrices"] == {"8 bits, rows": len(rounded)}
    assert said["scales"] == "one a row, zero met exactly"
    assert all(each.is_centred for each in rounded.values())
    assert said["quantised_bytes"] < said["float_bytes"]


@torch.inference_mode()
def test_the_encoders_weights_are_the_nearest_numbers_as_the_folder_says(folder):
    before, after = (checkpoint.load(each).model for each in (resolve("nano"), folder))

    assert json.loads((folder / "quantization.json").read_text())["encoder"]["rounding"] == "nearest"
    for name in encoder_packings(before):
        layer = after.get_submodule(name)
        matrix = before.get_submodule(name).weight.flatten(1).float()
        assert ((layer.floats(torch.float32) - matrix).abs() <= layer.scales.float() * 0.501).all()


@torch.inference_mode()
def test_whole_numbers_are_multiplied_exactly(multiplying):
    """Weights and activations that are bytes already, and values where GELU is the identity: float32 remains."""
    numbers = torch.randint(-127, 128, (48, 16)).float()
    numbers[:, 0] = 127  # so that every scale is 1
    fc1, fc2 = conv_of(numbers, bias=torch.full((48,), 1e6)), conv_of(torch.eye(16, 48) * 127, bias=torch.zeros(16))
    x = torch.randint(0, 256, (1, 16, 5, 7)).float()
    x[:, 0], x[:, 1] = 0, 255

    found = in_bytes(multiplying, fc1, fc2, x)

    expected = in_floats(fc1, fc2, x)
    assert (found - expected).abs().max() < (expected.max() / 255)  # one step of the hidden layer's bytes
    assert found.unique().numel() > 10


@pytest.mark.parametrize(
    "shape", [(32, 128, 3, 3), (96, 384, 20, 15), (36, 100, 1, 1), (512, 2048, 8, 8), (192, 768, 13, 4)], ids=str
)
@torch.inference_mode()
def test_wide_layers_in_bytes_compute_nearly_what_their_floats_compute(shape, multiplying):
    dim, hidden, height, width = shape
    layers, x = wide(dim, hidden), torch.randn(2, dim, height, width) * 3 + 1

    found = in_bytes(multiplying, *layers, x)

    assert 0 < distance(found, in_floats(*layers, x)) < 0.012


def rounded(x):
    """Each row to bytes of its own range: numbers, scales and zeros, as the kernel does in float32."""
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / scale).round()
    return ((x / scale[:, None] + zero[:, None]).round().clamp(0, 255) - zero[:, None]) * scale[:, None]


@pytest.mark.parametrize("shape", [(32, 128, 50), (36, 100, 13), (192, 768, 100)], ids=str)
@torch.inference_mode()
def test_the_kernel_rounds_each_position_to_its_own_range_and_multiplies_exactly(shape, multiplying):
    dim, hidden, num_positions = shape
    fc1, fc2 = wide(dim, hidden)
    x = torch.randn(1, dim, 1, num_positions) * torch.rand(num_positions) * 3 + 1
    weights = [conv.floats(torch.float32).double() for conv in (fc1, fc2)]

    found = in_bytes(multiplying, fc1, fc2, x)[0, :, 0].T

    inner = F.gelu(rounded(x[0, :, 0].T.double()) @ weights[0].T + fc1.bias.double())
    expected = rounded(inner) @ weights[1].T + fc2.bias.double()
    assert distance(found, expected) < 1e-3  # a number may fall to the other side of a half
    assert distance(found, expected) < distance(found, in_floats(fc1, fc2, x)[0, :, 0].T) / 5


@torch.inference_mode()
def test_a_position_whose_activations_are_small_loses_no_more_than_others(multiplying):
    layers, x = wide(96, 384), torch.randn(1, 96, 30, 30)
    x[..., 10:] /= 1000
    layers[0].bias *= 1e-3
    layers[1].bias *= 1e-3

    found, expected = in_bytes(multiplying, *layers, x), in_floats(*layers, x)

    assert distance(found[..., 10:], expected[..., 10:]) < 0.012


@torch.inference_mode()
def test_what_is_added_to_a_skip_is_what_is_computed_without(multiplying):
    layers = wide(96, 384)
    x, skip = (torch.randn(1, 96, 10, 30).to(memory_format=torch.channels_last) for _ in range(2))
    total = skip.clone()

    found = ByteFFN(*layers, multiplying).add_to(total, x)

    assert_close(found, skip + in_bytes(multiplying, *layers, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 7.0, -7.0, 1e-30])
@torch.inference_mode()
def test_positions_that_are_all_equal_are_no_exception(value, multiplying):
    layers, x = wide(32, 64), torch.full((1, 32, 1, 5), value)

    assert_close(
        in_bytes(multiplying, *layers, x), in_floats(*layers, x).float(), rtol=0.02, atol=0.02 * (1 + abs(value))
    )


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
@torch.inference_mode()
def test_a_number_that_is_none_is_not_hidden_and_stays_where_it_is(damage, multiplying):
    x = torch.randn(1, 32, 5, 20)
    x[0, 3, 2, 7] = damage

    found = in_bytes(multiplying, *wide(32, 64), x)

    assert found[0, :, 2, 7].isnan().all()
    assert found.isnan().sum() == 32


@torch.inference_mode()
@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_and_whose_they_are_changes_nothing(num_threads, monkeypatch, multiplying):
    layers, x = wide(96, 384), torch.randn(1, 96, 40, 30).to(memory_format=torch.channels_last)
    expected = in_bytes(multiplying, *layers, x)
    ffn = ByteFFN(*layers, multiplying)
    monkeypatch.setattr(ffn, "_parallel", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)

    assert torch.equal(ffn.add_to(torch.zeros_like(x), x), expected)


@pytest.mark.parametrize("size", [(1, 3, 384, 384), (2, 3, 128, 192)], ids=str)
@torch.inference_mode()
def test_features_of_nano_in_bytes_are_near_those_in_floats(folder, size, multiplying):
    exact, rounded = (
        accelerate(checkpoint.load(each, dtype=torch.float32).model, ON_CPU, is_compiled=True).vision
        for each in (resolve("nano"), folder)
    )
    pixels = torch.rand(size).to(memory_format=torch.channels_last)

    expected, found = exact(pixels), rounded(pixels)

    assert sum(isinstance(module, QuantizedFFN) for module in rounded.modules()) == 10
    assert 0 < distance(found, expected) < 0.05
    assert F.cosine_similarity(found, expected, dim=-1).mean() > 0.999


@torch.inference_mode()
def test_a_picture_of_a_batch_has_the_features_that_it_has_alone(folder, multiplying):
    vision = accelerate(checkpoint.load(folder, dtype=torch.float32).model, ON_CPU, is_compiled=True).vision
    pixels = torch.stack([torch.rand(3, 384, 384), torch.rand(3, 384, 384) / 50])
    pixels = pixels.to(memory_format=torch.channels_last)
    kept = pixels.clone()

    together = vision(pixels)

    for index in range(2):
        assert distance(together[index], vision(pixels[index : index + 1])[0]) < 1e-3
    assert torch.equal(pixels, kept)


@pytest.mark.parametrize("why", ["not compiled", "bfloat16", "openvino"])
@torch.inference_mode()
def test_where_bytes_are_not_multiplied_the_encoder_is_what_its_floats_are(folder, why, request):
    if why == "openvino":
        pytest.importorskip("openvino")
    placement = Placement(device=torch.device("cpu"), dtype=torch.bfloat16 if why == "bfloat16" else torch.float32)
    model, floats = (checkpoint.load(folder, dtype=placement.dtype).model for _ in range(2))
    use_floats(floats.vision)
    pixels = torch.rand(1, 3, 128, 128).to(placement.dtype).to(memory_format=torch.channels_last)

    is_compiled = why == "bfloat16"
    if is_compiled:
        request.getfixturevalue("multiplying")
    found = accelerate(model, placement, is_compiled=is_compiled, engine="openvino" if why == "openvino" else "torch")
    expected = accelerate(floats, placement, is_compiled=is_compiled).vision

    assert not quantized_layers(found.vision)
    assert not any(isinstance(module, QuantizedFFN) for module in found.modules())
    assert distance(found.vision(pixels), expected(pixels)) < 1e-4


def test_numbers_whose_zero_lies_elsewhere_become_floats(folder, multiplying):
    model = checkpoint.load(folder, dtype=torch.float32).model
    model.vision.stages[0].blocks[0].mlp.fc1.biases += 1e-3

    vision = accelerate(model, ON_CPU, is_compiled=True).vision

    assert not any(isinstance(module, QuantizedFFN) for module in vision.modules())
    assert not quantized_layers(vision)
    assert sum(isinstance(module, FusedFFN) for module in vision.modules()) == 10 * fused.can_fuse(vision)


@torch.inference_mode()
def test_half_a_pair_in_bytes_becomes_floats(folder, multiplying):
    model = checkpoint.load(folder, dtype=torch.float32).model
    ffn = model.vision.stages[0].blocks[0].mlp
    ffn.fc2 = ffn.fc2.as_floats()
    expected = checkpoint.load(folder, dtype=torch.float32).model
    use_floats(expected.vision)
    pixels = torch.rand(1, 3, 128, 128).to(memory_format=torch.channels_last)

    found = accelerate(model, ON_CPU, is_compiled=True).vision

    assert not quantized_layers(found)
    assert distance(found(pixels), accelerate(expected, ON_CPU).vision(pixels)) < 1e-4


@torch.inference_mode()
def test_folding_a_quantised_encoder_is_folding_its_floats(folder):
    model, floats = (checkpoint.load(folder, dtype=torch.float32).model for _ in range(2))
    use_floats(floats.vision)
    pixels = torch.rand(1, 3, 128, 128)

    found, expected = (fold.for_inference(each).vision(pixels) for each in (model, floats))

    assert len(quantized_layers(model.vision)) == 20
    assert not quantized_layers(floats.vision)
    assert distance(found, expected) < 1e-5


def test_a_folder_is_loaded_as_it_is_and_saved_with_the_same_bytes(folder, tmp_path):
    loaded = checkpoint.load(folder)
    names = [name for name in quantized_layers(loaded.model) if name.startswith("vision.")]

    again = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "again")

    assert sorted(names) == sorted(encoder_packings(checkpoint.load(resolve("nano")).model))
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


@torch.no_grad()
def test_what_needs_floats_gets_convolutions(folder, tmp_path):
    checkpoint.convert(folder, "hf", tmp_path / "hf")
    converted, own = checkpoint.load(tmp_path / "hf").model, checkpoint.load(folder).model
    encoder, exact = load_encoder(folder), checkpoint.load(resolve("nano")).model.vision

    name = "stages.1.blocks.0.mlp.fc1"
    kept = own.vision.get_submodule(name)
    for vision in (converted.vision, encoder):
        conv = vision.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        assert torch.equal(conv.weight, kept.floats(conv.weight.dtype)[..., None, None])
        assert 0 < distance(conv.weight.float(), exact.get_submodule(name).weight.float()) < 0.02


def test_an_encoder_of_odd_widths_is_refused():
    nano = PRESETS["nano"]
    config = replace(
        nano, vision=replace(nano.vision, dims=(6, 12, 24, 96, 192)), projector=replace(nano.projector, in_dim=384)
    )

    with pytest.raises(InputError, match="6 channels"):
        encoder_packings(shapes_only(lambda: FastVLM(config)))
