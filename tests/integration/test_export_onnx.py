"""ONNX and OpenVINO folders of a tiny model, run by the two programs that read them."""

import gc
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm import cli
from fastvlm.checkpoint.load import load
from fastvlm.export.graphs import Decoder, HalfEncoder
from fastvlm.export.onnx import trace_decoder, trace_encoder
from fastvlm.export.parts import ImageEncoder, Request, Source
from fastvlm.model import fold

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("export")]
PRECISIONS = ("fp32", "fp16", "int8", "q4", "q4f16")


def export(out, *args, name, tiny):
    return cli.main(["export", name, "--model", str(tiny), "--out", str(out), "--pictures", "2", "--keep", *args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, goldens):
    out = tmp_path_factory.mktemp("onnx") / "out"
    flags = [word for precision in PRECISIONS for word in ("--precision", precision)]
    assert export(out, "--image-size", "128", *flags, name="onnx", tiny=goldens / "apple_tiny") == 0
    return out


@pytest.fixture(scope="module")
def eager(goldens):
    return fold.for_inference(load(goldens / "apple_tiny", dtype=torch.float32).model)


def session(folder, name):
    return onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])


def report_of(folder, precision):
    reports = json.loads((folder / "parity.json").read_text())["reports"]
    return next(report for report in reports if report["precision"] == precision)


def test_float32_is_eager_within_a_ten_thousandth(folder):
    report = report_of(folder, "fp32")

    assert report["failures"] == []
    assert report["image_embeds"]["relative"] <= 1e-4
    assert report["logits"]["relative"] <= 1e-4
    assert report["texts"]["equal_or_tied"] == 2


@pytest.mark.parametrize("precision", ["fp16", "int8", "q4", "q4f16"])
def test_smaller_files_are_close(folder, precision):
    report = report_of(folder, precision)
    whole = sum(path.stat().st_size for path in (folder / "onnx").iterdir() if "_" not in path.stem[-6:])
    small = sum(path.stat().st_size for path in (folder / "onnx").glob(f"*_{precision}.onnx"))

    assert report["image_embeds"]["least_cosine"] >= 0.999
    # Random weights this small turn a rounding of four bits into other logits, but not into any others.
    assert report["logits"]["least_cosine"] >= (0.5 if precision.startswith("q4") else 0.99)
    assert small < whole * 0.8


def test_the_changes_say_in_words_what_was_rounded(folder):
    text = (folder / "CHANGES.md").read_text()

    assert "int8: the encoder's large kernels" in text
    assert "q4: " in text
    assert "the decoder's matrices in 4 bits" in text
    assert "manifest.json" not in text


def weights_in_memory():
    gc.collect()
    return sum(each.numel() for each in gc.get_objects() if type(each) is torch.nn.Parameter)


@pytest.mark.parametrize(("name", "precision"), [("onnx", "fp16"), ("openvino", "fp32")])
def test_weights_that_are_written_are_let_go_of(name, precision, tiny, tmp_path):
    pytest.importorskip(name)
    source = Source(load(tiny), lambda: load(tiny, dtype=torch.float32).model)
    side = source.config.vision.image_size
    request = Request(precisions=(precision,), image_size=side, has_dynamic_batch=True, with_projector=True)
    before = weights_in_memory()

    import_module(f"fastvlm.export.{name}").write(source, request, tmp_path)

    assert before <= weights_in_memory() < 1.01 * before


def parts_of(graph):
    """Each operation with what it reads and makes, and each constant."""
    nodes = [
        (node.op_type, [value and value.name for value in node.inputs], [value.name for value in node.outputs])
        for node in graph.graph
    ]
    return nodes, {name: value.const_value.shape for name, value in graph.graph.initializers.items()}


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_graphs_are_those_that_all_rules_of_the_exporter_make(dtype, batch, tiny, monkeypatch):
    optimizer = import_module("onnxscript.optimizer")
    model = fold.for_inference(load(tiny, dtype=torch.float32).model)
    side, config = model.config.vision.image_size, model.config.language
    request = Request(precisions=("fp32",), image_size=side, has_dynamic_batch=batch, with_projector=True)
    is_half = dtype == torch.float16
    encoder = HalfEncoder(model, ["stem"], with_projector=True) if is_half else ImageEncoder(model, with_projector=True)
    decoder = Decoder(model.language.to(dtype))

    def traced():
        return [parts_of(each) for each in (trace_encoder(encoder, request), trace_decoder(decoder, config))]

    ours = traced()
    monkeypatch.setattr("fastvlm.export.onnx.simplify", optimizer.optimize)
    theirs = traced()

    assert ours == theirs
    assert not {"Identity", "Constant", "SplitToSequence", "CastLike"} & {
        node[0] for nodes, _ in ours for node in nodes
    }


