"""PEFT's file format for low-rank updates of transformers' `fast_vlm`: a folder with a configuration and a few tensors.

The names are those of transformers behind `base_model.model.`; an update of a module is its `lora_A.weight` and
`lora_B.weight`, and modules that learned in full stand under their own names (`modules_to_save`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastvlm.checkpoint.foreign import require
from fastvlm.checkpoint.huggingface import preprocessor_config, rename, to_huggingface
from fastvlm.checkpoint.reading import read_json
from fastvlm.checkpoint.save import Entry, write_json, write_tensors
from fastvlm.config import Config
from fastvlm.errors import CheckpointError
from fastvlm.model.fastvlm import FastVLM

CONFIG: Final = "adapter_config.json"
TENSORS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_PLAIN: Final = {  # settings of PEFT that change what is computed: read at these values only
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None,),
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What was learned beside the weights of a base model."""

    base: str
    """Folder or name of the base model."""
    rank: int
    alpha: float
    dropout: float
    updates: Mapping[str, Tensor]
    """By our names: `<module>.lora_A` `(rank, in)`, `.lora_B` `(out, rank)`; convolutions have two more axes of 1."""
    whole: Mapping[str, Tensor]
    """Tensors of parts that learned in full, by our names."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """Say which model an adapter belongs to, in the words of whoever made it.

    Raises:
        CheckpointError: The folder's configuration cannot be read, or does not say.
    """
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / CONFIG} names no base model; name it (--model-base)")
    return base


def write_adapter(place: Path, adapter: Adapter, model_config: Config) -> None:
    """Write an adapter into an empty folder, in float32, and how pictures are made for it."""
    write_json(place / "preprocessor_config.json", preprocessor_config(model_config))
    modules = {name.rpartition(".")[0] for name in adapter.updates}
    parts = {_part(name) for name in adapter.whole}
    config = {
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": sorted(parts) or None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": sorted(_module(name) for name in modules),
        "task_type": None,
    }
    write_json(place / CONFIG, config)
    tensors = {f"{_PREFIX}{to_huggingface(name)}": tensor for name, tensor in adapter.whole.items()}
    for name, tensor in adapter.updates.items():
        module, _, which = name.rpartition(".")
        tensors[f"{_PREFIX}{_module(module)}.{which}.weight"] = tensor
    write_tensors(place / TENSORS, {name: _entry(tensor) for name, tensor in tensors.items()})


def _module(name: str) -> str:
    return to_huggingface(f"{name}.weight").removesuffix(".weight")


def _part(name: str) -> str:
    return ".".join(to_huggingface(name).split(".")[:2]).removeprefix("model.")


def _entry(tensor: Tensor) -> Entry:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return Entry(tuple(tensor.shape), dtype, lambda: tensor.detach().to("cpu", dtype))


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that this package or PEFT wrote.

    Raises:
        CheckpointError: It is damaged, is of another kind than LoRA, or does something that is not computed here.
    """
    origin = str(folder / CONFIG)
    raw = read_json(folder / CONFIG)
    require(raw, origin, "peft_type", "LORA")
    for key, values in _PLAIN.items():
        if raw.get(key) not in values:
            raise CheckpointError(f"{origin}: {key} is {raw[key]!r:.80}, which is not supported")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{origin}: r is {rank!r:.40} and lora_alpha {alpha!r:.40}; expected numbers")
    updates, whole = _tensors(folder / TENSORS)
    return Adapter(
        base=str(raw.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=float(alpha),
        dropout=0.0,
        updates=updates,
        whole=whole,
    )


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read ({reason:.100}); is the adapter whole?") from error
    updates, whole = {}, {}
    for name, tensor in stored.items():
        plain = name.removeprefix(_PREFIX)
        module, _, which = plain.removesuffix(".weight").rpartition(".")
        is_update = which in ("lora_A", "lora_B")
        ours = rename(f"{module}.weight" if is_update else plain)
        if ours is None or not name.startswith(_PREFIX):
            raise CheckpointError(f"{path}: {name!r} belongs to no part of the model")
        if is_update:
            updates[f"{ours.removesuffix('.weight')}.{which}"] = tensor
        else:
            whole[ours] = tensor
    return updates, whole


@torch.no_grad()
def merge_adapter(model: FastVLM, folder: Path) -> None:
    """Add an adapter's updates to a model's weights, in place; computed in float32 and rounded once.

    Raises:
        CheckpointError: The adapter cannot be read, or belongs to another model.
    """
    adapter = read_adapter(folder)
    state: dict[str, Any] = model.state_dict()
    changed: dict[str, Tensor] = {}
    modules = {name.rpartition(".")[0] for name in adapter.updates}
    for module in sorted(modules):
        halves = [adapter.updates.get(f"{module}.{which}") for which in ("lora_A", "lora_B")]
        down, up = halves
        if down is None or up is None:
            raise CheckpointError(f"{folder / TENSORS}: {module!r} has one half of an update; is the adapter whole?")
        weight = state.get(f"{module}.weight")
        if weight is None or weight.shape[:2] != (up.shape[0], down.shape[1]) or down.shape[0] != up.shape[1]:
            raise _other_model(folder, module)
        update = adapter.alpha / adapter.rank * (up.float().flatten(1) @ down.float().flatten(1))
        changed[f"{module}.weight"] = (weight.float() + update.view_as(weight).to(weight.device)).to(weight.dtype)
    for name, tensor in adapter.whole.items():
        if name not in state or state[name].shape != tensor.shape:
            raise _other_model(folder, name)
        changed[name] = tensor.to(state[name])
    model.load_state_dict(state | changed, assign=True)


def _other_model(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{folder}: its {name!r} does not fit the base model; name the one it was trained on")
