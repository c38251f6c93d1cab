"""`fastvlm bench`: programs in turns, a step of training by the clock, and a record of how it was measured."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvlm.benchmark.record import write_results
from fastvlm.benchmark.train import make_batch, run
from fastvlm.benchmark.turns import median, take_turns
from fastvlm.cli import main
from fastvlm.errors import InputError
from fastvlm.options import BenchTrainOptions
from fastvlm.prompt import IGNORE
from fastvlm.train.timed import time_steps

TINY = Path(__file__).parents[1] / "goldens" / "hf_tiny"
RIVAL = os.environ.get("FASTVLM_ORACLE_PYTHON")
SMALL = {"model": str(TINY), "image_size": 64, "batch_size": 2, "text_tokens": 16, "learned_tokens": 4, "steps": 1}


def program(code):
    return [sys.executable, "-I", "-S", "-c", code]


def test_programs_take_turns_and_each_round_turns_the_order_around():
    told = []
    programs = {name: program(f"print('noise'); print('{{\"seconds\": [{i}, 3]}}')") for i, name in enumerate("ab")}

    found = take_turns(programs, rounds=2, environment={}, report=lambda name, _: told.append(name))

    assert told == ["a", "b", "b", "a"]
    assert found["b"] == [{"seconds": [1, 3]}, {"seconds": [1, 3]}]
    assert median(found["b"], "seconds") == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (program("import sys; sys.exit('no such model')"), "ended with status 1: no such model"),
        (program("raise ValueError('7')"), "ended with status 1: ValueError: 7"),
        (program("import sys; sys.exit('ValueError: 7\\n====')"), "ended with status 1: ValueError: 7"),
        (program("print('hello')"), "it printed no result"),
        (program("print('[1]')"), "it printed no result"),
        (["/no/such/python"], "cannot be run"),
    ],
)
def test_a_program_that_fails_is_one_line(command, words):
    with pytest.raises(InputError, match=words):
        take_turns({"a": command}, rounds=1, environment={}, report=lambda *_: None)


@pytest.mark.parametrize(
    "command",
    [["latency"], ["throughput"], ["peers"], ["roofline"], ["paper", "--rival-python", sys.executable], ["train"]],
    ids=lambda command: command[0],
)
def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(command, tmp_path, capsys):
    (tmp_path / "file").touch()

    status = main(["bench", *command, "--output", str(tmp_path / "file" / "x.json")])

    assert status == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "cannot be written" in said[0]


def unwritten(monkeypatch):
    """Nothing is prepared: the models of random weights are not written."""
    for module in ("subject", "train"):
        monkeypatch.setattr(f"fastvlm.benchmark.{module}.init_checkpoint", lambda *_, **__: pytest.fail("too late"))


@pytest.mark.parametrize("command", ["paper", "peers", "train"])
@pytest.mark.parametrize("what", ["missing", "broken", "without modules"])
def test_a_rival_that_cannot_run_is_said_before_anything_is_measured(command, what, tmp_path, capsys, monkeypatch):
    unwritten(monkeypatch)
    python = tmp_path / "python"
    if what == "broken":
        python.write_text("#!/bin/sh\nexit 7\n")
    elif what == "without modules":
        python.write_text("#!/bin/sh\necho 'Traceback' >&2\necho 'No module named timm' >&2\nexit 1\n")
    if what != "missing":
        python.chmod(0o755)

    status = main(["bench", command, "--model", "0.5b", "--rival-python", str(python)])

    assert status == 2
    (said,) = capsys.readouterr().err.splitlines()
    expected = {
        "missing": "cannot be run: No such file",
        "broken": "status 7",
        "without modules": "No module named timm",
    }
    assert str(python) in said
    assert expected[what] in said


@pytest.mark.parametrize("command", [["latency", "--compile"], ["peers", "--route", "compile"]], ids=lambda c: c[0])
def test_a_missing_compiler_is_said_before_anything_is_measured(command, capsys, monkeypatch):
    unwritten(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")

    status = main(["bench", *command, "--model", "0.5b", "--device", "cpu"])

    assert status == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "no C++ compiler is here" in said


def test_a_batch_has_a_picture_in_each_row_and_learns_the_end_of_it():
    options = BenchTrainOptions(**SMALL)

    batch = make_batch(options, TINY)

    learned = batch["labels"] != IGNORE
    assert batch["pixels"].shape == (2, 3, 64, 64)
    assert batch["token_ids"].shape == (2, 16 + 1)
    assert learned.sum(1).tolist() == [4, 4]
    assert learned[:, -4:].all()
    with pytest.raises(InputError, match="multiple of 64"):
        make_batch(BenchTrainOptions(**SMALL | {"image_size": 100}), TINY)


@pytest.mark.parametrize("learn", ["full", "lora"])
def test_a_timed_step_learns(learn, tmp_path):
    save_file(make_batch(BenchTrainOptions(**SMALL), TINY), tmp_path / "batch.safetensors")
    recomputes = learn == "full"
    how = Namespace(
        steps=3, device="cpu", dtype="float32", learn=learn, checkpoint_activations=recomputes, compile=False
    )

    result = time_steps(TINY, tmp_path / "batch.safetensors", how)

    assert len(result["seconds"]) == 3
    assert len(result["losses"]) == 4
    assert result["losses"][-1] < result["losses"][0]


@pytest.mark.slow
def test_processes_that_share_the_batch_take_the_same_step(tmp_path):
    options = BenchTrainOptions(**SMALL, rounds=1, processes=2, threads=1)

    results = run(options, ours=[sys.executable, "-m", "fastvlm.train.timed"], command=["x"], report=lambda _: None)

    rows = results["results"]
    assert list(rows) == ["fastvlm", "fastvlm ddp x2", "fastvlm fsdp x2"]
    losses = torch.tensor([row["losses"] for row in rows.values()])
    assert losses.shape == (3, SMALL["steps"] + 1)
    torch.testing.assert_close(losses, losses[:1].expand_as(losses), rtol=1e-5, atol=0)
    alone, *shared = rows.values()
    assert 0 < alone["mfu"] < 1.5
    assert all(row["mfu"] == pytest.approx(alone["mfu"] * row["speedup"] / 2, rel=0.05) for row in shared)


@pytest.mark.slow
def test_the_command_measures_and_says_how_to_repeat_it(tmp_path, capsys, monkeypatch):
    out = tmp_path / "deep" / "train.json"
    args = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = ["bench", "train", *args, "--rounds", "1", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["fastvlm", *command])

    status = main(command)

    record = json.loads(out.read_text())
    assert status == 0, capsys.readouterr().err
    assert capsys.readouterr().out.startswith("fastvlm ")
    assert record["command"].startswith("fastvlm bench train --model=")
    assert {"commit", "machine", "load_average", "settings"} <= record.keys()
    assert record["results"]["fastvlm"]["seconds_a_step"] > 0
    assert "ratio" not in record


@pytest.mark.oracle
@pytest.mark.skipif(not RIVAL, reason="FASTVLM_ORACLE_PYTHON names no interpreter with transformers")
def test_transformers_takes_the_same_step():
    options = BenchTrainOptions(**SMALL, rounds=1, rival_python=RIVAL)

    results = run(options, ours=[sys.executable, "-m", "fastvlm.train.timed"], command=["x"], report=lambda _: None)

    assert results["ratio"] > 0
    losses = [row["first_loss"] for row in results["results"].values()]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)


def test_programs_that_do_not_compute_the_same_are_not_compared(tmp_path):
    result = {"seconds": [1], "processor_seconds": [1], "peak_bytes": 1, "versions": {}}
    result |= {"flops": 1, "matrix_flops_per_second": 1}
    other = tmp_path / "other"
    other.write_text(f"#!{sys.executable} -S\nprint({json.dumps(json.dumps(result | {'losses': [7.5]}))})\n")
    other.chmod(0o755)
    ours = program(f"print({json.dumps(json.dumps(result | {'losses': [7.6]}))})")
    options = BenchTrainOptions(**SMALL, rounds=1, rival_python=str(other))

    with pytest.raises(InputError, match="do not compute the same"):
        run(options, ours=ours, command=["x"], report=lambda _: None)


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 0},
        {"batch_size": 0},
        {"steps": 0},
        {"rounds": 0},
        {"threads": 0},
        {"text_tokens": 8, "learned_tokens": 5},
        {"learn": "lora", "rival_python": "python"},
        {"processes": 0},
        {"batch_size": 2, "processes": 4},
    ],
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(InputError):
        BenchTrainOptions(**values)


def test_results_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="cannot be written"):
        write_results(tmp_path / "file" / "train.json", {})
