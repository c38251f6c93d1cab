"""From one layout to another and back gives the same tensors; licences come along."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastvlm import checkpoint
from fastvlm.checkpoint.build import shapes_only
from fastvlm.checkpoint.save import tensor_entries, write_folder
from fastvlm.config import Config, LanguageConfig, ProjectorConfig, VisionConfig
from fastvlm.errors import CheckpointError
from fastvlm.model.fastvlm import FastVLM

GOLDENS = Path(__file__).parents[1] / "goldens"


def test_converting_to_our_layout_is_loading_and_saving(tmp_path):
    loaded = checkpoint.load(GOLDENS / "apple_tiny")
    saved = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "saved")

    converted = checkpoint.convert(GOLDENS / "apple_tiny", "hf", tmp_path / "converted")

    names = {path.name for path in converted.iterdir()}
    assert names == {path.name for path in saved.iterdir()} | {"CHANGES.md"}
    for path in saved.iterdir():
        assert (converted / path.name).read_bytes() == path.read_bytes()


def test_licences_go_along_with_a_note_of_the_changes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in (GOLDENS / "apple_tiny").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "LICENSE_MODEL").write_text("research only")
    (source / "ACKNOWLEDGEMENTS").write_text("thanks")

    once = checkpoint.convert(source, "hf", tmp_path / "once", dtype=torch.float32)
    twice = checkpoint.convert(once, "hf", tmp_path / "twice")

    for folder in (once, twice):
        assert (folder / "LICENSE_MODEL").read_text() == "research only"
        assert (folder / "ACKNOWLEDGEMENTS").read_text() == "thanks"
    assert "Weights converted to float32" in (twice / "CHANGES.md").read_text()
    assert (twice / "CHANGES.md").read_text().count("# Changes made") == 2


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("out", ["source", "source/inside", "link"])
def test_a_folder_is_not_converted_into_itself(out, overwrite, tmp_path):
    source = checkpoint.convert(GOLDENS / "apple_tiny", "hf", tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}

    with pytest.raises(CheckpointError, match="which is read; name another folder"):
        checkpoint.convert(source, "hf", tmp_path / out, dtype=torch.bfloat16, overwrite=overwrite)

    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize(("to", "reader"), [("apple", "Apple's code and app"), ("mlx", "mlx-vlm")])
def test_a_geometry_that_the_others_do_not_know_is_refused_in_one_line(to, reader, tmp_path):
    with pytest.raises(CheckpointError) as error:
        checkpoint.convert(GOLDENS / "apple_tiny", to, tmp_path / "out")

    assert f"{reader} can read only the encoder of depths (2, 12, 24, 4, 2)" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no layout 'gguf'; expected one of hf, apple, mlx"):
        checkpoint.convert(GOLDENS / "apple_tiny", "gguf", tmp_path / "out")


def numbered(entry, start):
    """Numbers that differ from place to place and from tensor to tensor, all exact in bfloat16."""
    count = torch.Size(entry.shape).numel()
    return lambda: ((torch.arange(count) + start) % 251).view(entry.shape).to(entry.dtype)


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """The real encoder's geometry beside a small language model; each weight tells its place."""
    language = LanguageConfig(
        dim=64, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=64, vocab_size=500, tied=True, max_positions=512
    )
    vision = VisionConfig(clip_dim=768, image_size=512)
    config = Config(vision=vision, projector=ProjectorConfig(out_dim=64), language=language, image_token_id=489)
    entries = tensor_entries(shapes_only(lambda: FastVLM(config)), torch.bfloat16)
    entries = {name: replace(entry, make=numbered(entry, i)) for i, (name, entry) in enumerate(entries.items())}
    folder = tmp_path_factory.mktemp("standard")
    write_folder(folder, entries, config, checkpoint.load(GOLDENS / "apple_tiny").tokenizer)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("to", ["apple", "mlx"])
def test_there_and_back_gives_the_same_tensors(to, standard, tmp_path):
    there = checkpoint.convert(standard, to, tmp_path / "there")
    back = checkpoint.load(there)

    original = checkpoint.load(standard)
    assert back.layout == to
    assert back.model.config == original.model.config
    state = back.model.state_dict()
    for name, tensor in original.model.state_dict().items():
        if to == "apple" or not name.endswith("num_batches_tracked"):
            assert torch.equal(state[name], tensor), name
    assert back.tokenizer.encode_text("a picture") == original.tokenizer.encode_text("a picture")


@pytest.mark.slow
@pytest.mark.parametrize(("to", "column"), [("apple", 0), ("mlx", 3)])
def test_names_and_shapes_are_those_that_the_others_expect(to, column, standard, tmp_path):
    folder = checkpoint.convert(standard, to, tmp_path / "out")

    rows = [line.split("\t") for line in (GOLDENS / "fastvithd_keys.tsv").read_text().splitlines()[1:]]
    shapes = {row[column]: json.loads(row[column + 1]) for row in rows if row[column] != "None"}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        found = {name: file.get_slice(name).get_shape() for name in shapes}
        kind = file.metadata()["format"]
    assert found == shapes
    assert {name for name in names if "vision_tower" in name} == shapes.keys()
    assert ("lm_head.weight" in names) == (to == "apple")
    assert kind == ("mlx" if to == "mlx" else "pt")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava_qwen2"
    assert config["mm_vision_tower"] == "mobileclip_l_512"
    assert config["image_aspect_ratio"] == "pad"
