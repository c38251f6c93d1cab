"""Whole runs on data of several kinds: packed, mixed, with features that are kept, with samples that cannot be used."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from fastvlm.errors import InputError, TrainingError
from fastvlm.train.run import run
from shared import training
from shared.training import GOLDENS, losses, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("square.png", "wide.png", "gray.png", "small.png")


def row(i, picture="yes"):
    marks, image = (
        ("<image>\n", NAMES[i % 4]) if picture == "yes" else ("<image>\n", picture) if picture else ("", None)
    )
    turns = [{"from": "human", "value": f"{marks}Question {i}?"}, {"from": "gpt", "value": f"Answer {'x' * i}."}]
    return {"image": image, "conversations": turns}


def options(data, output, **changes):
    return training.options(data, output, **{"batch_size": 4, "max_tokens": 192, **changes})


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_tools_that_are_not_read_are_said_once_before_a_run(tmp_path, caplog):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    tools = [None, [{"type": "function"}], [], [{"type": "function"}]]
    data = [write_rows(tmp_path / "data.json", [{"messages": turns, "tools": some} for some in tools])]

    with caplog.at_level("WARNING"):
        run(options(data, tmp_path / "run", steps=2, workers=1))

    said = [line for line in caplog.messages if "tools" in line]
    reason = "`tools` is not read, the answers are learned without it, in 2 of 4 samples that were looked at"
    assert said == [f"{data[0]} row 1: {reason}"]


@pytest.mark.slow
def test_a_packed_run_learns_what_an_unpacked_one_does(tmp_path):
    data = [write_rows(tmp_path / "data.json", [row(i, "yes" if i % 3 else None) for i in range(8)])]

    apart, packed = (run(options(data, tmp_path / str(pack), pack=pack)) for pack in (False, True))

    assert losses(packed) == pytest.approx(losses(apart), rel=1e-5)
    assert losses(packed)[-1] < losses(packed)[0]


@pytest.mark.slow
def test_a_run_with_kept_features_learns_what_one_without_does(tmp_path):
    data = [write_rows(tmp_path / "data.json", [row(i, "yes" if i % 3 else None) for i in range(8)])]
    frozen = {"learn_vision": "frozen"}
    kept = frozen | {"feature_cache": str(tmp_path / "kept")}

    plain = run(options(data, tmp_path / "plain", **frozen))
    first = run(options(data, tmp_path / "first", **kept))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")}
    second = run(options(data, tmp_path / "second", workers=1, **kept))

    assert len(files) == 4  # five samples show a picture, two of them the same one
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")} == files
    assert losses(first) == pytest.approx(losses(plain), rel=1e-6)
    assert losses(second) == pytest.approx(losses(plain), rel=1e-6)


def test_a_conversation_of_the_validation_that_cannot_be_read_is_left_out_and_named(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for name in NAMES:
        (tmp_path / "images" / name).write_bytes((GOLDENS / "images" / name).read_bytes())
    (tmp_path / "images" / "cut.png").write_bytes((GOLDENS / "images" / "photo.jpg").read_bytes()[:3000])
    data = [write_rows(tmp_path / "data.json", [row(i) for i in range(4)])]
    held = write_rows(tmp_path / "held.json", [row(0, "cut.png"), row(1), row(2)])
    settings = {"validation": (str(held),), "validate_every": 2, "image_folder": (str(tmp_path / "images"),)}

    with caplog.at_level("WARNING"):
        folder = run(options(data, tmp_path / "run", **settings))

    shown = [json.loads(line)["question"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert shown == ["Question 1?", "Question 2?"] * 2
    assert [line for line in caplog.messages if "cut.png" in line and "left out of the validation" in line] == [
        caplog.messages[0]
    ]


def test_features_of_an_encoder_that_learns_are_not_kept(tmp_path):
    data = [write_rows(tmp_path / "data.json", [row(1)])]

    with pytest.raises(InputError, match="--feature-cache keeps what a frozen encoder makes"):
        run(options(data, tmp_path / "run", feature_cache=str(tmp_path / "kept")))

    assert not (tmp_path / "kept").exists()


@pytest.mark.slow
def test_C6_a_run_leaves_bad_samples_out_whatever_reads_them_and_when(tmp_path):
    rows = [row(i, "nope.png" if i in (2, 9) else None) for i in range(20)]
    data, some = [write_rows(tmp_path / "data.json", rows)], {"max_bad_fraction": 0.1, "steps": 6, "save_steps": 2}
    whole = run(options(data, tmp_path / "whole", **some))

    helped = run(options(data, tmp_path / "helped", workers=1, **some))
    cut = tmp_path / "cut"
    asked = iter([False] * 3 + [True] * 9)
    run(options(data, cut, **some), wants_end=lambda: next(asked))
    assert len(losses(cut)) == 3
    run(options(data, cut, resume=True, **some))

    listed = (whole / "bad_samples.jsonl").read_text()
    assert [json.loads(line)["index"] for line in listed.splitlines()] in ([2, 9], [9, 2])
    for other in (helped, cut):
        assert (other / "bad_samples.jsonl").read_text() == listed
        assert losses(other) == losses(whole)
        assert all(torch.equal(weights(other)[name], value) for name, value in weights(whole).items())


def test_C6_too_many_bad_samples_are_said_before_anything_is_written(tmp_path):
    data = [write_rows(tmp_path / "data.json", [row(i, "nope.png" if i == 2 else None) for i in range(20)])]

    with pytest.raises(InputError, match=r"1 of 20 samples cannot be used, .* the first: .*row 2: there is no picture"):
        run(options(data, tmp_path / "run"))

    assert not (tmp_path / "run").exists()


def test_C6_a_picture_that_turns_out_to_be_damaged_ends_a_strict_run_with_its_name(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes((GOLDENS / "images" / "photo.jpg").read_bytes()[:3000])
    data = [write_rows(tmp_path / "data.json", [row(i, "a.png" if i == 2 else None) for i in range(20)])]

    with pytest.raises(InputError, match=r"the first: .*row 2: .*a\.png: the picture is damaged"):
        run(options(data, tmp_path / "run", steps=20, image_folder=(str(tmp_path / "images"),)))

    assert len((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_C7_a_run_whose_worker_is_killed_says_so_and_goes_on_from_its_checkpoint(tmp_path):
    data = [write_rows(tmp_path / "data.json", [row(i, None) for i in range(8)])]
    settings = {"steps": 6, "save_steps": 1, "workers": 1}

    def kill(metrics):
        if metrics.step == 3:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(1)

    with pytest.raises(TrainingError, match=r"reading data failed: DataLoader worker \(pid.*; .*--resume"):
        run(options(data, tmp_path / "run", **settings), follow=kill)

    whole = run(options(data, tmp_path / "whole", **settings))
    resumed = run(options(data, tmp_path / "run", resume=True, **settings))
    assert losses(resumed) == losses(whole)


@pytest.mark.slow
def test_C3_a_mixture_is_resumed_in_the_middle(tmp_path):
    data = [
        f"{write_rows(tmp_path / 'a.json', [row(i, None) for i in range(3)])}:0.25",
        f"{write_rows(tmp_path / 'b.json', [row(i) for i in range(5)])}:0.75",
    ]
    whole = run(options(data, tmp_path / "whole", steps=6))
    asked = iter([False] * 3 + [True] * 9)
    run(options(data, tmp_path / "cut", steps=6), wants_end=lambda: next(asked))

    resumed = run(options(data, tmp_path / "cut", steps=6, resume=True))

    assert losses(resumed) == losses(whole)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {task for line in lines for task in line["task_losses"]} == {"a", "b"}


def test_C5_data_that_changed_is_refused_on_resume(tmp_path):
    data = [write_rows(tmp_path / "data.json", [row(i, None) for i in range(8)])]
    run(options(data, tmp_path / "run", steps=1))
    write_rows(tmp_path / "data.json", [row(i + 1, None) for i in range(8)])

    with pytest.raises(InputError, match="was begun with other data"):
        run(options(data, tmp_path / "run", steps=1, resume=True))


def test_an_output_that_is_a_file_is_refused_and_stays(tmp_path):
    data = [write_rows(tmp_path / "data.json", [row(0, None)])]
    (tmp_path / "run").write_text("mine")

    with pytest.raises(InputError, match=r"run is not a folder; give another --output"):
        run(options(data, tmp_path / "run", steps=1))

    assert (tmp_path / "run").read_text() == "mine"
