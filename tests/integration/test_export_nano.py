"""nano as each format writes it, compared on twenty pictures by what reads the files here."""

import json

import pytest

from fastvlm.export.run import run
from fastvlm.options import ExportOptions

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("export")]


@pytest.mark.parametrize(
    ("name", "precision", "package", "encoder", "logits"),
    [
        ("coreml", "fp32", "coremltools", 1e-3, 1e-3),
        ("mlx", "fp16", "safetensors", 1e-2, 1e-2),
        ("openvino", "fp32", "openvino", 1e-4, 1e-4),
    ],
)
def test_twenty_answers_are_eagers(name, precision, package, encoder, logits, tmp_path):
    pytest.importorskip(package, exc_type=ImportError)

    folder = run(ExportOptions(format=name, model="nano", out=str(tmp_path / "out"), precision=(precision,)))

    (report,) = json.loads((folder / "parity.json").read_text())["reports"]
    assert report["pictures"]["count"] == 20
    assert report["texts"]["equal"] == 20
    assert report["image_embeds"]["relative"] <= encoder
    assert report["logits"]["relative"] <= logits
    if name == "openvino":
        assert not list(folder.glob("*.onnx*"))
