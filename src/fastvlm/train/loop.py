"""One step of training and the loop around it.

A step has pieces: batches whose gradients are added up, in this process and in the others of the run. What is learned
from a piece is said by an `Objective`, a module around the model; the loop knows no other loss.

Letters: `P` images, `H, W` pixels, `N` positions, `C` channels of vision, `B` rows, `T` tokens, `V` vocabulary.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.device import Placement
from fastvlm.errors import TrainingError
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.vision import FastViTHD
from fastvlm.prompt import IGNORE
from fastvlm.train.data import Batch
from fastvlm.train.folded import can_fold, encode_folded
from fastvlm.train.learning import gather_rows, set_train_mode, statistics
from fastvlm.train.optimizer import set_rates
from fastvlm.train.parallel import Group


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


def learned_losses(model: FastVLM, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compare what hidden states `(B, T, D)` predict with the labels `(B, T)` of the next position.

    Only what is learned gets logits: of a prompt and its pictures there would be many more, each as long as the
    vocabulary. The results are those of `row_losses`.
    """
    if torch.compiler.is_compiling():  # whose graphs have one size
        return row_losses(model.language.head(hidden), labels)
    targets = labels[:, 1:]
    is_learned = targets != IGNORE
    logits = model.language.head(hidden[:, :-1][is_learned])  # (learned, V)
    losses = F.cross_entropy(logits.float(), targets[is_learned], reduction="none")
    row = is_learned.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add(0, row, losses), is_learned.sum(1)


class Losses(NamedTuple):
    """What a piece of a step is to make smaller."""

    sums: Tensor
    """Cross-entropy of each row, summed over its learned tokens, `(B,)`; a step divides by the number of all its."""
    counts: Tensor
    """Learned tokens of each row, `(B,)`."""
    extra: Tensor | None = None
    """Another loss, one number: the mean over the piece; a step takes the mean over its pieces."""


