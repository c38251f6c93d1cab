"""What resuming needs beside the weights: optimizer moments and counters, as safetensors and JSON."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastvlm.errors import CheckpointError
from fastvlm.model.fastvlm import FastVLM

TENSORS = "train_state.safetensors"
FACTS = "train_state.json"


def save_state(folder: Path, model: FastVLM, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Write the float32 weights, the optimizer's moments and `facts` beside a checkpoint's files."""
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    path = folder / TENSORS
    save_file(tensors, path.with_name(path.name + ".tmp"))
    os.replace(path.with_name(path.name + ".tmp"), path)
    (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def load_state(folder: Path, model: FastVLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights and moments back; return the facts.

    Raises:
        CheckpointError: The folder holds no state, or one of another model.
    """
    if not (folder / TENSORS).is_file() or not (folder / FACTS).is_file():
        raise CheckpointError(f"{folder}: no training state to resume from; expected {TENSORS} and {FACTS}")
    tensors = load_file(folder / TENSORS)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if missing := sorted(model.state_dict().keys() ^ weights.keys()):
        raise CheckpointError(f"{folder / TENSORS}: state of another model; {missing[0]!r} is on one side only")
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if moments:
            device = {key: "cpu" if key == "step" and not parameter.is_cuda else parameter.device for key in moments}
            optimizer.state[parameter] = {key: value.to(device[key]) for key, value in moments.items()}
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts
