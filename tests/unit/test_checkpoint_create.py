"""Folders of random weights load, are reproducible, and never answer with unused rows."""

import json
from pathlib import Path

import pytest
import torch

from fastvlm import checkpoint
from fastvlm.config import PRESETS
from fastvlm.errors import CheckpointError

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load(GOLDENS / "apple_tiny").tokenizer


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return checkpoint.init_checkpoint("nano", 0, tmp_path_factory.mktemp("init") / "nano", tokenizer=tokenizer)


def test_a_random_folder_loads_and_is_the_preset(folder, tokenizer):
    loaded = checkpoint.load(folder)

    assert loaded.model.config.vision == PRESETS["nano"].vision
    assert loaded.model.config.language == PRESETS["nano"].language
    assert loaded.model.config.image_token_id == tokenizer.image_id
    assert loaded.model.language.norm.weight.dtype == torch.bfloat16


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(folder, tokenizer, tmp_path):
    again = checkpoint.init_checkpoint("nano", 0, tmp_path / "again", tokenizer=tokenizer)
    other = checkpoint.init_checkpoint("nano", 1, tmp_path / "other", tokenizer=tokenizer)

    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_rows_past_the_tokenizer_are_suppressed(folder):
    suppressed = json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]

    assert suppressed == list(range(489, 1024))


def test_an_unknown_preset_is_refused(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match=r"no preset '13b'; expected one of 0\.5b, 1\.5b, 7b, nano"):
        checkpoint.init_checkpoint("13b", 0, tmp_path / "out", tokenizer=tokenizer)
