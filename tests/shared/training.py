"""Small runs of training, which several tests begin: what they are told, and what they learn from."""

import json
from pathlib import Path

from fastvlm.options import TrainOptions

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = ("square.png", "photo.jpg", "gray.png", "wide.png")


def conversation(i):
    """A row as LLaVA writes it, about one of four pictures."""
    turns = [{"from": "human", "value": f"<image>\nQuestion {i}?"}, {"from": "gpt", "value": f"Answer {i}."}]
    return {"image": NAMES[i % 4], "conversations": turns}


def write_rows(file, rows):
    file.write_text(json.dumps(rows))
    return file


def settings(data, output, /, **changes):
    """Four steps of two million weights, in one process; `data` is a file, or several in a list."""
    return {
        "output": str(output),
        "data": tuple(map(str, data)) if isinstance(data, list) else (str(data),),
        "image_folder": (str(GOLDENS / "images"),),
        "model": str(GOLDENS / "hf_tiny"),
        "image_size": 64,
        "steps": 4,
        "batch_size": 2,
        "lr": 1e-3,
        "workers": 0,
        "device": "cpu",
        "dtype": "float32",
        "log_every": 1,
        **changes,
    }


def options(data, output, /, **changes):
    return TrainOptions(**settings(data, output, **changes))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
