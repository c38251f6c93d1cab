"""Bad input, one clear line: status 2, nothing on standard output, no traceback."""

import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastvlm import cli

FC1 = "model.mm_projector.0.weight"


def png_that_claims(width, height):
    """The beginning of a picture that would fill the memory."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.fixture
def folder(tmp_path):
    """Things that are no picture."""
    (tmp_path / "words.txt").write_text("words")
    (tmp_path / "words.png").write_text("words")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bomb.png").write_bytes(png_that_claims(50_000, 50_000))
    (tmp_path / "document.pdf").write_bytes(b"%PDF-1.7 nothing")
    (tmp_path / "inside").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.fixture
def changed_checkpoint(tmp_path, tiny):
    """Copy the tiny checkpoint with its tensors or its configuration changed."""

    def copy(tensors=None, config=None):
        target = tmp_path / "model"
        shutil.copytree(tiny, target)
        if tensors is not None:
            content = load_file(target / "model.safetensors")
            tensors(content)
            save_file(content, target / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            content = json.loads((target / "config.json").read_text()) | config
            (target / "config.json").write_text(json.dumps(content))
        return target

    return copy


@pytest.fixture
def complaint(capsys):
    """Run a command that must fail; give the line that it says."""

    def run(*args):
        status = cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert status == 2, err
        assert out == ""
        assert err.startswith("fastvlm: error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return run


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.png", "no such file"),
        ("inside", "is a folder"),
        ("words.txt", "words.txt"),
        ("words.png", "words.png"),
        ("empty.png", "empty"),
        ("cut.png", "damaged or cut off"),
        ("bomb.png", "50000"),
        ("document.pdf", "PDF"),
        ("", "no such file"),
        ("nul\0byte.png", "no such file"),
    ],
)
def test_a_picture_that_cannot_be_used(complaint, folder, tiny, name, words):
    path = folder / name if name and "\0" not in name else name

    line = complaint("predict", "--model", tiny, "--image", path, "--prompt", "x")

    assert words in line


def test_a_picture_with_more_pixels_than_allowed(complaint, folder, tiny):
    line = complaint("predict", "--model", tiny, "--image", folder / "whole.png", "--max-pixels", 100)

    assert "whole.png" in line


@pytest.mark.parametrize("name", ["nonesuch", "nope/", "a/b/c", "\U0001f600", "x" * 5000])
def test_a_model_that_nobody_knows(complaint, name):
    complaint("predict", "--model", name, "--prompt", "x")


def test_a_model_that_was_not_pulled(complaint):
    assert "fastvlm models pull 0.5b-stage3" in complaint("predict", "--model", "0.5b", "--prompt", "x")


def test_a_folder_that_is_no_checkpoint(complaint, folder):
    assert str(folder / "inside") in complaint("predict", "--model", folder / "inside", "--prompt", "x")


def test_a_layout_that_is_not_read(complaint, changed_checkpoint):
    def rename(tensors):
        for name in list(tensors):
            tensors[f"strange.{name}"] = tensors.pop(name)

    assert "layout" in complaint("predict", "--model", changed_checkpoint(rename), "--prompt", "x")


def test_a_missing_tensor(complaint, changed_checkpoint):
    target = changed_checkpoint(lambda tensors: tensors.pop(FC1))

    assert "missing 'projector.fc1.weight'" in complaint("predict", "--model", target, "--prompt", "x")


def test_a_tensor_too_many(complaint, changed_checkpoint):
    def add(tensors):
        tensors["model.layers.0.nonsense.weight"] = torch.zeros(3)

    assert "model.layers.0.nonsense.weight" in complaint("predict", "--model", changed_checkpoint(add), "--prompt", "x")


def test_a_tensor_of_the_wrong_shape(complaint, changed_checkpoint):
    name = "model.layers.0.mlp.up_proj.weight"

    def cut(tensors):
        tensors[name] = tensors[name][:-1].clone()

    assert name in complaint("predict", "--model", changed_checkpoint(cut), "--prompt", "x")


@pytest.mark.parametrize(
    ("config", "words"),
    [({"hidden_act": "relu"}, "hidden_act"), ({"mm_projector_type": "linear"}, "mm_projector_type")],
)
def test_a_configuration_that_we_do_not_compute(complaint, changed_checkpoint, config, words):
    assert words in complaint("predict", "--model", changed_checkpoint(config=config), "--prompt", "x")


ABSENT = [
    "cuda:77" if torch.cuda.is_available() else "cuda",
    "cpu:gpu" if torch.backends.mps.is_available() else "mps",
]


@pytest.mark.parametrize("device", [*ABSENT, "tpu", "meta", "gpu!"])
def test_a_device_that_is_not_here(complaint, tiny, device):
    assert device in complaint("predict", "--model", tiny, "--device", device, "--prompt", "x")


def test_a_number_format_that_does_not_go_with_the_device(complaint, tiny):
    line = complaint("predict", "--model", tiny, "--device", "cpu", "--dtype", "float16", "--prompt", "x")

    assert "float16" in line


def test_a_prompt_that_does_not_fit(complaint, tiny):
    line = complaint("predict", "--model", tiny, "--prompt", "word " * 40_000)

    assert "the context holds" in line


def test_a_prompt_that_is_no_text(complaint, tiny):
    assert "prompt" in complaint("predict", "--model", tiny, "--prompt", "caf\udce9")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be between 1"),
        (["--max-new-tokens", "1e9"], "--max-new-tokens must be a whole number"),
        (["--temperature", "-1"], "temperature must be between 0"),
        (["--temperature", "nan"], "temperature must be between 0"),
        (["--top-p", "1.5"], "top_p must be between"),
        (["--image-size", "-64"], "image_size must be a whole number between"),
        (["--image-size", "100"], "image_size must be a multiple of 64"),
        (["--num-beams", "3", "--temperature", "1"], "num_beams (3)"),
        (["--video", "x.gif"], "do not go together"),
        (["--frames", "0"], "frames must be between"),
        (["--stop", ""], "a stop string is empty"),
        (["--unknown-flag"], "unknown option"),
        (["--seed", "9" * 20], "seed must be a whole number between"),
        (["--model-base", "x"], "is no adapter"),
    ],
)
def test_options_that_cannot_be(complaint, tiny, photo, args, words):
    assert words in complaint("predict", "--model", tiny, "--image", photo, *args)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://example.com/cat.jpg", "not an http or https address"),
        ("file:///etc/passwd", "not an http or https address"),
        ("http://127.0.0.1:9/cat.jpg", "cannot connect"),
        ("http://", "names no host"),
        ("http://exa mple/cat.jpg", "spaces"),
    ],
)
def test_an_address_that_cannot_be_fetched(complaint, tiny, address, words):
    assert words in complaint("predict", "--model", tiny, "--image", address)


@pytest.mark.parametrize("video", ["missing.gif", "words.txt", "inside", "empty.png"])
def test_a_film_that_cannot_be_read(complaint, folder, tiny, video):
    complaint("predict", "--model", tiny, "--video", folder / video)


@pytest.mark.parametrize(
    "args",
    [
        ["models", "show", "nonesuch"],
        ["models", "pull", "nonesuch"],
        ["models", "pull", "0.5b"],
        ["models", "init", "9b", "--out", "x"],
        ["convert", "--model", "nonesuch", "--to", "hf", "--out", "x"],
        ["train", "--output", "x", "--data", "missing.json"],
        ["train", "--output", "x", "--steps", "0"],
        ["data", "synth", "--out", "x", "--assets", "nowhere"],
        ["data", "synth", "--out", "x", "--num", "0"],
        ["chat", "--model", "nonesuch"],
        ["eval", "--model", "nonesuch"],
        ["doctor", "--colour"],
    ],
)
def test_the_other_commands_complain_alike(complaint, monkeypatch, tmp_path, args):
    monkeypatch.chdir(tmp_path)

    complaint(*args)

    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_not_written(complaint, folder, tiny):
    complaint("convert", "--model", tiny, "--to", "hf", "--out", folder)
    complaint("models", "init", "nano", "--out", folder)

    assert (folder / "words.txt").read_text() == "words"


def test_where_nano_would_have_introduced_itself_the_complaint_is_the_only_line(complaint, folder):
    assert "damaged" in complaint("predict", "--image", folder / "cut.png")
