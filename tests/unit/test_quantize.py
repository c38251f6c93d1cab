"""Quantised layers compute what their floats compute, are saved and mapped as they are, and read as before."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from fastvlm import checkpoint, cli
from fastvlm.checkpoint.reading import read_header
from fastvlm.config import LanguageConfig
from fastvlm.errors import CheckpointError, InputError
from fastvlm.generate import make_cache
from fastvlm.model import quantized_cpu
from fastvlm.model.cache import KVCache
from fastvlm.model.language import Qwen2
from fastvlm.model.quantize import (
    ROW,
    Packing,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantise,
    pack,
    quantise,
    quantized_layers,
    replace_layers,
    unpack,
)
from fastvlm.model.quantized_bags import BagEmbedding, BagLinear, can_bag
from fastvlm.options import QuantizeOptions
from fastvlm.quantize.gptq import compensated
from fastvlm.quantize.run import quantize

PACKINGS = [Packing(4, 32), Packing(4, 64), Packing(4, 128), Packing(8, 32), Packing(8, 64), Packing(8, ROW)]
CONFIG = LanguageConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96, vocab_size=80, tied=True)


def put(layer, parts):
    layer.weight, layer.scales, layer.biases = parts


def layer_of(packing, *, num_outputs=64, num_inputs=256, dtype=torch.float32):
    layer = QuantizedLinear(num_inputs, num_outputs, packing, bias=True)
    put(layer, quantise(torch.randn(num_outputs, num_inputs), packing, dtype))
    layer.bias.data = torch.randn(num_outputs, dtype=dtype)
    return layer


@pytest.fixture
def floats():
    torch.manual_seed(0)
    return Qwen2(CONFIG).eval()


@pytest.fixture(params=[(8, False), (8, True), (4, False), (4, True)], ids=str)
def quantised(request, floats):
    packing = Packing(8, ROW) if request.param[0] == 8 else Packing(4, 32)
    matrices = {
        name: layer.weight
        for name, layer in floats.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding)
    }
    replace_layers(floats, dict.fromkeys(matrices, packing))
    for name, matrix in matrices.items():
        put(floats.get_submodule(name), quantise(matrix.detach(), packing, torch.float32))
    if request.param[1]:
        quantized_cpu.prepare(floats)
    return floats


@pytest.fixture(params=[8, 4])
def folder(request, tiny, tmp_path):
    options = QuantizeOptions(model=str(tiny), out=str(tmp_path / "quantised"), bits=request.param, rounding="nearest")
    return quantize(options)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_numbers_come_back(bits):
    numbers = torch.randint(0, 2**bits, (6, 64), dtype=torch.uint8)

    packed = pack(numbers, bits)

    assert packed.shape == (6, 64 * bits // 8)
    assert torch.equal(unpack(packed, bits), numbers)


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_of_mlx_words_become_the_floats_that_mlx_makes(bits, goldens):
    golden = load_file(goldens / "mlx_quant.expected.safetensors")
    words, scales, biases = (golden[f"q{bits}.{name}"] for name in ("weight", "scales", "biases"))

    weight = dequantise(words.view(torch.uint8), scales, biases, bits)

    assert torch.equal(weight.float(), golden[f"q{bits}.dequantized"])


def test_what_is_not_a_matrix_of_the_language_model_is_left_as_it_was(folder, tiny):
    before, after = (checkpoint.load(each).model.state_dict() for each in (tiny, folder))
    packed = {name for name, tensor in after.items() if tensor.dtype == torch.uint8}

    for name in before.keys() - packed:
        assert torch.equal(after[name], before[name]), name


def test_the_folder_says_how_it_was_made_and_what_it_cost(folder):
    report = json.loads((folder / "quantization.json").read_text())

    assert report["rounding"] == "nearest"
    assert sum(report["matrices"].values()) == 2 * 7 + 1
    assert report["quantised_bytes"] < (0.6 if report["bits"] == 8 else 0.5) * report["float_bytes"]
    assert 0.5 < report["logits_cosine"] <= 1


def test_drawn_pictures_are_read_before_4_bits_are_rounded(tiny, tmp_path, real_assets):
    options = QuantizeOptions(model=str(tiny), out=str(tmp_path / "gptq"), bits=4, pictures=2)

    report = json.loads((quantize(options) / "quantization.json").read_text())
    nearest = quantize(QuantizeOptions(model=str(tiny), out=str(tmp_path / "nearest"), bits=4, rounding="nearest"))
    one, two = (checkpoint.load(each).model.state_dict() for each in (tmp_path / "gptq", nearest))

    assert (report["rounding"], report["pictures"]) == ("gptq", 2)
    assert 0.5 < report["logits_cosine"] <= 1
    assert one.keys() == two.keys()
    assert not torch.equal(one["language.layers.0.mlp.up_proj.weight"], two["language.layers.0.mlp.up_proj.weight"])
    assert torch.equal(one["language.norm.weight"], two["language.norm.weight"])


@torch.inference_mode()
def test_a_quantised_model_computes_nearly_the_same_logits(folder, tiny):
    ids = torch.arange(40)[None]
    floats, quantised = (checkpoint.load(each, dtype=torch.float32).model(ids) for each in (tiny, folder))

    bits = json.loads((folder / "config.json").read_text())["quantization"]["bits"]
    cosine = F.cosine_similarity(quantised.flatten(), floats.flatten(), dim=0)
    assert cosine > (0.98 if bits == 8 else 0.8)  # these random weights make much of little


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_no_weight_is_farther_from_its_number_than_half_a_step_unless_clipped(packing):
    matrix = torch.randn(16, 256)

    weight, scales, biases = quantise(matrix, packing, torch.float32)
    error = (dequantise(weight, scales, biases, packing.bits) - matrix).view(*scales.shape, -1)
    low, high = biases[..., None], (biases + scales * (2**packing.bits - 1))[..., None]
    is_inside = (matrix.view(error.shape) >= low) & (matrix.view(error.shape) <= high)

    assert bool((error.abs() <= scales[..., None] * 0.501)[is_inside].all())
    assert float(is_inside.float().mean()) > 0.9


def test_errors_that_count_more_become_smaller():
    matrix = torch.randn(64, 128)
    importance = torch.where(torch.arange(128) % 32 < 4, 1000.0, 1.0)

    def error(importance):
        weight, scales, biases = quantise(matrix, Packing(4, 32), torch.float32, importance)
        wrong = dequantise(weight, scales, biases, 4) - matrix
        return float(wrong.square()[:, torch.arange(128) % 32 < 4].sum())

    assert error(importance) < error(None)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_compensated_rounding_changes_outputs_less_than_the_nearest(packing):
    torch.manual_seed(1)
    matrix = torch.randn(32, 256)
    x = torch.randn(400, 256) @ torch.randn(256, 256) * torch.linspace(0.1, 3, 256)  # inputs that go together

    def error(parts):
        return float((x @ (dequantise(*parts, packing.bits) - matrix).T).norm())

    nearest = error(quantise(matrix, packing, torch.float32))

    assert error(compensated(matrix, x.T @ x / len(x), packing, torch.float32)) < 0.8 * nearest


def inside(layer):
    """A model that holds one layer: what `prepare` rearranges."""
    return torch.nn.Sequential(layer)


@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("num_outputs", [64, 96, 130, 300])
@torch.inference_mode()
def test_a_quantised_layer_computes_what_its_floats_compute(packing, dtype, num_tokens, num_outputs):
    layer = layer_of(packing, num_outputs=num_outputs, dtype=dtype)
    x = torch.randn(2, num_tokens, 256).to(dtype)
    expected = F.linear(x.float(), layer.floats(torch.float32), layer.bias.float())

    plain = layer(x)
    model = inside(layer)
    quantized_cpu.prepare(model)

    is_taken = can_bag(layer) or packing == Packing(8, ROW) or quantized_cpu.kernel_block() is not None
    assert isinstance(model[0], QuantizedLinear) != is_taken
    for product in (plain, model(x)):
        assert product.dtype == dtype
        error = (product.float() - expected).norm() / expected.norm()
        assert error <= (1e-5 if dtype == torch.float32 else 0.01)


@torch.inference_mode()
def test_what_no_kernel_takes_is_left_alone():
    layer = layer_of(Packing(4, ROW), num_inputs=40, dtype=torch.bfloat16)
    x = torch.randn(1, 40).bfloat16()
    expected = layer(x)
    model = inside(layer)

    quantized_cpu.prepare(model)

    assert torch.equal(model(x), expected)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="embedding bags are slow here")
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_float32_is_left_to_embedding_bags_and_the_copied_numbers_are_given_back(packing):
    layer, table = layer_of(packing), QuantizedEmbedding(70, 128, packing)
    put(table, quantise(torch.randn(70, 128), packing, torch.float32))
    model, forgotten = torch.nn.Sequential(table, layer), []

    quantized_cpu.prepare(model, forgotten.append)

    assert [type(each) for each in model] == [BagEmbedding, BagLinear]
    assert [each.data_ptr() for each in forgotten] == [table.weight.data_ptr(), layer.weight.data_ptr()]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@torch.inference_mode()
def test_an_embedding_gives_the_rows_of_its_table_and_reads_as_a_head(packing):
    table = QuantizedEmbedding(70, 128, packing)
    put(table, quantise(torch.randn(70, 128), packing, torch.float32))
    ids, hidden = torch.tensor([[3, 69], [0, 3]]), torch.randn(2, 128)
    floats = table.floats(torch.float32)
    model = inside(table)

    for _ in range(2):
        assert_close(model[0](ids), floats[ids], atol=1e-6, rtol=1e-6)
        assert_close(model[0].as_head(hidden), hidden @ floats.T, atol=1e-4, rtol=1e-4)
        quantized_cpu.prepare(model)


@torch.inference_mode()
def test_cache_gives_the_same_hidden_states_as_no_cache(quantised):
    embeds = torch.randn(2, 9, 64)
    cache = KVCache(CONFIG, num_rows=2, capacity=16)
    steps = []

    for i in range(9):
        steps.append(quantised(embeds[:, i : i + 1], cache))
        cache.advance([1, 1])

    assert_close(torch.cat(steps, dim=1), quantised(embeds), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_row_of_a_batch_is_the_row_alone(quantised):
    embeds = torch.randn(20, 3, 64)

    together = quantised.head(quantised(embeds))

    for row in range(0, 20, 7):
        assert_close(together[row : row + 1], quantised.head(quantised(embeds[row : row + 1])), atol=1e-4, rtol=1e-4)


def test_a_quantised_folder_is_loaded_as_it_is_and_saved_with_the_same_bytes(folder, tmp_path):
    loaded = checkpoint.load(folder)

    again = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "again")

    assert loaded.layout == "transformers"
    assert len(quantized_layers(loaded.model)) == 2 * 7 + 1
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_numbers_are_mapped_and_no_float_is_made_of_them(tmp_path):
    """The process may grow by what it reads, not by four times that."""
    config = LanguageConfig(
        dim=512, num_layers=1, num_heads=8, num_kv_heads=2, mlp_dim=512, vocab_size=65_536, tied=True
    )
    code = f"""
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from fastvlm.checkpoint.build import build
from fastvlm.checkpoint.packed import translate_packed
from fastvlm.checkpoint.reading import Weights
from fastvlm.checkpoint import mlx
from fastvlm.checkpoint.translate import plain_source
from fastvlm.config import LanguageConfig
from fastvlm.model.language import Qwen2
import re
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
weights = Weights.open(Path(sys.argv[1]))
parts = translate_packed(weights, {{"quantization": {{"bits": 8, "group_size": -1}}}}, "config.json",
    rename=lambda name: "language." + name, dequantise=mlx.dequantise,
    plain=lambda weights, stored, name: plain_source(weights, stored), keep_packed=True)
