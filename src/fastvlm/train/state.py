"""What resuming needs, in one file that is there whole or not at all: weights, optimizer moments, and facts."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvlm.errors import CheckpointError
from fastvlm.model.fastvlm import FastVLM

TENSORS = "train_state.safetensors"
_FACTS = "fastvlm"  # the key of the file's metadata under which the facts are, as JSON
_KINDS = {"step": int, "samples": int, "num_skipped": int, "seconds": float, "options": dict}


def save_state(folder: Path, model: FastVLM, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Write the float32 weights, the optimizer's moments and `facts` beside a checkpoint's files."""
    tensors = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    path = folder / TENSORS
    save_file(tensors, path.with_name(path.name + ".tmp"), metadata={_FACTS: json.dumps(facts)})
    os.replace(path.with_name(path.name + ".tmp"), path)


def load_state(folder: Path, model: FastVLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights and moments back; return the facts.

    Raises:
        CheckpointError: The folder holds no state, a damaged one, or one of another model.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise CheckpointError(f"{folder}: no training state to resume from; expected {TENSORS}")
    tensors, facts = _read(path)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if missing := sorted(model.state_dict().keys() ^ weights.keys()):
        raise CheckpointError(f"{path}: state of another model; {missing[0]!r} is on one side only")
    for name, tensor in model.state_dict().items():
        if weights[name].shape != tensor.shape:
            shapes = f"{name!r} is {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: state of another model; {shapes}")
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if moments:
            device = {key: "cpu" if key == "step" and not parameter.is_cuda else parameter.device for key in moments}
            optimizer.state[parameter] = {key: value.to(device[key]) for key, value in moments.items()}
    return facts


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_FACTS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: the training state is damaged ({reason:.100}); begin another run") from error
    if not isinstance(facts, dict) or any(not isinstance(facts.get(key), kind) for key, kind in _KINDS.items()):
        raise CheckpointError(f"{path}: the training state is damaged, its facts are not {', '.join(_KINDS)}")
    return tensors, facts
