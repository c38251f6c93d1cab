"""Folders of random weights load, are reproducible, and never answer with unused rows."""

import json
from pathlib import Path

import pytest
import torch

import fastvlm
from fastvlm import GenerationOptions, checkpoint
from fastvlm.checkpoint.zoo import NANO_FOLDER
from fastvlm.config import PRESETS, table_rows
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


@pytest.mark.parametrize(("num_ids", "rows"), [(1, 64), (64, 64), (65, 128), (490, 512)])
def test_tables_have_a_multiple_of_64_rows(num_ids, rows):
    assert table_rows(num_ids) == rows


def test_the_packaged_tokenizer_is_nanos():

    assert checkpoint.packaged_tokenizer().origin == str(NANO_FOLDER / "tokenizer.json")


def test_an_unknown_preset_is_refused(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match=r"no preset '13b'; expected one of 0\.5b, 1\.5b, 7b, nano"):
        checkpoint.init_checkpoint("13b", 0, tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.slow
def test_random_weights_of_the_real_size_load_and_answer(tokenizer, tmp_path):
    folder = checkpoint.init_checkpoint("0.5b", 0, tmp_path / "0.5b", tokenizer=tokenizer)

    predictor = fastvlm.load(folder, device="cpu", dtype="bfloat16")
    answer = predictor.ask(
        "What is this?", images=[GOLDENS / "images" / "photo.jpg"], options=GenerationOptions(max_new_tokens=4)
    )

    assert 1.2e9 < (folder / "model.safetensors").stat().st_size < 1.3e9
    assert answer.image_tokens == 256
    assert answer.completion_tokens == 4 or answer.finish_reason == "stop"
    assert all(token_id < tokenizer.vocab_size for token_id in answer.token_ids)
