import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from fastvlm import checkpoint
from fastvlm.checkpoint import mlx
from fastvlm.errors import ExportError
from fastvlm.export.mlx import largest_activation, neutralise_norms
from fastvlm.export.parts import Request, Source
from fastvlm.export.run import run
from fastvlm.model import fold
from fastvlm.options import ExportOptions


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_are_packed_as_mlx_packs_them(bits, goldens):
    golden = load_file(goldens / "mlx_quant.expected.safetensors")

    packed, scales, biases = mlx.quantise(golden["w"].bfloat16(), bits)

    assert torch.equal(packed.view(torch.int32), golden[f"q{bits}.weight"].view(torch.int32))
    assert torch.equal(scales, golden[f"q{bits}.scales"])
    assert torch.equal(biases, golden[f"q{bits}.biases"])


@pytest.mark.parametrize("row", [[0.0] * 64, [0.5] * 64, [-1.0] * 32 + [2.0] * 32], ids=["zeros", "equal", "two"])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_that_a_group_can_hold_exactly_come_back(row, bits):
    weight = torch.tensor([row])

    packed, scales, biases = mlx.quantise(weight, bits)

    assert_close(mlx.dequantise(packed, scales, biases, bits), weight, rtol=0, atol=0.1)


def test_only_matrices_of_whole_groups_outside_of_the_encoder_are_quantised():
    assert mlx.can_quantise("language_model.model.layers.0.mlp.up_proj.weight", (8, 128))
    assert not mlx.can_quantise("language_model.model.layers.0.mlp.down_proj.weight", (8, 100))
    assert not mlx.can_quantise("language_model.model.norm.weight", (128,))
    assert not mlx.can_quantise("vision_tower.vision_model.network.7.0.token_mixer.qkv.weight", (8, 128))


@torch.inference_mode()
def test_norms_that_only_add_compute_the_same(tiny):
    model = fold.reparameterise(checkpoint.load(tiny, dtype=torch.float32).model)
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    wanted = model.vision(pixels)

    neutralise_norms(model.vision)

    assert_close(model.vision(pixels), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    norms = [module for module in model.vision.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", "BF16"), ("fp16", "F16"), ("int8", "BF16"), ("int4", "BF16")]
)
def test_an_export_is_read_back_and_compared(tiny, precision, dtype, tmp_path):
    options = ExportOptions(
        format="mlx", model=str(tiny), out=str(tmp_path / "out"), precision=(precision,), pictures=1, keep=True
    )

    folder = run(options)

    (report,) = json.loads((folder / "parity.json").read_text())["reports"]
    assert report["image_embeds"]["least_cosine"] > 0.98
    header = (folder / "model.safetensors").read_bytes()[:2_000_000]
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    dtypes = {entry["dtype"] for name, entry in entries.items() if name != "__metadata__"}
    assert dtypes == ({dtype, "U32"} if precision.startswith("int") else {dtype})
    config = json.loads((folder / "config.json").read_text())
    assert config.get("quantization", {}).get("bits") == {"int8": 8, "int4": 4}.get(precision)
    assert "VisionConfig.layers" in (folder / "CHANGES.md").read_text()


def test_a_value_that_is_no_number_is_beyond_float16(tiny):
    def broken():
        model = checkpoint.load(tiny, dtype=torch.float32).model
        with torch.no_grad():
            fold.reparameterise(model).vision.stages[0].blocks[0].mlp.fc2.bias[0] = torch.nan
        return model

    request = Request(precisions=("fp16",), image_size=64, has_dynamic_batch=False, with_projector=True)

    assert largest_activation(Source(checkpoint.load(tiny), broken), request, count=1) == torch.inf


@pytest.mark.slow
def test_float16_is_refused_where_the_encoder_goes_beyond_it(tiny, tmp_path):
    loaded = checkpoint.load(tiny, dtype=torch.float32)
    with torch.no_grad():
        fold.reparameterise(loaded.model).vision.stages[0].blocks[0].mlp.fc2.bias.add_(1e6)
        loaded.model.vision.stages[0].blocks[0].layer_scale.gamma.fill_(1)
    source = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "source")
    out = tmp_path / "out"

    with pytest.raises(ExportError, match=r"float16 ends at 65,504; take --precision bf16"):
        run(ExportOptions(format="mlx", model=str(source), out=str(out), precision=("fp16",), pictures=1))

    assert [path.name for path in tmp_path.iterdir()] == ["source"]
