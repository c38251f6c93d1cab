"""What is saved is whole, the same every time, and never in the way of what was there."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastvlm import checkpoint
from fastvlm.checkpoint.folder import check_target
from fastvlm.checkpoint.reading import DTYPES, INDEX, read_header
from fastvlm.errors import CheckpointError
from fastvlm.model import fold
from fastvlm.options import QuantizeOptions
from fastvlm.quantize.run import quantize

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def apple():
    return checkpoint.load(GOLDENS / "apple_tiny")


@pytest.fixture
def training_form(apple):
    """A model with branches, in float32."""
    encoder = checkpoint.load_encoder(GOLDENS / "training_form.safetensors", dtype=torch.float32)
    language = checkpoint.load(GOLDENS / "apple_tiny", dtype=torch.float32).model.language
    return checkpoint.assemble(encoder, language, apple.tokenizer, image_size=128, seed=0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_what_was_loaded_gives_the_same_bytes(apple, tmp_path):
    first = checkpoint.save(apple.model, apple.tokenizer, tmp_path / "first")
    loaded = checkpoint.load(first)

    second = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "second")

    assert contents(first) == contents(second)
    assert loaded.layout == "transformers"


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_config_and_tokenizer_come_back(fit, apple, tmp_path):
    config = apple.model.config.to_dict()
    config["vision"]["fit"] = fit
    apple.model.config = type(apple.model.config).from_dict(config)

    loaded = checkpoint.load(checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out"))

    assert loaded.model.config == apple.model.config
    assert loaded.tokenizer.image_id == apple.tokenizer.image_id
    assert loaded.tokenizer.encode_text("Straße <image>") == apple.tokenizer.encode_text("Straße <image>")


def test_the_clip_head_lies_in_a_file_of_its_own(apple, tmp_path):
    folder = checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out")

    assert torch.equal(load_file(folder / "clip_head.safetensors")["head.proj"], apple.model.vision.head.proj)
    assert not any("head.proj" in name for name in load_file(folder / "model.safetensors"))
    assert torch.equal(checkpoint.load(folder).model.vision.head.proj, apple.model.vision.head.proj)


def test_the_training_form_comes_back_as_it_was(training_form, apple, tmp_path):
    folder = checkpoint.save(training_form, apple.tokenizer, tmp_path / "out")

    loaded = checkpoint.load(folder).model

    assert not loaded.config.vision.is_reparameterised
    assert loaded.config == training_form.config
    assert json.loads((folder / "config.json").read_text())["vision_config"]["model_args"]["inference_mode"] is False
    for name, tensor in training_form.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weights_in_bfloat16_keep_batch_norm_in_float32(training_form, apple, tmp_path):
    folder = checkpoint.save(training_form, apple.tokenizer, tmp_path / "out", dtype=torch.bfloat16)

    loaded = checkpoint.load(folder).model

    for name, tensor in loaded.state_dict().items():
        is_norm = ".bn." in name or ".identity." in name
        if not name.endswith("num_batches_tracked"):
            assert tensor.dtype == (torch.float32 if is_norm else torch.bfloat16), name
    assert torch.isfinite(loaded.vision(torch.rand(1, 3, 64, 64).bfloat16())).all()


def test_a_reparameterised_model_can_be_saved_and_a_folded_one_cannot(training_form, apple, tmp_path):
    pixels = torch.rand(1, 3, 64, 64)
    fold.reparameterise(training_form)
    folder = checkpoint.save(training_form, apple.tokenizer, tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(checkpoint.load(folder).model.vision(pixels), training_form.vision(pixels))

    fold.for_inference(training_form)

    with pytest.raises(CheckpointError, match="save before folding"):
        checkpoint.save(training_form, apple.tokenizer, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_large_models_are_cut_into_shards_that_load_alike(apple, tmp_path):
    folder = checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out", max_shard_bytes=500_000)

    index = json.loads((folder / INDEX).read_text())
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards == sorted(set(index["weight_map"].values()))
    assert all((folder / name).stat().st_size < 600_000 for name in shards)
    loaded = checkpoint.load(folder).model.state_dict()
    for name, tensor in apple.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_the_safetensors_library_reads_our_files(apple, tmp_path):
    folder = checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out")

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        name = "model.language_model.norm.weight"
        assert torch.equal(file.get_tensor(name), apple.model.language.norm.weight)


def test_every_tensor_is_aligned_in_its_file(training_form, apple, tmp_path):
    folder = checkpoint.save(training_form, apple.tokenizer, tmp_path / "out", dtype=torch.bfloat16)

    for entry in read_header(folder / "model.safetensors").values():
        assert entry.start % DTYPES[entry.dtype].itemsize == 0


def test_the_placeholder_gets_a_row_when_the_table_ends_with_the_tokenizer(apple, tmp_path):
    table = apple.model.language.embed_tokens
    table.weight = torch.nn.Parameter(table.weight[:489].detach())
    config = apple.model.config.to_dict()
    config["language"]["vocab_size"] = 489
    apple.model.config = type(apple.model.config).from_dict(config)

    loaded = checkpoint.load(checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out"))

    assert loaded.model.config.language.vocab_size == 490
    assert torch.equal(loaded.model.language.embed_tokens.weight[:489], table.weight)
    assert not loaded.model.language.embed_tokens.weight[489].any()


def test_a_folder_that_is_not_empty_is_left_alone(apple, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")

    with pytest.raises(CheckpointError, match="is not empty"):
        checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out")

    assert contents(tmp_path / "out") == {"thesis.txt": b"years of work"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_used_and_another_replaced_when_allowed(apple, tmp_path):
    (tmp_path / "out").mkdir()

    checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("of the old one")
    checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out", overwrite=True)

    assert checkpoint.load(tmp_path / "out").layout == "transformers"
    assert not (tmp_path / "out" / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stranger", ["thesis.txt", "checkpoint-5/config.json", "results.json"])
@pytest.mark.parametrize("is_checkpoint", [True, False])
def test_what_is_no_checkpoint_alone_is_never_overwritten(stranger, is_checkpoint, apple, tmp_path):
    folder = tmp_path / "out"
    if is_checkpoint:
        checkpoint.save(apple.model, apple.tokenizer, folder)
    (folder / stranger).parent.mkdir(parents=True, exist_ok=True)
    (folder / stranger).write_text("years of work")
    before = sorted(folder.rglob("*"))

    with pytest.raises(CheckpointError, match=f"holds '{stranger.split('/')[0]}' and is no checkpoint alone"):
        checkpoint.save(apple.model, apple.tokenizer, folder, overwrite=True)

    assert (folder / stranger).read_text() == "years of work"
    assert sorted(folder.rglob("*")) == before


def test_a_folder_with_a_readme_alone_is_no_checkpoint(apple, tmp_path):
    (tmp_path / "README.md").write_text("a repository")

    with pytest.raises(CheckpointError, match=r"holds 'README\.md'"):
        checkpoint.save(apple.model, apple.tokenizer, tmp_path, overwrite=True)

    assert contents(tmp_path) == {"README.md": b"a repository"}


@pytest.mark.parametrize("target", [".", "..", "../here"])
def test_the_folder_that_one_stands_in_is_not_taken_away(target, apple, tmp_path, monkeypatch):
    checkpoint.save(apple.model, apple.tokenizer, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")

    with pytest.raises(CheckpointError, match="the folder you are in"):
        checkpoint.save(apple.model, apple.tokenizer, target, overwrite=True)

    assert checkpoint.load(tmp_path / "here").layout == "transformers"


def test_a_link_to_a_folder_stays_a_link(apple, tmp_path):
    checkpoint.save(apple.model, apple.tokenizer, tmp_path / "real")
    (tmp_path / "real" / "README.md").write_text("of the old one")
    (tmp_path / "link").symlink_to(tmp_path / "real")

    checkpoint.save(apple.model, apple.tokenizer, tmp_path / "link", overwrite=True)

    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "real" / "README.md").exists()
    assert checkpoint.load(tmp_path / "real").layout == "transformers"


@pytest.mark.parametrize("moment", [0, 1])
@pytest.mark.parametrize("is_done", [True, False])
def test_an_interrupt_while_folders_change_places_leaves_a_whole_one(moment, is_done, apple, tmp_path, monkeypatch):
    checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out")
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(source)
        is_now = len(calls) == moment + 1
        if is_done or not is_now:
            replace(source, target)
        if is_now:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out", overwrite=True)

    assert checkpoint.load(tmp_path / "out").layout == "transformers"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_value_that_float16_cannot_hold_is_refused(apple, tmp_path):
    apple.model.language.norm.weight.data[3] = 70_000

    with pytest.raises(CheckpointError, match=r"norm\.weight has values up to .*too large for float16; take bfloat16"):
        checkpoint.save(apple.model, apple.tokenizer, tmp_path / "half", dtype=torch.float16)
    checkpoint.save(apple.model, apple.tokenizer, tmp_path / "brain", dtype=torch.bfloat16)

    with pytest.raises(CheckpointError, match=r"norm\.weight' has values up to .*too large for float16"):
        checkpoint.load(tmp_path / "brain", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["brain"]


def test_a_save_that_fails_leaves_what_was_there(apple, tmp_path):
    checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out")
    before = contents(tmp_path / "out")
    apple.model.register_buffer("stray", torch.ones(3, dtype=torch.int8))

    with pytest.raises(CheckpointError, match="'stray' has dtype"):
        checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out", overwrite=True)
    del apple.model.stray
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out", extra={"no/such/folder": b""}, overwrite=True)

    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_named(apple, tmp_path):
    (tmp_path / "out").write_text("x")

    with pytest.raises(CheckpointError, match="is a file; name a folder"):
        checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out")


def test_the_folder_may_be_read_by_others_as_far_as_the_user_allows(apple, tmp_path):
    (tmp_path / "plain").mkdir()

    folder = checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out")

    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_more_files_go_along(apple, tmp_path):
    folder = checkpoint.save(apple.model, apple.tokenizer, tmp_path / "out", extra={"LICENSE_MODEL": b"research"})

    assert (folder / "LICENSE_MODEL").read_bytes() == b"research"
    assert checkpoint.load(folder).licences == {"LICENSE_MODEL": b"research"}


BAD_TARGETS = {
    "file": "is a file; name a folder",
    "full": "is not empty",
    "n" * 250: "cannot be written: File name too long",
}


@pytest.fixture(params=BAD_TARGETS, ids=["file", "full", "long"])
def bad_target(request, tmp_path):
    """A target that is refused, and what is said of it."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    return tmp_path / request.param, BAD_TARGETS[request.param]


