"""What runs in another engine computes the same; what is not here is one line."""

import builtins
import sys

import pytest
import torch
from torch.testing import assert_close

import fastvlm
from fastvlm.accelerate import accelerate
from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.zoo import resolve
from fastvlm.device import Placement
from fastvlm.errors import DeviceError, InputError
from fastvlm.model.native import NativeQwen2
from fastvlm.model.openvino import OpenVinoVision
from fastvlm.options import GenerationOptions

PICTURE = "examples/images/emoji.png"
ON_CPU = Placement(device=torch.device("cpu"), dtype=torch.float32)


def nano():
    return load(resolve("nano"), dtype=torch.float32).model


@pytest.mark.parametrize("size", [(1, 3, 128, 128), (2, 3, 64, 192)], ids=str)
def test_openvino_computes_the_encoders_features(size):
    pytest.importorskip("openvino")
    pixels = torch.rand(size)

    with torch.inference_mode():
        expected = accelerate(nano(), ON_CPU).vision(pixels)
        encoder = accelerate(nano(), ON_CPU, engine="openvino").vision
        got = encoder(pixels)

    assert isinstance(encoder, OpenVinoVision)
    assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean()))


def test_openvino_answers_as_pytorch_does():
    pytest.importorskip("openvino")
    options = GenerationOptions(max_new_tokens=6)

    answers = [
        fastvlm.load("nano", device="cpu", dtype="float32", engine=engine).ask(
            "Which emoji is this?", [PICTURE], options=options
        )
        for engine in ("torch", "openvino")
    ]

    assert answers[0].token_ids == answers[1].token_ids


def test_a_size_that_is_no_multiple_of_the_stride_is_refused_alike():
    pytest.importorskip("openvino")
    encoder = accelerate(nano(), ON_CPU, engine="openvino").vision

    with pytest.raises(InputError, match="multiples of 64"):
        encoder(torch.zeros(1, 3, 100, 64))


def test_where_openvino_is_missing_one_line_says_what_to_install(monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "openvino":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)

    with pytest.raises(DeviceError, match=r"pip install 'fastvlm\[openvino\]'"):
        accelerate(nano(), ON_CPU, engine="openvino")


def test_compiled_kernels_are_for_the_cpu():
    with pytest.raises(DeviceError, match="--compile is for the CPU and for NVIDIA GPUs, not for meta"):
        accelerate(nano(), Placement(device=torch.device("meta"), dtype=torch.float32), is_compiled=True)


def test_by_default_nothing_is_compiled():
    assert not isinstance(accelerate(nano(), ON_CPU).language, NativeQwen2)


@pytest.mark.parametrize(("options", "said"), [({"compile": True}, "no C"), ({"engine": "openvino"}, "pip install")])
def test_what_is_missing_is_reported_before_the_model_is_looked_for(options, said, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(sys.modules, "openvino", None)

    with pytest.raises(DeviceError, match=said):
        fastvlm.load("no-such-model", device="cpu", dtype="float32", **options)