class Objective(nn.Module):
    """The loss of the next token (arXiv 2304.08485, 4.2).

    Another objective is a subclass with a `forward` of its own, and with whatever modules learn beside the model. It
    gets every tensor of a batch by its field's name.
    """

    def __init__(
        self,
        model: FastVLM,
        encoder: FastViTHD | None = None,
        *,
        sees_always: bool = False,
        recomputes: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            model: What learns.
            encoder: A folded copy of a vision encoder that does not learn, which is faster than the original.
            sees_always: Show a blank picture where a batch has none, so that every process uses the same parameters.
            recomputes: Keep only the inputs of the encoder's blocks where its passes are folded.
        """
        super().__init__()
        self.model, self.sees_always = model, sees_always
        self.recomputes = recomputes
        self.is_folded = False  # set with the training mode, where folding is exact
        self._encoder = (encoder,)  # in a tuple, so that it is no part of what is trained, wrapped and saved

    @property
    def encoder(self) -> FastViTHD | None:
        """The folded copy, where there is one."""
        return self._encoder[0]

    def forward(self, tensors: Mapping[str, Tensor]) -> Losses:
        """Compute the losses of `token_ids` and `labels` `(B, T)`.

        The pictures are `features` `(P, N, C)`, or `pixels` `(P, 3, H, W)`, 0 to 1, that the encoder is to see;
        `segments` `(B, T)`, where it is there, says which of a row's conversations a token belongs to.
        """
        pixels, features = tensors["pixels"], tensors.get("features")
        if features is None and self.sees_always and not len(pixels):
            pixels = pixels.new_zeros(1, *pixels.shape[1:])
        if features is None and self.encoder is not None and len(pixels):
            features = self.encode(pixels)
        if features is None and len(pixels) and self.is_folded:
            features = encode_folded(self.model.vision, pixels, recomputes=self.recomputes)
        shown = pixels if features is None and len(pixels) else None
        hidden = self.model.read(tensors["token_ids"], shown, features=features, segments=tensors.get("segments"))
        return Losses(*learned_losses(self.model, hidden, tensors["labels"]))

    def encode(self, pixels: Tensor) -> Tensor:
        """Make features `(P, N, C)` of pixels `(P, 3, H, W)` with the encoder that does not learn."""
        encoder = self.encoder
        assert encoder is not None
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return encoder(pixels.to(next(encoder.parameters()).dtype))


def to_tensors(batch: Batch, placement: Placement) -> dict[str, Tensor]:
    """Move what a batch holds to where the model computes; pixels become numbers from 0 to 1."""
    tensors = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            tensors[item.name] = value.to(placement.device, non_blocking=True)
    pixels = tensors["pixels"].to(placement.dtype).div_(255)
    tensors["pixels"] = pixels.contiguous(memory_format=torch.channels_last)
    if "features" in tensors:
        tensors["features"] = tensors["features"].to(placement.dtype)
    return tensors


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a stretch of steps came to, in all processes."""

    step: int
    progress: float
    """How much of the run is done, 0 to 1."""
    samples: int
    loss: float
    task_losses: dict[str, float]
    grad_norm: float
    lr: float
    """The highest of the parts' learning rates at the last step."""
    samples_per_second: float
    tokens_per_second: float
    """Positions that are no padding, image embeddings included."""
    mfu: float | None
    """Share of the speed at which the device multiplies large matrices, by what the first step's samples need."""
    elapsed: float
    """Seconds that this process has trained."""
    remaining: float | None
    """Seconds that are left at this pace."""
    num_skipped: int
    """Steps of the run so far whose loss or gradient was not finite."""


class StepResult(NamedTuple):
    """What one step came to in this process; the numbers stay on the device."""

    sums: Tensor
    """Summed losses of the rows, `(B,)`."""
    counts: Tensor
    """Learned tokens of the rows, `(B,)`."""
    norm: Tensor
    """Length of the whole gradient before it was clipped."""
    is_skipped: bool


@dataclass(kw_only=True)
class _Window:
    """Sums since the last report; they stay on the device until it is due."""

    results: list[StepResult] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    seconds_out: float = 0.0
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop tells its caller and asks of it; it knows no clock, log or folder itself."""

    progress: Callable[["Trainer"], float]
    """How much of the run is done, 0 to 1: by steps or by the clock. That of the first process counts."""
    schedule: Callable[[float], float]
    """The learning rate's factor at a progress."""
    report: Callable[[Metrics], None]
    skipped: Callable[["Trainer"], None] = lambda _: None
    """A step was skipped because its loss or gradient was not finite."""
    after_step: Callable[["Trainer"], None] = lambda _: None
    """Called in every process: saves, validates, when it is time."""
    wants_end: Callable[[], bool] = lambda: False
    """Whether this process was asked to end; then all end behind the same step."""
    cost: Callable[[Batch], float] | None = None
    """Seconds that a sample takes at the device's full speed, told from the first piece."""


class Trainer:
    """An objective, its optimizer and the step between them."""

    def __init__(  # noqa: PLR0913  (what a step needs)
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        placement: Placement,
        *,
        clip: float = 1.0,
        max_skipped: int = 20,
        learns_vision: bool = True,
        learns_statistics: bool = True,
        compile_model: bool = False,
        group: Group | None = None,
        pad_id: int | None = None,
    ) -> None:
        """Take the pieces.

        Args:
            objective: The model and what it learns.
            optimizer: Of the objective's parameters, as `build_optimizer` makes it.
            placement: Where the objective is, and the format of the arithmetic.
            clip: Longest gradient.
            max_skipped: How many steps on end may be skipped.
            learns_vision: Whether the vision encoder learns.
            learns_statistics: Whether its BatchNorm statistics follow the data.
            compile_model: Compile the objective.
            group: The processes of the run; None is this one alone.
            pad_id: What stands behind a row's end and is not counted as a token.
        """
        self.objective, self.optimizer, self.placement = objective, optimizer, placement
        self.clip, self.max_skipped = clip, max_skipped
        self.learns_vision, self.learns_statistics = learns_vision, learns_statistics
        self.group = group or Group()
        self.step, self.samples, self.num_skipped, self.num_skipped_on_end = 0, 0, 0, 0
        self.pad_id, self.cost = pad_id, 0.0
        if self.group.world == 1 and placement.device.type == "cpu" and not compile_model:
            gather_rows(self.model)
        self.wrapped: nn.Module = self.group.wrap(objective, placement.device)
        if compile_model:
            self.wrapped = torch.compile(self.wrapped)  # type: ignore[assignment]

    @property
    def model(self) -> FastVLM:
        """What learns."""
        return self.objective.model

    def set_train_mode(self) -> None:
        """Put what learns into training mode; what does not stays in evaluation mode."""
        self.objective.train()
        set_train_mode(self.model, learns_vision=self.learns_vision, learns_statistics=self.learns_statistics)
        self.objective.is_folded = self.learns_vision and can_fold(self.model.vision)

    def train_step(self, pieces: Sequence[Batch], factor: float) -> StepResult:
        """Learn from a step's pieces at `factor` times the highest learning rates.

        The loss is the mean over the learned tokens of all pieces in all processes, however they are cut. A step whose
        loss or gradient is not finite changes nothing, not even BatchNorm's statistics; it is counted. Neither does one
        in which nothing is to be learned.

        Raises:
            TrainingError: Too many steps on end were skipped, or another process is gone.
        """
        # The forward pass moves BatchNorm's statistics before the gradient is known.
        moved = statistics(self.model)
        before = [buffer.clone() for buffer in moved]
        set_rates(self.optimizer, factor)
        num_tokens = self.group.sum(sum(int((piece.labels[:, 1:] != IGNORE).sum()) for piece in pieces))
        losses = [self._learn(piece, num_tokens, len(pieces), is_last=piece is pieces[-1]) for piece in pieces]
        norm = self.group.clip_gradient(self.objective, self.clip)
        is_finite = bool(torch.isfinite(norm))
        is_empty = not num_tokens and all(piece.extra is None for piece in losses)
        if is_finite and not is_empty:  # of an empty one, momentum and decay would move the weights all the same
            self.optimizer.step()
        else:
            for buffer, value in zip(moved, before, strict=True):
                buffer.copy_(value)
        self.num_skipped += not is_finite
        self.num_skipped_on_end = 0 if is_finite else self.num_skipped_on_end + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.samples += self.group.world * sum(piece.num_samples for piece in pieces)
        return StepResult(
            torch.cat([piece.sums.detach() for piece in losses]),
            torch.cat([piece.counts for piece in losses]),
            norm,
            not is_finite,
        )

    def _learn(self, piece: Batch, num_tokens: int, num_pieces: int, *, is_last: bool) -> Losses:
        """Add the gradient of one piece."""
        dtype, device = self.placement.dtype, self.placement.device
        with self.group.synchronised(self.wrapped, is_last=is_last):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses: Losses = self.wrapped(to_tensors(piece, self.placement))
            total = losses.sums.sum() / max(1, num_tokens)
            if losses.extra is not None:
                total = total + losses.extra / (num_pieces * self.group.world)
            # Processes' gradients are averaged; the loss is a sum over them.
            torch.autograd.backward(total * self.group.world)
        return losses

    def run(self, pieces: Iterable[Batch], hooks: Hooks, *, accumulate: int = 1, log_every: int = 20) -> bool:
        """Train until the pieces end, `progress` reaches 1 or a process is asked to end.

        Args:
            pieces: What to learn from, in order; those of a step follow one another.
            hooks: What the loop tells and asks.
            accumulate: Pieces of a step in this process.
            log_every: Steps between reports; the last step is reported too.

        Returns:
            Whether it was asked to end.

        Raises:
            TrainingError: As `train_step`.
        """
        self.set_train_mode()
        started = time.monotonic()
        begun_at: float | None = None
        window, factor = _Window(), 0.0

        def report() -> None:
            nonlocal window
            metrics = self._metrics(window, factor, time.monotonic() - started, begun_at or 0.0, hooks.progress(self))
            hooks.report(metrics)
            window = _Window()

        for step in _steps(pieces, accumulate):
            done, is_ending = self.group.agree(hooks.progress(self), ends=hooks.wants_end())
            if begun_at is None:
                begun_at = done
                self.cost = hooks.cost(step[0]) if hooks.cost is not None else 0.0
                window.started = time.monotonic()
            if is_ending or done >= 1:
                if window.results:
                    report()
                return is_ending
            factor = hooks.schedule(done)
            result = self.train_step(step, factor)
            window.results.append(result)
            window.tasks.extend(task for piece in step for task in piece.tasks)
            window.samples += sum(piece.num_samples for piece in step)
            window.tokens += sum(self._num_tokens(piece) for piece in step)
            if result.is_skipped:
                hooks.skipped(self)
                if self.num_skipped_on_end >= self.max_skipped:
                    raise TrainingError(
                        f"the loss or its gradient was not a finite number in {self.num_skipped_on_end} steps on end, "
                        f"up to step {self.step}; nothing was learned from them; lower --lr, or look at the data"
                    )
            if self.step % log_every == 0:
                report()
            outside = time.monotonic()
            hooks.after_step(self)
            window.seconds_out += time.monotonic() - outside
        if window.results:
            report()
        return False

    def _num_tokens(self, piece: Batch) -> int:
        if self.pad_id is None:
            return piece.token_ids.numel()
        return int((piece.token_ids != self.pad_id).sum())

    def _metrics(self, window: _Window, factor: float, elapsed: float, begun_at: float, done: float) -> Metrics:
        sums = torch.cat([result.sums for result in window.results]).tolist()
        counts = torch.cat([result.counts for result in window.results]).tolist()
        per_task: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for task, loss, count in zip(window.tasks, sums, counts, strict=True):
            per_task[task][0] += loss
            per_task[task][1] += count
        per_task = self.group.add_up(per_task)
        total, num_learned = (sum(pair[i] for pair in per_task.values()) for i in (0, 1))
        seconds = max(1e-9, time.monotonic() - window.started - window.seconds_out)
        samples_per_second = self.group.sum(window.samples) / seconds
        passed = done - begun_at
        return Metrics(
            step=self.step,
            progress=min(1.0, done),
            samples=self.samples,
            loss=total / max(1.0, num_learned),
            task_losses={task: loss / max(1.0, count) for task, (loss, count) in sorted(per_task.items())},
            grad_norm=float(torch.stack([result.norm for result in window.results]).mean()),
            lr=factor * max(group["peak_lr"] for group in self.optimizer.param_groups),
            samples_per_second=samples_per_second,
            tokens_per_second=self.group.sum(window.tokens) / seconds,
            mfu=samples_per_second * self.cost / self.group.world if self.cost else None,
            elapsed=elapsed,
            remaining=max(0.0, elapsed * (1 - done) / passed) if passed > 0 else None,
            num_skipped=self.num_skipped,
        )


def _steps(pieces: Iterable[Batch], accumulate: int) -> Iterator[list[Batch]]:
    """The pieces of each step; what does not make up a whole one is left."""
    step: list[Batch] = []
    for piece in pieces:
        step.append(piece)
        if len(step) == accumulate:
            yield step
            step = []