def test_a_target_that_is_refused_is_said_before_tensors_are_looked_at(apple, bad_target):
    target, said = bad_target
    fold.for_inference(apple.model)  # which cannot be saved

    with pytest.raises(CheckpointError, match=said):
        checkpoint.save(apple.model, apple.tokenizer, target)


def test_a_target_that_is_refused_is_said_before_a_source_is_read(bad_target, tmp_path):
    target, said = bad_target

    with pytest.raises(CheckpointError, match=said):
        checkpoint.convert(tmp_path / "no-source", "hf", target)


def test_a_target_that_is_refused_is_said_before_weights_are_drawn(bad_target, tmp_path, monkeypatch):
    target, said = bad_target
    monkeypatch.setattr("fastvlm.checkpoint.create.NANO_FOLDER", tmp_path / "no-tokenizer")

    with pytest.raises(CheckpointError, match=said):
        checkpoint.init_checkpoint("nano", 0, target)


def test_a_target_that_is_refused_is_said_before_a_model_is_quantised(bad_target, tmp_path):
    target, said = bad_target
    (tmp_path / "no-model").mkdir()

    with pytest.raises(CheckpointError, match=said):
        quantize(QuantizeOptions(model=str(tmp_path / "no-model"), out=str(target)))


def test_looking_at_a_target_leaves_nothing(tmp_path):
    check_target(tmp_path / "a" / "b", overwrite=False)

    assert not list(tmp_path.iterdir())
