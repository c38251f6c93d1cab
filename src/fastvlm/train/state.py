"""What resuming needs, in one folder: a safetensors file for each process and the facts that the manifest has.

The files are written and read by PyTorch's distributed checkpointing, which knows which share of a tensor lies where:
what so many processes wrote, any other number can read. There is no pickle among them.

What does not change while learning is not stored again: frozen weights are those of the model that the run began with,
and a digest of them is compared.
"""

import base64
import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fastvlm.device import random_state, set_random_state
from fastvlm.errors import CheckpointError
from fastvlm.train.data import lost_worker
from fastvlm.train.learning import statistics
from fastvlm.train.parallel import Group

STATE: Final = "state"
"""The folder's name, inside that of a checkpoint."""


def learned_tensors(objective: nn.Module) -> dict[str, Tensor]:
    """Name the parameters that learn and the statistics that move; the tensors are those of the module, not copies."""
    moving = {id(buffer) for buffer in statistics(objective)}
    named = dict(objective.named_parameters())
    learned = {name: parameter.detach() for name, parameter in named.items() if parameter.requires_grad}
    return learned | {name: buffer for name, buffer in objective.named_buffers() if id(buffer) in moving}


def frozen_digest(objective: nn.Module) -> str:
    """Digest the weights and buffers that do not change while learning."""
    learned = learned_tensors(objective)
    digest = hashlib.sha256()
    for name, tensor in sorted(objective.state_dict().items()):
        if name not in learned:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_state(place: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Write what was learned and the optimizer's moments into a folder; every process of the run calls it.

    Raises:
        CheckpointError: It cannot be written.
    """
    tensors = {f"weights.{name}": tensor for name, tensor in learned_tensors(objective).items()}
    for name, parameter in objective.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this process is alone
            writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
            save(stored, storage_writer=writer, no_dist=group.world == 1)
    except (OSError, CheckpointException) as error:
        if (lost := lost_worker(_cause(error))) is not None:  # it died while this was written
            raise lost from error
        raise CheckpointError(f"{place} cannot be written: {_reason(error)}") from error


def load_state(place: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Put weights, statistics and moments back, whatever number of processes wrote them; every process calls it.

    Raises:
        CheckpointError: The state is damaged, or that of another model.
    """
    weights = learned_tensors(objective)
    named = dict(objective.named_parameters())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = HuggingFaceStorageReader(str(place))
            stored = reader.read_metadata().state_dict_metadata
            sizes = {name: tuple(item.size) for name, item in stored.items()}  # type: ignore[union-attr]
            _compare(place, sizes, {f"weights.{name}": tuple(tensor.shape) for name, tensor in weights.items()})
            moments = {name: _room_for(place, name, size, named) for name, size in sizes.items() if _is_moment(name)}
            tensors = {f"weights.{name}": tensor for name, tensor in weights.items()} | moments
            load(tensors, storage_reader=reader, no_dist=group.world == 1)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{place}: the training state is damaged ({_reason(error)}); begin another run"
        ) from error
    for name, moment in moments.items():
        parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
        optimizer.state[named[parameter]][key] = moment


def _is_moment(name: str) -> bool:
    return name.startswith("optimizer.")


def _compare(place: Path, stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    weights = {name for name in stored if not _is_moment(name)}
    if strange := sorted(weights ^ wanted.keys()):
        raise CheckpointError(f"{place}: state of another model; {strange[0]!r} is on one side only")
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise CheckpointError(f"{place}: state of another model; {name!r} is {stored[name]}, expected {shape}")


def _room_for(place: Path, name: str, size: tuple[int, ...], named: Mapping[str, nn.Parameter]) -> Tensor:
    """An empty moment: of its parameter's shape, spread over processes as that is, or a counter."""
    parameter = named.get(name.removeprefix("optimizer.").rpartition(".")[0])
    if parameter is None or size not in ((), tuple(parameter.shape)):
        raise CheckpointError(f"{place}: state of another model; {name!r} {size} belongs to none of its parameters")
    if size:
        return torch.zeros_like(parameter.detach())
    return torch.zeros((), device=parameter.device if parameter.is_cuda else "cpu")


def _cause(error: BaseException) -> BaseException:
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error  # of the first process that failed


def _reason(error: BaseException) -> str:
    error = _cause(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:160] or type(error).__name__


def random_facts(device: torch.device, group: Group) -> list[list[str]]:
    """Say for each process where its random numbers stand, as text."""
    own = [base64.b64encode(state.numpy().tobytes()).decode() for state in random_state(device)]
    return group.gather(own)


def restore_random(device: torch.device, facts: Iterable[Iterable[str]], group: Group) -> None:
    """Go on with the random numbers of this process; one that was not there before keeps its own."""
    of_each = list(facts)
    if group.rank < len(of_each):
        states = [
            torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in of_each[group.rank]
        ]
        set_random_state(device, states)


def facts_of(value: Any) -> dict[str, Any]:
    """Return the facts of a manifest if they are what `run` wrote.

    Raises:
        ValueError: They are not.
    """
    kinds = {"step": int, "samples": int, "num_skipped": int, "seconds": float, "options": dict, "random": list}
    facts = value if isinstance(value, dict) else {}
    for key, kind in kinds.items():
        if not isinstance(facts.get(key), kind):
            raise ValueError(f"{key} is no {kind.__name__}")  # noqa: TRY004  (it is a file that is wrong)
    return facts
