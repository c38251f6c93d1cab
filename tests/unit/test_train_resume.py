"""Runs that go on: bit for bit the runs that they would have been, or refused; and what is never saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm import checkpoint
from fastvlm.checkpoint.load import assemble, load, load_encoder
from fastvlm.errors import InputError, TrainingError
from fastvlm.options import TrainOptions
from fastvlm.train.facts import describe, differences
from fastvlm.train.folder import RunFolder
from fastvlm.train.run import run
from shared.training import GOLDENS, options

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def training_form(tmp_path_factory):
    """A checkpoint whose encoder has branches and BatchNorm."""
    given = load(GOLDENS / "apple_tiny", dtype=torch.float32)
    encoder = load_encoder(GOLDENS / "training_form.safetensors", image_size=128, dtype=torch.float32)
    model = assemble(encoder, given.model.language, given.tokenizer, image_size=128, seed=0)
    return checkpoint.save(model, given.tokenizer, tmp_path_factory.mktemp("base") / "model")


def states(folder):
    """What resuming needs, as bytes; the order of tensors in a file is not fixed."""
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for path in RunFolder(folder).latest().state.iterdir()
        for name, tensor in load_file(path).items()
    }


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def halved(settings, folder, behind):
    """A run that is asked to end behind a step, and then goes on."""
    asked = iter([False] * behind + [True])
    run(settings(folder), wants_end=lambda: next(asked))
    assert RunFolder(folder).latest().facts["step"] == behind
    return run(settings(folder, resume=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"batch_norm": "learning"},
        {"optimizer": "muon"},
        {"learn_vision": "lora", "learn_language": "lora", "lora_dropout": 0.1, "lora_rank": 4},
        {"pack": True, "accumulate": 2, "batch_size": 4},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_c3_a_resumed_run_is_the_same_bit_for_bit_in_each_way_of_learning(training_form, rows, tmp_path, changes):
    def settings(folder, **more):
        given = {"model": str(training_form), "image_size": 128, "steps": 5, **changes, **more}
        return options(rows, folder, **given)

    whole = run(settings(tmp_path / "whole"))
    resumed = halved(settings, tmp_path / "half", behind=3)

    assert states(resumed) == states(whole)
    assert losses(resumed) == losses(whole)


@pytest.mark.slow
def test_c3_heads_and_momenta_of_a_nano_from_scratch_go_on_bit_for_bit(real_assets, tmp_path):
    def settings(folder, **more):
        given = {"model": "nano:fresh", "data": ("synth",), "assets": str(real_assets), "image_size": 128}
        return options("", folder, **given, dense=0.5, optimizer="muon", **more)

    whole = run(settings(tmp_path / "whole"))
    resumed = halved(settings, tmp_path / "half", behind=2)

    found = states(whole)
    assert any(name.startswith("weights.heads.") for name in found)
    assert any(name.endswith(".momentum") for name in found)
    assert states(resumed) == found
    assert losses(resumed) == losses(whole)


@pytest.fixture
def facts():
    given = load(GOLDENS / "hf_tiny")
    return describe(TrainOptions(output="o"), data="d", tokenizer=given.tokenizer, model=given.model)


def test_what_an_earlier_version_did_not_write_down_is_no_change(facts):
    options_before = {name: value for name, value in facts["options"].items() if name not in ("dense", "optimizer")}
    before = {"options": options_before, "data": "d", "frozen": facts["frozen"]}

    assert differences(Path("o"), before, facts) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "x"}, "another tokenizer"),
        ({"data": "x"}, "other data"),
        ({"frozen": "x"}, "other frozen weights"),
        ({"drawn": "x"}, "other fonts and emoji"),
        ({"options": {"dense": 0.25}}, "begun with dense 0.25, not 0.0"),
    ],
)
def test_c5_what_is_not_as_it_was_is_named(facts, change, words):
    (found,) = differences(Path("o"), facts | change, facts)

    assert words in found


def test_c5_another_tokenizer_is_refused(rows, tmp_path):
    base = checkpoint.save(*_parts(), tmp_path / "base")
    folder = run(options(rows, tmp_path / "run", model=str(base), steps=1))
    path = base / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 490, "content": "<other>"})
    path.write_text(json.dumps(content))

    with pytest.raises(InputError, match=r"was begun with another tokenizer than that of .*base"):
        run(options(rows, folder, model=str(base), steps=1, resume=True))


def _parts():
    given = load(GOLDENS / "hf_tiny")
    return given.model, given.tokenizer


def test_c1_a_kill_between_a_checkpoint_and_what_load_reads_is_mended_by_resuming(rows, tmp_path):
    folder = run(options(rows, tmp_path / "run", steps=2))
    saved = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()  # as if it had not been put there yet

    run(options(rows, folder, steps=2, resume=True))

    assert (folder / "model.safetensors").read_bytes() == saved


def test_c1_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(rows, tmp_path):
    folder = run(options(rows, tmp_path / "run", steps=4, save_steps=2))
    with (folder / "checkpoints" / "step-00000004" / "model.safetensors").open("ab") as file:
        file.write(b"more")
    asked = iter([False, True])  # behind step 3, before it comes to the damaged one

    run(options(rows, folder, steps=4, save_steps=2, keep=1, resume=True), wants_end=lambda: next(asked))

    assert RunFolder(folder).latest().facts["step"] == 3
    run(options(rows, folder, steps=4, save_steps=2, keep=1, resume=True))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    assert RunFolder(folder).latest().facts["step"] == 4


def test_c8_weights_that_are_not_finite_are_not_saved(rows, tmp_path):
    folder = tmp_path / "run"

    def poison(model, _):
        model.projector.fc1.weight.data.fill_(torch.nan)
        return {}

    with pytest.raises(TrainingError, match="weights behind step 2 are not finite numbers and are not saved"):
        run(options(rows, folder, save_steps=1, validate_every=1, steps=3), score=poison)

    assert RunFolder(folder).latest().facts["step"] == 1
    assert load_file(folder / "model.safetensors")["model.multi_modal_projector.linear_1.weight"].isfinite().all()


def test_c8_a_short_run_in_which_no_step_was_finite_is_no_success(rows, tmp_path):
    base = checkpoint.save(*_parts(), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "vision_tower" in name and weights[name].ndim == 4)
    save_file(
        weights | {name: torch.full_like(weights[name], 3e38)}, base / "model.safetensors", metadata={"format": "pt"}
    )

    with pytest.raises(TrainingError, match="not a finite number in any of the 2 steps; nothing was learned"):
        run(options(rows, tmp_path / "run", model=str(base), learn_vision="frozen", steps=2))

    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_c11_a_run_that_is_asked_to_end_is_saved_before_anything_is_measured(rows, tmp_path):
    measured = []
    asked = iter([False, False, True])

    folder = run(
        options(rows, tmp_path / "run", validate_every=3, steps=9),
        score=lambda *_: measured.append(1) or {},
        wants_end=lambda: next(asked),
    )

    assert (RunFolder(folder).latest().facts["step"], measured) == (2, [])


def test_a_run_by_the_clock_does_not_end_for_want_of_steps(rows, tmp_path):
    asked = iter([False] * 7 + [True])

    folder = run(options(rows, tmp_path / "run", minutes=1000.0, steps=3), wants_end=lambda: next(asked))

    assert RunFolder(folder).latest().facts["step"] == 7


def test_epochs_of_pictures_that_have_no_end_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"drawn pictures .* have no end; name --data of your own, or say --steps"):
        run(options("synth", tmp_path / "run", epochs=1.0))

    assert not (tmp_path / "run").exists()
