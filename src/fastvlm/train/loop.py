"""One step of training and the loop around it.

Letters: `P` images, `H, W` pixels, `B` rows, `T` tokens, `V` vocabulary.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm.device import Placement
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.vision import FastViTHD
from fastvlm.prompt import IGNORE
from fastvlm.train.data import Batch


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compare logits `(B, T, V)` with the labels `(B, T)` of the next position.

    Returns:
        The summed cross-entropy and the number of learned tokens of each row, both `(B,)`.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(targets.shape).sum(1), (targets != IGNORE).sum(1)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a stretch of steps came to."""

    step: int
    samples: int
    loss: float
    task_losses: dict[str, float]
    grad_norm: float
    lr: float
    samples_per_second: float
    elapsed: float
    num_skipped: int


@dataclass(kw_only=True)
class _Window:
    """Sums since the last report; they stay on the device until it is due."""

    sums: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


class Trainer:
    """A model, its optimizer and the step between them."""

    def __init__(  # noqa: PLR0913  (what a step needs)
        self,
        model: FastVLM,
        optimizer: torch.optim.Optimizer,
        placement: Placement,
        *,
        lr: float,
        clip: float = 1.0,
        compile_model: bool = False,
        encoder: FastViTHD | None = None,
    ) -> None:
        """Take the pieces; `encoder` is a folded copy of a frozen vision encoder, which is faster than the original."""
        self.model, self.optimizer, self.placement, self.encoder = model, optimizer, placement, encoder
        self.lr, self.clip = lr, clip
        self.step, self.samples, self.num_skipped = 0, 0, 0
        self._forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = self._losses
        if compile_model:
            self._forward = torch.compile(self._losses)

    def _losses(self, pixels: Tensor, token_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder is None:
            return row_losses(self.model(token_ids, pixels), labels)
        with torch.no_grad():
            features = self.encoder(pixels.to(next(self.encoder.parameters()).dtype))
        return row_losses(self.model(token_ids, features=features.to(self.placement.dtype)), labels)

    def train_step(self, batch: Batch, lr_factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """Learn from one batch; return summed losses and token counts of its rows, and the gradient's norm.

        A step whose gradient is not finite changes nothing; it is counted.
        """
        device = self.placement.device
        pixels = batch.pixels.to(device, non_blocking=True)
        pixels = pixels.to(self.placement.dtype).div_(255).contiguous(memory_format=torch.channels_last)
        token_ids = batch.token_ids.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        # The forward pass moves BatchNorm's statistics before the gradient is known.
        buffers = [buffer for buffer in self.model.buffers() if self.encoder is None]
        before = [buffer.clone() for buffer in buffers]
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        with torch.autocast(device.type, self.placement.dtype, enabled=self.placement.dtype != torch.float32):
            sums, counts = self._forward(pixels, token_ids, labels)
        torch.autograd.backward(sums.sum() / counts.sum().clamp(min=1))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
        else:
            self.num_skipped += 1
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.samples += len(batch.tasks)
        return sums.detach(), counts, norm

    def run(  # noqa: PLR0913  (the loop knows no clock, log or folder: they are handed to it)
        self,
        batches: Iterable[Batch],
        *,
        progress: Callable[["Trainer"], float],
        schedule: Callable[[float], float],
        log_every: int,
        report: Callable[[Metrics], None],
        checkpoint: Callable[["Trainer"], None],
    ) -> None:
        """Train until the batches end or `progress` reaches 1.

        Args:
            batches: What to learn from, in order.
            progress: How much of the run is done, 0 to 1; by steps or by the clock.
            schedule: The learning rate's factor at a progress.
            log_every: Steps between reports; the last step is reported too.
            report: Takes each report.
            checkpoint: Called after every step; saves when it is time.
        """
        self.model.train()
        if self.encoder is not None:
            self.model.vision.eval()
        started = time.monotonic()
        window, factor = _Window(), 0.0
        for batch in batches:
            done = progress(self)
            if done >= 1:
                break
            factor = schedule(done)
            sums, counts, norm = self.train_step(batch, factor)
            window.sums.append(sums)
            window.counts.append(counts)
            window.norms.append(norm)
            window.tasks.extend(batch.tasks)
            if self.step % log_every == 0:
                report(self._metrics(window, started, factor))
                window = _Window()
            checkpoint(self)
        if window.sums:
            report(self._metrics(window, started, factor))

    def _metrics(self, window: _Window, started: float, factor: float) -> Metrics:
        sums, counts = torch.cat(window.sums).cpu(), torch.cat(window.counts).cpu()
        per_task: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for task, loss, count in zip(window.tasks, sums.tolist(), counts.tolist(), strict=True):
            per_task[task][0] += loss
            per_task[task][1] += count
        now = time.monotonic()
        return Metrics(
            step=self.step,
            samples=self.samples,
            loss=float(sums.sum() / counts.sum().clamp(min=1)),
            task_losses={task: total / max(1.0, count) for task, (total, count) in sorted(per_task.items())},
            grad_norm=float(torch.stack(window.norms).mean()),
            lr=self.lr * factor,
            samples_per_second=len(window.tasks) / (now - window.started),
            elapsed=now - started,
            num_skipped=self.num_skipped,
        )
