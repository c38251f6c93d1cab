"""Runs of two real processes (gloo, on the CPU), started by torchrun as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastvlm.train.folder import RunFolder

GOLDENS = Path(__file__).parents[1] / "goldens"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]
NAMES = ("square.png", "photo.jpg", "gray.png", "wide.png")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Conversations of unequal length, with pictures and without."""
    conversations = []
    for i in range(8):
        question = {"from": "human", "value": f"Question {i}?" if i % 3 == 2 else f"<image>\nQuestion {i}?"}
        turns = [question, {"from": "gpt", "value": "A cat. " * (1 + i % 3)}]
        conversations.append({"conversations": turns} | ({} if i % 3 == 2 else {"image": NAMES[i % 4]}))
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps(conversations))
    return file


def command(rows, folder, *flags, processes):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    settings = {
        "output": folder, "data": rows, "image-folder": GOLDENS / "images", "model": GOLDENS / "hf_tiny",
        "image-size": 64, "steps": 20, "batch-size": 4, "lr": 1e-5, "workers": 0, "device": "cpu",
        "dtype": "float32", "log-every": 1, "batch-norm": "frozen",
    }  # fmt: skip
    args = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [sys.executable, *launcher, "-m", "fastvlm", "train", *args, *map(str, flags)]


def start(rows, folder, *flags, processes, **pipes):
    return subprocess.Popen(
        command(rows, folder, *flags, processes=processes),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **pipes,
    )


def train(rows, folder, *flags, processes):
    process = start(rows, folder, *flags, processes=processes)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out == f"{folder}\n"
    return folder


def logged(folder, key):
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory):
    return train(rows, tmp_path_factory.mktemp("alone") / "run", processes=1)


def test_gradient_accumulation_is_one_batch(rows, alone, tmp_path):
    folder = train(rows, tmp_path / "run", "--accumulate", 2, processes=1)

    assert len(logged(folder, "loss")) == 20
    assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(rows, alone, tmp_path, kind):
    folder = train(rows, tmp_path / "run", "--parallel", kind, processes=2)

    assert len(logged(folder, "loss")) == 20
    assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-5)
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():  # stored in bfloat16
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-4, msg=name)


def states(folder):
    """The pieces of each tensor as bytes; which process writes what all have is not fixed."""
    pieces = defaultdict(list)
    for path in sorted(RunFolder(folder).latest().state.iterdir()):
        for name, tensor in load_file(path).items():
            pieces[name].append(tensor.numpy().tobytes())
    return dict(pieces)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_c3_two_processes_resume_bit_for_bit(rows, tmp_path, kind):
    flags = ["--parallel", kind, "--steps", 6, "--lr", 1e-3, "--save-steps", 3, "--keep", 9]
    whole = train(rows, tmp_path / "whole", *flags, processes=2)
    half = train(rows, tmp_path / "half", *flags, processes=2)
    lose_after(half, 3)

    train(rows, half, *flags, "--resume", processes=2)

    assert states(half) == states(whole)
    assert logged(half, "loss") == logged(whole, "loss")


def lose_after(folder, step):
    """Take a run back to one of its checkpoints, as if it had been killed behind it."""
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            path.rename(folder.parent / f"{folder.name}-{path.name}")


def test_c4_a_state_of_two_processes_is_gone_on_from_by_one(rows, alone, tmp_path):
    flags = ["--save-steps", 10, "--keep", 9]
    folder = train(rows, tmp_path / "run", "--parallel", "fsdp", *flags, processes=2)
    assert len(list(RunFolder(folder).latest().state.iterdir())) == 2
    lose_after(folder, 10)

    train(rows, folder, *flags, "--resume", processes=1)

    assert len(list(RunFolder(folder).latest().state.iterdir())) == 1
    assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-5)


def test_c4_low_rank_updates_of_three_processes_are_gone_on_from_by_two(rows, tmp_path):
    flags = ["--learn-vision", "frozen", "--learn-language", "lora", "--lora-rank", 5, "--batch-size", 6, "--lr", 1e-3]
    flags += ["--steps", 6, "--save-steps", 3, "--keep", 9, "--validation", rows, "--validate-every", 3]
    alone = train(rows, tmp_path / "alone", *flags, processes=1)
    folder = train(rows, tmp_path / "run", "--parallel", "fsdp", *flags, processes=3)
    assert len(list(RunFolder(folder).latest().state.iterdir())) == 3
    lose_after(folder, 3)

    train(rows, folder, "--parallel", "fsdp", *flags, "--resume", processes=2)

    assert len(list(RunFolder(folder).latest().state.iterdir())) == 2
    ours, theirs = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in (folder, alone)
    )
    for key in ("loss", "validation_loss"):
        found = [row[key] for row in ours if key in row]
        assert found == pytest.approx([row[key] for row in theirs if key in row], rel=1e-5), key
        assert len(found) == (6 if key == "loss" else 2)
    assert (
        load_file(folder / "adapter_model.safetensors").keys() == load_file(alone / "adapter_model.safetensors").keys()
    )


def test_c11_sigterm_saves_what_two_processes_have_learned(rows, tmp_path):
    folder = tmp_path / "run"
    process = start(rows, folder, "--steps", 100_000, processes=2)
    wait_for((folder / "metrics.jsonl").is_file, process)

    process.send_signal(signal.SIGTERM)  # to torchrun, which passes it on
    _, err = process.communicate(timeout=120)

    assert process.returncode != 0
    assert RunFolder(folder).latest().facts["step"] == logged(folder, "step")[-1], err[-2000:]


def test_c4_another_batch_is_refused(rows, tmp_path):
    process = start(rows, tmp_path / "run", "--batch-size", 3, processes=2)
    _, err = process.communicate(timeout=300)

    assert process.returncode != 0
    assert "batch_size (3) must be a multiple of accumulate (1) times the number of processes (2)" in err


def wait_for(condition, process, seconds=240):
    ends = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < ends
        time.sleep(0.05)


def ranks_of(launcher):
    """The processes that torchrun started, by rank."""
    found = {}
    for place in Path("/proc").iterdir():
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1]) if place.name.isdigit() else 0
            if parent == launcher:
                variables = (place / "environ").read_bytes().split(b"\0")
                rank = next(int(word[5:]) for word in variables if word.startswith(b"RANK="))
                found[rank] = int(place.name)
        except (OSError, StopIteration):
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes where Linux lists them")
def test_c10_a_dead_process_ends_the_others_and_the_checkpoint_stays(rows, tmp_path):
    folder = tmp_path / "run"
    flags = ["--steps", 100_000, "--save-steps", 2, "--timeout", 60]
    process = start(rows, folder, *flags, processes=2)
    wait_for(lambda: list(folder.glob("checkpoints/step-*")), process)

    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)

    assert process.returncode != 0
    assert "another process of the run has ended" in err or "SIGKILL" in err or "exitcode  : -9" in err
    assert RunFolder(folder).latest().facts["step"] >= 2
