"""`fastvlm train --config`: a stage, a file and flags make one run, which says what it is and keeps it beside it."""

import json
from pathlib import Path

import pytest

from fastvlm.checkpoint.load import load
from fastvlm.cli import main

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.slow
def test_a_stage_of_a_file_is_trained_for_its_epoch_and_leaves_a_checkpoint_and_its_options(tmp_path, capsys):
    rows = [
        {"image": name, "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]}
        for name in ("square.png", "photo.jpg", "gray.png")
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "run.toml").write_text(
        f'stage = 1\ndata = "{tmp_path}/data.json"\nimage_folder = "{GOLDENS}/images"\n'
        f'model = "{GOLDENS}/hf_tiny"\nimage_size = 64\nworkers = 0\n'
        'device = "cpu"\ndtype = "float32"\nbatch_size = 64\n'
    )
    out = tmp_path / "out"

    status = main(["train", "--config", str(tmp_path / "run.toml"), "--batch-size", "2", "--output", str(out)])

    said = capsys.readouterr()
    options = json.loads((out / "options.json").read_text())
    assert status == 0, said.err
    assert said.out.strip() == str(out)
    assert "# stage 1: the projector alone" in said.err
    assert "lr = 0.001  # paper" in said.err
    assert (options["stage"], options["batch_size"], options["steps"]) == ("1", 2, 2)
    before, after = load(GOLDENS / "hf_tiny").model.state_dict(), load(out).model.state_dict()
    moved = {
        name.partition(".")[0] for name, tensor in after.items() if not tensor.equal(before[name].to(tensor.dtype))
    }
    assert moved == {"projector"}