parts.sources.update({{name.removeprefix("language."): source for name, source in parts.sources.items()}})
for name in list(parts.sources):
    if name.startswith("language."): del parts.sources[name]
parts.packings.update({{name.removeprefix("language."): packing for name, packing in parts.packings.items()}})
for name in list(parts.packings):
    if name.startswith("language."): del parts.packings[name]
before = peak()
model = build(lambda: Qwen2({config!r}), parts)
print(peak() - before, sum(tensor.numel() for tensor in model.buffers()))
"""
    torch.manual_seed(0)
    model = Qwen2(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2:
            words, scales, biases = quantise(tensor, Packing(8, ROW), torch.float32)
            base = name.removesuffix(".weight")
            tensors |= {name: words.view(torch.uint32), f"{base}.scales": scales, f"{base}.biases": biases}
        else:
            tensors[name] = tensor
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors")

    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, packed = map(int, result.stdout.split())

    assert packed > 30_000_000
    assert grown < 1.3 * packed


def test_only_the_language_model_is_quantised_and_the_table_has_8_bits(folder):
    entries = read_header(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    packed = {name for name, entry in entries.items() if entry.dtype == "U32"}

    assert all(name.startswith("model.language_model.") for name in packed)
    table, layer = "model.language_model.embed_tokens", "model.language_model.layers.0.self_attn"
    assert f"{table}.weight" in packed
    if settings["bits"] == 4:
        assert settings[table] == settings[f"{layer}.v_proj"] == settings[f"{layer}.o_proj"]
        assert settings[table] == {"bits": 8, "group_size": ROW}
        assert settings["group_size"] == 32


def test_converting_makes_floats(folder, tmp_path):
    loaded = checkpoint.load(folder)

    converted = checkpoint.load(checkpoint.convert(folder, "hf", tmp_path / "hf")).model.state_dict()

    for name, layer in quantized_layers(loaded.model).items():
        assert torch.equal(converted[f"{name}.weight"], layer.floats(layer.scales.dtype)), name


def test_a_quantised_model_is_not_quantised_again(folder, tmp_path):
    with pytest.raises(InputError, match="quantised already"):
        quantize(QuantizeOptions(model=str(folder), out=str(tmp_path / "again")))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bits": 1}, "1 bits in groups of"),
        ({"group_size": 48}, "in groups of 48"),
        ({"group_size": 0}, "in groups of 0"),
        ({"mode": "mxfp4"}, "only 'affine' is read"),
        ({"bits": 6}, "cannot hold groups|expected"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_weights_are_refused_in_one_line(change, expected, folder):
    raw = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        raw[key] = raw[key] | change
    (folder / "config.json").write_text(json.dumps(raw))

    with pytest.raises(CheckpointError, match=expected) as error:
        checkpoint.load(folder)

    assert "\n" not in str(error.value)


def test_the_command_writes_a_folder_that_answers(tiny, tmp_path, capsys, photo):
    status = cli.main(
        ["quantize", "--model", str(tiny), "--out", str(tmp_path / "q"), "--bits", "4", "--rounding", "nearest"]
    )
    assert status == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip() == str(tmp_path / "q")

    status = cli.main(
        ["predict", "--model", str(tmp_path / "q"), "--image", str(photo), "--prompt", "?", "--max-new-tokens", "3"]
    )

    assert status == 0, capsys.readouterr().err


def test_a_cache_has_the_format_of_the_arithmetic(folder):
    model = checkpoint.load(folder, dtype=torch.float32).model

    assert make_cache(model, 1, 8).keys.dtype == torch.float32
    assert model.embed(torch.tensor([[1, 2]])).dtype == torch.float32
