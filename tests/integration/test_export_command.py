"""`fastvlm export` as a user meets it; the language half, which is written fastest, stands for every format."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from hashlib import sha256

import numpy as np
import pytest
import torch

from fastvlm import cli
from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.save import save
from fastvlm.config import Config
from fastvlm.errors import CheckpointError, ExportError
from fastvlm.export import gguf_lm
from fastvlm.export.openvino import _save as save_openvino
from fastvlm.export.parts import Request, Source
from fastvlm.export.verify import compare, draw_pictures
from fastvlm.options import EXPORT_FORMATS

gguf = pytest.importorskip("gguf")
Usage = namedtuple("Usage", "total used free")


def export(capsys, out, *args, model, name="gguf-lm"):
    size = () if name == "gguf-lm" or "--image-size" in args else ("--image-size", "64")
    count = () if "--pictures" in args else ("--pictures", "2")
    status = cli.main(["export", name, "--model", str(model), "--out", str(out), *size, *count, *args])
    return status, *capsys.readouterr()


def digests(folder):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_an_export_says_what_it_is_and_leaves_its_source_alone(tiny, tmp_path, capsys):
    before = digests(tiny)

    status, out, err = export(capsys, tmp_path / "out", model=tiny)

    assert status == 0, err
    assert out.strip() == str(tmp_path / "out")
    assert digests(tiny) == before
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == files
    for name, file in manifest["files"].items():
        assert file["sha256"] == sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
    assert manifest["image"]["tokens"] == 16
    assert manifest["image"]["fit"] == "pad"
    assert manifest["image"]["ends_in"] is None
    assert manifest["versions"]["gguf"]
    (report,) = json.loads((tmp_path / "out" / "parity.json").read_text())["reports"]
    assert report["failures"] == []
    assert report["texts"]["equal"] == report["pictures"]["count"] == 2
    assert report["logits"]["relative"] <= 1e-4


@pytest.mark.parametrize("licence", ["LICENSE", "LICENSE_MODEL"])
def test_a_licence_goes_along(tiny, tmp_path, capsys, licence):
    shutil.copytree(tiny, tmp_path / "source")
    (tmp_path / "source" / licence).write_text("the terms")

    status, _, _ = export(capsys, tmp_path / "out", model=tmp_path / "source")

    assert status == 0
    assert (tmp_path / "out" / licence).read_text() == "the terms"
    assert "GGUF" in (tmp_path / "out" / "CHANGES.md").read_text()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["licences"] == [licence]


def test_what_does_not_compute_the_same_is_refused_and_nothing_is_left(tiny, tmp_path, capsys):
    checkpoint = load(tiny, dtype=torch.float32)
    with torch.no_grad():  # float16 ends at 65,504
        checkpoint.model.language.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    save(checkpoint.model, checkpoint.tokenizer, tmp_path / "loud")

    status, out, err = export(capsys, tmp_path / "out", "--precision", "fp16", "--quiet", model=tmp_path / "loud")

    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "not equal to eager" in err
    assert [path.name for path in tmp_path.iterdir()] == ["loud"]


def test_what_does_not_compute_the_same_can_be_kept_to_look_at_it(tiny, tmp_path, capsys):
    checkpoint = load(tiny, dtype=torch.float32)
    with torch.no_grad():
        checkpoint.model.language.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    save(checkpoint.model, checkpoint.tokenizer, tmp_path / "loud")

    status, _, err = export(capsys, tmp_path / "out", "--precision", "fp16", "--keep", model=tmp_path / "loud")

    (report,) = json.loads((tmp_path / "out" / "parity.json").read_text())["reports"]
    assert status == 0
    assert report["failures"]
    assert "fp16 is not equal to eager" in err
    assert "it is kept" in err


def test_one_changed_weight_is_noticed(tiny, tmp_path):
    source = Source(load(tiny), lambda: load(tiny, dtype=torch.float32).model)
    request = Request(precisions=("fp32",), image_size=64, has_dynamic_batch=True, with_projector=True)
    gguf_lm.write(source, request, tmp_path)
    path = tmp_path / "language-f32.gguf"
    pictures = draw_pictures(1)

    sound = compare(source, request, gguf_lm.read(source, request, tmp_path, "fp32"), pictures, precision="fp32")
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.1.ffn_down.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset + 3] ^= 0x04  # in the exponent of the first weight
    path.write_bytes(content)
    broken = compare(source, request, gguf_lm.read(source, request, tmp_path, "fp32"), pictures, precision="fp32")

    assert sound["failures"] == []
    assert broken["failures"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--precision", "q4"), "gguf-lm has no precision 'q4'; it has fp32, fp16, bf16, int8"),
        (("--precision", "fp32", "--precision", "fp16"), "gguf-lm holds one precision"),
        (("--precision", "int8", "--precision", "fp32", "--precision", "fp32"), "precision names 'fp32' twice"),
        (("--pictures", "0"), "pictures must be between 1 and 10000, got 0"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(tiny, tmp_path, capsys, args, said):
    status, _, err = export(capsys, tmp_path / "out", *args, model=tiny)

    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ("100", "image_size must be a multiple of 64, got 100"),
        ("16384", "takes 65536 tokens, the model's context holds 32768"),
    ],
)
def test_pictures_that_do_not_fit_the_model_are_one_line(tiny, tmp_path, capsys, side, said):
    status, _, err = export(capsys, tmp_path / "out", "--image-size", side, model=tiny, name="mlx")

    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


GIVEN = {"image_size": ("--image-size", "64"), "batch": ("--batch", "1"), "with_projector": ("--with-projector",)}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, kind in EXPORT_FORMATS.items() for option in kind.refuses]
)
def test_an_option_that_a_format_cannot_honour_is_refused_before_the_model_is_read(tmp_path, capsys, name, option):
    command = ["export", name, "--model", str(tmp_path / "missing"), "--out", str(tmp_path / "out"), *GIVEN[option]]

    status = cli.main(command)

    err = capsys.readouterr().err
    assert status == 2
    assert err == f"fastvlm: error: {name} takes no {GIVEN[option][0]}: {EXPORT_FORMATS[name].refuses[option]}\n"


def test_these_options_are_refused_by_these_formats():
    refused = {name: sorted(kind.refuses) for name, kind in EXPORT_FORMATS.items()}

    assert refused == {
        "onnx": [],
        "openvino": [],
        "gguf-lm": ["batch", "image_size", "with_projector"],
        "coreml": [],
        "mlx": ["batch", "with_projector"],
        "ios-bundle": ["batch", "with_projector"],
    }


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_the_help_of_a_format_says_what_it_can_do(capsys, name):
    kind = EXPORT_FORMATS[name]

    status = cli.main(["export", name, "--help"])

    out = capsys.readouterr().out
    assert status == 0
    assert f"{kind.precisions[0]} (default), {', '.join(kind.precisions[1:])};" in out
    assert f"--precision {{{','.join(kind.precisions)}}}" in out
    assert (f"pip install 'fastvlm[{kind.extra}]'" in out) == (kind.extra is not None)
    for option, (flag, *_) in GIVEN.items():
        assert (option in kind.refuses) == (f"\n  {flag} " not in out)
    assert all(reason in " ".join(out.split()) for reason in kind.refuses.values())
    assert max(map(len, out.splitlines())) <= 80


def test_the_help_of_the_command_names_the_formats(capsys):
    cli.main(["export", "--help"])

    out = " ".join(capsys.readouterr().out.split())
    assert all(f" {name} {kind.reader} " in out for name, kind in EXPORT_FORMATS.items())


def test_an_unknown_format_is_one_line(tiny, tmp_path, capsys):
    status, _, err = export(capsys, tmp_path / "out", model=tiny, name="tflite")

    assert status == 2
    assert "'tflite'" in err
    assert "openvino" in err
    assert err.count("\n") == 1


def test_a_full_disk_is_noticed_before_anything_is_written(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))

    status, _, err = export(capsys, tmp_path / "out", model=tiny)

    assert status == 2
    assert "the disk has 0 MB free" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["gguf-lm", "mlx", *(pytest.param(each, marks=pytest.mark.slow) for each in ("coreml", "onnx", "openvino"))],
)
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # a folder that coremltools drops
def test_a_disk_that_fills_up_while_it_is_written_leaves_nothing(tiny, tmp_path, capsys, name):
    resource = pytest.importorskip("resource", reason="sizes of files are limited on Unix")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        status, out, err = export(capsys, tmp_path / "out", "--quiet", model=tiny, name=name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert status == 2
    assert out == ""
    assert "cannot be written" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    gc.collect()  # while that warning is still let pass


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that can be caught")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_export_that_is_interrupted_leaves_nothing(tiny, tmp_path, number, status):
    out = tmp_path / "out"
    command = ["export", "gguf-lm", "--model", str(tiny), "--out", str(out), "--pictures", "200"]
    with subprocess.Popen([sys.executable, "-m", "fastvlm", *command], stderr=subprocess.PIPE, text=True) as child:
        while not (found := list(tmp_path.glob(".out-*/*.gguf"))) and child.poll() is None:
            time.sleep(0.05)
        child.send_signal(number)
        _, err = child.communicate(timeout=60)

    assert found
    assert child.returncode == status
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_model_that_the_memory_does_not_hold_is_refused(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastvlm.export.run.available_memory_bytes", lambda: 1_000_000)

    status, _, err = export(capsys, tmp_path / "out", model=tiny)

    assert status == 2
    assert "use a smaller model, a smaller --image-size or a larger machine" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_model_that_is_read_is_no_place_to_write(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "source")

    status, _, err = export(capsys, tmp_path / "source" / "out", model=tmp_path / "source")

    assert status == 2
    assert "which is read; name another folder" in err
    assert digests(tmp_path / "source") == digests(tiny)


def refuse_to_read(*_, **__):
    raise CheckpointError("the weights were read")


def test_a_target_that_is_refused_is_said_before_the_weights_are_read(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastvlm.export.run.load", refuse_to_read)
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")

    status, _, err = export(capsys, out, model=tiny)
    _, _, replaced = export(capsys, out, "--overwrite", model=tiny)
    _, _, read = export(capsys, tmp_path / "new", model=tiny)

    assert status == 2
    assert "is not empty; name another folder, or say --overwrite" in err
    assert "holds 'diary.txt' and is no export alone" in replaced
    assert "the weights were read" in read
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("name", "package"), [("gguf-lm", "gguf"), ("onnx", "onnx"), ("coreml", "coremltools")])
def test_a_missing_package_is_said_before_the_weights_are_read(tiny, tmp_path, capsys, monkeypatch, name, package):
    monkeypatch.setattr("fastvlm.export.run.load", refuse_to_read)
    monkeypatch.setitem(sys.modules, package, None)

    status, _, err = export(capsys, tmp_path / "out", model=tiny, name=name)

    assert status == 2
    assert "this export needs more packages" in err
    assert err.count("\n") == 1


def test_a_size_that_apples_app_does_not_show_is_said_before_the_weights_are_read(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastvlm.export.run.load", refuse_to_read)

    status, _, err = export(capsys, tmp_path / "out", "--image-size", "512", model=tiny, name="ios-bundle")

    assert status == 2
    assert "Apple's app shows one picture of 1024 pixels, got 512" in err


def test_a_name_that_no_folder_can_have_is_one_clear_line(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")

    empty = export(capsys, "", model=tiny)
    under = export(capsys, tmp_path / "file" / "a" / "b", model=tiny)

    assert empty == (2, "", "fastvlm: error: the name of the folder to write is empty; name a folder\n")
    assert under[0] == 2
    assert under[2].endswith(f"b cannot be written: {tmp_path / 'file'} is a file; name another folder\n")
    assert under[2].count("\n") == 1


def test_only_an_export_is_replaced_and_only_when_asked(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    export(capsys, out, model=tiny)

    refused, _, line = export(capsys, out, model=tiny)
    replaced, _, _ = export(capsys, out, "--overwrite", model=tiny)
    (out / "diary.txt").write_text("mine")
    kept, _, other = export(capsys, out, "--overwrite", model=tiny)

    assert (refused, replaced, kept) == (2, 0, 2)
    assert "is not empty" in line
    assert "'diary.txt'" in other
    assert (out / "diary.txt").read_text() == "mine"


def test_a_gguf_holds_the_settings_and_the_tokenizer(tiny, tmp_path, capsys):
    export(capsys, tmp_path / "out", model=tiny)
    reader = gguf.GGUFReader(tmp_path / "out" / "language-f32.gguf")
    checkpoint = load(tiny)
    language: Config = checkpoint.model.config.language

    found = {name: field.contents() for name, field in reader.fields.items()}

    assert found["general.architecture"] == "qwen2"
    assert found["qwen2.block_count"] == language.num_layers
    assert found["qwen2.attention.head_count"] == language.num_heads
    assert found["qwen2.attention.head_count_kv"] == language.num_kv_heads
    assert found["qwen2.rope.freq_base"] == language.rope_theta
    assert found["qwen2.attention.layer_norm_rms_epsilon"] == pytest.approx(language.norm_eps)
    assert found["tokenizer.ggml.eos_token_id"] == checkpoint.tokenizer.im_end_id
    tokens = found["tokenizer.ggml.tokens"]
    assert len(tokens) == language.vocab_size
    content = json.loads(checkpoint.tokenizer.to_json())
    assert all(tokens[index] == token for token, index in content["model"]["vocab"].items())
    assert tokens[checkpoint.tokenizer.im_end_id] == "<|im_end|>"
    assert len(found["tokenizer.ggml.merges"]) == len(content["model"]["merges"])


def test_openvinos_own_writer_on_a_full_disk_is_said_in_one_line(tmp_path):
    ov = pytest.importorskip("openvino")
    resource = pytest.importorskip("resource", reason="sizes of files are limited on Unix")
    given = ov.opset13.parameter([1, 512], np.float32)
    matrix = ov.opset13.constant(np.ones((512, 512), np.float32))
    model = ov.Model([ov.opset13.matmul(given, matrix, False, False)], [given])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ExportError, match="cannot be written; is the disk full"):
            save_openvino(ov, model, tmp_path / "model.xml", is_half=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