def test_files_do_not_say_where_the_code_that_made_them_lies(folder):
    package = str(Path(torch.__file__).parent).encode()

    for path in (folder / "onnx").iterdir():
        content = path.read_bytes()
        assert b"stack_trace" not in content
        assert package not in content


def test_names_are_those_of_onnx_community(folder):
    decoder = session(folder, "decoder_model_merged")
    past = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]

    names = [each.name for each in decoder.get_inputs()], [each.name for each in decoder.get_outputs()]

    assert names[0] == ["inputs_embeds", "attention_mask", "position_ids", *past]
    assert names[1] == ["logits", *(name.replace("past_key_values", "present") for name in past)]
    assert [each.name for each in session(folder, "vision_encoder").get_outputs()] == ["image_features"]
    assert [each.name for each in session(folder, "embed_tokens").get_inputs()] == ["input_ids"]


@torch.inference_mode()
def test_three_pictures_at_once_are_encoded_as_eager_does(folder, eager):
    pixels = torch.rand(3, 3, 128, 128)

    (found,) = session(folder, "vision_encoder").run(None, {"pixel_values": pixels.numpy()})

    expected = eager.encode(pixels).numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@torch.inference_mode()
def test_two_rows_padded_on_the_left_are_the_rows_alone(folder, eager):
    config = eager.config.language
    long, short = torch.randn(1, 6, config.dim), torch.randn(1, 4, config.dim)
    embeds = torch.cat([long, torch.cat([torch.zeros(1, 2, config.dim), short], 1)])
    empty = np.zeros((2, config.num_kv_heads, 0, config.head_dim), np.float32)
    decoder = session(folder, "decoder_model_merged")
    inputs = {
        "inputs_embeds": embeds.numpy(),
        "attention_mask": np.array([[1] * 6, [0, 0, 1, 1, 1, 1]]),
        "position_ids": np.array([range(6), [0, 0, 0, 1, 2, 3]]),
    }
    past = {each.name: empty for each in decoder.get_inputs()[3:]}

    logits = decoder.run(["logits"], inputs | past)[0]

    for found, row in ((logits[0], long), (logits[1, 2:], short)):
        expected = eager.language.head(eager.language(row))[0].numpy()
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_what_does_not_fit_a_protobuf_lies_beside_it(goldens, tmp_path, monkeypatch):
    monkeypatch.setattr("fastvlm.export.onnx._MAX_PROTOBUF", 1000)

    status = export(tmp_path / "out", "--image-size", "64", name="onnx", tiny=goldens / "apple_tiny")

    settings = json.loads((tmp_path / "out" / "config.json").read_text())["transformers.js_config"]
    assert status == 0
    assert settings["use_external_data_format"]["vision_encoder.onnx"] == 1
    assert (tmp_path / "out" / "onnx" / "vision_encoder.onnx_data").stat().st_size > 1000
    assert report_of(tmp_path / "out", "fp32")["failures"] == []


def test_openvino_in_half_precision_is_close(goldens, tmp_path):  # float32: test_export_nano.py
    pytest.importorskip("openvino")

    status = export(
        tmp_path / "out", "--image-size", "64", "--precision", "fp16", name="openvino", tiny=goldens / "apple_tiny"
    )

    report = report_of(tmp_path / "out", "fp16")
    assert status == 0
    assert report["logits"]["relative"] <= 5e-2
    assert report["image_embeds"]["relative"] <= 1e-2
