"""Steps of training by the clock: `python -m fastvlm.train.timed FOLDER BATCH [...]`, a program for benchmarks.

It makes the step that `fastvlm train` makes, of a checkpoint folder and one batch that lies in a file, and prints one
JSON object. It is a process of its own, so that peak memory is that of training alone; under `torchrun` each process
takes its share of the batch's rows, and the first prints.
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
from fastvlm.device import (
    flush_denormals,
    keep_freed_memory,
    matrix_flops_per_second,
    peak_bytes_on,
    place,
    synchronize,
)
from fastvlm.options import Learning
from fastvlm.train.data import Batch
from fastvlm.train.learning import checkpoint_activations, choose_what_learns
from fastvlm.train.loop import Objective, Trainer
from fastvlm.train.optimizer import build_optimizer
from fastvlm.train.parallel import Group, local_placement, processes
from fastvlm.train.throughput import count_flops


def time_steps(folder: Path, batch: Path, how: argparse.Namespace, group: Group | None = None) -> dict[str, Any]:
    """Time `how.steps` steps behind one that is not counted.

    Args:
        folder: The checkpoint; its weights are taken in float32.
        batch: A file with `pixels` `(P, 3, H, W)` in uint8, `token_ids` and `labels` `(B, T)`.
        how: The program's flags: `steps`, `device`, `dtype`, `checkpoint_activations`, `compile`, and `learn`, which is
            `full` for all of the model, or `lora` for updates of rank 16 in the language model, and the projector.
        group: The processes that share the batch; None is this one alone.

    Returns:
        Seconds of each step, losses, the largest peak memory, the operations of a step, the device's speed at
        multiplying large matrices, and versions.
    """
    group = group or Group()
    placement = local_placement(place(how.device, how.dtype))
    checkpoint = load(folder, dtype=torch.float32, dequantise=True)
    model = checkpoint.model.to(placement.device)
    if not group.is_sharded:  # FSDP2 takes contiguous weights only
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
    num_rows, num_tokens = tensors["token_ids"].shape
    num_slots = int((tensors["token_ids"] == checkpoint.tokenizer.image_id).sum())
    flops = count_flops(
        model,
        num_pictures=num_slots / model.config.vision.num_image_tokens,
        num_rows=num_rows,
        num_tokens=num_tokens,
        sees_pixels=True,
    )
    share = {name: tensor.chunk(group.world)[group.rank] for name, tensor in tensors.items()}
    num_own = len(share["token_ids"])
    rows = Batch(
        pixels=share["pixels"],
        token_ids=share["token_ids"],
        labels=share["labels"],
        tasks=("",) * num_own,
        num_samples=num_own,
    )
    objective = Objective(model, recomputes=how.checkpoint_activations)
    group.prepare(objective, placement, learns_statistics=False)
    optimizer = build_optimizer(objective, lr=1e-5, weight_decay=0.0, betas=(0.9, 0.999))
    trainer = Trainer(
        objective,
        optimizer,
        placement,
        learns_vision=is_full,
        learns_statistics=False,
        compile_model=how.compile,
        group=group,
    )
    trainer.set_train_mode()
    seconds, processor_seconds, losses = [], [], []
    with flush_denormals(), keep_freed_memory(placement.device):
        for _ in range(how.steps + 1):
            start, begun = time.perf_counter(), time.process_time()
            result = trainer.train_step([rows], 1.0)
            parts = group.gather((float(result.sums.sum()), int(result.counts.sum())))
            losses.append(sum(loss for loss, _ in parts) / sum(count for _, count in parts))
            synchronize(placement.device)
            seconds.append(time.perf_counter() - start)
            processor_seconds.append(time.process_time() - begun)
    return {
        "seconds": seconds[1:],
        "processor_seconds": processor_seconds[1:],
        "losses": losses,
        "peak_bytes": max(group.gather(peak_bytes_on(placement.device))),
        "flops": flops,
        "matrix_flops_per_second": matrix_flops_per_second(placement, seconds=0.5),
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
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp")
    given = parser.parse_args()
    with processes(local_placement(place(given.device, given.dtype)), given.parallel, timeout=600) as group:
        result = time_steps(given.folder, given.batch, given, group)
    if group.is_first:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
