"""The example that fine-tunes nano: from nearly nothing to nearly everything on pictures that it did not learn."""

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_to_learn_and_pictures_to_ask_about_differ(finetune, tmp_path):
    files = [
        finetune.write_data(tmp_path / name, num=12, seed=seed) for name, seed in [("a", 1), ("b", 2), ("again", 1)]
    ]

    drawn = [[(file.parent / f"{i}.png").read_bytes() for i in range(12)] for file in files]
    answers = {row["conversations"][1]["value"] for row in json.loads(files[0].read_text())}
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])
    assert len(answers) > 4


@pytest.mark.slow
def test_nano_learns_signs_that_it_did_not_know(finetune, tmp_path, capsys):
    before, after = finetune.main(tmp_path / "run", num_train=160, num_test=40, steps=60)

    assert before < 0.1
    assert after > 0.9
    assert "after: " in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
