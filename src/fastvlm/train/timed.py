"""Steps of training by the clock: `python -m fastvlm.train.timed FOLDER BATCH [...]`, a program for benchmarks.

It makes the step that `fastvlm train` makes, of a checkpoint folder and one batch that lies in a file, and prints one
JSON object. It is a process of its own, so that peak memory is that of training alone.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastvlm.checkpoint.load import load
from fastvlm.device import flush_denormals, peak_bytes_on, place, synchronize
from fastvlm.options import Learning
from fastvlm.train.data import Batch
from fastvlm.train.learning import checkpoint_activations, choose_what_learns
from fastvlm.train.loop import Objective, Trainer
from fastvlm.train.optimizer import build_optimizer


def time_steps(folder: Path, batch: Path, how: argparse.Namespace) -> dict[str, Any]:
    """Time `how.steps` steps behind one that is not counted.

    Args:
        folder: The checkpoint; its weights are taken in float32.
        batch: A file with `pixels` `(P, 3, H, W)` in uint8, `token_ids` and `labels` `(B, T)`.
        how: The program's flags: `steps`, `device`, `dtype`, `checkpoint_activations`, and `learn`, which is `full`
            for all of the model, or `lora` for updates of rank 16 in the language model, and the projector.

    Returns:
        Seconds of each step, losses, peak memory and versions.
    """
    placement = place(how.device, how.dtype)
    model = load(folder, dtype=torch.float32, dequantise=True).model.to(placement.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    is_full = how.learn == "full"
    modes: dict[str, Learning] = {
        "vision": "full" if is_full else "frozen",
        "projector": "full",
        "language": "full" if is_full else "lora",
    }
    choose_what_learns(model, modes, rank=16, alpha=32.0, dropout=0.0)
    if how.checkpoint_activations:
        checkpoint_activations(model, learns_vision=is_full)
    tensors = load_file(batch)
    rows = Batch(
        pixels=tensors["pixels"],
        token_ids=tensors["token_ids"],
        labels=tensors["labels"],
        tasks=("",) * len(tensors["token_ids"]),
        num_samples=len(tensors["token_ids"]),
    )
    optimizer = build_optimizer(model, lr=1e-5, weight_decay=0.0, betas=(0.9, 0.999))
    objective = Objective(model, recomputes=how.checkpoint_activations)
    trainer = Trainer(objective, optimizer, placement, learns_vision=is_full, learns_statistics=False)
    trainer.set_train_mode()
    seconds, processor_seconds, losses = [], [], []
    with flush_denormals():
        for _ in range(how.steps + 1):
            start, begun = time.perf_counter(), time.process_time()
            result = trainer.train_step([rows], 1.0)
            losses.append(float(result.sums.sum() / result.counts.sum()))
            synchronize(placement.device)
            seconds.append(time.perf_counter() - start)
            processor_seconds.append(time.process_time() - begun)
    return {
        "seconds": seconds[1:],
        "processor_seconds": processor_seconds[1:],
        "losses": losses,
        "peak_bytes": peak_bytes_on(placement.device),
        "versions": {name: version(name) for name in ("torch", "fastvlm")},
    }


def main() -> None:
    """Read the arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("batch", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--learn", choices=["full", "lora"], required=True)
    parser.add_argument("--checkpoint-activations", action="store_true")
    given = parser.parse_args()
    result = time_steps(given.folder, given.batch, given)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
