"""The encoder in bytes is near its floats, is saved as it is, and is made floats where bytes gain nothing."""

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
from fastvlm.model import byte_conv, fold
from fastvlm.model.byte_conv import ByteConv, can_multiply_bytes
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.fused import STRIP, ByteFFN, FusedFFN
from fastvlm.model.quantize import ROW, Packing, QuantizedConv, quantise, quantized_layers, use_floats
from fastvlm.options import QuantizeOptions
from fastvlm.quantize.run import encoder_packings, quantize

ON_CPU = Placement(device=torch.device("cpu"), dtype=torch.float32)
needs_bytes = pytest.mark.skipif(
    not can_multiply_bytes(ON_CPU.device, ON_CPU.dtype), reason="this processor multiplies no bytes"
)


def conv_of(matrix):
    packing = Packing(8, ROW)
    conv = QuantizedConv(matrix.shape[1], matrix.shape[0], packing, bias=True)
    conv.weight, conv.scales, conv.biases = quantise(matrix, packing, torch.float32)
    conv.bias = nn.Parameter(torch.randn(len(matrix)), requires_grad=False)
    return conv


def in_floats(conv, x, *, has_gelu=False):
    product = F.linear(x, conv.floats(torch.float32), conv.bias)
    return F.gelu(product) if has_gelu else product


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = QuantizeOptions(model="nano", out=str(tmp_path_factory.mktemp("bytes") / "nano"), encoder_bits=8)
    return quantize(options)


@needs_bytes
@pytest.mark.parametrize("low", [0, -3, -100, -254])
@torch.inference_mode()
def test_whole_numbers_are_multiplied_exactly(low):
    """Weights and activations that are bytes already: what is left of the error is the rounding of float32."""
    matrix = torch.randint(-127, 128, (48, 64)).float()
    matrix[:, 0] = 127  # so that every scale is 1
    conv, x = conv_of(matrix), torch.randint(low, low + 255, (100, 64)).float()
    x[0, 0], x[0, 1] = low, low + 254

    found = ByteConv(conv, 100)(x.clone())

    assert_close(found, in_floats(conv, x), rtol=1e-6, atol=1e-2)


@needs_bytes
@pytest.mark.parametrize("has_gelu", [False, True])
@pytest.mark.parametrize("shape", [(32, 128, 9), (96, 384, 300), (384, 96, 1), (512, 2048, 64)], ids=str)
@torch.inference_mode()
def test_a_convolution_in_bytes_computes_nearly_what_its_floats_compute(shape, has_gelu):
    num_inputs, num_outputs, num_positions = shape
    conv, x = conv_of(torch.randn(num_outputs, num_inputs)), torch.randn(num_positions, num_inputs) * 30 + 5
    expected = in_floats(conv, x, has_gelu=has_gelu)

    found = ByteConv(conv, STRIP, has_gelu=has_gelu)(x.clone())

    assert 0 < distance(found, expected) < 0.02


@needs_bytes
@torch.inference_mode()
def test_what_is_added_to_a_skip_is_what_is_computed_without():
    layer, x, skip = ByteConv(conv_of(torch.randn(96, 384)), STRIP), torch.randn(300, 384), torch.randn(300, 96)
    total = skip.clone()

    layer.add_to(total, x.clone())

    assert_close(total, skip + layer(x.clone()), rtol=1e-5, atol=1e-4)


@needs_bytes
@pytest.mark.parametrize("value", [0.0, 7.0, -7.0, 1e-30])
@torch.inference_mode()
def test_positions_that_are_all_equal_are_no_exception(value):
    conv, x = conv_of(torch.randn(32, 32)), torch.full((5, 32), value)

    assert_close(ByteConv(conv, 5)(x.clone()), in_floats(conv, x), rtol=0.01, atol=0.01 * (1 + abs(value)))


@needs_bytes
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
@torch.inference_mode()
def test_a_number_that_is_none_is_not_hidden(damage):
    x = torch.randn(5, 32)
    x[3, 3] = damage

    assert ByteConv(conv_of(torch.randn(32, 32)), 5)(x).isnan().any()


@needs_bytes
@pytest.mark.parametrize("size", [(1, 3, 384, 384), (2, 3, 128, 192)], ids=str)
@torch.inference_mode()
def test_features_of_nano_in_bytes_are_near_those_in_floats(folder, size):
    exact, rounded = (
        accelerate(checkpoint.load(each, dtype=torch.float32).model, ON_CPU).vision
        for each in (resolve("nano"), folder)
    )
    pixels = torch.rand(size).to(memory_format=torch.channels_last)

    expected, found = exact(pixels), rounded(pixels)

    assert sum(isinstance(module, ByteFFN) for module in rounded.modules()) == 10
    assert 0 < distance(found, expected) < 0.05
    assert F.cosine_similarity(found, expected, dim=-1).mean() > 0.999


@needs_bytes
@torch.inference_mode()
def test_a_picture_of_a_batch_has_the_features_that_it_has_alone(folder):
    vision = accelerate(checkpoint.load(folder, dtype=torch.float32).model, ON_CPU).vision
    pixels = torch.stack([torch.rand(3, 384, 384), torch.rand(3, 384, 384) / 50])
    pixels = pixels.to(memory_format=torch.channels_last)
    kept = pixels.clone()

    together = vision(pixels)

    for index in range(2):
        assert distance(together[index], vision(pixels[index : index + 1])[0]) < 1e-3
    assert torch.equal(pixels, kept)


@pytest.mark.parametrize("why", ["no VNNI", "bfloat16", "openvino"])
@torch.inference_mode()
def test_where_bytes_gain_nothing_the_encoder_is_what_its_floats_are(folder, why, monkeypatch):
    if why == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setattr(byte_conv, "cpu_flags", lambda: {"avx2"} if why == "no VNNI" else {"avx512_vnni"})
    placement = Placement(device=torch.device("cpu"), dtype=torch.bfloat16 if why == "bfloat16" else torch.float32)
    engine = "openvino" if why == "openvino" else "torch"
    model, floats = (checkpoint.load(folder, dtype=placement.dtype).model for _ in range(2))
    use_floats(floats.vision)
    pixels = torch.rand(1, 3, 128, 128).to(placement.dtype).to(memory_format=torch.channels_last)

    found = accelerate(model, placement, engine=engine).vision
    expected = accelerate(floats, placement).vision

    assert not quantized_layers(found)
    assert not any(isinstance(module, ByteFFN) for module in found.modules())
    assert distance(found(pixels), expected(pixels)) < 1e-4


def test_numbers_whose_zero_lies_elsewhere_become_floats(folder):
    model = checkpoint.load(folder, dtype=torch.float32).model
    model.vision.stages[0].blocks[0].mlp.fc1.biases += 1e-3

    vision = accelerate(model, ON_CPU).vision

    assert not any(isinstance(module, ByteFFN) for module in vision.modules())
    assert sum(isinstance(module, FusedFFN) for module in vision.modules()) in (0, 10)


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
