"""The processes of a run: PyTorch's own engine under `torchrun`, or this process alone.

Each process reads its share of every step; gradients are averaged by DistributedDataParallel, or by FSDP2's
`fully_shard` (arXiv 2304.11277), with which each process keeps its share of weights and moments only.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastvlm.device import Placement
from fastvlm.errors import TrainingError

Result = TypeVar("Result")


def num_processes() -> int:
    """How many processes `torchrun` (or SLURM through it) says the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the one of the run that reports, before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def local_placement(placement: Placement) -> Placement:
    """Give each process of a machine a GPU of its own."""
    if not placement.is_cuda or num_processes() == 1:
        return placement
    device = torch.device(placement.device.type, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(device.index)
    return Placement(device=device, dtype=placement.dtype)


class Group:
    """This process among those of the run."""

    def __init__(self, kind: Literal["ddp", "fsdp"] = "ddp") -> None:
        """Look at the process group that there is; without one this process is alone."""
        is_on = dist.is_available() and dist.is_initialized()
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if is_on else (1, 0)
        self.kind = kind
        self._ddp: DistributedDataParallel | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether weights are spread over the processes."""
        return self.world > 1 and self.kind == "fsdp"

    def prepare(self, objective: nn.Module, placement: Placement, *, learns_statistics: bool) -> None:
        """Make an objective fit for several processes, in place, before its optimizer is built."""
        if self.world == 1:
            return
        if placement.is_cuda and learns_statistics:
            nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-untyped-call]
        if self.is_sharded:
            for layer in objective.model.language.layers:  # type: ignore[union-attr]
                fully_shard(layer)
            fully_shard(objective)

    def wrap(self, objective: nn.Module, device: torch.device) -> nn.Module:
        """Return what is called for the losses: the objective, or what averages its gradients."""
        if self.world == 1 or self.is_sharded:
            return objective
        devices = None if device.index is None else [device.index]
        with self._checked():
            self._ddp = DistributedDataParallel(objective, device_ids=devices, broadcast_buffers=False)
        return self._ddp

    @contextmanager
    def synchronised(self, wrapped: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Average gradients over the processes with the last piece of a step, once for all its pieces."""
        waits: AbstractContextManager[Any] = nullcontext()
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(is_last)
        elif self._ddp is not None and not is_last:
            waits = self._ddp.no_sync()
        with self._checked(), waits:
            yield

    def clip_gradient(self, module: nn.Module, longest: float) -> Tensor:
        """Shorten the whole gradient to `longest`; return what its length was, the same in every process."""
        with self._checked():
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), longest)
            return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def sum(self, number: int) -> int:
        """Add up a number over the processes."""
        return number if self.world == 1 else sum(self.gather(number))

    def agree(self, progress: float, *, ends: bool) -> tuple[float, bool]:
        """Take the progress of the first process, and end all where one is to end."""
        if self.world == 1:
            return progress, ends
        answers = self.gather((progress, ends))
        return answers[0][0], any(ends for _, ends in answers)

    def add_up(self, sums: Mapping[str, list[float]]) -> dict[str, list[float]]:
        """Add up lists of numbers by their keys over the processes."""
        total: dict[str, list[float]] = {}
        for part in self.gather(dict(sums)):
            for key, numbers in part.items():
                total[key] = [a + b for a, b in zip(total.get(key, [0.0] * len(numbers)), numbers, strict=True)]
        return total

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self._checked():
            dist.all_gather_object(values, value)
        return values

    def first(self, act: Callable[[], Result]) -> Result:
        """Let the first process act and give its result, or its error, to all."""
        if self.world == 1:
            return act()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                answer[0] = act()
            except Exception as caught:  # noqa: BLE001  (raised below, in every process)
                error = caught
                answer[1] = caught
        with self._checked():
            dist.broadcast_object_list(answer)
        if error is not None:
            raise error
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the numbers of the first, in place."""
        if self.world > 1:
            with self._checked():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        """Collect all weights and buffers on the CPU of the first process; others get nothing. All must call it."""
        if not self.is_sharded:
            return dict(module.state_dict()) if self.is_first else {}
        with self._checked():
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return dict(get_model_state_dict(module, options=options))  # type: ignore[arg-type]

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Say in one line that another process is gone."""
        if self.world == 1:
            yield
            return
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            is_lost = isinstance(error, dist.DistError) or any(word in reason for word in _LOST)
            if not is_lost:
                raise
            raise TrainingError(
                f"process {self.rank} of {self.world}: another process of the run has ended or does not answer "
                f"({reason:.160}); --resume goes on from the last checkpoint"
            ) from error


_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Timed out", "Broken pipe")


@contextmanager
def processes(placement: Placement, kind: Literal["ddp", "fsdp"], timeout: float) -> Iterator[Group]:
    """Join the processes that `torchrun` started, for the length of the block.

    Raises:
        TrainingError: They do not find each other.
    """
    if num_processes() == 1 or dist.is_initialized():
        yield Group(kind)
        return
    backend = f"cpu:gloo,{placement.device.type}:nccl" if placement.is_cuda else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TrainingError(f"the processes of the run do not find each other ({reason:.160}); use torchrun") from error
    try:
        yield Group(kind)
        dist.barrier()
    finally:
        # gloo's threads need Python's lock to let go of their last tensors, and whoever frees the group holds it while
        # waiting for them: they are given the time to be done before.
        time.sleep(0.1)
        dist.destroy_process_group()
